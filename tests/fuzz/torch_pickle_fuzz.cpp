// libFuzzer: any bytes as a file of torch.save, and as the pickle in one that is whole otherwise (where the first byte
// is odd). Every tensor that is read can be read to its end.

#include <ATen/core/Tensor.h>
#include <lora/detail/error.h>
#include <lora/io/torch_pickle.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>

#include "harness/torch_archive.h"

namespace {

/// A file in memory that has a path.
class MemoryFile {
 public:
  explicit MemoryFile(const std::string& content) : descriptor_(::memfd_create("fuzz", MFD_CLOEXEC)) {
    if (descriptor_ < 0) std::abort();
    if (::write(descriptor_, content.data(), content.size()) != static_cast<ssize_t>(content.size())) std::abort();
  }
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;
  ~MemoryFile() { ::close(descriptor_); }

  std::string path() const { return "/proc/self/fd/" + std::to_string(descriptor_); }

 private:
  int descriptor_;
};

/// Reads the first and the last byte of every tensor's memory: a sanitizer sees those beyond a storage.
void touch(const at::Tensor& tensor) {
  if (tensor.numel() == 0) return;
  const auto* first = static_cast<const char*>(tensor.const_data_ptr());
  auto last = static_cast<int64_t>(tensor.element_size()) - 1;
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    last += (tensor.size(i) - 1) * tensor.stride(i) * static_cast<int64_t>(tensor.element_size());
  }
  const volatile char sum = static_cast<char>(first[0] + first[last]);
  (void)sum;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string rest(reinterpret_cast<const char*>(data) + 1, size - 1);
  const bool is_pickle = data[0] % 2 != 0;
  const MemoryFile file(is_pickle ? torch_archive({{"data.pkl", rest}, {"data/0", std::string(24, '\0')}}) : rest);
  try {
    for (const auto& [name, tensor] : lora::load_torch_pickle(file.path())) touch(tensor);
  } catch (const lora::FormatError& error) {
    if (error.problems().empty()) std::abort();
  }
  return 0;
}
