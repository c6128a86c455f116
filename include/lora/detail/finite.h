#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/isfinite.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <lora/version.h>

#include <cstdint>
#include <cstring>
#include <limits>

LORA_NAMESPACE_BEGIN
namespace detail {

/// Whether none of `count` numbers is NaN or infinite, told by the bits: -ffast-math lets the compiler assume so.
template <class Bits, class T>
bool all_finite(const T* values, int64_t count) {
  Bits exponent;
  const T infinity = std::numeric_limits<T>::infinity();
  std::memcpy(&exponent, &infinity, sizeof exponent);
  Bits found = 0;
  for (int64_t i = 0; i < count; ++i) {
    Bits bits;
    std::memcpy(&bits, values + i, sizeof bits);
    found |= static_cast<Bits>((bits & exponent) == exponent);
  }
  return found == 0;
}

/// Whether a tensor has no NaN and no infinite value; true for whole numbers.
inline bool all_finite(const at::Tensor& tensor) {
  if (!tensor.is_floating_point()) return true;
  if (tensor.device().is_cpu() && tensor.is_contiguous()) {
    const auto count = tensor.numel();
    switch (tensor.scalar_type()) {
      case at::kDouble:
        return all_finite<uint64_t>(tensor.const_data_ptr<double>(), count);
      case at::kFloat:
        return all_finite<uint32_t>(tensor.const_data_ptr<float>(), count);
      case at::kHalf:
        return all_finite<uint16_t>(tensor.const_data_ptr<c10::Half>(), count);
      case at::kBFloat16:
        return all_finite<uint16_t>(tensor.const_data_ptr<c10::BFloat16>(), count);
      default:
        break;
    }
  }
  return at::isfinite(tensor).all().item<bool>();
}

}  // namespace detail
LORA_NAMESPACE_END
