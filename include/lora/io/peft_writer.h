#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/ops/zeros.h>
#include <lora/detail/error.h>
#include <lora/detail/finite.h>
#include <lora/inject/model_adapters.h>
#include <lora/io/method_registry.h>
#include <lora/io/peft_files.h>
#include <lora/io/peft_layout.h>
#include <lora/io/stored_ranks.h>
#include <lora/methods/lora.h>
#include <lora/version.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// Writes one adapter as a PEFT directory.
class PeftWriter {
 public:
  PeftWriter(const ModelAdapters& adapters, const std::string& name)
      : adapters_(adapters), name_(name), method_(adapters.adapter(name).method) {
    const auto* entry = MethodRegistry::instance().find(method_->peft_type());
    TORCH_CHECK_VALUE(entry != nullptr, "[lora::save] found an adapter of type ", method_->peft_type(),
                      ", expected one of ", MethodRegistry::instance().known(), "; see lora::register_method");
    config_ = entry->config_of(*method_);
    collect();
    check_finite();
  }

  void write(const std::string& directory) const { write_peft_directory(files(), directory); }

  PeftFiles files() const {
    const c10::NoGradGuard no_grad;
    PeftFiles files;
    files.config = config();
    for (const auto& [key, tensor] : tensors()) files.tensors[kPeftPrefix + key] = tensor;
    if (!updated_.empty()) {
      const auto& update = *updated_.front().updates->parts.front().update;
      for (const auto& [key, tensor] : method_->store_shared(update)) files.tensors[key] = tensor;
    }
    if (needs_own_config_) files.own_config = own_config();
    return files;
  }

 private:
  /// A weight with an update of the adapter.
  struct Updated {
    const Site* site;
    const WeightAdapter* updates;
  };

  std::vector<std::pair<std::string, at::Tensor>> tensors() const {
    std::vector<std::pair<std::string, at::Tensor>> result;
    std::vector<const Site*> sites;
    for (const auto& [site, updates] : updated_) {
      sites.push_back(site);
      const auto rank = ranks_ ? ranks_->filled(*site) : 0;
      for (auto& [name, tensor] : method_->store(updates->parts, stored_weight(*site, rank))) {
        result.emplace_back(join_path(site->file_path, name), std::move(tensor));
      }
    }
    const PeftKeys keys(sites);
    for (const auto& site : adapters_.sites()) {
      const auto* adapter = site.find(name_);
      if (adapter == nullptr) continue;
      if (adapter->copy.defined()) result.emplace_back(keys.copy(site), adapter->copy);
      if (adapter->rows.defined() && !adapter->rows_tied) {
        result.emplace_back(PeftKeys::rows(site), adapter->rows.values);
      }
      if (!adapter->offsets.empty()) result.push_back(bias_of_B(site, *adapter));
    }
    return result;
  }

  /// The bias of B as one vector of the whole bias, zeros where it has no part.
  std::pair<std::string, at::Tensor> bias_of_B(const Site& bias, const WeightAdapter& adapter) const {
    const auto weight = std::find_if(updated_.begin(), updated_.end(), [&](const Updated& updated) {
      return updated.site->module_path == bias.module_path;
    });
    auto values = at::zeros({weight->site->base_matrix().size(0)}, adapter.offsets.front().values.options());
    for (const auto& offset : adapter.offsets) {
      values.narrow(0, offset.begin, offset.values.size(0)).copy_(offset.values);
    }
    return {PeftKeys::bias_of_B(*weight->site), values};
  }

  void collect() {
    for (const auto& site : adapters_.sites()) {
      const auto* updates = site.find(name_);
      if (updates == nullptr || updates->parts.empty()) continue;
      TORCH_CHECK_VALUE(!peft_module(site).empty(),
                        "[lora::save] found a layer as the model itself, expected a module that holds it: PEFT's files "
                        "name each layer by its path");
      columns_ = columns_ || site.layout == WeightLayout::kColumns;
      needs_own_config_ = needs_own_config_ || !updates->parts.front().name.empty();
      updated_.push_back({&site, updates});
    }
    for (const auto* key : method_->keys_unknown_to_peft()) {
      const bool is_bias = key == std::string("bias") && method_->targeting().bias != BiasCopies::kNone;
      needs_own_config_ = needs_own_config_ || is_bias;
    }
    if (const auto* lora = dynamic_cast<const LoRA*>(method_.get())) {
      ranks_ = StoredRanks(*lora);
      for (const auto& [site, updates] : updated_) ranks_->add(*site, *updates);
      ranks_->settle();
      needs_own_config_ = needs_own_config_ || ranks_->fills() || ranks_->has_starts();
    }
  }

