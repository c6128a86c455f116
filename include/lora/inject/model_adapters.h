#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>
#include <lora/detail/error.h>
#include <lora/inject/planner.h>
#include <lora/inject/prepare.h>
#include <lora/inject/report.h>
#include <lora/inject/site.h>
#include <lora/inject/site_change.h>
#include <lora/methods/method.h>
#include <lora/version.h>
#include <lora/weight/adapted_weight.h>
#include <lora/weight/adapter_node.h>
#include <lora/weight/product_plan.h>
#include <lora/weight/registrar.h>

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

using Names = std::vector<std::string>;

inline bool contains(const Names& names, const std::string& name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

/// Throws a StateError in InferenceMode.
inline void check_no_inference_mode(const char* operation) {
  if (!c10::InferenceMode::is_enabled()) return;
  throw StateError(std::string("[lora::") + operation +
                   "] found InferenceMode enabled, expected it off: tensors made in it get no gradient");
}

/// The adapters of one model: what all `Adapters` handles of it share. The model keeps it alive, through the nodes
/// below its hosts and through its carriers; it does not keep the model alive.
class ModelAdapters : public std::enable_shared_from_this<ModelAdapters> {
 public:
  struct Adapter {
    std::string name;
    std::shared_ptr<const Method> method;
    InjectionReport report;
    bool trainable = false;
  };

  /// `parameters` are all parameters of the model; `session` is told while there are carriers in it, null: nobody.
  ModelAdapters(ModelSites model, std::vector<at::Tensor> parameters, std::shared_ptr<CarrierSession> session)
      : model_(std::move(model)), session_(std::move(session)) {
    std::set<const c10::TensorImpl*> known;  // a model lists a tied weight under each of its names
    for (auto& parameter : parameters) {
      if (!known.insert(parameter.unsafeGetTensorImpl()).second) continue;
      const bool required = parameter.requires_grad();
      original_parameters_.emplace_back(std::move(parameter), required);
    }
  }

  const std::vector<Site>& sites() const { return model_.sites; }
  std::vector<Site>& sites() { return model_.sites; }
  const std::vector<OtherModule>& others() const { return model_.others; }
  const std::vector<Adapter>& adapters() const { return adapters_; }
  const Names& active() const { return active_; }
  const Names& merged() const { return merged_; }
  const std::shared_ptr<CallState>& calls() const { return calls_; }
  const std::vector<std::pair<at::Tensor, bool>>& original_parameters() const { return original_parameters_; }
  bool unloaded() const { return unloaded_; }

  const Adapter& adapter(const std::string& name) const {
    const auto found = std::find_if(adapters_.begin(), adapters_.end(), [&](const auto& a) { return a.name == name; });
    if (found == adapters_.end()) {
      std::string known;
      for (const auto& a : adapters_) known += (known.empty() ? "" : ", ") + a.name;
      TORCH_CHECK_VALUE(false, "[lora::adapters] found no adapter \"", name, "\", expected one of: ", known);
    }
    return *found;
  }

  /// Holds the model's adapters still: one change at a time and none while a kernel of another thread runs. Throws a
  /// StateError where a host is gone, unless the change is to leave the model and passes over layers that were
  /// replaced.
  std::unique_lock<std::recursive_mutex> change(const char* operation, bool leaving = false) {
    std::unique_lock<std::recursive_mutex> lock(mutex_);
    if (unloaded_) {
      throw StateError(std::string("[lora::") + operation +
                       "] found adapters that were unloaded, expected them in their model; call lora::inject again");
    }
    if (calls_->running()) {
      throw StateError(std::string("[lora::") + operation +
                       "] found a forward running in another thread, expected none while adapters change");
    }
    for (const auto& site : model_.sites) {
      if (site.weight == nullptr || site.host->alive() || (leaving && site.host->takes_nodes())) continue;
      throw StateError(
          std::string("[lora::") + operation + "] found " + site.path +
          " destroyed, or not in the model that adapters_of was called with, expected the whole model; unload() "
          "leaves what is there");
    }
    if (!merged_.empty()) follow_moves();
    return lock;
  }

  /// What every handle keeps a copy of. With the last one the references to the model are let go; `alive` are the
  /// objects of the model for those that have been.
  std::shared_ptr<void> handle(const std::set<const void*>& alive = {}) {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    auto handle = handle_.lock();
    if (handle == nullptr) {
      handle = std::shared_ptr<void>(this, [self = shared_from_this()](void*) mutable {
        const auto adapters = std::move(self);  // handle_ keeps this function object
        const std::lock_guard<std::recursive_mutex> still(adapters->mutex_);
        adapters->for_references([](ModelReference& reference) { reference.let_go(); });
      });
      handle_ = handle;
    }
    for_references([&](ModelReference& reference) { reference.hold(alive); });
    return handle;
  }

  /// Throws a c10::ValueError for a name that is no adapter's or is taken.
  void check_name(const std::string& name) const {
    TORCH_CHECK_VALUE(!name.empty() && name.find_first_of("./") == std::string::npos &&
                          std::string("lora_").find(name) == std::string::npos,
                      "[lora::inject] found the adapter name \"", name,
                      "\", expected a name without '.' and '/' that is no part of \"lora_\" (PEFT cannot load those)");
    for (const auto& adapter : adapters_) {
      TORCH_CHECK_VALUE(adapter.name != name, "[lora::inject] found an adapter named \"", name,
                        "\" in the model, expected a new name; remove() it first or choose another");
    }
  }

  /// Chooses the sites for an adapter; the model is not touched.
  Plan plan(const Method& method, const Targeting& targeting, const std::string& name, Unmatched unmatched) const {
    check_name(name);
    check_no_inference_mode("inject");
    auto plan = Planner(model_, targeting, unmatched).plan();
    std::vector<std::vector<std::string>> names;
    for (const auto& planned : plan.sites) names.push_back(names_of(model_.sites[planned.site]));
    std::string entries;
    for (const auto& entry : method.unmatched(names)) {
      entries += (entries.empty() ? "" : "\n") + ("[lora::inject] found no adapted module for " + entry);
      plan.notes.push_back("found no adapted module for " + entry);
    }
    TORCH_CHECK_VALUE(entries.empty() || unmatched == Unmatched::kNote, entries,
                      "; expected a module's path, its end behind a dot, or a regular expression for one of them");
    std::string refusals;
    for (const auto& planned : plan.sites) {
      const auto& site = model_.sites[planned.site];
      for (const auto& part : planned.parts) {
        const auto refusal =
            method.refusal(update_spec(site, method, part.begin, part.size, false), !part.name.empty());
        if (refusal.empty()) continue;
        refusals += (refusals.empty() ? "" : "\n") + ("[lora::inject] found " + refusal) + " at " + site.path;
      }
    }
    TORCH_CHECK_VALUE(refusals.empty(), refusals);
    return plan;
  }

  /// Makes a new adapter and puts it into the model, neither active nor trainable.
  void add(const std::shared_ptr<const Method>& method, const std::string& name) {
    const auto chosen = plan(*method, method->targeting(), name, Unmatched::kError);
    attach(AdapterMaker(model_.sites, method, name, chosen, /*initialise=*/true).make());
  }

  /// Puts a prepared adapter into the model, neither active nor trainable. On an exception the model is as before.
  void attach(PreparedAdapter prepared) {
    std::map<std::string, std::shared_ptr<AdapterNode>> nodes;
    try {
      for (const auto& [index, adapter] : prepared.sites) attach(prepared, index, adapter, nodes);
    } catch (...) {
      detach(prepared.name);
      throw;
    }
    if (adapters_.empty()) {
      for (const auto& [parameter, required] : original_parameters_) {
        if (parameter.is_leaf()) parameter.set_requires_grad(false);
      }
    }
    adapters_.push_back({prepared.name, prepared.method, std::move(prepared.report), false});
  }

  /// Takes an adapter that is not active out of the model.
  void detach(const std::string& name) {
    Names done;
    for (auto& site : model_.sites) {
      const auto end = std::remove_if(site.adapters.begin(), site.adapters.end(), [&](const Site::Adapter& adapter) {
        if (adapter.updates->adapter != name) return false;
        if (adapter.node.lock() != nullptr && site.host->alive() && !contains(done, site.module_path)) {
          done.push_back(site.module_path);
          site.host->detach(node_name(name));
        }
        return true;
      });
      site.adapters.erase(end, site.adapters.end());
    }
    adapters_.erase(std::remove_if(adapters_.begin(), adapters_.end(), [&](const auto& a) { return a.name == name; }),
                    adapters_.end());
  }

  /// Puts a prepared adapter into the place of the one with its name, which is not active.
  void exchange(PreparedAdapter prepared) {
    const auto place = std::find_if(adapters_.begin(), adapters_.end(),
                                    [&](const auto& known) { return known.name == prepared.name; }) -
                       adapters_.begin();
    const auto self = shared_from_this();  // the nodes that go away may be its last owners
    detach(prepared.name);
    adapters_.reserve(adapters_.size() + 1);
    attach(std::move(prepared));
    std::rotate(adapters_.begin() + place, adapters_.end() - 1, adapters_.end());
  }

  void set_trainable(const Names& names) {
    for (const auto& name : names) adapter(name);
    for (auto& adapter : adapters_) adapter.trainable = contains(names, adapter.name);
    for (auto& site : model_.sites) {
      for (const auto& adapter : site.adapters) {
        for (auto& [child, named] : adapter.updates->tensors()) {
          if (!is_trained(named.role)) continue;
          named.tensor.set_requires_grad(contains(names, adapter.updates->adapter));
        }
      }
    }
    announce_gradients();
  }

  /// Throws a StateError where two of the adapters have values in place of the same ones of the base.
  void check_copies(const Names& active) const {
    std::string problems;
    for (const auto& site : model_.sites) {
      std::string owner;
      std::map<int64_t, std::string> owners;
      for (const auto& name : active) {
        const auto* adapter = site.find(name);
        if (adapter == nullptr) continue;
        const auto conflict = [&](const std::string& other, const std::string& what) {
          problems += (problems.empty() ? "" : "\n") + ("[lora::adapters] found " + what) + " of both \"" + other +
                      "\" and \"" + name + "\" active at " + site.parameter_path() +
                      ", expected those of one: copies have no sum";
        };
        if (adapter->copy.defined() && !owner.empty()) conflict(owner, "copies");
        if (adapter->copy.defined()) owner = name;
        for (const auto id : adapter->rows.ids) {
          const auto [known, is_new] = owners.emplace(id, name);
          if (!is_new) conflict(known->second, "rows of token " + std::to_string(id));
        }
      }
    }
    if (!problems.empty()) throw StateError(problems);
  }

  /// Lets products with frozen weights go by a plan, those of weights without an adapter too, until unload(), or
  /// beyond it where it `stays`.
  void accelerate(std::shared_ptr<ProductPlan> plan, bool stays) {
    calls_->set_plan(std::move(plan));
    acceleration_stays_ = stays;
    std::map<std::string, std::shared_ptr<HostNode>> nodes;
    for (auto& site : model_.sites) {
      if (!site.is_multiplied_matrix() || !site.host->alive()) continue;
      const bool elsewhere = site.weight == nullptr && as_carrier(site.host->weight()) != nullptr;
      if (elsewhere) continue;
      make_weight(site);
      if (!site.host->takes_nodes() || !site.acceleration.expired()) continue;
      auto& node = nodes[site.module_path];
      if (node == nullptr) {
        node = std::make_shared<HostNode>(kAccelerationNode, shared_from_this());
        site.host->attach(kAccelerationNode, node);
      }
      node->add(site.weight);
      site.acceleration = node;
    }
    install(active_, merged_, merged_weights());
  }

  /// Goes back to ATen's products; weights without an adapter become plain.
  void end_acceleration() {
    calls_->set_plan(nullptr);
    acceleration_stays_ = false;
    const auto self = shared_from_this();  // a node may be its last owner
    detach_acceleration();
    install(active_, merged_, merged_weights());
    for (auto& site : model_.sites) {
      if (site.adapters.empty()) site.weight.reset();
    }
  }

  bool acceleration_stays() const { return acceleration_stays_; }

  /// Makes `active` the active adapters. `weights` holds the merged W′ of sites by index, `merged` the adapters in
  /// them; a site without one goes back to W0.
  void install(const Names& active, const Names& merged, const std::map<size_t, at::Tensor>& weights = {}) {
    check_copies(active);
    std::vector<SiteChange> changes;
    bool any_carrier = false, any_low_rank = false;
    for (size_t i = 0; i < model_.sites.size(); ++i) {
      auto& site = model_.sites[i];
      if (site.weight == nullptr) continue;
      const auto merged_weight = weights.find(i);
      const bool is_merged = merged_weight != weights.end();
      SiteChange change{site, is_merged ? merged_weight->second : site.weight->base(), is_merged, false, {}};
      bool splits_uses = false;
      for (const auto& name : active) {
        for (const auto& adapter : site.adapters) {
          if (adapter.updates->adapter != name) continue;
          if (!contains(merged, name)) change.unmerged.push_back(adapter.updates);
          splits_uses = splits_uses || site.splits_uses(*adapter.updates);
        }
      }
      change.carrier = is_merged ? !change.unmerged.empty() || splits_uses : !site.adapters.empty();
      any_low_rank = any_low_rank || change.carrier;
      changes.push_back(std::move(change));
    }
    for (auto& change : changes) {
      // A TorchScript model that is merged as a whole can be saved and moved: its slots are plain, unless asked for.
      const bool accelerates = change.site.host->takes_nodes() || any_low_rank || acceleration_stays_;
      change.carrier =
          change.carrier || (calls_->plan() != nullptr && accelerates && change.site.is_multiplied_matrix());
      any_carrier = any_carrier || change.carrier;
    }
    if (session_ != nullptr && any_carrier) session_->begin();
    for (const auto& change : changes) change.apply(shared_from_this());
    active_ = active;
    merged_ = merged;
    announce_gradients();
    if (session_ != nullptr && !any_carrier) session_->end();
  }

  /// W′ of the sites that are merged now.
  std::map<size_t, at::Tensor> merged_weights() const {
    std::map<size_t, at::Tensor> weights;
    for (size_t i = 0; i < model_.sites.size(); ++i) {
      const auto& weight = model_.sites[i].weight;
      if (weight == nullptr) continue;
      const auto snapshot = weight->snapshot();
      if (!snapshot->base.is_same(weight->base())) weights.emplace(i, snapshot->base);
    }
    return weights;
  }

  /// Puts W′ in place of a site's W0 for good, in the registry too.
  void replace(size_t index, const at::Tensor& merged) {
    auto& site = model_.sites[index];
    site.weight->publish(site.weight->base(), {});  // a carrier that somebody else holds is the base from now on
    if (!site.host->alive()) return;
    auto base = site.base();
    if (base.defined() && !site.may_be_tied) {
      base.set_data(merged);
    } else {
      const auto flagged = base.defined() ? base : weight_beside(site).base();  // whose requires_grad it gets
      base = merged;
      site.host->set_parameter(base);
      untied_.emplace_back(base, flagged);
    }
    site.host->set_weight(base);
    replaced_.insert(index);
  }

  /// Leaves the model as it was before the first injection, but for what replace() has put there.
  void unload() {
    const auto self = shared_from_this();  // the nodes and carriers that go away may be its last owners
    active_.clear();
    merged_.clear();
    for (size_t i = 0; i < model_.sites.size(); ++i) {
      auto& site = model_.sites[i];
      if (site.weight == nullptr || replaced_.count(i) != 0) continue;
      site.weight->publish(site.weight->base(), {});
      if (site.host->alive()) site.host->set_weight(site.base());
    }
    while (!adapters_.empty()) detach(std::string(adapters_.back().name));
    detach_acceleration();
    restore_flags();
    for (auto& site : model_.sites) site.weight.reset();
    unloaded_ = true;
    if (acceleration_stays_) {
      std::vector<at::Tensor> parameters;
      for (auto& [parameter, required] : original_parameters_) parameters.push_back(parameter);
      const auto next = std::make_shared<ModelAdapters>(std::move(model_), std::move(parameters), std::move(session_));
      next->accelerate(calls_->plan(), /*stays=*/true);
    }
    session_.reset();
  }

  /// Gives the model's parameters the requires_grad of before the first injection.
  void restore_flags() {
    for (auto& [parameter, required] : original_parameters_) {
      if (parameter.is_leaf()) parameter.set_requires_grad(required);
      for (auto& [fresh, old] : untied_) {
        if (old.is_same(parameter)) fresh.set_requires_grad(required);
      }
    }
  }

  /// Takes over the adapters of another set that check_joinable let pass, whose paths are relative to `root`; its
  /// handles follow to this one.
  void join(ModelAdapters& other, const std::string& root) {
    const auto lock = other.change("adapters_of");
    for (auto& site : other.model_.sites) {
      site.path = join_path(root, site.path);
      site.aliases.push_back(join_path(root, site.file_path));
      site.file_path = site.aliases.back();
      site.module_path = join_path(root, site.module_path);
      site.module_file_path = join_path(root, site.module_file_path);
      if (site.weight != nullptr) site.weight->set_calls(calls_);
      for (const auto& adapter : site.adapters) {
        if (const auto node = adapter.node.lock()) node->set_owner(shared_from_this());
      }
      if (const auto node = site.acceleration.lock()) node->set_owner(shared_from_this());
      model_.sites.push_back(std::move(site));
    }
    for (auto& adapter : other.adapters_) {
      const auto known = std::find_if(adapters_.begin(), adapters_.end(),
                                      [&](const auto& candidate) { return candidate.name == adapter.name; });
      for (auto& entry : adapter.report.entries) {
        for (auto& module : entry.modules) module.path = join_path(root, module.path);
      }
      if (known == adapters_.end()) {
        adapters_.push_back(std::move(adapter));
        continue;
      }
      known->trainable = known->trainable || adapter.trainable;
      for (auto& entry : adapter.report.entries) known->report.entries.push_back(std::move(entry));
    }
    calls_->add_fallbacks(other.calls_->fallbacks());
    if (other.calls_->plan() != nullptr) calls_->set_plan(other.calls_->plan());
    for (auto& parameter : other.original_parameters_) original_parameters_.push_back(std::move(parameter));
    for (const auto& name : other.active_) {
      if (!contains(active_, name)) active_.push_back(name);
    }
    other.model_.sites.clear();
    other.adapters_.clear();
    other.joined_into_ = shared_from_this();
    install(active_, {});
  }

  /// The set that took this one's adapters over, or null.
  std::shared_ptr<ModelAdapters> joined_into() const { return joined_into_.lock(); }

  /// Scripted modules ask their weights whether a gradient is wanted; where none is, they take kernels without one.
  void announce_gradients() {
    for (const auto& site : model_.sites) {
      if (site.weight == nullptr || site.host->takes_nodes() || !site.host->alive()) continue;
      const auto slot = site.host->weight();
      if (as_carrier(slot) != nullptr) slot.set_requires_grad(site.weight->wants_gradient());
    }
  }

  static std::string node_name(const std::string& adapter) { return "lora_" + adapter; }
  /// Not the node of an adapter of any name.
  static constexpr const char* kAccelerationNode = "accelerated";

 private:
  template <class Function>
  void for_references(const Function& function) {
    for (const auto& site : model_.sites) function(*site.host);
    if (session_ != nullptr) function(*session_);
  }

  /// In TorchScript, to() on a merged model reaches W′ alone: W0 and the adapters follow here.
  void follow_moves() {
    for (auto& site : model_.sites) {
      if (site.weight == nullptr || site.host->takes_nodes() || !site.host->alive()) continue;
      const auto slot = site.host->weight();
      auto base = site.weight->base();
      if (as_carrier(slot) != nullptr || (slot.dtype() == base.dtype() && slot.device() == base.device())) continue;
      base.set_data(base.to(slot.options()));
      for (const auto& owner : site.adapters) {
        const auto dtype = adapter(owner.updates->adapter).method->tensor_dtype(slot.scalar_type());
        for (auto& [child, named] : owner.updates->tensors()) {
          const bool buffer = named.role == TensorRole::kBuffer;
          named.tensor.set_data(named.tensor.to(slot.device(), buffer ? slot.scalar_type() : dtype));
        }
      }
    }
  }

  void attach(const PreparedAdapter& prepared, size_t index, const std::shared_ptr<WeightAdapter>& adapter,
              std::map<std::string, std::shared_ptr<AdapterNode>>& nodes) {
    auto& site = model_.sites[index];
    make_weight(site);
    auto& node = nodes[site.module_path];
    if (node == nullptr) {
      node = std::make_shared<AdapterNode>(node_name(prepared.name), shared_from_this(), prepared.method);
      if (site.host->takes_nodes()) site.host->attach(node_name(prepared.name), node);
    }
    site.adapters.push_back({adapter, node});  // first: from here on detach() takes it back
    node->add(site.weight, *adapter);
  }

  void make_weight(Site& site) const {
    if (site.weight != nullptr) return;
    auto base = site.host->weight();
    const bool absent = !base.defined();
    if (absent) base = absent_bias(site);
    site.weight = std::make_shared<AdaptedWeight>(site.host, std::move(base), calls_, site.layout, absent);
    if (site.is_multiplied) site.weight->note_multiplied();
  }

  void detach_acceleration() {
    std::set<std::string> done;
    for (auto& site : model_.sites) {
      const bool hangs = !site.acceleration.expired() && site.host->alive();
      if (hangs && done.insert(site.module_path).second) site.host->detach(kAccelerationNode);
      site.acceleration.reset();
    }
  }

  /// What the bias of a layer without one counts as.
  at::Tensor absent_bias(const Site& bias) const {
    const auto& weight = weight_beside(bias);
    return at::zeros({weight.base_matrix().size(0)}, weight.base().options().requires_grad(false));
  }

  const Site& weight_beside(const Site& bias) const {
    for (const auto& site : model_.sites) {
      if (site.module_path == bias.module_path && site.takes_updates()) return site;
    }
    throw StateError("[lora::inject] found no weight beside " + bias.parameter_path() + ", expected one");
  }

  ModelSites model_;
  std::vector<Adapter> adapters_;
  Names active_;
  Names merged_;
  std::shared_ptr<CallState> calls_ = std::make_shared<CallState>();
  std::vector<std::pair<at::Tensor, bool>> original_parameters_;  // with their requires_grad
  std::vector<std::pair<at::Tensor, at::Tensor>> untied_;
  std::set<size_t> replaced_;
  std::shared_ptr<CarrierSession> session_;
  std::weak_ptr<void> handle_;
  std::recursive_mutex mutex_;
  std::weak_ptr<ModelAdapters> joined_into_;
  bool unloaded_ = false;
  bool acceleration_stays_ = false;
};

}  // namespace detail
LORA_NAMESPACE_END
