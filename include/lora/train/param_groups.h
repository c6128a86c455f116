#pragma once

#include <lora/config/targets.h>
#include <lora/methods/method.h>
#include <lora/version.h>
#include <torch/arg.h>
#include <torch/optim/optimizer.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN

/// Options of LoRA+ (Hayou et al. 2024, arXiv 2402.12354): another learning rate for B than for A.
class LoraPlusOptions {
 public:
  /// The learning rate of B over that of A; 1 is plain LoRA, the paper suggests 16.
  TORCH_ARG(double, lr_ratio) = 1;
  /// The learning rate of the factors of embeddings, whose A is zero at the start; none: that of A. PEFT's is 1e-6.
  TORCH_ARG(std::optional<double>, lr_embedding);

 public:
  /// Sets the learning rate of the tensors whose name in named_parameters(), or its end behind a dot, is `name`.
  LoraPlusOptions& lr(const std::string& name, double value) {
    overrides_.emplace_back(name, value);
    return *this;
  }
  /// The rates by name, in the order in which they were set.
  const std::vector<std::pair<std::string, double>>& overrides() const noexcept { return overrides_; }

 private:
  std::vector<std::pair<std::string, double>> overrides_;
};

namespace detail {

/// Vectors, as biases and gains, are not to be pulled to zero.
template <class Options>
auto leave_out_decay(Options& options, int) -> decltype(options.weight_decay(0.0), void()) {
  options.weight_decay(0.0);
}
template <class Options>
void leave_out_decay(Options&, long) {}

}  // namespace detail

/// Parameter groups of the given tensors, named by their paths, for any of LibTorch's optimizers; none is empty, and
/// they keep the tensors' order. Every group carries all of `options`, which LibTorch would otherwise forget, but no
/// weight decay where its tensors are vectors. Give an optimizer no options beside the groups (SGD, which needs some,
/// the rate 1e-3): LibTorch 2.15's takes them for whatever in a group is as the options' constructor leaves it, set or
/// not.
///
/// Throws c10::ValueError for a ratio or learning rate out of range and for an override that names no tensor.
template <class Options>
std::vector<torch::optim::OptimizerParamGroup> param_groups(const std::vector<UpdateTensor>& tensors,
                                                            const Options& options, const LoraPlusOptions& plus = {}) {
  TORCH_CHECK_VALUE(std::isfinite(plus.lr_ratio()) && plus.lr_ratio() > 0,
                    "[lora::param_groups] found lr_ratio = ", plus.lr_ratio(), ", expected a positive number");
  const double base_lr = std::make_unique<Options>(options)->get_lr();
  TORCH_CHECK_VALUE(!plus.lr_embedding() || *plus.lr_embedding() >= 0,
                    "[lora::param_groups] found lr_embedding = ", plus.lr_embedding().value_or(0),
                    ", expected none below 0");
  struct Group {
    double lr;
    bool decays;
    std::vector<at::Tensor> members;
  };
  const auto rate = [&](const UpdateTensor& parameter) {
    if (parameter.role == TensorRole::kOutput) return base_lr * plus.lr_ratio();
    return parameter.role == TensorRole::kEmbedding ? plus.lr_embedding().value_or(base_lr) : base_lr;
  };
  std::vector<bool> used(plus.overrides().size(), false);
  std::vector<Group> groups;
  for (const auto& parameter : tensors) {
    double lr = rate(parameter);
    for (size_t i = 0; i < used.size(); ++i) {
      if (!TargetModules::is_path_or_suffix(plus.overrides()[i].first, parameter.name)) continue;
      lr = plus.overrides()[i].second;
      used[i] = true;
    }
    TORCH_CHECK_VALUE(lr >= 0, "[lora::param_groups] found the learning rate ", lr, ", expected none below 0 for ",
                      parameter.name);
    const bool decays = parameter.tensor.dim() > 1;
    auto group = std::find_if(groups.begin(), groups.end(),
                              [&](const Group& known) { return known.lr == lr && known.decays == decays; });
    if (group == groups.end()) group = groups.insert(groups.end(), {lr, decays, {}});
    group->members.push_back(parameter.tensor);
  }
  for (size_t i = 0; i < used.size(); ++i) {
    TORCH_CHECK_VALUE(used[i], "[lora::param_groups] found a learning rate for \"", plus.overrides()[i].first,
                      "\", expected the name of a trainable tensor, see named_parameters()");
  }
  TORCH_CHECK_VALUE(!groups.empty(),
                    "[lora::param_groups] found no trainable tensor, expected some; call "
                    "set_trainable first");

  std::vector<torch::optim::OptimizerParamGroup> result;
  for (auto& group : groups) {
    auto group_options = std::make_unique<Options>(options);
    group_options->set_lr(group.lr);
    if (!group.decays) detail::leave_out_decay(*group_options, 0);
    result.emplace_back(std::move(group.members), std::move(group_options));
  }
  return result;
}

LORA_NAMESPACE_END
