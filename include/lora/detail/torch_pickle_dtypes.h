#pragma once

#include <c10/core/ScalarType.h>
#include <lora/version.h>

#include <array>
#include <string_view>

LORA_NAMESPACE_BEGIN
namespace detail {

/// A dtype in Python's pickles: the class of its storages, for those that have one, and its own name.
struct PickleDtype {
  std::string_view storage;  // in the module torch; empty: torch.storage.UntypedStorage
  std::string_view name;     // in the module torch
  c10::ScalarType type;
};

inline constexpr std::array<PickleDtype, 19> kPickleDtypes = {{
    {"DoubleStorage", "float64", c10::ScalarType::Double},
    {"FloatStorage", "float32", c10::ScalarType::Float},
    {"HalfStorage", "float16", c10::ScalarType::Half},
    {"BFloat16Storage", "bfloat16", c10::ScalarType::BFloat16},
    {"LongStorage", "int64", c10::ScalarType::Long},
    {"IntStorage", "int32", c10::ScalarType::Int},
    {"ShortStorage", "int16", c10::ScalarType::Short},
    {"CharStorage", "int8", c10::ScalarType::Char},
    {"ByteStorage", "uint8", c10::ScalarType::Byte},
    {"BoolStorage", "bool", c10::ScalarType::Bool},
    {"ComplexFloatStorage", "complex64", c10::ScalarType::ComplexFloat},
    {"ComplexDoubleStorage", "complex128", c10::ScalarType::ComplexDouble},
    {"", "uint16", c10::ScalarType::UInt16},
    {"", "uint32", c10::ScalarType::UInt32},
    {"", "uint64", c10::ScalarType::UInt64},
    {"", "float8_e4m3fn", c10::ScalarType::Float8_e4m3fn},
    {"", "float8_e5m2", c10::ScalarType::Float8_e5m2},
    {"", "float8_e4m3fnuz", c10::ScalarType::Float8_e4m3fnuz},
    {"", "float8_e5m2fnuz", c10::ScalarType::Float8_e5m2fnuz},
}};

/// The entry for which `matches` holds, or null.
template <class Predicate>
const PickleDtype* find_pickle_dtype(const Predicate& matches) {
  for (const auto& dtype : kPickleDtypes) {
    if (matches(dtype)) return &dtype;
  }
  return nullptr;
}

}  // namespace detail
LORA_NAMESPACE_END
