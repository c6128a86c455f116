#pragma once

#if !defined(__unix__) && !defined(__APPLE__)
#error "lora/detail/atomic_file.h needs POSIX (openat, renameat, fsync)"
#endif

#include <dirent.h>
#include <fcntl.h>
#include <lora/detail/error.h>
#include <lora/version.h>
#include <sys/file.h>
#include <sys/stat.h>
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
/// (an exception, a full disk) the temporary file is removed and the old file is as it was; that of a killed program is
/// removed by the next writer in the folder. A symbolic link of that name is replaced, not followed. What the system
/// refuses is a SystemError that names the path and the reason.
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
    struct stat old {};
    if (::fstatat(folder_, name_.c_str(), &old, AT_SYMLINK_NOFOLLOW) == 0 && S_ISDIR(old.st_mode)) {
      stop("cannot be replaced", EISDIR);
    }
    remove_abandoned();
    do {
      make_temporary();
    } while (file_ >= 0 && !hold());
    if (file_ < 0) {
      temporary_.clear();
      stop("cannot make a temporary file in its folder", errno);
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

  /// Brings every byte to the disk, still under the temporary name: the last step that a full disk or a removed folder
  /// can stop. Several files that belong together are all synced before the first is committed.
  void sync() {
    if (::fsync(file_) != 0) fail("cannot be written to the disk");
    struct stat status {};
    if (::fstat(file_, &status) == 0 && status.st_nlink == 0) {
      errno = ENOENT;
      fail("cannot be replaced, its temporary file was removed");
    }
  }

  /// Replaces the file of that name; call it once, last.
  void commit() {
    sync();
    // Open, and so held, until it has its name. After fsync closing has nothing left to report.
    if (::renameat(folder_, temporary_.c_str(), folder_, name_.c_str()) != 0) fail("cannot be replaced");
    temporary_.clear();
    // Some file systems have no fsync of folders and say EINVAL; their renames are as durable as they get.
    if (::fsync(folder_) != 0 && errno != EINVAL) fail("is written, but its folder cannot be brought to the disk");
  }

 private:
  /// Opens a temporary file of a new name; a negative file_ where that cannot be.
  void make_temporary() {
    if (file_ >= 0) ::close(file_);
    do {
      static std::atomic<unsigned> count{0};
      temporary_ = kPrefix + std::to_string(::getpid()) + "-" + std::to_string(count++) + kSuffix;
      file_ = ::openat(folder_, temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    } while (file_ < 0 && errno == EEXIST);
  }

  /// Locks the temporary file, which shows that its writer lives; false where another writer took it for abandoned just
  /// before. A file system without locks keeps what killed programs leave.
  bool hold() const {
    if (::flock(file_, LOCK_EX | LOCK_NB) != 0) return errno != EWOULDBLOCK;
    struct stat status {};
    return ::fstat(file_, &status) != 0 || status.st_nlink > 0;
  }

  /// Removes the folder's temporary files that no living writer holds.
  void remove_abandoned() const {
    const int list = ::openat(folder_, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (list < 0) return;
    DIR* const entries = ::fdopendir(list);
    if (entries == nullptr) {
      ::close(list);
      return;
    }
    const std::string_view prefix = kPrefix, suffix = kSuffix;
    while (const auto* const entry = ::readdir(entries)) {
      const std::string_view name = entry->d_name;
      if (name.size() < prefix.size() + suffix.size() || name.substr(0, prefix.size()) != prefix ||
          name.substr(name.size() - suffix.size()) != suffix) {
        continue;
      }
      const int file = ::openat(folder_, entry->d_name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
      if (file < 0) continue;
      if (::flock(file, LOCK_EX | LOCK_NB) == 0) ::unlinkat(folder_, entry->d_name, 0);
      ::close(file);
    }
    ::closedir(entries);
  }

  /// For the constructor, after which no destructor runs.
  [[noreturn]] void stop(const char* what, int reason) {
    close_all();
    errno = reason;
    fail(what);
  }

  [[noreturn]] void fail(const char* what) const { throw SystemError(path_, what, {errno, std::generic_category()}); }

  void close_all() noexcept {
    if (file_ >= 0) ::close(file_);
    if (!temporary_.empty()) ::unlinkat(folder_, temporary_.c_str(), 0);
    if (folder_ >= 0) ::close(folder_);
    file_ = folder_ = -1;
    temporary_.clear();
  }

  static constexpr const char* kPrefix = ".lora-";
  static constexpr const char* kSuffix = ".tmp";

  std::string path_;
  std::string name_;
  std::string temporary_;  // empty: there is none
  int folder_ = -1;
  int file_ = -1;
};

}  // namespace detail
LORA_NAMESPACE_END
