#pragma once

#include <lora/config/targets.h>
#include <lora/inject/nearest_names.h>
#include <lora/inject/plan.h>
#include <lora/inject/site.h>
#include <lora/version.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// Whether a module at or above a site is called `name`: its whole path, or its end behind a dot.
inline bool saves(const std::string& name, const std::string& module_path) {
  for (size_t end = module_path.size(); end != std::string::npos && end > 0; end = module_path.rfind('.', end - 1)) {
    if (TargetModules::is_path_or_suffix(name, module_path.substr(0, end))) return true;
  }
  return false;
}

inline bool saves(const std::string& name, const Site& site) { return saves(name, site.module_path); }

/// Adds to a plan what an adapter has copies of: whole modules, biases, rows of embeddings; and the biases of its
/// updates.
class CopyPlanner {
 public:
  CopyPlanner(const ModelSites& model, const Targeting& targeting, Unmatched unmatched, Plan& plan,
              std::vector<std::string>& problems)
      : model_(model), targeting_(targeting), unmatched_(unmatched), plan_(plan), problems_(problems) {}

  void plan() {
    for (const auto& name : targeting_.modules_to_save) add_module(name);
    if (targeting_.bias != BiasCopies::kNone) add_biases();
    if (targeting_.update_bias) add_offsets();
    if (targeting_.scales_bias) add_scales();
    for (const auto& [name, ids] : targeting_.tokens.embeddings()) add_rows(name, ids);
  }

 private:
  const Site& site(size_t index) const { return model_.sites[index]; }

  bool is_copied(size_t index) const {
    return std::find(plan_.copies.begin(), plan_.copies.end(), index) != plan_.copies.end();
  }

  const PlannedSite* update_of(size_t index) const {
    for (const auto& planned : plan_.sites) {
      if (planned.site == index) return &planned;
    }
    return nullptr;
  }

  void unmatched(const std::string& found, const std::string& expected) {
    if (unmatched_ == Unmatched::kNote) {
      plan_.notes.push_back(found);
    } else {
      problems_.push_back(found + ", expected " + expected);
    }
  }

  void add_module(const std::string& name) {
    Plan::Entry entry{"modules_to_save \"" + name + "\"", {}};
    for (size_t i = 0; i < model_.sites.size(); ++i) {
      if (!saves(name, site(i)) || !site(i).base().defined()) continue;
      add_copy(i, entry);
    }
    for (const auto& path : model_.hidden) {
      const auto dot = path.rfind('.');
      if (dot == std::string::npos || !saves(name, path.substr(0, dot))) continue;
      problems_.push_back("found the parameter " + path + " of a type that is not known for modules_to_save \"" + name +
                          "\", expected parameters whose members are; make it known by lora::register_parameter");
    }
    if (entry.sites.empty() && problems_.empty()) {
      std::vector<std::string> modules;
      for (const auto& site : model_.sites) modules.push_back(site.module_path);
      for (const auto& path : model_.hidden) modules.push_back(path.substr(0, path.rfind('.')));
      std::string nearest;
      for (const auto& near : nearest_names(name, modules)) nearest += (nearest.empty() ? "" : ", ") + near;
      unmatched("found no module for \"" + name + "\" in modules_to_save",
                "at least one with parameters; nearest: " + nearest);
      if (unmatched_ == Unmatched::kNote) return;
    }
    plan_.entries.push_back(std::move(entry));
  }

  void add_copy(size_t index, Plan::Entry& entry) {
    const auto& path = site(index).path;
    if (!site(index).refusal.empty()) {
      problems_.push_back("found " + path + ", " + site(index).refusal);
      return;
    }
    if (!is_copied(index)) plan_.copies.push_back(index);
    entry.sites.push_back(index);
    if (!site(index).tied_to.empty()) {
      plan_.notes.push_back(path + " is tied to " + site(index).tied_to +
                            ": the adapter's copy stands for this use of it only");
    }
  }

  void add_biases() {
    const bool all = targeting_.bias == BiasCopies::kAll;
    Plan::Entry entry{all ? "bias \"all\"" : "bias \"lora_only\"", {}};
    for (size_t i = 0; i < model_.sites.size(); ++i) {
      if (site(i).parameter != "bias" || site(i).is_buffer || !site(i).base().defined()) continue;
      const bool adapted = std::any_of(plan_.sites.begin(), plan_.sites.end(), [&](const PlannedSite& planned) {
        return site(planned.site).module_path == site(i).module_path;
      });
      if (!all && !adapted) continue;
      if (is_copied(i)) continue;  // with its module
      add_copy(i, entry);
    }
    for (const auto& path : model_.hidden) {
      if (!all || !TargetModules::is_path_or_suffix("bias", path)) continue;
      unmatched("found the parameter " + path + " of a type that is not known for bias \"all\"",
                "parameters whose members are; make it known by lora::register_parameter");
    }
    plan_.entries.push_back(std::move(entry));
  }

  /// The bias beside a weight: "bias", "in_proj_bias".
  std::size_t bias_of(const Site& weight) const {
    auto name = weight.parameter;
    const std::string kind = "weight";
    const auto at = name.rfind(kind);
    name = at == std::string::npos ? "bias" : name.replace(at, kind.size(), "bias");
    return find_bias(weight, name);
  }

