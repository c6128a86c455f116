#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <lora/version.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <string_view>

LORA_NAMESPACE_BEGIN
namespace detail {

/// A 64-bit hash of a sequence of texts and tensors. It finds every change within 8 bytes; it is no protection against
/// a forger.
class ContentHash {
 public:
  void add(std::string_view text) { add(text.data(), text.size()); }

  /// Dtype, shape and bytes, of any device and stride.
  void add(const at::Tensor& tensor) {
    const auto sizes = tensor.sizes();
    add(c10::toString(tensor.scalar_type()));
    add(sizes.data(), sizes.size() * sizeof(int64_t));
    const auto data = tensor.detach().to(at::kCPU).contiguous();
    add(data.numel() == 0 ? nullptr : data.const_data_ptr(), data.nbytes());
  }

  /// 16 hexadecimal digits.
  std::string text() const {
    char digits[17];
    std::snprintf(digits, sizeof digits, "%016llx", static_cast<unsigned long long>(hash_));
    return digits;
  }

 private:
  void add(const void* data, size_t size) {
    const auto* bytes = static_cast<const char*>(data);
    mix(size);  // where one item ends is content too
    uint64_t word = 0;
    for (; size >= sizeof word; size -= sizeof word, bytes += sizeof word) {
      std::memcpy(&word, bytes, sizeof word);
      mix(word);
    }
    if (size == 0) return;
    word = 0;
    std::memcpy(&word, bytes, size);
    mix(word);
  }

  /// Two steps that can both be undone, so that different words never meet.
  void mix(uint64_t word) {
    hash_ = (hash_ ^ word) * 0x9E3779B97F4A7C15U;
    hash_ ^= hash_ >> 32;
  }

  uint64_t hash_ = 0;
};

}  // namespace detail
LORA_NAMESPACE_END
