#pragma once

#include <lora/detail/error.h>
#include <lora/inject/hosts/module_hosts.h>
#include <lora/inject/hosts/script_executor.h>
#include <lora/inject/hosts/script_hosts.h>
#include <lora/inject/model_adapters.h>
#include <lora/version.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/nn/module.h>

#include <algorithm>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// Adapters, or an acceleration alone, found in a model.
struct FoundAdapters {
  std::shared_ptr<ModelAdapters> adapters;
  std::string root;      // the path of the module that their own paths are relative to
  bool is_part = false;  // that module is around this model
};

inline void add_found(std::vector<FoundAdapters>& found, std::shared_ptr<ModelAdapters> adapters, std::string root,
                      bool is_part) {
  const bool known =
      std::any_of(found.begin(), found.end(), [&](const auto& other) { return other.adapters == adapters; });
  if (!known) found.push_back({std::move(adapters), std::move(root), is_part});
}

inline void find_adapters(const torch::nn::Module& module, const std::string& path, std::vector<FoundAdapters>& found) {
  for (const auto& child : module.named_children()) {
    const auto* node = dynamic_cast<const HostNode*>(child.value().get());
    if (node == nullptr) {
      find_adapters(*child.value(), join_path(path, child.key()), found);
      continue;
    }
    auto adapters = std::static_pointer_cast<ModelAdapters>(node->owner());
    for (const auto& site : adapters->sites()) {
      const bool here = std::any_of(site.adapters.begin(), site.adapters.end(),
                                    [&](const auto& adapter) { return adapter.node.lock().get() == node; });
      if (!here && site.acceleration.lock().get() != node) continue;
      const auto length = path.size() - std::min(path.size(), site.module_path.size());
      add_found(found, adapters, path.substr(0, length == 0 ? 0 : length - (site.module_path.empty() ? 0 : 1)),
                path.size() < site.module_path.size());
      break;
    }
  }
}

inline std::vector<FoundAdapters> find_adapters(const torch::nn::Module& model) {
  std::vector<FoundAdapters> found;
  find_adapters(model, "", found);
  return found;
}

inline std::vector<FoundAdapters> find_adapters(const torch::jit::Module& model) {
  std::vector<FoundAdapters> found;
  for (const auto& module : model.modules()) {
    for (const auto& attribute : module.named_attributes(/*recurse=*/false)) {
      if (!attribute.value.isTensor() || !attribute.value.toTensor().defined()) continue;
      const auto tensor = attribute.value.toTensor();
      if (const auto* carrier = as_carrier(tensor)) {
        add_found(found, std::static_pointer_cast<ModelAdapters>(carrier->owner()), "", false);
      } else if (auto* mark = dynamic_cast<OwnerMark*>(tensor.unsafeGetTensorImpl()->get_backend_meta())) {
        add_found(found, mark->adapters, "", false);
      }
    }
  }
  return found;
}

/// The objects of a model that references to it may have been let go of.
inline std::set<const void*> objects_of(const torch::nn::Module&) { return {}; }
inline std::set<const void*> objects_of(const torch::jit::Module& model) {
  std::set<const void*> objects;
  for (const auto& module : model.modules()) objects.insert(module._ivalue().get());
  return objects;
}

/// Throws a StateError where the adapters of several injections cannot become one set.
inline void check_joinable(const std::vector<FoundAdapters>& found) {
  std::map<std::string, bool> active;
  for (const auto& [adapters, root, is_part] : found) {
    if (!adapters->sites().front().host->takes_nodes()) {
      throw StateError(
          "[lora::adapters_of] found TorchScript adapters of several injections, expected one; inject into the whole "
          "model");
    }
    if (adapters->calls()->disabled_anywhere()) {
      throw StateError("[lora::adapters_of] found adapters disabled at " + root +
                       ", expected no DisableAdapters guard alive where adapters are joined");
    }
    if (!adapters->merged().empty()) {
      throw StateError("[lora::adapters_of] found merged adapters at " + root +
                       ", expected none; call unmerge() first");
    }
    for (const auto& adapter : adapters->adapters()) {
      const bool is_active = contains(adapters->active(), adapter.name);
      if (active.emplace(adapter.name, is_active).first->second == is_active) continue;
      throw StateError("[lora::adapters_of] found \"" + adapter.name +
                       (is_active ? "\" active at " : "\" inactive at ") + root +
                       " unlike in other layers, expected one choice for the model; call set_active there first");
    }
  }
}

