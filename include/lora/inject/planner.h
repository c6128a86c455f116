#pragma once

#include <c10/util/Exception.h>
#include <lora/config/targets.h>
#include <lora/inject/copy_planner.h>
#include <lora/inject/nearest_names.h>
#include <lora/inject/plan.h>
#include <lora/inject/site.h>
#include <lora/version.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// Chooses the sites for a configuration. Throws one c10::ValueError with every problem.
class Planner {
 public:
  Planner(const ModelSites& model, const Targeting& targeting, Unmatched unmatched)
      : model_(model), targeting_(targeting), unmatched_(unmatched), chosen_(model.sites.size()) {}

  Plan plan() {
    if (targeting_.modules.empty() && !targeting_.predicate && !targeting_.script_predicate) {
      problems_.push_back("found no target, expected target_modules or target_if; candidates: " + candidates());
    }
    if (targeting_.modules.kind() == TargetModules::Kind::kAllLinear) {
      add_all_linear();
    } else {
      for (const auto& entry : targeting_.modules.entries()) add_entry(entry);
    }
    if (targeting_.predicate || targeting_.script_predicate) add_predicate();
    check_exclusions();
    for (size_t i = 0; i < chosen_.size(); ++i) resolve(i);
    CopyPlanner(model_, targeting_, unmatched_, plan_, problems_).plan();
    if (problems_.empty() && plan_.sites.empty()) {
      problems_.push_back("found no module to adapt, expected at least one; candidates: " + candidates());
    }
    if (!problems_.empty()) {
      if (!model_.unreachable.empty()) problems_.push_back(model_.unreachable);
      std::string message;
      for (const auto& problem : problems_) message += (message.empty() ? "" : "\n") + ("[lora::inject] " + problem);
      TORCH_CHECK_VALUE(false, message);
    }
    return std::move(plan_);
  }

 private:
  struct Choice {
    bool whole = false;
    std::vector<std::string> parts;
  };

  template <class Matches>
  static bool any_name(const Site& site, const Matches& matches) {
    return matches(site.path) || std::any_of(site.aliases.begin(), site.aliases.end(), matches);
  }

  /// A MultiheadAttention that is excluded as a whole, by PEFT's name for it, is so with its out_proj.
  bool excludes(const TargetModules::Entry& entry, const Site& site) const {
    const auto names = [&](const std::string& path) { return targeting_.exclude.matches(entry, path); };
    return any_name(site, names) || names(site.module_path) || names(peft_module(site));
  }

  /// A module that the adapter has a copy of takes no update, as in PEFT.
  bool excluded(const Site& site) const {
    const auto& entries = targeting_.exclude.entries();
    const auto& saved = targeting_.modules_to_save;
    return std::any_of(entries.begin(), entries.end(), [&](const auto& entry) { return excludes(entry, site); }) ||
           std::any_of(saved.begin(), saved.end(), [&](const auto& name) { return saves(name, site); });
  }

  bool excluded(const OtherModule& other) const {
    const auto& entries = targeting_.exclude.entries();
    return std::any_of(entries.begin(), entries.end(),
                       [&](const auto& entry) { return targeting_.exclude.matches(entry, other.path); });
  }

  /// An exclusion that names nothing is as likely a typing error as a target that does.
  void check_exclusions() {
    for (const auto& entry : targeting_.exclude.entries()) {
      const bool found = std::any_of(model_.sites.begin(), model_.sites.end(),
                                     [&](const auto& site) { return excludes(entry, site); }) ||
                         std::any_of(model_.others.begin(), model_.others.end(), [&](const auto& other) {
                           return other.has_parameters && targeting_.exclude.matches(entry, other.path);
                         });
      if (found) continue;
      const auto reason = "found no module for \"" + entry.text + "\" in exclude_modules";
      if (unmatched_ == Unmatched::kNote) {
        plan_.notes.push_back(reason);
      } else {
        problems_.push_back(reason + ", expected at least one with a weight; nearest: " + nearest(entry.name));
      }
    }
  }

  void choose(size_t index, const std::vector<std::string>& parts) {
    auto& choice = chosen_[index];
    if (parts.empty()) choice.whole = true;
    for (const auto& part : parts) {
      if (std::find(choice.parts.begin(), choice.parts.end(), part) == choice.parts.end()) choice.parts.push_back(part);
    }
  }

