#pragma once

#include <lora/config/lora_config.h>
#include <lora/detail/error.h>
#include <lora/inject/eva.h>
#include <lora/inject/find.h>
#include <lora/inject/inject_options.h>
#include <lora/inject/model_adapters.h>
#include <lora/inject/report.h>
#include <lora/inject/truncate.h>
#include <lora/inject/verify.h>
#include <lora/io/load_options.h>
#include <lora/io/peft_reader.h>
#include <lora/io/peft_writer.h>
#include <lora/merge/merge_sites.h>
#include <lora/methods/lora.h>
#include <lora/train/param_groups.h>
#include <lora/version.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/nn/module.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN

/// The adapters of one model: a cheap handle, copied freely; destroying it changes nothing.
///
/// Changes are for one thread at a time and not while a forward runs elsewhere; an overlap that is noticed throws a
/// StateError. Names default to the active adapters.
class Adapters {
 public:
  /// `alive` are the objects of a TorchScript model whose last handle may be gone.
  explicit Adapters(std::shared_ptr<detail::ModelAdapters> state, const std::set<const void*>& alive = {})
      : state_(std::move(state)), handle_(state_->handle(alive)) {}

  /// The injected modules by target, the notes and the model's trainable share, for an adapter (the first by default).
  InjectionReport report(const std::string& name = "") const;

  /// Tensors of the trainable adapters: adapter by adapter, in the model's order.
  std::vector<at::Tensor> parameters() const;
  /// The same with their names, "h.0.attn.c_attn.lora_default.q.lora_A".
  std::vector<std::pair<std::string, at::Tensor>> named_parameters() const;
  /// The same with their names and their roles for an optimizer.
  std::vector<UpdateTensor> trainable_tensors() const;
  /// The updates of the trainable adapters with the paths of their weights.
  std::vector<std::pair<std::string, const Update*>> trainable_updates() const;
  /// All tensors of one adapter, trainable or not.
  std::vector<std::pair<std::string, at::Tensor>> named_tensors(const std::string& name) const;

  /// All adapters, in the order in which they came.
  std::vector<std::string> names() const;
  /// Those whose sum the model computes.
  std::vector<std::string> active() const { return state().active(); }
  /// Those of them that are in the weights.
  std::vector<std::string> merged() const { return state().merged(); }
  /// Those that get gradients.
  std::vector<std::string> trainable() const;

  /// Chooses the adapters whose sum the model computes; none: the base model. On a model that is merged as a whole the
  /// new choice is merged, one pass from W0; on a partly merged one, what was merged and stays active.
  void set_active(const std::vector<std::string>& names);
  /// Chooses the adapters that get gradients, apart from what is active.
  void set_trainable(const std::vector<std::string>& names);

  /// Adds another adapter, neither active nor trainable; of the options the data of its start are used.
  template <class Config>
  void add(const Config& config, const std::string& name, const InjectOptions& options = {}) {
    const auto lock = state().change("add");
    detail::add_adapter(state(), config, name, options);
  }
  /// Adds an adapter from a PEFT directory, neither active nor trainable. Throws a FormatError with every mismatch.
  void load(const std::string& directory, const std::string& name, const LoadOptions& options = {});
  /// Adds an adapter from a file of tensors alone, under PEFT's keys or loralib's, by the given configuration: such
  /// files say neither rank nor alpha nor targets.
  void load(const std::string& file, const LoraConfig& config, const std::string& name,
            const LoadOptions& options = {});
  /// Takes an adapter out of the model, deactivating it first. Removing the last one is unload().
  void remove(const std::string& name);

  /// Writes PEFT's layout: the adapter "default" into the directory, any other into the sub-folder of its name.
  void save(const std::string& directory) const;
  /// Writes one adapter into the directory itself.
  void save(const std::string& directory, const std::string& name) const;

