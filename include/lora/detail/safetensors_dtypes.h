#pragma once

#include <c10/core/ScalarType.h>
#include <lora/version.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <optional>
#include <string_view>
#include <utility>

LORA_NAMESPACE_BEGIN
namespace detail {

/// The dtypes in the order in which the format's own library lays out their data.
inline constexpr std::array<std::pair<const char*, c10::ScalarType>, 16> kSafetensorsDtypes = {{
    {"U64", c10::ScalarType::UInt64},
    {"I64", c10::ScalarType::Long},
    {"F64", c10::ScalarType::Double},
    {"C64", c10::ScalarType::ComplexFloat},
    {"F32", c10::ScalarType::Float},
    {"U32", c10::ScalarType::UInt32},
    {"I32", c10::ScalarType::Int},
    {"BF16", c10::ScalarType::BFloat16},
    {"F16", c10::ScalarType::Half},
    {"U16", c10::ScalarType::UInt16},
    {"I16", c10::ScalarType::Short},
    {"F8_E4M3", c10::ScalarType::Float8_e4m3fn},
    {"F8_E5M2", c10::ScalarType::Float8_e5m2},
    {"I8", c10::ScalarType::Char},
    {"U8", c10::ScalarType::Byte},
    {"BOOL", c10::ScalarType::Bool},
}};

inline size_t safetensors_dtype_index(c10::ScalarType type) {
  const auto found = std::find_if(kSafetensorsDtypes.begin(), kSafetensorsDtypes.end(),
                                  [type](const auto& entry) { return entry.second == type; });
  return static_cast<size_t>(found - kSafetensorsDtypes.begin());
}

/// The format's name of a dtype, or null.
inline const char* safetensors_dtype_name(c10::ScalarType type) {
  const size_t index = safetensors_dtype_index(type);
  return index < kSafetensorsDtypes.size() ? kSafetensorsDtypes[index].first : nullptr;
}

/// The dtype of one of the format's names, or nothing.
inline std::optional<c10::ScalarType> safetensors_dtype(std::string_view name) {
  for (const auto& [known, type] : kSafetensorsDtypes) {
    if (name == known) return type;
  }
  return std::nullopt;
}

}  // namespace detail
LORA_NAMESPACE_END