  void add_all_linear() {
    Plan::Entry result{targeting_.modules.entries().front().text, {}};
    for (size_t i = 0; i < model_.sites.size(); ++i) {
      const auto& site = model_.sites[i];
      if (!site.is_linear || excluded(site)) continue;
      if (site.tied_to_embedding) {
        plan_.notes.push_back(site.path + " is left out of all-linear: its weight is tied to " + site.tied_to);
        continue;
      }
      choose(i, {});
      result.sites.push_back(i);
    }
    plan_.entries.push_back(std::move(result));
  }

  void add_predicate() {
    Plan::Entry result{"target_if", {}};
    for (size_t i = 0; i < model_.sites.size(); ++i) {
      const auto& site = model_.sites[i];
      if (!site.takes_updates() || excluded(site) || !site.predicate(targeting_, site.path)) continue;
      choose(i, {});
      result.sites.push_back(i);
    }
    if (result.sites.empty() && unmatched_ == Unmatched::kError) {
      problems_.push_back("found no module for which target_if holds, expected at least one; candidates: " +
                          candidates());
    }
    plan_.entries.push_back(std::move(result));
  }

  void add_entry(const TargetModules::Entry& entry) {
    Plan::Entry result{entry.text, {}};
    size_t left_out = 0, in_other_layers = 0;
    for (size_t i = 0; i < model_.sites.size(); ++i) {
      const auto& site = model_.sites[i];
      if (!site.takes_updates()) continue;
      // PEFT names a MultiheadAttention as a whole; then the name of the module stands for its weights.
      const bool by_attention = entry.parts.empty() || !site.parts.empty();
      const auto reached = [&](const auto& names) {
        return any_name(site, names) || (by_attention && names(peft_module(site)));
      };
      if (!reached([&](const std::string& path) { return targeting_.modules.matches(entry, path); })) continue;
      const bool in_layers =
          targeting_.layers.empty() || reached([&](const std::string& path) {
            return targeting_.modules.matches(entry, path) && (path == entry.name || targeting_.layers.contains(path));
          });
      if (!in_layers) {
        ++in_other_layers;
        continue;
      }
      if (excluded(site)) {
        ++left_out;
        continue;
      }
      choose(i, entry.parts);
      result.sites.push_back(i);
    }
    const bool reached_others = check_others(entry, result);
    if (result.sites.empty() && !reached_others) {
      const auto reason =
          left_out > 0 ? "found every module of the target \"" + entry.text + "\" in exclude_modules or modules_to_save"
          : in_other_layers > 0
              ? "found every module of the target \"" + entry.text + "\" outside of layers_to_transform"
              : "found no module for the target \"" + entry.text + "\"";
      if (unmatched_ == Unmatched::kNote) {
        plan_.notes.push_back(reason);
      } else {
        problems_.push_back(reason + ", expected at least one to adapt; nearest: " + nearest(entry.name));
      }
    }
    plan_.entries.push_back(std::move(result));
  }

  /// Names the modules of the entry that cannot take an adapter, and says whether there were any; containers beside
  /// modules that can are passed over.
  bool check_others(const TargetModules::Entry& entry, const Plan::Entry& result) {
    bool found = false;
    for (const auto& other : model_.others) {
      if (!targeting_.modules.matches(entry, other.path) || excluded(other)) continue;
      if (result.sites.empty() || other.has_parameters) {
        problems_.push_back("found " + other.type + " at " + other.path + " for the target \"" + entry.text + "\"" +
                            (other.reason.empty()
                                 ? ", expected a Linear, MultiheadAttention, Embedding, convolution, Bilinear or a "
                                   "registered host; choose another target, or make the type known by "
                                   "lora::register_host"
                                 : ", " + other.reason));
        found = true;
      }
    }
    return found;
  }

