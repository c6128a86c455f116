#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <c10/util/Exception.h>
#include <lora/version.h>

#include <cstdint>
#include <string>
#include <type_traits>

LORA_NAMESPACE_BEGIN
namespace detail {

template <class T>
inline constexpr bool is_whole_number = std::is_integral_v<T> && !std::is_same_v<T, bool>;

/// A number, a bool, a text or a tensor (copied) in the form in which it is kept.
template <class T>
c10::IValue to_value(const T& value) {
  if constexpr (is_whole_number<T>) {
    return static_cast<int64_t>(value);
  } else if constexpr (std::is_floating_point_v<T>) {
    return static_cast<double>(value);
  } else if constexpr (std::is_same_v<T, at::Tensor>) {
    return value.detach().clone();
  } else if constexpr (std::is_same_v<T, bool>) {
    return value;
  } else {
    return std::string(value);
  }
}

/// What to_value was given. Throws c10::ValueError where `name` is of another type.
template <class T>
T from_value(const c10::IValue& value, const std::string& name) {
  const bool fits = is_whole_number<T>              ? value.isInt()
                    : std::is_floating_point_v<T>   ? value.isDouble()
                    : std::is_same_v<T, at::Tensor> ? value.isTensor()
                    : std::is_same_v<T, bool>       ? value.isBool()
                                                    : value.isString();
  TORCH_CHECK_VALUE(fits, "[lora::TrainingState::get] found ", name, " as a value of type ", value.tagKind(),
                    ", expected the type that was asked for");
  if constexpr (is_whole_number<T>) {
    return static_cast<T>(value.toInt());
  } else if constexpr (std::is_floating_point_v<T>) {
    return static_cast<T>(value.toDouble());
  } else {
    return value.to<T>();
  }
}

}  // namespace detail
LORA_NAMESPACE_END
