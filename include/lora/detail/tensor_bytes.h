#pragma once

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the files hold little-endian data; a big-endian host would have to swap the bytes"
#endif

#include <ATen/core/Tensor.h>
#include <lora/version.h>

#include <algorithm>
#include <cstddef>
#include <nlohmann/json.hpp>
#include <string>

LORA_NAMESPACE_BEGIN
namespace detail {

inline bool is_utf8(const std::string& text) {
  try {
    nlohmann::json(text).dump();
    return true;
  } catch (const nlohmann::json::exception&) {
    return false;
  }
}

/// Why a tensor cannot be stored as its elements in a row, or nothing.
inline std::string why_no_bytes(const at::Tensor& tensor) {
  if (!tensor.defined()) return "is undefined";
  if (tensor.is_quantized()) return "is quantized; dequantize it or store its parts";
  if (tensor.is_nested()) return "is nested; store its parts";
  if (tensor.layout() != at::kStrided) return "is sparse or packed; to_dense() it or store its parts";
  if (tensor.is_meta() || !tensor.has_storage()) return "holds no data";
  return "";
}

/// The tensor with its elements in a row in the memory of the CPU.
inline at::Tensor in_a_row(const at::Tensor& tensor) {
  return tensor.detach().resolve_conj().resolve_neg().to(at::kCPU).contiguous();
}

/// A C++ bool that is neither 0 nor 1 is undefined behaviour wherever it is read.
inline bool are_bools(const std::byte* data, size_t size) {
  return std::all_of(data, data + size, [](std::byte value) { return value <= std::byte{1}; });
}

}  // namespace detail
LORA_NAMESPACE_END