  /// Turns the choice for one site into row ranges.
  void resolve(size_t index) {
    const auto& choice = chosen_[index];
    const auto& site = model_.sites[index];
    if (!choice.whole && choice.parts.empty()) return;
    if (choice.whole && !choice.parts.empty()) {
      problems_.push_back("found both the whole weight and parts of it as targets, expected one of them at " +
                          site.path);
      return;
    }
    if (!site.refusal.empty()) {
      problems_.push_back("found " + site.path + ", " + site.refusal);
      return;
    }
    const auto weight = site.base_matrix();
    if (weight.dim() != 2 || !weight.is_floating_point()) {
      problems_.push_back("found a weight of " + std::to_string(weight.dim()) + " dimensions and type " +
                          std::string(c10::toString(weight.scalar_type())) +
                          ", expected a floating-point matrix [out, in] at " + site.path);
      return;
    }
    if (weight.is_inference()) {
      problems_.push_back("found a weight made in InferenceMode, expected one that gradients can pass at " + site.path +
                          "; make or load the model outside of InferenceMode");
      return;
    }
    if (!site.tied_to.empty()) {
      plan_.notes.push_back(site.path + " is tied to " + site.tied_to +
                            ": the adapter changes this use of the weight only");
    }
    if (site.is_multiplied) {
      plan_.notes.push_back(site.path +
                            " is multiplied with as well, as by a tied head: the adapter changes lookups only");
    }
    PlannedSite planned{index, {}};
    if (choice.whole) {
      planned.parts.push_back({"", 0, weight.size(0)});
    } else {
      resolve_parts(site, weight.size(0), choice.parts, planned.parts);
    }
    plan_.sites.push_back(std::move(planned));
  }

  void resolve_parts(const Site& site, int64_t rows, const std::vector<std::string>& names,
                     std::vector<PlannedPart>& planned) {
    const auto declared = declared_parts(site, rows);
    int64_t sum = 0;
    for (const auto& part : declared) sum += part.size;
    if (sum != rows) {
      problems_.push_back("found " + std::to_string(rows) + " rows, expected " +
                          (declared.empty() ? std::string("three equal thirds q, k, v") : std::to_string(sum)) +
                          " at " + site.path + "; declare its row ranges by fused_parts");
      return;
    }
    size_t found = 0;
    int64_t begin = 0;
    for (const auto& part : declared) {
      if (std::find(names.begin(), names.end(), part.name) != names.end()) {
        planned.push_back({part.name, begin, part.size});
        ++found;
      }
      begin += part.size;
    }
    if (found == names.size()) return;
    std::string known;
    for (const auto& part : declared) known += (known.empty() ? "" : ", ") + part.name;
    for (const auto& name : names) {
      const bool is_known =
          std::any_of(declared.begin(), declared.end(), [&](const auto& p) { return p.name == name; });
      if (!is_known)
        problems_.push_back("found the part \"" + name + "\", expected one of " + known + " at " + site.path);
    }
  }

  std::vector<FusedPart> declared_parts(const Site& site, int64_t rows) const {
    for (const auto& [name, parts] : targeting_.fused_parts) {
      const auto& wanted = name;
      if (any_name(site, [&](const std::string& path) { return TargetModules::is_path_or_suffix(wanted, path); })) {
        return parts;
      }
    }
    if (!site.parts.empty()) return site.parts;
    if (rows % 3 == 0) return {{"q", rows / 3}, {"k", rows / 3}, {"v", rows / 3}};
    return {};
  }

  std::string candidates() const {
    std::vector<std::string> names;
    for (const auto& site : model_.sites) {
      if (!site.takes_updates()) continue;
      const auto name = site.path.substr(site.path.rfind('.') + 1);
      if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
    }
    return listed(names);
  }

  std::string nearest(const std::string& wanted) const {
    std::vector<std::string> paths;
    for (const auto& site : model_.sites) {
      if (site.takes_updates()) paths.push_back(site.path);
    }
    return listed(nearest_names(wanted, paths));
  }

  static std::string listed(const std::vector<std::string>& names) {
    std::string text;
    for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
    return text.empty() ? "none (the model has no layer of a known type)" : text;
  }

  const ModelSites& model_;
  const Targeting& targeting_;
  Unmatched unmatched_;
  std::vector<Choice> chosen_;
  std::vector<std::string> problems_;
  Plan plan_;
};

}  // namespace detail
LORA_NAMESPACE_END
