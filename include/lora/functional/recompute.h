#pragma once

#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/Exception.h>
#include <lora/detail/error.h>
#include <lora/detail/graph_node.h>
#include <lora/detail/graph_section.h>
#include <lora/detail/random_state.h>
#include <lora/version.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <cstddef>
#include <functional>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

using TensorsFunction = std::function<std::vector<at::Tensor>(const std::vector<at::Tensor>&)>;

/// What operators depend on beside their inputs: guards of this thread, autocast among them, and the random generators
/// of some devices.
class RunState {
 public:
  explicit RunState(std::vector<at::Device> devices)
      : keys_(c10::impl::tls_local_dispatch_key_set()), devices_(std::move(devices)) {
    for (const auto device : devices_) {
      random_.push_back(random_state(device));
      dtypes_.push_back(autocast_dtype(device));
    }
  }

  /// Forgets the generators that are as they were: nothing was drawn, and what others draw meanwhile is left alone.
  void forget_unused_generators() {
    for (size_t i = 0; i < devices_.size(); ++i) {
      if (random_[i].equal(random_state(devices_[i]))) random_[i] = at::Tensor();
    }
  }

  class Restored;

 private:
  static at::ScalarType autocast_dtype(at::Device device) {
    const bool known = at::autocast::is_autocast_available(device.type());
    return known ? at::autocast::get_autocast_dtype(device.type()) : at::ScalarType::Undefined;
  }

  void set() const {
    for (size_t i = 0; i < devices_.size(); ++i) {
      if (random_[i].defined()) set_random_state(devices_[i], random_[i]);
      if (dtypes_[i] != at::ScalarType::Undefined) {
        at::autocast::set_autocast_dtype(devices_[i].type(), dtypes_[i]);
      }
    }
  }

  c10::impl::LocalDispatchKeySet keys_;
  std::vector<at::Device> devices_;
  std::vector<at::Tensor> random_;
  std::vector<at::ScalarType> dtypes_;
};

/// The state while it lives; then that of before again.
class RunState::Restored {
 public:
  explicit Restored(const RunState& state) : before_(state.devices_), keys_(state.keys_) {
    for (size_t i = 0; i < state.random_.size(); ++i) {
      if (!state.random_[i].defined()) before_.random_[i] = at::Tensor();
    }
    state.set();
  }
  ~Restored() { before_.set(); }
  Restored(const Restored&) = delete;
  Restored& operator=(const Restored&) = delete;

 private:
  RunState before_;
  const c10::impl::ForceDispatchKeyGuard keys_;
};

/// One run of a function as a section of the graph that starts from its inputs and from what else needs a gradient.
struct RecomputeRun {
  using Tensors = std::vector<at::Tensor>;
  using Edges = torch::autograd::edge_list;

  RecomputeRun(const TensorsFunction& fn, const Tensors& given, const std::vector<bool>& differentiable)
      : section("lora::recompute") {
    for (size_t i = 0; i < given.size(); ++i) {
      const bool floating = given[i].defined() && differentiable[i];
      inputs.push_back(given[i].defined() ? given[i].detach().requires_grad_(floating) : at::Tensor());
    }
    outputs = fn(inputs);
    for (auto& output : outputs) {
      // What the function passes on as it is becomes a tensor of the section too.
      if (output.defined() && output.requires_grad() && !section.computed(output)) output = output.view_as(output);
    }
  }

  Tensors differentiable_outputs() const {
    Tensors result;
    for (const auto& output : outputs) {
      if (section.computed(output)) result.push_back(output);
    }
    return result;
  }

  /// Where the graph of the outputs starts outside of the inputs, and which inputs it starts from.
  std::pair<Edges, std::vector<bool>> sources() const {
    auto edges = section.sources(differentiable_outputs());
    std::vector<bool> used;
    for (const auto& input : inputs) {
      const auto before = edges.size();
      if (input.defined() && input.requires_grad()) {
        edges.erase(std::remove(edges.begin(), edges.end(), torch::autograd::impl::gradient_edge(input)), edges.end());
      }
      used.push_back(edges.size() != before);
    }
    return {std::move(edges), std::move(used)};
  }

  GraphSection section;
  Tensors inputs;
  Tensors outputs;
};

/// Runs the function again when its gradients are asked for.
class RecomputeBackward : public torch::autograd::Node {
 public:
  using Tensors = torch::autograd::variable_list;
  using Edges = torch::autograd::edge_list;

  /// `edges`: of the inputs, undefined for those that need no gradient, then `sources`.
  RecomputeBackward(TensorsFunction fn, std::vector<torch::autograd::SavedVariable> inputs, RunState state,
                    std::vector<bool> used, Edges sources, std::vector<bool> differentiable_outputs, Edges&& edges)
      : torch::autograd::Node(std::move(edges)),
        fn_(std::move(fn)),
        inputs_(std::move(inputs)),
        state_(std::move(state)),
        used_(std::move(used)),
        sources_(std::move(sources)),
        differentiable_outputs_(std::move(differentiable_outputs)) {}

  std::string name() const override { return "lora::RecomputeBackward"; }

