// libFuzzer: any bytes as a safetensors file. What the header is believed to say has to be true of the file.

#include <lora/detail/error.h>
#include <lora/detail/safetensors_header.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    const auto header = lora::detail::read_safetensors_header("input", reinterpret_cast<const std::byte*>(data), size);
    size_t position = 0;
    for (const auto& entry : header.entries) {
      size_t bytes = c10::elementSize(entry.dtype);
      for (const auto extent : entry.shape) bytes *= static_cast<size_t>(extent);
      if (entry.begin != position || entry.end - entry.begin != bytes) std::abort();
      position = entry.end;
    }
    if (header.data_begin + position != size) std::abort();
  } catch (const lora::FormatError& error) {
    if (error.problems().empty()) std::abort();
  }
  return 0;
}