/// Makes one set of adapters out of those of the modules that are written with LoRALinear, with paths from the root.
/// The old handles follow to the new set.
inline std::shared_ptr<ModelAdapters> join_adapters(std::vector<FoundAdapters> found) {
  check_joinable(found);
  auto joined = std::make_shared<ModelAdapters>(ModelSites{}, std::vector<at::Tensor>{}, nullptr);
  for (auto& part : found) joined->join(*part.adapters, part.root);
  return joined;
}

template <class Module>
std::shared_ptr<ModelAdapters> adapters_of(const Module& model) {
  auto found = find_adapters(model);
  found.erase(std::remove_if(found.begin(), found.end(),
                             [](const FoundAdapters& one) { return one.adapters->adapters().empty(); }),
              found.end());
  if (found.empty()) {
    throw StateError("[lora::adapters_of] found no adapters in the model, expected some; call lora::inject first");
  }
  const bool of_one_layer = found.front().adapters->sites().front().file_path.empty() && !found.front().root.empty();
  return found.size() == 1 && !of_one_layer ? found.front().adapters : join_adapters(std::move(found));
}

/// Throws a StateError for a model that has adapters, or is part of one that is accelerated. Ends the acceleration of
/// one that has none, and returns its plan; null where it is not accelerated.
template <class Module>
std::shared_ptr<ProductPlan> take_acceleration(const Module& model) {
  check_key_owner();
  std::shared_ptr<ProductPlan> plan;
  const auto found = find_adapters(model);
  for (const auto& [adapters, root, is_part] : found) {
    if (!adapters->adapters().empty()) {
      throw StateError(
          "[lora::inject] found adapters in the model, expected none; add another adapter by "
          "lora::adapters_of(model).add(config, name)");
    }
    if (is_part) {
      throw StateError(
          "[lora::inject] found a part of a model that is accelerated as a whole, expected the whole; inject into that "
          "one, or call lora::end_acceleration on it first");
    }
  }
  for (const auto& [adapters, root, is_part] : found) {
    plan = adapters->calls()->plan();
    const auto lock = adapters->change("inject");
    adapters->end_acceleration();
  }
  return plan;
}

inline std::shared_ptr<ModelAdapters> walk_model(torch::nn::Module& model) {
  return std::make_shared<ModelAdapters>(ModuleWalk().walk(model), model.parameters(), nullptr);
}

inline std::shared_ptr<ModelAdapters> walk_model(torch::jit::Module& model) {
  std::vector<at::Tensor> parameters;
  for (const auto& parameter : model.parameters()) parameters.push_back(parameter);
  return std::make_shared<ModelAdapters>(ScriptWalk().walk(model), std::move(parameters),
                                         std::make_shared<ScriptSession>(model));
}

/// The sites of a model without adapters, ready for its first one; accelerated if it was.
template <class Module>
std::shared_ptr<ModelAdapters> open_model(Module& model) {
  const auto plan = take_acceleration(model);
  const auto state = walk_model(model);
  if (plan != nullptr) state->accelerate(plan, /*stays=*/true);
  return state;
}

/// Ends the opening of a model by its first adapters: accelerates it where that is wanted and it is not yet.
inline void accelerate_by_default(ModelAdapters& adapters, bool wanted) {
  if (wanted && adapters.calls()->plan() == nullptr) adapters.accelerate(ProductPlan::of_process(), /*stays=*/false);
}

}  // namespace detail
LORA_NAMESPACE_END
