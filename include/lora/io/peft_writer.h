#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/ops/zeros.h>
#include <lora/detail/error.h>
#include <lora/detail/finite.h>
#include <lora/inject/model_adapters.h>
#include <lora/io/lora_config_json.h>
#include <lora/io/peft_files.h>
#include <lora/io/peft_layout.h>
#include <lora/methods/lora.h>
#include <lora/version.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// An adapter on one module as PEFT stores it: ΔW = s·B·A over the whole weight, s by rank and alpha.
struct StoredFactors {
  const Site* site = nullptr;
  const WeightAdapter* updates = nullptr;
  int64_t rank = 0;
  double alpha = 0;
};

inline int64_t total_rank(const WeightAdapter& adapter) {
  int64_t rank = 0;
  for (const auto& part : adapter.parts) rank += static_cast<const LoraUpdate&>(*part.update).rank();
  return rank;
}

/// The parts' factors as one pair of the given rank: A stacked by rows, B with a block a part and zeros elsewhere, so
/// that B·A is the same ΔW exactly.
inline std::pair<at::Tensor, at::Tensor> stack_parts(const WeightAdapter& adapter, int64_t rows, int64_t rank) {
  const auto first = adapter.parts.front().update->low_rank();
  auto A = at::zeros({rank, first.A.size(1)}, first.A.options().requires_grad(false));
  auto B = at::zeros({rows, rank}, first.B.options().requires_grad(false));
  int64_t done = 0;
  for (const auto& part : adapter.parts) {
    const auto factors = part.update->low_rank();
    const auto r = factors.A.size(0);
    A.narrow(0, done, r).copy_(factors.A.detach());
    B.narrow(0, part.begin, factors.B.size(0)).narrow(1, done, r).copy_(factors.B.detach());
    done += r;
  }
  return {A, B};
}

/// Writes one adapter as a PEFT directory.
class PeftWriter {
 public:
  PeftWriter(const ModelAdapters& adapters, const std::string& name)
      : adapters_(adapters),
        name_(name),
        method_(std::dynamic_pointer_cast<const LoRA>(adapters.adapter(name).method)) {
    TORCH_CHECK_VALUE(method_ != nullptr, "[lora::save] found an adapter of type ",
                      adapters.adapter(name).method->peft_type(), ", expected LORA");
    collect();
    check_finite();
  }

  void write(const std::string& directory) const { write_peft_directory(files(), directory); }

  PeftFiles files() const {
    const c10::NoGradGuard no_grad;
    PeftFiles files;
    files.config = config();
    for (const auto& [key, tensor] : tensors()) files.tensors[kPeftPrefix + key] = tensor;
    if (needs_own_config_) files.own_config = own_config();
    return files;
  }

