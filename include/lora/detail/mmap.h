#pragma once

#if !defined(__unix__) && !defined(__APPLE__)
#error "lora/detail/mmap.h needs POSIX (mmap)"
#endif

#include <fcntl.h>
#include <lora/detail/error.h>
#include <lora/version.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <memory>
#include <string>
#include <system_error>

LORA_NAMESPACE_BEGIN
namespace detail {

/// A whole file in memory, copy-on-write: pages are read when they are touched, and writing to them never reaches the
/// file. A file that is replaced by another (rename) stays readable as it was; one that is shortened in place does not.
class MappedFile {
 public:
  /// Throws SystemError where `path` is missing or unreadable, FormatError where it is no regular file.
  static std::shared_ptr<MappedFile> open(const std::string& path) {
    // O_NONBLOCK: opening a pipe must not wait for its writer.
    const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (descriptor < 0) fail(path, "cannot be opened");
    struct stat status {};
    if (::fstat(descriptor, &status) != 0) fail(path, "cannot be examined", descriptor);
    if (!S_ISREG(status.st_mode)) {
      ::close(descriptor);
      throw FormatError(path, {"is no regular file"});
    }
    const auto size = static_cast<size_t>(status.st_size);
    void* data = nullptr;
    if (size > 0) {  // mmap refuses an empty range
      data = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE, descriptor, 0);
      if (data == MAP_FAILED) fail(path, "cannot be mapped", descriptor);
    }
    ::close(descriptor);
    return std::shared_ptr<MappedFile>(new MappedFile(data, size));
  }

  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile() {
    if (data_ != nullptr) ::munmap(data_, size_);
  }

  std::byte* data() const noexcept { return static_cast<std::byte*>(data_); }
  size_t size() const noexcept { return size_; }

 private:
  MappedFile(void* data, size_t size) : data_(data), size_(size) {}

  [[noreturn]] static void fail(const std::string& path, const char* what, int descriptor = -1) {
    const std::error_code reason(errno, std::generic_category());
    if (descriptor >= 0) ::close(descriptor);
    throw SystemError(path, what, reason);
  }

  void* data_;
  size_t size_;
};

}  // namespace detail
LORA_NAMESPACE_END
