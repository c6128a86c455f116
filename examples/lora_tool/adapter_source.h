#pragma once

#include <lora/config/lora_config.h>  // defines: LoraConfig, BiasCopies
#include <lora/io/adapter_files.h>    // defines: adapter_folders
#include <lora/io/safetensors.h>      // defines: load_safetensors
#include <lora/io/torch_pickle.h>     // defines: load_torch_pickle

#include <algorithm>
#include <filesystem>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <system_error>
#include <vector>

#include "lora_tool/options.h"  // defines: Options
#include "lora_tool/outcome.h"  // defines: UsageError

/// An adapter on disk: a PEFT directory, or a file of tensors alone with its configuration.
struct AdapterSource {
  std::string path;
  std::optional<lora::LoraConfig> config;
};

namespace adapter_source_detail {

inline bool is_there(const std::filesystem::path& path) {
  std::error_code error;
  return std::filesystem::exists(path, error);
}

/// The folder itself, or the sub-folder of the given name; without a name the only one.
inline std::string find_folder(const std::string& path, const std::string& name) {
  const auto folders = lora::detail::adapter_folders(path);
  std::string known;
  for (const auto& [folder_name, folder] : folders) {
    if (folder_name == (name.empty() ? "default" : name) || (name.empty() && folders.size() == 1)) return folder;
    known += (known.empty() ? "" : ", ") + folder_name;
  }
  throw UsageError(path + ": found no adapter \"" + (name.empty() ? "default" : name) +
                   "\", expected --name with one of " + known);
}

/// The module of a factor's key in PEFT's form or in loralib's; empty for any other key.
inline std::string module_of(const std::string& key, const std::string& factor) {
  const std::string prefix = "base_model.model.";
  const auto begin = key.compare(0, prefix.size(), prefix) == 0 ? prefix.size() : 0;
  for (const auto& end : {"." + factor, "." + factor + ".weight"}) {
    if (key.size() > begin + end.size() && key.compare(key.size() - end.size(), end.size(), end) == 0) {
      return key.substr(begin, key.size() - end.size() - begin);
    }
  }
  return "";
}

/// The configuration of a file of tensors: what the flags say, and what the factors say by themselves.
inline lora::LoraConfig configuration(const Options& options) {
  if (!options.alpha) {
    throw UsageError(options.path +
                     ": found a file of tensors alone, expected --alpha: it does not say how its updates "
                     "are scaled");
  }
  const bool safetensors = std::filesystem::path(options.path).extension() == ".safetensors";
  const auto tensors = safetensors ? lora::load_safetensors(options.path) : lora::load_torch_pickle(options.path);
  std::map<std::string, std::int64_t> ranks;
  for (const auto& [key, tensor] : tensors) {
    const auto module = module_of(key, "lora_B");
    if (!module.empty() && tensor.dim() >= 2) ranks[module] = tensor.size(1);
  }
  lora::LoraConfig config;
  config.lora_alpha(*options.alpha).modules_to_save(options.modules_to_save);
  config.fan_in_fan_out(options.fan_in_fan_out.value_or(false));
  config.r(options.rank ? *options.rank : ranks.empty() ? config.r() : ranks.begin()->second);
  std::vector<std::string> targets = options.targets;
  for (const auto& [module, rank] : ranks) {
    if (options.targets.empty()) targets.push_back(module);
    if (!options.rank && rank != config.r())
      config.rank_pattern().emplace_back("^" + lora::detail::escaped(module), rank);
  }
  if (!targets.empty()) config.target_modules(targets);
  config.bias(options.bias == "all"         ? lora::BiasCopies::kAll
              : options.bias == "lora_only" ? lora::BiasCopies::kAdaptedOnly
                                            : lora::BiasCopies::kNone);
  return config;
}

}  // namespace adapter_source_detail

/// Throws a UsageError where the path cannot be what the flags say.
inline void check_source(const Options& options) {
  if (!adapter_source_detail::is_there(options.path)) {
    throw UsageError(options.path + ": cannot be read: there is no such file or folder");
  }
  const bool folder = std::filesystem::is_directory(options.path);
  const auto flag = options.configuration_flag();
  if (folder && !flag.empty()) throw UsageError(flag + ": found a directory, which has a configuration of its own");
  if (!folder && !options.name.empty()) throw UsageError("--name: found a file, expected a folder of adapters");
}

/// Finds the adapter that the command line means. Throws a UsageError where there is none.
inline AdapterSource find_adapter(const Options& options) {
  using namespace adapter_source_detail;
  check_source(options);
  if (std::filesystem::is_directory(options.path)) return {find_folder(options.path, options.name), std::nullopt};
  return {options.path, configuration(options)};
}