  /// Replaces the weights by W′ = W0 + Σ s·B·A, so that forwards cost what the plain model costs. Adapters that are
  /// active but not named stay low-rank on top. A NaN or infinite value in W′ is a c10::ValueError, and nothing is
  /// changed.
  ///
  /// Without `keep_base` every active adapter is merged and then unloaded; see MergeOptions.
  MergeReport merge(const MergeOptions& options = {});
  /// Merges some of the active adapters, and those that are merged already.
  MergeReport merge(const std::vector<std::string>& names, const MergeOptions& options = {});
  /// What merge() would take, with nothing done.
  MergeReport merge_cost(const MergeOptions& options = {}) const;
  /// Brings an adapter to a smaller rank by the SVD of its ΔW, in the space of its factors: the first `rank` singular
  /// values of each weight, or as many as hold `energy` of the sum of their squares. What LoRA's s·B·A gives stays
  /// nearest to what it was, the scaling stays; an adapter of another method whose ΔW is a sum of such products becomes
  /// LoRA.
  ///
  /// The tensors are new ones: an optimizer has to be made anew. Throws a StateError for a merged adapter, and a
  /// c10::ValueError for a ΔW that is no such sum.
  TruncationReport truncate(const std::string& name, const Truncation& to);
  /// Goes back to W0, bit for bit.
  void unmerge();
  /// Takes every adapter out: the plain base model, bit for bit, with its requires_grad flags.
  void unload();
  /// Leaves the plain model with W′ of the active adapters in place of W0.
  void merge_and_unload();

  /// Runs `forward` with each B moved a little: does the output change, and does every A and B get a gradient?
  /// Everything is restored.
  VerifyReport verify(const std::function<at::Tensor()>& forward) const;

  /// How often each operator formed a dense weight because it has no low-rank kernel.
  std::map<std::string, int64_t> fallbacks() const { return state().calls()->fallbacks(); }

  /// Whether both are handles of one model's adapters.
  bool operator==(const Adapters& other) const { return &state() == &other.state(); }

 private:
  friend class DisableAdapters;
  friend class TrainingState;

  detail::ModelAdapters& state() const {
    while (auto next = state_->joined_into()) state_ = std::move(next);
    return *state_;
  }

  std::vector<UpdateTensor> tensors(const std::function<bool(const std::string& adapter)>& chosen) const;
  void check_names(const char* operation, const std::vector<std::string>& names) const;

  mutable std::shared_ptr<detail::ModelAdapters> state_;
  std::shared_ptr<void> handle_;
};

/// Turns a model's adapters off for the calling thread while it lives; guards nest.
class DisableAdapters {
 public:
  /// Throws a StateError where adapters are merged.
  explicit DisableAdapters(const Adapters& adapters) : calls_(adapters.state().calls()) {
    if (!adapters.merged().empty()) {
      throw StateError(
          "[lora::DisableAdapters] found merged adapters, expected none: merged weights are plain; call unmerge() "
          "first");
    }
    calls_->disable();
  }
  ~DisableAdapters() { calls_->enable(); }
  DisableAdapters(const DisableAdapters&) = delete;
  DisableAdapters& operator=(const DisableAdapters&) = delete;

 private:
  std::shared_ptr<detail::CallState> calls_;
};

/// Puts a new adapter into a model that is already written: active and trainable, the model's own parameters frozen.
///
/// `model` is a torch::nn::Module& or a torch::jit::Module&. Throws c10::ValueError, with the model unchanged, for a
/// configuration out of range and for a target that matches nothing; StateError for a model that has adapters.
template <class Model, class Config>
Adapters inject(Model& model, const Config& config, const std::string& name = "default",
                const InjectOptions& options = {}) {
  const auto state = detail::open_model(model);
  detail::add_adapter(*state, config, name, options);
  detail::accelerate_by_default(*state, options.accelerate());
  state->install({name}, {});
  state->set_trainable({name});
  return Adapters(state);
}

/// Injects a saved PEFT directory by its own configuration: active, not trainable.
template <class Model>
Adapters load(Model& model, const std::string& directory, const std::string& name = "default",
              const LoadOptions& options = {}) {
  const auto state = detail::open_model(model);
  state->attach(detail::PeftReader(*state, name, options).read(directory));
  detail::accelerate_by_default(*state, options.accelerate());
  state->install({name}, {});
  state->set_trainable({});
  return Adapters(state);
}

