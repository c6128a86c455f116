#pragma once

#include <ATen/core/Tensor.h>
#include <lora/detail/crc32.h>
#include <lora/detail/error.h>
#include <lora/detail/safetensors_dtypes.h>
#include <lora/detail/safetensors_header.h>
#include <lora/detail/strict_json.h>
#include <lora/detail/tensor_bytes.h>
#include <lora/io/safetensors.h>
#include <lora/version.h>
#include <torch/types.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// Metadata of a safetensors file with the checksums of all else in it.
inline constexpr const char* kChecksums = "lora.crc32";

inline std::string hexadecimal(uint32_t value) {
  char text[9];
  std::snprintf(text, sizeof text, "%08x", value);
  return text;
}

/// The checksum of "<name> <dtype> [<size>,…]\n" and of the tensor's elements in a row.
inline std::string checksum_of(const std::string& name, const at::Tensor& tensor) {
  std::string sizes;
  for (const auto size : tensor.sizes()) sizes += (sizes.empty() ? "" : ",") + std::to_string(size);
  const auto title = name + " " + safetensors_dtype_name(tensor.scalar_type()) + " [" + sizes + "]\n";
  const auto data = in_a_row(tensor);
  return hexadecimal(crc32(data.const_data_ptr(), data.nbytes(), crc32(title)));
}

/// The checksum of the lines "<key>=<value>\n" of all metadata but the checksums themselves.
inline std::string checksum_of(const std::map<std::string, std::string>& metadata) {
  uint32_t value = 0;
  for (const auto& [key, text] : metadata) {
    if (key != kChecksums) value = crc32(key + "=" + text + "\n", value);
  }
  return hexadecimal(value);
}

/// Whether a file without checksums was written with them: it has another key of ours, or theirs with a few letters
/// damaged.
inline bool lost_checksums(const std::map<std::string, std::string>& metadata) {
  constexpr int kFewLetters = 3;
  const std::string key = kChecksums, begin = key.substr(0, key.find('.') + 1);
  for (const auto& [name, unused] : metadata) {
    if (name.compare(0, begin.size(), begin) == 0) return true;
    if (name.size() != key.size()) continue;
    int damaged = 0;
    for (size_t i = 0; i < key.size(); ++i) damaged += name[i] == key[i] ? 0 : 1;
    if (damaged <= kFewLetters) return true;
  }
  return false;
}

}  // namespace detail

/// Adds to the metadata of a safetensors file, as "lora.crc32", the CRC-32 of every tensor with its name, dtype and
/// sizes, and that of all other metadata.
inline void add_checksums(const std::map<std::string, torch::Tensor>& tensors,
                          std::map<std::string, std::string>& metadata) {
  nlohmann::json checksums = {{detail::kSafetensorsMetadata, detail::checksum_of(metadata)}};
  for (const auto& [name, tensor] : tensors) {
    // What cannot be written is an error of the writer's.
    if (detail::why_not_writable(name, tensor).empty()) checksums[name] = detail::checksum_of(name, tensor);
  }
  metadata[detail::kChecksums] = checksums.dump();
}

/// Compares a file with the checksums in its metadata; one of another program, which has none, passes.
///
/// Throws FormatError(path) that names every tensor that is damaged, missing or in excess, and damaged metadata.
inline void check_checksums(const SafetensorsFile& file, const std::string& path) {
  std::vector<std::string> problems;
  const auto written = file.metadata.find(detail::kChecksums);
  if (written == file.metadata.end()) {
    if (!detail::lost_checksums(file.metadata)) return;
    throw FormatError(path,
                      {"found metadata of this library without lora.crc32, expected the checksums that it writes: the "
                       "file is damaged, or was changed by a program that should also remove all keys lora.*"});
  }
  nlohmann::json checksums;
  try {
    checksums = detail::parse_strict_json(written->second, 1, problems);
  } catch (const std::runtime_error&) {
  }
  if (!checksums.is_object())
    throw FormatError(path, {"found no JSON object as lora.crc32, expected checksums: it is damaged"});
  const auto compare = [&](const std::string& name, const std::string& what, const std::string& found) {
    const auto expected = checksums.find(name);
    if (expected == checksums.end()) {
      problems.push_back("found no checksum of " + what + ", expected " + found);
    } else if (*expected != found) {
      problems.push_back("found the checksum " + found + " of " + what + ", expected " + expected->dump() +
                         ": damaged");
    }
    checksums.erase(name);
  };
  compare(detail::kSafetensorsMetadata, "the metadata", detail::checksum_of(file.metadata));
  for (const auto& [name, tensor] : file.tensors)
    compare(name, "tensor '" + name + "'", detail::checksum_of(name, tensor));
  for (const auto& [name, unused] : checksums.items())
    problems.push_back("found no tensor '" + name + "', expected one by its checksum");
  if (!problems.empty()) throw FormatError(path, std::move(problems));
}

LORA_NAMESPACE_END
