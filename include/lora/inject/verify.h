#pragma once

#include <ATen/ops/count_nonzero.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/randn_like.h>
#include <c10/core/GradMode.h>
#include <lora/detail/random_state.h>
#include <lora/inject/model_adapters.h>
#include <lora/version.h>
#include <torch/csrc/autograd/autograd.h>

#include <functional>
#include <memory>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN

/// What verify() found.
struct VerifyReport {
  bool output_changes = false;            ///< The adapters reach the output.
  std::vector<std::string> dead_targets;  ///< Tensors that the output does not depend on.

  /// Whether every adapter is reached.
  bool ok() const { return output_changes && dead_targets.empty(); }
};

/// A line, and one more for each tensor that no gradient reaches.
inline std::ostream& operator<<(std::ostream& out, const VerifyReport& report) {
  out << (report.output_changes ? "the adapters change the output" : "the adapters do not change the output");
  for (const auto& target : report.dead_targets) out << "\n  no gradient reaches " << target;
  return out << "\n";
}

namespace detail {

/// Keeps the state of a device's random generator: restart() sets it back, and so does the destructor.
class RandomState {
 public:
  explicit RandomState(at::Device device) : device_(device), state_(random_state(device)) {}
  ~RandomState() { restart(); }
  RandomState(const RandomState&) = delete;
  RandomState& operator=(const RandomState&) = delete;

  void restart() { set_random_state(device_, state_); }

 private:
  at::Device device_;
  at::Tensor state_;
};

/// Moves each factor that may be zero a little and makes all tensors trainable, for its lifetime; calls `announce`
/// after both changes.
class Perturbation {
 public:
  Perturbation(const std::vector<UpdateTensor>& tensors, std::function<void()> announce)
      : announce_(std::move(announce)) {
    const c10::NoGradGuard no_grad;
    for (const auto& named : tensors) {
      saved_.push_back({named.tensor, named.tensor.detach().clone(), named.tensor.requires_grad()});
      named.tensor.set_requires_grad(true);
      const bool moves = named.role == TensorRole::kOutput || named.role == TensorRole::kEmbedding;
      if (moves) named.tensor.add_(at::randn_like(named.tensor), 0.02);
    }
    announce_();
  }
  ~Perturbation() {
    const c10::NoGradGuard no_grad;
    for (const auto& saved : saved_) {
      saved.tensor.copy_(saved.value);
      saved.tensor.set_requires_grad(saved.required);
    }
    announce_();
  }
  Perturbation(const Perturbation&) = delete;
  Perturbation& operator=(const Perturbation&) = delete;

 private:
  struct Saved {
    at::Tensor tensor;
    at::Tensor value;
    bool required;
  };
  std::function<void()> announce_;
  std::vector<Saved> saved_;
};

inline VerifyReport verify(const std::vector<UpdateTensor>& tensors, const std::function<at::Tensor()>& forward,
                           const std::function<void()>& announce) {
  const at::AutoGradMode with_grad(true);
  std::vector<at::Tensor> inputs;
  for (const auto& named : tensors) inputs.push_back(named.tensor);
  std::vector<std::unique_ptr<RandomState>> random;  // equal dropout masks before and after
  for (const auto device : random_devices(inputs)) random.push_back(std::make_unique<RandomState>(device));
  const auto before = forward().detach();
  const Perturbation perturbation(tensors, announce);
  for (const auto& state : random) state->restart();
  const auto after = forward();

  std::vector<at::Tensor> gradients(inputs.size());
  if (after.requires_grad()) {
    gradients = torch::autograd::grad({after}, inputs, {at::randn_like(after)}, /*retain_graph=*/false,
                                      /*create_graph=*/false, /*allow_unused=*/true);
  }
  VerifyReport report;
  report.output_changes = !at::equal(before, after);
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (!gradients[i].defined() || at::count_nonzero(gradients[i]).item<int64_t>() == 0) {
      report.dead_targets.push_back(tensors[i].name);
    }
  }
  return report;
}

}  // namespace detail
LORA_NAMESPACE_END