/// Injects a file of tensors alone, see Adapters::load: active, not trainable.
template <class Model>
Adapters load(Model& model, const std::string& file, const LoraConfig& config, const std::string& name = "default",
              const LoadOptions& options = {}) {
  const auto state = detail::open_model(model);
  state->attach(detail::PeftReader(*state, name, options).read(file, config));
  detail::accelerate_by_default(*state, options.accelerate());
  state->install({name}, {});
  state->set_trainable({});
  return Adapters(state);
}

/// Injects every adapter that Adapters::save wrote into a directory: "default" in itself, the others in sub-folders of
/// their names. The first of them is active, none trainable.
template <class Model>
Adapters load_all(Model& model, const std::string& directory, const LoadOptions& options = {}) {
  const auto state = detail::open_model(model);
  for (const auto& [name, folder] : detail::adapter_folders(directory)) {
    state->attach(detail::PeftReader(*state, name, options).read(folder));
  }
  detail::accelerate_by_default(*state, options.accelerate());
  state->install({state->adapters().front().name}, {});
  state->set_trainable({});
  return Adapters(state);
}

/// The handle on a model's adapters, also where every other handle is gone. Throws a StateError where there are none.
template <class Model>
Adapters adapters_of(const Model& model) {
  return Adapters(detail::adapters_of(model), detail::objects_of(model));
}

/// Parameter groups of all that is trainable, see the overload for tensors.
template <class Options>
std::vector<torch::optim::OptimizerParamGroup> param_groups(const Adapters& adapters, const Options& options,
                                                            const LoraPlusOptions& plus = {}) {
  return param_groups(adapters.trainable_tensors(), options, plus);
}

namespace detail {

inline void leave_out_untrained(std::vector<UpdateTensor>& tensors) {
  tensors.erase(
      std::remove_if(tensors.begin(), tensors.end(), [](const UpdateTensor& named) { return !is_trained(named.role); }),
      tensors.end());
}

}  // namespace detail

inline InjectionReport Adapters::report(const std::string& name) const {
  const auto& state = this->state();
  TORCH_CHECK_VALUE(!state.adapters().empty(), "[lora::report] found no adapter, expected one");
  auto report = state.adapter(name.empty() ? state.adapters().front().name : name).report;
  for (const auto& [parameter, required] : state.original_parameters()) {
    report.total_parameters += parameter.numel();
    if (parameter.requires_grad()) report.trainable_parameters += parameter.numel();
  }
  for (const auto& named : tensors([](const std::string&) { return true; })) {
    if (!is_trained(named.role)) continue;
    report.total_parameters += named.tensor.numel();
    if (named.tensor.requires_grad()) report.trainable_parameters += named.tensor.numel();
  }
  return report;
}

inline std::vector<UpdateTensor> Adapters::tensors(const std::function<bool(const std::string&)>& chosen) const {
  std::vector<UpdateTensor> result;
  std::set<const c10::TensorImpl*> shared;  // by several weights: listed once
  for (const auto& adapter : state().adapters()) {
    if (!chosen(adapter.name)) continue;
    for (const auto& site : state().sites()) {
      const auto* updates = site.find(adapter.name);
      if (updates == nullptr) continue;
      const auto node = detail::join_path(site.module_path, detail::ModelAdapters::node_name(adapter.name));
      for (auto& [child, named] : updates->tensors()) {
        const bool frozen = named.role == TensorRole::kFrozen;
        if (frozen && !shared.insert(named.tensor.unsafeGetTensorImpl()).second) continue;
        named.name = detail::join_path(detail::join_path(node, child), named.name);
        result.push_back(std::move(named));
      }
    }
  }
  return result;
}

inline std::vector<UpdateTensor> Adapters::trainable_tensors() const {
  const auto names = trainable();
  auto result = tensors([&](const std::string& name) { return detail::contains(names, name); });
  detail::leave_out_untrained(result);
  return result;
}

inline std::vector<at::Tensor> Adapters::parameters() const {
  std::vector<at::Tensor> result;
  for (auto& named : trainable_tensors()) result.push_back(std::move(named.tensor));
  return result;
}