 private:
  std::vector<std::pair<std::string, at::Tensor>> tensors() const {
    std::vector<std::pair<std::string, at::Tensor>> result;
    std::vector<const Site*> updated;
    for (const auto& factors : stored_) {
      const auto& site = *factors.site;
      updated.push_back(&site);
      const auto [A, B] = stack_parts(*factors.updates, site.base_matrix().size(0), factors.rank);
      result.emplace_back(PeftKeys::A(site), A.reshape(PeftKeys::sizes_of_A(site, factors.rank)));
      result.emplace_back(PeftKeys::B(site), B.reshape(PeftKeys::sizes_of_B(site, factors.rank)));
    }
    const PeftKeys keys(updated);
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
    const auto weight = std::find_if(stored_.begin(), stored_.end(), [&](const StoredFactors& factors) {
      return factors.site->module_path == bias.module_path;
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
      if (updates == nullptr) continue;
      columns_ = columns_ || (site.layout == WeightLayout::kColumns && !updates->parts.empty());
      if (updates->parts.empty()) continue;
      TORCH_CHECK_VALUE(!peft_module(site).empty(),
                        "[lora::save] found a layer as the model itself, expected a module that holds it: PEFT's files "
                        "name each layer by its path");
      const auto rank = total_rank(*updates);
      stored_.push_back({&site, updates, rank, 0});
      needs_own_config_ = needs_own_config_ || !updates->parts.front().name.empty();
    }
    // PEFT has one rank for both weights of a MultiheadAttention: the smaller one is filled up with zeros.
    for (auto& factors : stored_) {
      for (const auto& other : stored_) {
        if (peft_module(*other.site) == peft_module(*factors.site)) factors.rank = std::max(factors.rank, other.rank);
      }
      factors.alpha = alpha_for(factors);
      needs_own_config_ = needs_own_config_ || factors.rank != total_rank(*factors.updates);
    }
    for (const auto& factors : stored_) {
      for (const auto& other : stored_) {
        const auto module = peft_module(*factors.site);
        TORCH_CHECK_VALUE(peft_module(*other.site) != module || same(other.alpha, factors.alpha),
                          "[lora::save] found different scalings on the weights of ", module,
                          ", expected one: PEFT has one rank and one alpha for a MultiheadAttention; choose "
                          "alpha_pattern so that alpha / rank are equal");
      }
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

  /// The alpha that gives the update's scaling at the stored rank.
  double alpha_for(const StoredFactors& factors) const {
    const auto& update = static_cast<const LoraUpdate&>(*factors.updates->parts.front().update);
    const auto names = names_of(*factors.site);
    const auto divisor = [&](int64_t rank) {
      return method_->config().use_rslora() ? std::sqrt(static_cast<double>(rank)) : static_cast<double>(rank);
    };
    // Modules written with LoRALinear may have other configurations than the first one of the name.
    const bool as_configured = update.rank() == method_->rank(names) && update.scaling() == method_->scaling(names);
    const double alpha = as_configured ? method_->alpha(names) : update.scaling() * divisor(update.rank());
    return factors.rank == update.rank() ? alpha : alpha * divisor(factors.rank) / divisor(update.rank());
  }

  Json config() const {
    auto json = lora_config_json(method_->config());
    json.erase("fused_parts");
    json["fan_in_fan_out"] = method_->config().fan_in_fan_out() || columns_;
    if (!as_configured()) {
      const auto rank = [](const StoredFactors& f) { return static_cast<double>(f.rank); };
      const auto alpha = [](const StoredFactors& f) { return f.alpha; };
      json["r"] = stored_.front().rank;
      json["lora_alpha"] = number(stored_.front().alpha);
      json["rank_pattern"] = pattern(rank);
      json["alpha_pattern"] = pattern(alpha);
    }
    if (names_fit()) {
      if (method_->config().target_modules().kind() == TargetModules::Kind::kList) {
        json["target_modules"] = Json::array();
        for (const auto& entry : method_->config().target_modules().entries())
          json["target_modules"].push_back(entry.name);
      }
    } else {
      for (const auto* key : {"exclude_modules", "layers_to_transform", "layers_pattern"}) json[key] = nullptr;
      json["target_modules"] = Json::array();
      for (const auto& factors : stored_) {
        const auto module = peft_module(*factors.site);
        auto& list = json["target_modules"];
        if (std::find(list.begin(), list.end(), module) == list.end()) list.push_back(module);
      }
    }
    return json;
  }

  /// Whether the configuration gives every stored rank and alpha to a reader that knows modules by PEFT's names.
  bool as_configured() const {
    return std::all_of(stored_.begin(), stored_.end(), [&](const StoredFactors& factors) {
      const std::vector<std::string> names{peft_module(*factors.site)};
      return method_->rank(names) == factors.rank && method_->alpha(names) == factors.alpha;
    });
  }

  Json own_config() const {
    auto json = lora_config_json(method_->config());
    if (method_->config().target_if() || method_->config().target_script_if()) {
      // A predicate cannot be written down: the modules that it chose can.
      json["target_modules"] = Json::array();
      for (const auto& factors : stored_) {
        std::string parts;
        for (const auto& part : factors.updates->parts) parts += (parts.empty() ? "" : ",") + part.name;
        json["target_modules"].push_back(factors.site->path + (parts.empty() ? "" : "[" + parts + "]"));
      }
    }
    return json;
  }

  /// Whether the user's target_modules choose exactly the adapted modules, read by PEFT's rules, which know no module
  /// that is passed over.
  bool names_fit() const {
    const auto& config = method_->config();
    const auto& targets = config.target_modules();
    if (config.target_if() || config.target_script_if() || targets.empty() ||
        targets.kind() == TargetModules::Kind::kAllLinear) {
      return false;
    }
    const auto targeting = config.targeting();
    const auto chosen = [&](const std::string& path) {
      const auto any = [&](const TargetModules& modules, const auto& accept) {
        return std::any_of(modules.entries().begin(), modules.entries().end(),
                           [&](const auto& entry) { return modules.matches(entry, path) && accept(entry); });
      };
      const bool targeted = any(targets, [&](const auto& entry) {
        return targeting.layers.empty() || entry.name == path || targeting.layers.contains_in_peft(path);
      });
      const bool excluded = any(config.exclude_modules(), [](const auto&) { return true; });
      const bool saved = std::any_of(config.modules_to_save().begin(), config.modules_to_save().end(),
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

  /// The entries of rank_pattern or alpha_pattern for the modules that differ from the first one.
  template <class Value>
  Json pattern(const Value& value) const {
    auto json = Json::object();
    const auto common = value(stored_.front());
    for (const auto& factors : stored_) {
      const auto module = peft_module(*factors.site);
      const auto last = module.substr(module.rfind('.') + 1);
      bool uniform = true;
      for (const auto& other : stored_) {
        const auto other_module = peft_module(*other.site);
        const bool same_name = other_module.substr(other_module.rfind('.') + 1) == last;
        uniform = uniform && (!same_name || value(other) == value(factors));
      }
      if (value(factors) != common) json[uniform ? escaped(last) : "^" + escaped(module)] = number(value(factors));
    }
    return json;
  }

  const ModelAdapters& adapters_;
  std::string name_;
  std::shared_ptr<const LoRA> method_;
  std::vector<StoredFactors> stored_;
  bool needs_own_config_ = false;
  bool columns_ = false;  // some weight is [in, out]
};

}  // namespace detail
LORA_NAMESPACE_END
