#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <lora/detail/atomic_file.h>
#include <lora/detail/error.h>
#include <lora/detail/mmap.h>
#include <lora/detail/safetensors_dtypes.h>
#include <lora/detail/safetensors_header.h>
#include <lora/detail/tensor_bytes.h>
#include <lora/version.h>
#include <torch/types.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN

/// What a safetensors file holds: tensors by name, and free text by name ("format": "pt" in files that PyTorch wrote).
struct SafetensorsFile {
  std::map<std::string, torch::Tensor> tensors;  ///< By name.
  std::map<std::string, std::string> metadata;   ///< Free text by name.
};

namespace detail {

/// A tensor over its bytes in the mapped file, which lives as long as the tensor's storage.
inline at::Tensor mapped_tensor(const std::shared_ptr<MappedFile>& file, size_t data_begin,
                                const SafetensorsEntry& entry) {
  const auto options = at::TensorOptions().dtype(entry.dtype);
  const size_t size = entry.end - entry.begin;
  if (size == 0) return at::empty(entry.shape, options);
  std::byte* data = file->data() + data_begin + entry.begin;
  if (reinterpret_cast<std::uintptr_t>(data) % c10::elementSize(entry.dtype) == 0) {
    return at::from_blob(
        data, entry.shape, [file](void*) {}, options);
  }
  at::Tensor copy = at::empty(entry.shape, options);
  std::memcpy(copy.mutable_data_ptr(), data, size);
  return copy;
}

/// The reason why a tensor cannot be written, or nothing.
inline std::string why_not_writable(const std::string& name, const at::Tensor& tensor) {
  if (name == kSafetensorsMetadata) return "the name is the format's own";
  const std::string no_bytes = why_no_bytes(tensor);
  if (!no_bytes.empty()) return no_bytes;
  if (!safetensors_dtype_name(tensor.scalar_type()))
    return std::string("the format has no dtype for ") + toString(tensor.scalar_type());
  return is_utf8(name) ? "" : "the name is not UTF-8";
}

/// The header as the format's own library writes it: wide types first so that all data is aligned, then by name.
inline std::string safetensors_header(const std::vector<std::pair<std::string, at::Tensor>>& tensors,
                                      const std::map<std::string, std::string>& metadata) {
  std::string text;
  if (!metadata.empty()) text += ",\"" + std::string(kSafetensorsMetadata) + "\":" + nlohmann::json(metadata).dump();
  size_t begin = 0;
  for (const auto& [name, tensor] : tensors) {
    const nlohmann::ordered_json entry = {{"dtype", safetensors_dtype_name(tensor.scalar_type())},
                                          {"shape", tensor.sizes().vec()},
                                          {"data_offsets", {begin, begin + tensor.nbytes()}}};
    text += "," + nlohmann::json(name).dump() + ":" + entry.dump();
    begin += tensor.nbytes();
  }
  text = "{" + text.substr(text.empty() ? 0 : 1) + "}";
  text.resize((text.size() + 7) / 8 * 8, ' ');
  return text;
}

inline std::vector<std::string> why_not_writable(const std::map<std::string, at::Tensor>& tensors) {
  std::vector<std::string> problems;
  for (const auto& [name, tensor] : tensors) {
    const std::string why_not = why_not_writable(name, tensor);
    if (!why_not.empty()) problems.push_back("tensor '" + name + "' " + why_not);
  }
  return problems;
}

/// Writes a whole safetensors file and leaves it to the caller to commit it (with other files that belong to it).
inline void write_safetensors(AtomicFile& file, const std::map<std::string, at::Tensor>& tensors,
                              const std::map<std::string, std::string>& metadata) {
  std::vector<std::string> problems = why_not_writable(tensors);
  for (const auto& [name, text] : metadata) {
    if (!is_utf8(name) || !is_utf8(text)) problems.push_back("metadata '" + name + "' is not UTF-8");
  }
  if (!problems.empty()) throw FormatError(file.path(), std::move(problems));
  std::vector<std::pair<std::string, at::Tensor>> ordered(tensors.begin(), tensors.end());
  std::stable_sort(ordered.begin(), ordered.end(), [](const auto& a, const auto& b) {
    return safetensors_dtype_index(a.second.scalar_type()) < safetensors_dtype_index(b.second.scalar_type());
  });

  const std::string header = safetensors_header(ordered, metadata);
  const uint64_t header_size = header.size();
  file.write(&header_size, sizeof header_size);
  file.write(header);
  for (const auto& [name, tensor] : ordered) {
    const at::Tensor data = in_a_row(tensor);
    file.write(data.const_data_ptr(), data.nbytes());
  }
}

}  // namespace detail

/// Reads a safetensors file with its metadata; see load_safetensors.
inline SafetensorsFile load_safetensors_with_metadata(const std::string& path) {
  const auto file = detail::MappedFile::open(path);
  detail::SafetensorsHeader header = detail::read_safetensors_header(path, file->data(), file->size());
  SafetensorsFile result;
  result.metadata = std::move(header.metadata);
  for (const auto& entry : header.entries) {
    result.tensors.emplace(entry.name, detail::mapped_tensor(file, header.data_begin, entry));
  }
  return result;
}

/// Reads the tensors of a safetensors file by name, on the CPU.
///
/// The file is mapped, not read: its bytes come in when a tensor is used, and the mapping lives as long as the last
/// tensor. Tensors may be written to, which never changes the file. Misaligned data is copied. The file may be replaced
/// meanwhile (as save_safetensors does), but not shortened in place. Throws FormatError with every problem of the file.
inline std::map<std::string, torch::Tensor> load_safetensors(const std::string& path) {
  return load_safetensors_with_metadata(path).tensors;
}

/// Writes tensors of any device and stride to a safetensors file, each with its own copy of shared data.
///
/// The file appears whole or not at all: on any error (a tensor that the format cannot hold, a full disk) a FormatError
/// says why, and an older file of that name is as it was.
inline void save_safetensors(const std::map<std::string, torch::Tensor>& tensors, const std::string& path,
                             const std::map<std::string, std::string>& metadata = {{"format", "pt"}}) {
  detail::AtomicFile file(path);
  detail::write_safetensors(file, tensors, metadata);
  file.commit();
}

LORA_NAMESPACE_END