inline std::vector<std::pair<std::string, at::Tensor>> Adapters::named_parameters() const {
  std::vector<std::pair<std::string, at::Tensor>> result;
  for (auto& named : trainable_tensors()) result.emplace_back(std::move(named.name), std::move(named.tensor));
  return result;
}

inline std::vector<std::pair<std::string, const Update*>> Adapters::trainable_updates() const {
  std::vector<std::pair<std::string, const Update*>> result;
  for (const auto& name : trainable()) {
    for (const auto& site : state().sites()) {
      const auto* updates = site.find(name);
      if (updates == nullptr) continue;
      for (const auto& part : updates->parts) {
        result.emplace_back(detail::join_path(site.path, part.name), part.update.get());
      }
    }
  }
  return result;
}

inline std::vector<std::pair<std::string, at::Tensor>> Adapters::named_tensors(const std::string& name) const {
  state().adapter(name);
  std::vector<std::pair<std::string, at::Tensor>> result;
  for (auto& named : tensors([&](const std::string& adapter) { return adapter == name; })) {
    result.emplace_back(std::move(named.name), std::move(named.tensor));
  }
  return result;
}

inline std::vector<std::string> Adapters::names() const {
  std::vector<std::string> result;
  for (const auto& adapter : state().adapters()) result.push_back(adapter.name);
  return result;
}

inline std::vector<std::string> Adapters::trainable() const {
  std::vector<std::string> result;
  for (const auto& adapter : state().adapters()) {
    if (adapter.trainable) result.push_back(adapter.name);
  }
  return result;
}

inline void Adapters::check_names(const char* operation, const std::vector<std::string>& names) const {
  for (size_t i = 0; i < names.size(); ++i) {
    state().adapter(names[i]);
    TORCH_CHECK_VALUE(std::find(names.begin(), names.begin() + static_cast<std::ptrdiff_t>(i), names[i]) ==
                          names.begin() + static_cast<std::ptrdiff_t>(i),
                      "[lora::", operation, "] found \"", names[i], "\" twice, expected each adapter once");
  }
}

inline void Adapters::set_active(const std::vector<std::string>& names) {
  const auto lock = state().change("set_active");
  check_names("set_active", names);
  detail::Names merged;
  const auto& before = state().merged();
  for (const auto& name : names) {
    if (!before.empty() && (before.size() == state().active().size() || detail::contains(before, name))) {
      merged.push_back(name);
    }
  }
  state().check_copies(names);
  state().install(names, merged, detail::merge_sites(state().sites(), merged, names));
}

inline void Adapters::set_trainable(const std::vector<std::string>& names) {
  const auto lock = state().change("set_trainable");
  check_names("set_trainable", names);
  state().set_trainable(names);
}

inline void Adapters::load(const std::string& directory, const std::string& name, const LoadOptions& options) {
  const auto lock = state().change("load");
  state().attach(detail::PeftReader(state(), name, options).read(directory));
}

inline void Adapters::load(const std::string& file, const LoraConfig& config, const std::string& name,
                           const LoadOptions& options) {
  const auto lock = state().change("load");
  state().attach(detail::PeftReader(state(), name, options).read(file, config));
}

inline void Adapters::remove(const std::string& name) {
  const auto lock = state().change("remove");
  state().adapter(name);
  if (state().adapters().size() == 1) {
    state().unload();
    return;
  }
  const auto without = [&](detail::Names names) {
    names.erase(std::remove(names.begin(), names.end(), name), names.end());
    return names;
  };
  const auto active = without(state().active());
  const auto merged = without(state().merged());
  const auto weights = detail::merge_sites(state().sites(), merged, active);
  state().install(active, merged, weights);  // first out of what runs, then out of the model
  state().detach(name);
  state().install(active, merged, weights);  // sites that have no adapter any more become plain
}

inline void Adapters::save(const std::string& directory) const {
  if (names().empty()) {
    throw StateError("[lora::save] found no adapter, expected save() before unload() or merge_and_unload()");
  }
  std::vector<std::pair<std::string, detail::PeftWriter>> writers;  // what one refuses stops all
  for (const auto& name : names()) {
    writers.emplace_back(name == "default" ? directory : directory + "/" + name, detail::PeftWriter(state(), name));
  }
  for (const auto& [folder, writer] : writers) writer.write(folder);
}

