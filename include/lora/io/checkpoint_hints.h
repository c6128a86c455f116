#pragma once

#include <ATen/core/Tensor.h>
#include <lora/inject/hosts/checkpoint_hosts.h>
#include <lora/io/adapter_files.h>
#include <lora/io/method_registry.h>
#include <lora/io/peft_layout.h>
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

/// Notes what one of an update's tensors says about its weight [out, in]: LoRA's factors say both sizes, others one of
/// them or none.
inline void note_tensor(CheckpointHints::Factors& factors, const std::string& name, const at::Tensor& tensor) {
  const auto sizes = tensor.sizes().vec();
  const auto is = [&](const char* known) { return name == known; };
  factors.parameters += tensor.numel();
  factors.embedding = factors.embedding || is("lora_embedding_A") || is("lora_embedding_B");
  factors.bias = factors.bias || is("lora_B.bias");
  if (is("lora_A.weight") || is("lora_embedding_A")) factors.A = sizes;
  if (is("lora_B.weight") || is("lora_embedding_B") || is("vera_lambda_b")) factors.B = sizes;
  if (is("ia3_l") && sizes.size() == 2) (sizes[1] == 1 ? factors.B : factors.A) = sizes;
  if (is("miss_block") && sizes.size() == 2) factors.B = {sizes[1]};
  if (is("miss_block") && sizes.size() == 3) factors.B = {sizes[0] * sizes[1]};
}

/// How the names of the method's tensors begin; LoRA's where the configuration is wrong, which its reader tells.
inline std::string tensor_prefix(const AdapterFiles& files) {
  const auto type = files.config.find("peft_type");
  const auto* entry = type != files.config.end() && type->is_string()
                          ? MethodRegistry::instance().find(type->get<std::string>())
                          : nullptr;
  return entry == nullptr ? LoraConfig::kPrefix : entry->prefix;
}

/// What an adapter's file says about the tensors of its base.
inline CheckpointHints checkpoint_hints(const AdapterFiles& files) {
  CheckpointHints hints;
  const auto note = files.config.find("fan_in_fan_out");
  hints.fan_in_fan_out = note != files.config.end() && note->is_boolean() && note->get<bool>();
  const auto prefix = "." + tensor_prefix(files);
  for (const auto& [key, file] : files.tensors) {
    if (key.compare(0, std::string(kModelPrefix).size(), kModelPrefix) == 0) continue;  // of no module
    const auto at = key.rfind(prefix);
    std::string path;
    if (at != std::string::npos && at > 0) {
      note_tensor(hints.factors[key.substr(0, at)], key.substr(at + 1), file.tensor);
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