  std::size_t find_bias(const Site& weight, const std::string& name) const {
    for (size_t i = 0; i < model_.sites.size(); ++i) {
      if (site(i).module_path == weight.module_path && site(i).parameter == name && !site(i).takes_updates()) return i;
    }
    return model_.sites.size();
  }

  void add_offsets() {
    for (const auto& planned : plan_.sites) {
      const auto& weight = site(planned.site);
      const auto bias = bias_of(weight);
      if (weight.layout == WeightLayout::kTable || bias == model_.sites.size()) {
        problems_.push_back("found no bias at " + weight.path +
                            ", expected a layer that can have one for lora_bias; choose other targets");
        continue;
      }
      for (const auto& part : planned.parts) {
        plan_.offsets.push_back({bias, planned.site, part.name, part.begin, part.size});
      }
    }
  }

  void add_scales() {
    for (const auto& planned : plan_.sites) {
      const auto& weight = site(planned.site);
      auto bias = bias_of(weight);
      int64_t begin = 0;
      if (bias == model_.sites.size()) {  // a MultiheadAttention has one bias for its three weights
        const std::vector<std::string> names{"q_proj_weight", "k_proj_weight", "v_proj_weight"};
        const auto found = std::find(names.begin(), names.end(), weight.parameter);
        if (found == names.end()) continue;
        bias = find_bias(weight, "in_proj_bias");
        begin = (found - names.begin()) * weight.base_matrix().size(0);
      }
      if (bias != model_.sites.size() && site(bias).base().defined()) {
        plan_.scales.push_back({bias, planned.site, begin});
      }
    }
  }

  /// The embedding that a model reads its tokens by, where there is no doubt.
  std::vector<size_t> input_embeddings() const {
    std::vector<size_t> all, named, tied;
    for (size_t i = 0; i < model_.sites.size(); ++i) {
      if (site(i).layout != WeightLayout::kTable) continue;
      all.push_back(i);
      if (TargetModules::is_path_or_suffix("embed_tokens", site(i).path)) named.push_back(i);
      if (!tied_matrices(i).empty()) tied.push_back(i);
    }
    return named.size() == 1 ? named : tied.size() == 1 ? tied : all;
  }

  std::vector<size_t> tied_matrices(size_t index) const {
    const auto table = site(index).base();
    std::vector<size_t> tied;
    for (size_t i = 0; i < model_.sites.size(); ++i) {
      if (i == index || site(i).layout != WeightLayout::kRows) continue;
      const auto other = site(i).base();
      if (other.sizes() == table.sizes() && other.const_data_ptr() == table.const_data_ptr()) tied.push_back(i);
    }
    return tied;
  }

  void add_rows(const std::string& name, const std::vector<int64_t>& ids) {
    std::vector<size_t> found;
    if (name.empty()) {
      found = input_embeddings();
    } else {
      for (size_t i = 0; i < model_.sites.size(); ++i) {
        const auto& candidate = site(i);
        const auto named = [&](const std::string& path) { return TargetModules::is_path_or_suffix(name, path); };
        if (candidate.layout == WeightLayout::kTable &&
            (named(candidate.path) || std::any_of(candidate.aliases.begin(), candidate.aliases.end(), named))) {
          found.push_back(i);
        }
      }
    }
    if (found.empty() || (name.empty() && found.size() > 1)) {
      problems_.push_back("found " + std::string(found.empty() ? "no Embedding" : "several Embeddings") +
                          " for trainable_token_indices" + (name.empty() ? "" : " of \"" + name + "\"") +
                          ", expected one; name it: {{\"wte\", {1, 2}}}");
      return;
    }
    for (const auto index : found) check_rows(name, index, ids);
  }

  void check_rows(const std::string& name, size_t index, const std::vector<int64_t>& ids) {
    const auto& table = site(index);
    const auto problem = [&](const std::string& text) { problems_.push_back("found " + text + " at " + table.path); };
    if (!table.refusal.empty()) return problem(table.path + ", " + table.refusal);
    if (update_of(index) != nullptr) {
      return problem("trainable_token_indices and target_modules for one embedding, expected one of them");
    }
    if (is_copied(index)) {
      return problem("trainable_token_indices and modules_to_save for one embedding, expected one of them");
    }
    const auto entries = table.base().size(0);
    for (const auto id : ids) {
      if (id >= entries) {
        problem("the token " + std::to_string(id) + ", expected one of " + std::to_string(entries) + " entries");
      }
    }
    plan_.rows.push_back({index, ids, tied_matrices(index)});
    plan_.entries.push_back({"trainable_token_indices" + (name.empty() ? "" : " \"" + name + "\""), {index}});
    for (const auto tied : plan_.rows.back().tied) {
      plan_.notes.push_back(site(tied).path + " is tied to " + table.path + ": its rows of the tokens are trained too");
    }
  }

  const ModelSites& model_;
  const Targeting& targeting_;
  Unmatched unmatched_;
  Plan& plan_;
  std::vector<std::string>& problems_;
};

}  // namespace detail
LORA_NAMESPACE_END
