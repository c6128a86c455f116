#pragma once

#include <ATen/ops/isfinite.h>
#include <lora/detail/error.h>
#include <lora/detail/json.h>
#include <lora/detail/python_regex.h>
#include <lora/io/checksum.h>
#include <lora/io/load_options.h>
#include <lora/io/peft_layout.h>
#include <lora/io/safetensors.h>
#include <lora/version.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

inline std::string read_text(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  if (!stream) throw FormatError(path, {std::string("cannot be read: ") + std::strerror(errno)});
  return {std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
}

/// A tensor of an adapter's file, and whether something was found for it to be.
struct FileTensor {
  at::Tensor tensor;
  std::string key;  // in the file
  bool used = false;
};

/// An adapter as it lies on disk: tensors by PEFT's keys without their prefix, and what says how to read them.
struct AdapterFiles {
  std::string place;  // for errors
  std::string config_path;
  std::string tensor_path;
  Json config;
  std::map<std::string, std::string> metadata;
  std::map<std::string, FileTensor> tensors;
};

/// Whether numbers of the type can be an adapter's: counters of buffers are whole.
inline bool is_adapter_type(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16 || type == at::kLong;
}

/// Puts the tensors of a file under their keys, renamed; every tensor that cannot be an adapter's is a problem.
inline void add_tensors(AdapterFiles& files, const std::map<std::string, at::Tensor>& tensors,
                        const LoadOptions& options, std::vector<std::string>& problems) {
  std::vector<std::pair<PythonRegex, std::string>> renames;
  for (const auto& [pattern, replacement] : options.key_mapping())
    renames.emplace_back(PythonRegex(pattern), replacement);
  const std::string prefix = kPeftPrefix;
  for (const auto& [key, tensor] : tensors) {
    if (key.compare(0, prefix.size(), prefix) != 0) {
      problems.push_back("found the tensor " + key + ", expected names that begin with " + prefix);
      continue;
    }
    auto name = key.substr(prefix.size());
    for (const auto& [pattern, replacement] : renames) {
      if (const auto renamed = pattern.substituted(name, replacement)) {
        name = *renamed;
        break;
      }
    }
    if (!is_adapter_type(tensor.scalar_type())) {
      problems.push_back("found the type " + std::string(c10::toString(tensor.scalar_type())) +
                         ", expected F64, F32, F16 or BF16 in " + key);
    } else if (tensor.is_floating_point() && !at::isfinite(tensor).all().item<bool>()) {
      problems.push_back("found NaN or infinite values, expected finite ones in " + key);
    }
    if (!files.tensors.emplace(name, FileTensor{tensor, key}).second) {
      problems.push_back("found two tensors for " + name + ", expected one; change key_mapping");
    }
  }
}

/// A PEFT directory.
inline AdapterFiles read_peft_directory(const std::string& directory, const LoadOptions& options,
                                        std::vector<std::string>& problems) {
  AdapterFiles files;
  files.place = directory;
  files.config_path = directory + "/" + kConfigFile;
  files.config = parse_object(read_text(files.config_path), files.config_path);
  files.tensor_path = directory + "/" + kTensorFile;
  auto file = load_safetensors_with_metadata(files.tensor_path);
  check_checksums(file, files.tensor_path);
  files.metadata = std::move(file.metadata);
  add_tensors(files, file.tensors, options, problems);
  return files;
}

}  // namespace detail
LORA_NAMESPACE_END
