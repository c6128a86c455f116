#pragma once

#if !defined(__unix__) && !defined(__APPLE__)
#error "lora/detail/atomic_file.h needs POSIX (openat, renameat, fsync)"
#endif

#include <fcntl.h>
#include <lora/detail/error.h>
#include <lora/version.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <string>
#include <string_view>
#include <system_error>

LORA_NAMESPACE_BEGIN
namespace detail {

/// Writes a file so that its name stands for the old content or for the whole new one, never for anything between.
///
/// The bytes go to a temporary file in the same folder; `commit` brings them to the disk and renames. Without `commit`
/// (an exception, a full disk) the temporary file is removed and the old file is as it was. A symbolic link of that
/// name is replaced, not followed. Every failure is a FormatError that names the path and the system's reason.
class AtomicFile {
 public:
  explicit AtomicFile(const std::string& path) : path_(path) {
    const size_t slash = path.rfind('/');
    name_ = slash == std::string::npos ? path : path.substr(slash + 1);
    if (name_.empty()) throw FormatError(path, {"cannot be written: it names no file"});
    const std::string folder = slash == std::string::npos ? "." : path.substr(0, slash + 1);
    // An open folder makes the later steps immune to its renaming, and shows what is wrong with it before any work.
    folder_ = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (folder_ < 0) fail("cannot open the folder");
    do {
      static std::atomic<unsigned> count{0};
      temporary_ = ".lora-" + std::to_string(::getpid()) + "-" + std::to_string(count++) + ".tmp";
      file_ = ::openat(folder_, temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    } while (file_ < 0 && errno == EEXIST);
    if (file_ < 0) {
      const int reason = errno;
      temporary_.clear();
      close_all();
      errno = reason;
      fail("cannot make a temporary file in its folder");
    }
  }

  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  ~AtomicFile() { close_all(); }

  const std::string& path() const noexcept { return path_; }

  void write(const void* data, size_t size) {
    constexpr size_t kLargest = size_t{1} << 30;  // Linux writes no more than 2 GiB at once
    const char* next = static_cast<const char*>(data);
    while (size > 0) {
      const ssize_t written = ::write(file_, next, size < kLargest ? size : kLargest);
      if (written < 0 && errno == EINTR) continue;
      if (written < 0) fail("cannot be written");
      next += written;
      size -= static_cast<size_t>(written);
    }
  }
  void write(std::string_view text) { write(text.data(), text.size()); }

  /// Brings every byte to the disk, still under the temporary name: the last step that a full disk can stop. Several
  /// files that belong together are all synced before the first is committed.
  void sync() {
    if (::fsync(file_) != 0) fail("cannot be written to the disk");
  }

  /// Replaces the file of that name; call it once, last.
  void commit() {
    sync();
    const int closed = ::close(file_);
    file_ = -1;
    if (closed != 0) fail("cannot be closed");
    if (::renameat(folder_, temporary_.c_str(), folder_, name_.c_str()) != 0) fail("cannot be replaced");
    temporary_.clear();
    // Some file systems have no fsync of folders and say EINVAL; their renames are as durable as they get.
    if (::fsync(folder_) != 0 && errno != EINVAL) fail("is written, but its folder cannot be brought to the disk");
  }

 private:
  [[noreturn]] void fail(const char* what) const {
    throw FormatError(path_, {std::string(what) + ": " + std::generic_category().message(errno)});
  }

  void close_all() noexcept {
    if (file_ >= 0) ::close(file_);
    if (!temporary_.empty()) ::unlinkat(folder_, temporary_.c_str(), 0);
    if (folder_ >= 0) ::close(folder_);
    file_ = folder_ = -1;
    temporary_.clear();
  }

  std::string path_;
  std::string name_;
  std::string temporary_;  // empty: there is none
  int folder_ = -1;
  int file_ = -1;
};

}  // namespace detail
LORA_NAMESPACE_END