inline void Adapters::save(const std::string& directory, const std::string& name) const {
  detail::PeftWriter(state(), name).write(directory);
}

inline MergeReport Adapters::merge(const MergeOptions& options) {
  if (state().active().empty()) {
    throw StateError("[lora::merge] found no active adapter, expected one; call set_active first");
  }
  return merge(state().active(), options);
}

inline MergeReport Adapters::merge(const std::vector<std::string>& names, const MergeOptions& options) {
  const auto lock = state().change("merge");
  TORCH_CHECK_VALUE(!names.empty(), "[lora::merge] found no name, expected the adapters to merge");
  check_names("merge", names);
  if (state().calls()->disabled_anywhere()) {
    throw StateError("[lora::merge] found the adapters disabled, expected no DisableAdapters guard alive");
  }
  detail::Names merged;
  for (const auto& name : state().active()) {
    if (detail::contains(names, name) || detail::contains(state().merged(), name)) merged.push_back(name);
  }
  for (const auto& name : names) {
    if (!detail::contains(merged, name)) {
      throw StateError("[lora::merge] found \"" + name +
                       "\" inactive, expected an active adapter: merging it would change the output; call set_active "
                       "first");
    }
  }
  detail::SiteMerger merger(state().sites(), merged, state().active(), !options.keep_base());
  const auto report = merger.cost(options.keep_base());
  if (options.keep_base()) {
    state().install(state().active(), merged, merger.merge());
    return report;
  }
  if (merged.size() != state().active().size()) {
    throw StateError(
        "[lora::merge] found some of the active adapters for a merge without the base, expected all: it unloads them; "
        "call set_active first");
  }
  merger.check_each();
  state().install(state().active(), {});  // second copies of an earlier merge go first
  merger.merge_each([&](size_t site, const at::Tensor& weight) { state().replace(site, weight); });
  state().unload();
  return report;
}

inline MergeReport Adapters::merge_cost(const MergeOptions& options) const {
  return detail::SiteMerger(state().sites(), state().active(), state().active()).cost(options.keep_base());
}

inline TruncationReport Adapters::truncate(const std::string& name, const Truncation& to) {
  const auto lock = state().change("truncate");
  const auto trainable = this->trainable();
  auto [prepared, report] = detail::truncate(state(), name, to);
  const auto active = state().active(), merged = state().merged();
  if (detail::contains(merged, name)) {
    throw StateError("[lora::truncate] found \"" + name + "\" merged, expected it unmerged; call unmerge() first");
  }
  auto without = active;
  without.erase(std::remove(without.begin(), without.end(), name), without.end());
  const auto weights = state().merged_weights();
  state().install(without, merged, weights);
  state().exchange(std::move(prepared));
  state().install(active, merged, weights);
  state().set_trainable(trainable);
  return report;
}

inline void Adapters::unmerge() {
  const auto lock = state().change("unmerge");
  if (state().merged().empty()) throw StateError("[lora::unmerge] found nothing merged, expected merge() before");
  state().install(state().active(), {});
}

inline void Adapters::unload() {
  const auto lock = state().change("unload", /*leaving=*/true);
  state().unload();
}

inline void Adapters::merge_and_unload() {
  const auto lock = state().change("merge_and_unload", /*leaving=*/true);
  const auto& active = state().active();
  for (const auto& [site, weight] : detail::merge_sites(state().sites(), active, active, /*for_good=*/true)) {
    state().replace(site, weight);
  }
  state().unload();
}

inline VerifyReport Adapters::verify(const std::function<at::Tensor()>& forward) const {
  const auto lock = state().change("verify");
  detail::check_no_inference_mode("verify");
  if (!state().merged().empty()) {
    throw StateError("[lora::verify] found merged adapters, expected none; call unmerge() first");
  }
  const auto active = state().active();
  auto moved = tensors([&](const std::string& name) { return detail::contains(active, name); });
  detail::leave_out_untrained(moved);
  return detail::verify(moved, forward, [this] { state().announce_gradients(); });
}

LORA_NAMESPACE_END
