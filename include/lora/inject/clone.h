#pragma once

#include <lora/detail/error.h>
#include <lora/inject/find.h>
#include <lora/inject/model_adapters.h>
#include <lora/version.h>
#include <lora/weight/adapter_node.h>
#include <lora/weight/host.h>
#include <torch/nn/module.h>

#include <algorithm>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// Takes the carriers and nodes out of a model for its lifetime.
class PlainModel {
 public:
  explicit PlainModel(ModelAdapters& adapters) : adapters_(adapters) {
    for (auto& site : adapters_.sites()) {
      if (site.weight == nullptr) continue;
      site.host->set_weight(site.base());
      for (const auto& adapter : site.adapters) take_out(site.host, adapter.node.lock());
      take_out(site.host, site.acceleration.lock());
    }
  }
  ~PlainModel() {
    for (const auto& [host, node] : nodes_) host->attach(node->name(), node);
    adapters_.install(adapters_.active(), {});
  }
  PlainModel(const PlainModel&) = delete;
  PlainModel& operator=(const PlainModel&) = delete;

 private:
  /// A node with the host that it hangs below.
  struct HungNode {
    std::shared_ptr<Host> host;
    std::shared_ptr<HostNode> node;
  };

  void take_out(const std::shared_ptr<Host>& host, const std::shared_ptr<HostNode>& node) {
    const bool known =
        std::any_of(nodes_.begin(), nodes_.end(), [&](const HungNode& hung) { return hung.node == node; });
    if (node == nullptr || known) return;
    host->detach(node->name());
    nodes_.push_back({host, node});
  }

  ModelAdapters& adapters_;
  std::vector<HungNode> nodes_;
};

/// The plain copy of a model, with the requires_grad flags that its parameters had before the injection.
inline std::shared_ptr<torch::nn::Module> clone_plain(const torch::nn::Module& model, ModelAdapters& adapters,
                                                      const std::optional<torch::Device>& device) {
  const PlainModel plain(adapters);
  auto copy = model.clone(device);
  std::map<const c10::TensorImpl*, bool> required;
  for (const auto& [parameter, flag] : adapters.original_parameters()) required[parameter.unsafeGetTensorImpl()] = flag;
  auto copied = copy->named_parameters();
  for (const auto& parameter : model.named_parameters()) {
    const auto flag = required.find(parameter.value().unsafeGetTensorImpl());
    copied[parameter.key()].set_requires_grad(flag == required.end() ? parameter.value().requires_grad()
                                                                     : flag->second);
  }
  return copy;
}

}  // namespace detail

/// A deep copy of a model with its adapters, which Module::clone cannot make: the copy has adapters, active and
/// trainable choice of its own. Throws a StateError while adapters are merged, and what Module::clone throws for the
/// plain model.
template <class Model>
std::shared_ptr<Model> clone(const Model& model, const std::optional<torch::Device>& device = std::nullopt) {
  const auto adapters = detail::adapters_of(static_cast<const torch::nn::Module&>(model));
  const auto lock = adapters->change("clone");
  detail::check_no_inference_mode("clone");
  if (!adapters->merged().empty()) {
    throw StateError("[lora::clone] found merged adapters, expected none; call unmerge() first");
  }
  const auto root = detail::find_adapters(static_cast<const torch::nn::Module&>(model)).front().root;
  const auto copy = detail::clone_plain(model, *adapters, device);
  const auto state = detail::open_model(*copy);
  std::map<std::string, size_t> index;
  for (size_t i = 0; i < state->sites().size(); ++i) index[state->sites()[i].path] = i;

  detail::Names trainable;
  for (const auto& adapter : adapters->adapters()) {
    detail::PreparedAdapter prepared{adapter.name, adapter.method, adapter.report, {}};
    std::map<const c10::TensorImpl*, at::Tensor> cloned;
    for (const auto& site : adapters->sites()) {
      const auto* updates = site.find(adapter.name);
      if (updates == nullptr) continue;
      const auto found = index.find(detail::join_path(root, site.path));
      if (found == index.end()) {
        throw StateError("[lora::clone] found an adapter at " + site.path +
                         " outside of the given model, expected the model that was injected into");
      }
      const auto target = found->second;
      prepared.sites.emplace(target, std::make_shared<detail::WeightAdapter>(updates->clone(device, cloned)));
    }
    state->attach(std::move(prepared));
    if (adapter.trainable) trainable.push_back(adapter.name);
  }
  if (const auto& plan = adapters->calls()->plan()) state->accelerate(plan, adapters->acceleration_stays());
  state->install(adapters->active(), {});
  state->set_trainable(trainable);
  return std::dynamic_pointer_cast<Model>(copy);
}

LORA_NAMESPACE_END
