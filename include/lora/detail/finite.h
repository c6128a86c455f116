#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/isfinite.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <lora/version.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

LORA_NAMESPACE_BEGIN
namespace detail {

/// A whole number of T's size.
template <class T>
using BitsOf = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;

/// Whether a number is neither NaN nor infinite, told by the bits: -ffast-math lets the compiler assume so.
template <class T>
bool is_finite(T value) {
  BitsOf<T> bits, exponent;
  const T infinity = std::numeric_limits<T>::infinity();
  std::memcpy(&bits, &value, sizeof bits);
  std::memcpy(&exponent, &infinity, sizeof exponent);
  return (bits & exponent) != exponent;
}

/// Whether all of `count` numbers are.
template <class T>
bool all_finite(const T* values, int64_t count) {
  BitsOf<T> found = 0;
  for (int64_t i = 0; i < count; ++i) found |= static_cast<BitsOf<T>>(!is_finite(values[i]));
  return found == 0;
}

/// Whether a tensor has no NaN and no infinite value; true for whole numbers.
inline bool all_finite(const at::Tensor& tensor) {
  if (!tensor.is_floating_point()) return true;
  if (tensor.device().is_cpu() && tensor.is_contiguous()) {
    const auto count = tensor.numel();
    switch (tensor.scalar_type()) {
      case at::kDouble:
        return all_finite(tensor.const_data_ptr<double>(), count);
      case at::kFloat:
        return all_finite(tensor.const_data_ptr<float>(), count);
      case at::kHalf:
        return all_finite(tensor.const_data_ptr<c10::Half>(), count);
      case at::kBFloat16:
        return all_finite(tensor.const_data_ptr<c10::BFloat16>(), count);
      default:
        break;
    }
  }
  return at::isfinite(tensor).all().item<bool>();
}

}  // namespace detail
LORA_NAMESPACE_END
