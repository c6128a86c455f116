#pragma once

#include <ATen/core/Tensor.h>
#include <lora/detail/error.h>
#include <lora/detail/mmap.h>
#include <lora/detail/strict_json.h>
#include <lora/io/checksum.h>
#include <lora/io/safetensors.h>
#include <lora/io/torch_pickle.h>
#include <lora/version.h>

#include <filesystem>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

inline constexpr const char* kModelFile = "model.safetensors";
inline constexpr const char* kModelIndex = "model.safetensors.index.json";

inline bool ends_with(std::string_view text, std::string_view end) {
  return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
}

/// A file with tensors in it, whole or a shard, by the end of its name; nothing for any other name.
inline bool has_tensor_file_name(std::string_view path) {
  for (const auto* end : {".safetensors", ".bin", ".pt", ".pth"}) {
    if (ends_with(path, end)) return true;
  }
  return false;
}
/// One file of either kind, compared with its checksums where it has some.
inline SafetensorsFile read_tensor_file(const std::string& path) {
  if (!ends_with(path, ".safetensors")) return {load_torch_pickle(path), {}};
  auto file = load_safetensors_with_metadata(path);
  check_checksums(file, path);
  return file;
}

/// Reads the tensors of a checkpoint's shards by its index: {"metadata": {…}, "weight_map": {tensor: shard, …}}.
class ShardReader {
 public:
  explicit ShardReader(std::string index) : path_(std::move(index)) {}

  std::map<std::string, at::Tensor> read() {
    const auto shards = read_index();
    finish();
    for (const auto& [shard, names] : shards) read_shard(shard, names);
    finish();
    return std::move(tensors_);
  }

 private:
  using Names = std::set<std::string>;

  void finish() {
    if (!problems_.empty()) throw FormatError(path_, std::move(problems_));
  }
  [[noreturn]] void stop(std::string problem) {
    problems_.push_back(std::move(problem));
    throw FormatError(path_, std::move(problems_));
  }

  /// The names of the tensors in each shard.
  std::map<std::string, Names> read_index() {
    constexpr size_t kLongest = 100'000'000;  // as of a safetensors header
    constexpr int kDeepest = 8;
    const auto file = MappedFile::open(path_);
    if (file->size() > kLongest) stop("has " + std::to_string(file->size()) + " bytes, expected 100000000 at most");
    nlohmann::json json;
    try {
      json = parse_strict_json({reinterpret_cast<const char*>(file->data()), file->size()}, kDeepest, problems_);
    } catch (const std::runtime_error& error) {
      stop(std::string("is no valid JSON: ") + error.what());
    }
    const auto map = json.is_object() ? json.find("weight_map") : json.end();
    if (!json.is_object() || map == json.end() || !map->is_object())
      stop("found no object weight_map, expected the shard of every tensor");
    std::map<std::string, Names> shards;
    for (const auto& [name, shard] : map->items()) {
      if (!shard.is_string()) {
        problems_.push_back("found " + std::string(shard.type_name()) + " as the shard of " + name +
                            ", expected a string");
      } else {
        shards[shard.get<std::string>()].insert(name);
      }
    }
    for (const auto& [shard, unused] : shards) check_name(shard);
    return shards;
  }

  /// A shard lies beside its index: an index from elsewhere names no other file of the machine.
  void check_name(const std::string& shard) {
    if (shard.find('/') != std::string::npos || shard.find('\0') != std::string::npos) {
      problems_.push_back("found the shard '" + shard + "', expected the name of a file in the folder of the index");
    } else if (!has_tensor_file_name(shard)) {
      problems_.push_back("found the shard '" + shard +
                          "', expected a name that ends in .safetensors, .bin, .pt or .pth");
    }
  }

  void read_shard(const std::string& shard, const Names& names) {
    std::map<std::string, at::Tensor> found;
    try {
      found = read_tensor_file((std::filesystem::path(path_).parent_path() / shard).string()).tensors;
    } catch (const FormatError& error) {
      for (const auto& problem : error.problems()) problems_.push_back(shard + ": " + problem);
      return;
    }
    for (const auto& name : names) {
      if (found.count(name) == 0)
        problems_.push_back("found no tensor " + name + " in " + shard + ", expected it there by weight_map");
    }
    for (auto& [name, tensor] : found) {
      if (names.count(name) == 0) {
        problems_.push_back("found the tensor " + name + " in " + shard + ", expected it in weight_map, there");
      } else {
        tensors_.emplace(name, std::move(tensor));
      }
    }
  }

  std::string path_;
  std::map<std::string, at::Tensor> tensors_;
  std::vector<std::string> problems_;
};

inline std::map<std::string, at::Tensor> load_checkpoint(const std::string& path) {
  std::error_code error;
  if (std::filesystem::is_directory(path, error)) {
    for (const auto* name : {kModelFile, kModelIndex, "pytorch_model.bin", "pytorch_model.bin.index.json"}) {
      const auto file = std::filesystem::path(path) / name;
      if (std::filesystem::exists(file, error)) return load_checkpoint(file.string());
    }
    throw FormatError(path, {"found none of model.safetensors, model.safetensors.index.json, pytorch_model.bin and "
                             "pytorch_model.bin.index.json, expected one of them in the folder"});
  }
  if (ends_with(path, ".index.json")) return ShardReader(path).read();
  if (has_tensor_file_name(path)) return read_tensor_file(path).tensors;
  throw FormatError(path, {"expected a folder or a name that ends in .safetensors, .bin, .pt, .pth or .index.json"});
}

}  // namespace detail
LORA_NAMESPACE_END
