#pragma once

#include <lora/inject/site.h>
#include <lora/methods/method.h>
#include <lora/version.h>

#include <cctype>
#include <cmath>
#include <cstdint>
#include <set>
#include <string>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

inline constexpr const char* kPeftPrefix = "base_model.model.";
/// The beginning of names that are of no module, as VeRA's projections'.
inline constexpr const char* kModelPrefix = "base_model.";
inline constexpr const char* kConfigFile = "adapter_config.json";
inline constexpr const char* kTensorFile = "adapter_model.safetensors";
inline constexpr const char* kPickleFile = "adapter_model.bin";
/// Metadata of the tensor file with our own configuration, where PEFT's cannot say all: parts of fused projections.
inline constexpr const char* kOwnConfig = "lora.config";
/// Metadata of the tensor file with what of PEFT's configuration the tensors' meaning depends on: a save that was
/// interrupted between the two files is found by it.
inline constexpr const char* kScalingConfig = "lora.scaling";
inline constexpr const char* kScalingKeys[] = {
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "mora_type", "projection_prng_key"};

/// Whether two scalings are equal but for the rounding of their computation.
inline bool same(double a, double b) { return std::abs(a - b) <= 1e-12 * std::abs(a); }

/// PEFT's keys, without their prefix, for what one adapter has on the sites of a model.
class PeftKeys {
 public:
  /// `updated`: the sites that the adapter has an update on.
  explicit PeftKeys(const std::vector<const Site*>& updated) {
    for (const auto* site : updated) {
      modules_.insert(site->module_file_path);
      attentions_.insert(peft_module(*site));
    }
  }

  static std::string A(const Site& site) {
    return join_path(site.file_path, is_embedding(site) ? "lora_embedding_A" : "lora_A.weight");
  }
  static std::string B(const Site& site) {
    return join_path(site.file_path, is_embedding(site) ? "lora_embedding_B" : "lora_B.weight");
  }
  static std::string bias_of_B(const Site& weight) { return join_path(weight.file_path, "lora_B.bias"); }
  static std::string rows(const Site& site) {
    return join_path(site.file_path, "token_adapter.trainable_tokens_delta");
  }

  /// PEFT keeps what a module has itself below `base_layer` where it has wrapped it.
  std::string copy(const Site& site) const {
    const bool in_attention = site.module_file_path != site.module_path;
    const bool wrapped = modules_.count(site.module_file_path) != 0 ||
                         (in_attention && attentions_.count(attention_of(site.module_file_path)) != 0);
    return wrapped ? join_path(site.module_file_path, "base_layer." + site.parameter) : site.parameter_path();
  }

 private:
  static bool is_embedding(const Site& site) { return site.layout == WeightLayout::kTable; }
  static std::string attention_of(const std::string& path) { return path.substr(0, path.rfind(".base_layer.")); }

  std::set<std::string> modules_;
  std::set<std::string> attentions_;
};

/// What a method needs to know of a site to lay its tensors out; `rank` as in StoredWeight.
inline StoredWeight stored_weight(const Site& site, int64_t rank = 0) {
  const auto base = site.base().detach();
  const auto rows = site.base_matrix().size(0);
  const auto kernel = site.layout == WeightLayout::kKernel ? base.sizes().vec() : std::vector<int64_t>();
  return {BaseRows(base, site.layout, 0, rows), rows, kernel, kPeftPrefix + site.file_path + ".", rank};
}

}  // namespace detail
LORA_NAMESPACE_END