  /// A run that diverged must not replace a good file.
  void check_finite() const {
    std::string problems;
    for (const auto& site : adapters_.sites()) {
      const auto* adapter = site.find(name_);
      if (adapter == nullptr) continue;
      for (const auto& [child, named] : adapter->tensors()) {
        if (all_finite(named.tensor)) continue;
        problems += (problems.empty() ? "" : "\n") + ("[lora::save] found NaN or infinite values in " + named.name) +
                    ", expected finite ones at " + join_path(site.module_path, child) + "; nothing was written";
      }
    }
    TORCH_CHECK_VALUE(problems.empty(), problems);
  }

  Json config() const {
    auto json = config_->json();
    json.erase("fused_parts");
    json["fan_in_fan_out"] = config_->options().fan_in_fan_out() || columns_;
    if (ranks_) ranks_->write(json);
    if (names_fit()) {
      if (targets().kind() == TargetModules::Kind::kList) {
        json["target_modules"] = Json::array();
        for (const auto& entry : targets().entries()) json["target_modules"].push_back(entry.name);
      }
    } else {
      for (const auto* key : {"exclude_modules", "layers_to_transform", "layers_pattern"}) json[key] = nullptr;
      json["target_modules"] = Json::array();
      for (const auto& updated : updated_) {
        const auto module = peft_module(*updated.site);
        auto& list = json["target_modules"];
        if (std::find(list.begin(), list.end(), module) == list.end()) list.push_back(module);
      }
    }
    for (const auto* key : method_->keys_unknown_to_peft()) json.erase(key);
    return json;
  }

  Json own_config() const {
    auto json = config_->json();
    if (has_predicate()) {
      // A predicate cannot be written down: the modules that it chose can.
      json["target_modules"] = Json::array();
      for (const auto& [site, updates] : updated_) {
        std::string parts;
        for (const auto& part : updates->parts) parts += (parts.empty() ? "" : ",") + part.name;
        json["target_modules"].push_back(site->path + (parts.empty() ? "" : "[" + parts + "]"));
      }
    }
    return json;
  }

  const TargetModules& targets() const { return method_->targeting().modules; }
  bool has_predicate() const { return method_->targeting().predicate || method_->targeting().script_predicate; }

  /// Whether the user's target_modules choose exactly the adapted modules, read by PEFT's rules, which know no module
  /// that is passed over.
  bool names_fit() const {
    const auto& targeting = method_->targeting();
    if (has_predicate() || targets().empty() || targets().kind() == TargetModules::Kind::kAllLinear) return false;
    for (const auto* key : method_->keys_unknown_to_peft()) {
      if (key == std::string("layers_to_transform") && !targeting.layers.empty()) return false;
      if (key == std::string("exclude_modules") && !targeting.exclude.empty()) return false;
    }
    const auto chosen = [&](const std::string& path) {
      const auto any = [&](const TargetModules& modules, const auto& accept) {
        return std::any_of(modules.entries().begin(), modules.entries().end(),
                           [&](const auto& entry) { return modules.matches(entry, path) && accept(entry); });
      };
      const bool targeted = any(targets(), [&](const auto& entry) {
        return targeting.layers.empty() || entry.name == path || targeting.layers.contains_in_peft(path);
      });
      const bool excluded = any(targeting.exclude, [](const auto&) { return true; });
      const bool saved = std::any_of(targeting.modules_to_save.begin(), targeting.modules_to_save.end(),
                                     [&](const auto& name) { return saves(name, path); });
      return targeted && !excluded && !saved;
    };
    for (const auto& site : adapters_.sites()) {
      const auto* adapter = site.find(name_);
      const bool adapted = adapter != nullptr && !adapter->parts.empty();
      if (site.takes_updates() && adapted != chosen(peft_module(site))) return false;
    }
    const auto& others = adapters_.others();
    return std::none_of(others.begin(), others.end(),
                        [&](const auto& other) { return !other.path.empty() && chosen(other.path); });
  }

  const ModelAdapters& adapters_;
  std::string name_;
  std::shared_ptr<const Method> method_;
  std::shared_ptr<AnyConfig> config_;
  std::vector<Updated> updated_;
  std::optional<StoredRanks> ranks_;  // of LoRA
  bool needs_own_config_ = false;
  bool columns_ = false;  // some weight is [in, out]
};

}  // namespace detail
LORA_NAMESPACE_END
