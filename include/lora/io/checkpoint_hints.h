#pragma once

#include <ATen/core/Tensor.h>
#include <lora/inject/hosts/checkpoint_hosts.h>
#include <lora/io/adapter_files.h>
#include <lora/version.h>

#include <string>

LORA_NAMESPACE_BEGIN
namespace detail {

/// What stands before `end` in a key, with the dot between them; empty where the key ends otherwise.
inline std::string path_before(const std::string& key, const std::string& end) {
  const bool behind_path = key.size() > end.size() + 1 && TargetModules::is_path_or_suffix(end, key);
  return behind_path ? key.substr(0, key.size() - end.size() - 1) : "";
}

/// The name that a tensor which PEFT keeps below `base_layer` has in the model.
inline std::string without_base_layer(std::string key) {
  const std::string wrapper = ".base_layer.";
  for (auto at = key.find(wrapper); at != std::string::npos; at = key.find(wrapper)) {
    key.erase(at, wrapper.size() - 1);
  }
  return key;
}

/// What an adapter's file says about the tensors of its base.
inline CheckpointHints checkpoint_hints(const AdapterFiles& files) {
  CheckpointHints hints;
  const auto note = files.config.find("fan_in_fan_out");
  hints.fan_in_fan_out = note != files.config.end() && note->is_boolean() && note->get<bool>();
  for (const auto& [key, file] : files.tensors) {
    const auto sizes = file.tensor.sizes().vec();
    std::string path;
    if (!(path = path_before(key, "lora_A.weight")).empty()) {
      hints.factors[path].A = sizes;
    } else if (!(path = path_before(key, "lora_B.weight")).empty()) {
      hints.factors[path].B = sizes;
    } else if (!(path = path_before(key, "lora_B.bias")).empty()) {
      hints.factors[path].bias = true;
    } else if (!(path = path_before(key, "lora_embedding_A")).empty()) {
      hints.factors[path].A = sizes;
      hints.factors[path].embedding = true;
    } else if (!(path = path_before(key, "lora_embedding_B")).empty()) {
      hints.factors[path].B = sizes;
      hints.factors[path].embedding = true;
    } else if (!(path = path_before(key, "token_adapter.trainable_tokens_delta")).empty()) {
      hints.tables.insert(path);
    } else if (key.find(".original_module.") == std::string::npos &&
               key.find(".modules_to_save.") == std::string::npos) {
      hints.copies[without_base_layer(key)] = file.tensor;
    }
  }
  for (auto& [path, factors] : hints.factors) {
    for (const auto& name : files.embeddings) {
      factors.embedding = factors.embedding || TargetModules::is_path_or_suffix(name, path);
    }
  }
  return hints;
}

}  // namespace detail
LORA_NAMESPACE_END
