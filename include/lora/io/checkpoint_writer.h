#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/equal.h>
#include <lora/detail/atomic_file.h>
#include <lora/detail/error.h>
#include <lora/io/checkpoint_reader.h>
#include <lora/io/checksum.h>
#include <lora/io/safetensors.h>
#include <lora/version.h>

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// Writes tensors as the safetensors files of a Hugging Face folder: one file, or shards and their index.
///
/// All files are on the disk under temporary names before the first is renamed, and the index is renamed last. Where
/// shards of an older save have the same names, its index goes before them: a crash in between leaves a folder that
/// cannot be loaded, not one that mixes two models.
class CheckpointWriter {
 public:
  using Tensors = std::map<std::string, at::Tensor>;

  CheckpointWriter(std::string directory, const Tensors& tensors, int64_t max_shard_bytes)
      : directory_(std::move(directory)) {
    auto problems = why_not_writable(tensors);
    if (!problems.empty()) throw FormatError(directory_, std::move(problems));
    int64_t size = 0;
    for (const auto& [name, tensor] : tensors) {
      const auto bytes = static_cast<int64_t>(tensor.nbytes());
      if (shards_.empty() || (size > 0 && bytes > max_shard_bytes - size)) {
        shards_.emplace_back();
        size = 0;
      }
      shards_.back().emplace(name, tensor);
      size += bytes;
      total_ += bytes;
    }
    if (shards_.empty()) shards_.emplace_back();
  }

  void write() const {
    std::error_code error;
    std::filesystem::create_directories(directory_, error);
    if (error) throw SystemError(directory_, "cannot make the folder", error);
    std::vector<std::unique_ptr<AtomicFile>> files;
    std::set<std::string> names;
    for (size_t i = 0; i < shards_.size(); ++i) {
      names.insert(name(i));
      files.push_back(std::make_unique<AtomicFile>(path(name(i))));
      std::map<std::string, std::string> metadata{{"format", "pt"}};
      add_checksums(shards_[i], metadata);
      write_safetensors(*files.back(), shards_[i], metadata);
    }
    if (is_sharded()) {
      names.insert(kModelIndex);
      files.push_back(std::make_unique<AtomicFile>(path(kModelIndex)));
      files.back()->write(index().dump(2) + "\n");
    }
    for (const auto& file : files) file->sync();
    const auto older = older_files();
    if (is_sharded() && older.count(name(0)) != 0) remove(kModelIndex);
    for (const auto& file : files) file->commit();
    for (const auto& left : older) {
      if (names.count(left) == 0) remove(left);
    }
  }

 private:
  bool is_sharded() const { return shards_.size() > 1; }
  std::string path(const std::string& name) const { return (std::filesystem::path(directory_) / name).string(); }

  std::string name(size_t shard) const {
    if (!is_sharded()) return kModelFile;
    constexpr size_t kLongest = 64;
    char text[kLongest];
    std::snprintf(text, sizeof text, "model-%05zu-of-%05zu.safetensors", shard + 1, shards_.size());
    return text;
  }

  nlohmann::ordered_json index() const {
    nlohmann::ordered_json map = nlohmann::ordered_json::object();
    for (size_t i = 0; i < shards_.size(); ++i) {
      for (const auto& [name, unused] : shards_[i]) map[name] = this->name(i);
    }
    return {{"metadata", {{"total_size", total_}}}, {"weight_map", map}};
  }

  /// The files of the folder that are named as this writer names its own.
  std::set<std::string> older_files() const {
    std::set<std::string> found;
    std::error_code error;
    for (std::filesystem::directory_iterator entry(directory_, error), end; !error && entry != end;
         entry.increment(error)) {
      const auto name = entry->path().filename().string();
      if (name == kModelFile || name == kModelIndex || is_shard(name)) found.insert(name);
    }
    if (error) throw SystemError(directory_, "cannot be listed", error);
    return found;
  }

  /// Whether a name has the form of model-00001-of-00003.safetensors.
  static bool is_shard(const std::string& name) {
    constexpr std::string_view kForm = "model-#####-of-#####.safetensors";
    return std::equal(name.begin(), name.end(), kForm.begin(), kForm.end(), [](char c, char form) {
      return form == '#' ? std::isdigit(static_cast<unsigned char>(c)) != 0 : c == form;
    });
  }

  void remove(const std::string& name) const {
    std::error_code error;
    std::filesystem::remove(path(name), error);
    if (error) throw SystemError(path(name), "is of an older save and cannot be removed", error);
  }

  std::string directory_;
  std::vector<Tensors> shards_;
  int64_t total_ = 0;
};

/// The tensors without those that Python's model ties to others; each has to be equal to the one that it stands for.
inline std::map<std::string, at::Tensor> without_tied(std::map<std::string, at::Tensor> tensors,
                                                      const std::map<std::string, std::string>& tied) {
  for (const auto& [name, of] : tied) {
    const auto left_out = tensors.find(name), kept = tensors.find(of);
    TORCH_CHECK_VALUE(left_out != tensors.end() && kept != tensors.end() && tied.count(of) == 0,
                      "[lora::save_checkpoint] found tied(", name, " to ", of,
                      "), expected two tensors of the checkpoint, of which the second is written");
    const bool equal = left_out->second.sizes() == kept->second.sizes() &&
                       left_out->second.scalar_type() == kept->second.scalar_type() &&
                       at::equal(left_out->second, kept->second);
    TORCH_CHECK_VALUE(equal, "[lora::save_checkpoint] found different values in ", name, " and ", of,
                      ", expected equal ones: they are given as tied");
  }
  for (const auto& [name, unused] : tied) tensors.erase(name);
  return tensors;
}

}  // namespace detail
LORA_NAMESPACE_END