  Tensors apply(Tensors&& incoming) override {
    Tensors result(used_.size() + sources_.size());
    if (std::none_of(incoming.begin(), incoming.end(), [](const auto& gradient) { return gradient.defined(); })) {
      return result;
    }
    {
      const at::AutoGradMode grad_mode(true);
      const RecomputeRun run = run_again(saved());
      auto outputs = run.differentiable_outputs();
      check_outputs(run);
      for (size_t i = 0; i < outputs.size(); ++i) {
        if (!incoming[i].defined()) incoming[i] = at::zeros(outputs[i].sizes(), outputs[i].options());
      }
      auto starts = sources_;
      std::vector<size_t> places;
      for (size_t i = 0; i < sources_.size(); ++i) places.push_back(used_.size() + i);
      for (size_t i = 0; i < used_.size(); ++i) {
        if (!used_[i]) continue;
        starts.push_back(torch::autograd::impl::gradient_edge(run.inputs[i]));
        places.push_back(i);
      }
      auto gradients = run.section.backward(outputs, incoming, starts);
      for (size_t i = 0; i < places.size(); ++i) result[places[i]] = std::move(gradients[i]);
    }
    refuse_double_backward("lora::recompute", *this, result);
    return result;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    fn_ = nullptr;
    for (auto& input : inputs_) input.reset_data();
  }

 private:
  /// The function and its inputs; another backward may free them at the same time.
  std::pair<TensorsFunction, Tensors> saved() {
    const std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(
        fn_,
        "[lora::recompute] found a second backward through the same outputs, expected one; pass retain_graph to "
        "the first");
    Tensors inputs;
    for (auto& input : inputs_) inputs.push_back(input.unpack());
    return {fn_, std::move(inputs)};
  }

  RecomputeRun run_again(const std::pair<TensorsFunction, Tensors>& saved) const {
    const RunState::Restored restored(state_);
    return RecomputeRun(saved.first, saved.second, used_);
  }

  void check_outputs(const RecomputeRun& run) const {
    std::vector<bool> differentiable;
    for (const auto& output : run.outputs) differentiable.push_back(run.section.computed(output));
    if (differentiable == differentiable_outputs_) return;
    throw StateError(
        "[lora::recompute] found other outputs that need a gradient when the function is run again, expected those of "
        "its first run; keep everything that it depends on as it was then");
  }

  std::mutex mutex_;
  TensorsFunction fn_;
  std::vector<torch::autograd::SavedVariable> inputs_;
  RunState state_;
  std::vector<bool> used_;
  Edges sources_;
  std::vector<bool> differentiable_outputs_;
};

}  // namespace detail

/// fn(inputs) without its intermediate results in memory: they are freed when it returns, and computed again when the
/// backward comes to it (Chen et al. 2016, "Training deep nets with sublinear memory cost", arXiv 1604.06174).
///
/// fn: takes and returns tensors of any shapes; it may use others and modules, whose parameters get their gradients and
/// hooks as without it. It is kept and called again, when the caller's frame may be gone: let it capture by value what
/// it needs. It is run again under the autocast and FastOperators of its first run and, where it drew random numbers,
/// from the state that the generators had then (the CPU's and those of the inputs' devices); draws of other threads
/// meanwhile are taken back with it. Active adapters, DisableAdapters and training modes have to be as they were.
/// Nests. Can be differentiated once. Without grad mode, or where nothing needs a gradient, it is fn(inputs) alone.
///
/// The backward throws a StateError where the second run starts from other tensors that need a gradient or has other
/// outputs that do, as after a change of the active adapters that are trained, and LibTorch's error where an input has
/// been written to, by fn or later.
inline std::vector<at::Tensor> recompute(
    const std::function<std::vector<at::Tensor>(const std::vector<at::Tensor>&)>& fn,
    const std::vector<at::Tensor>& inputs) {
  TORCH_CHECK_VALUE(fn, "[lora::recompute] found an empty function, expected one to run");
  if (!at::GradMode::is_enabled()) return fn(inputs);
  std::vector<bool> differentiable;
  std::vector<at::Tensor> defined;
  for (const auto& input : inputs) {
    differentiable.push_back(input.defined() && input.requires_grad());
    if (input.defined()) defined.push_back(input);
  }
  // Before the run: what the function writes to its inputs is noticed by their versions.
  std::vector<torch::autograd::SavedVariable> saved;
  for (const auto& input : inputs) saved.emplace_back(input, /*is_output=*/false);
  detail::RunState state(detail::random_devices(defined));
  std::vector<at::Tensor> outputs;
  std::vector<bool> differentiable_outputs, used;
  torch::autograd::edge_list sources;
  {
    const detail::RecomputeRun run(fn, inputs, differentiable);
    std::tie(sources, used) = run.sources();
    state.forget_unused_generators();
    for (const auto& output : run.outputs) {
      differentiable_outputs.push_back(run.section.computed(output));
      outputs.push_back(differentiable_outputs.back() ? output.detach() : output);
    }
  }
  const auto is_set = [](bool value) { return value; };
  if (std::none_of(differentiable_outputs.begin(), differentiable_outputs.end(), is_set)) return outputs;
  torch::autograd::edge_list edges;
  for (size_t i = 0; i < inputs.size(); ++i) {
    edges.push_back(used[i] ? torch::autograd::impl::gradient_edge(inputs[i]) : torch::autograd::Edge());
  }
  edges.insert(edges.end(), sources.begin(), sources.end());
  const auto node =
      detail::make_node<detail::RecomputeBackward>(fn, std::move(saved), std::move(state), std::move(used),
                                                   std::move(sources), differentiable_outputs, std::move(edges));
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (differentiable_outputs[i]) torch::autograd::create_gradient_edge(outputs[i], node);
  }
  return outputs;
}

/// The same for a function of one tensor.
///
///     x = lora::recompute([block](const torch::Tensor& x) mutable { return block->forward(x); }, x);
inline at::Tensor recompute(const std::function<at::Tensor(const at::Tensor&)>& fn, const at::Tensor& input) {
  TORCH_CHECK_VALUE(fn, "[lora::recompute] found an empty function, expected one to run");
  return recompute([fn](const std::vector<at::Tensor>& inputs) { return std::vector<at::Tensor>{fn(inputs[0])}; },
                   std::vector<at::Tensor>{input})[0];
}

LORA_NAMESPACE_END
