#pragma once

#include <lora/inject/eva.h>
#include <lora/inject/find.h>
#include <lora/inject/inject_options.h>
#include <lora/inject/model_adapters.h>
#include <lora/methods/lora.h>
#include <lora/version.h>
#include <torch/nn/module.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN

/// A Linear layer with an adapter, for models that are written with adapters in mind: y = x·W0ᵀ + b + x·ΔWᵀ.
///
/// It shares the given layer, as the child `base_layer`, and gives bitwise what inject gives. `adapters_of(model)`
/// makes one handle of all such layers of a model. The config's target_modules are not used.
template <class Method = LoRA>
class LoRALinearImpl : public torch::nn::Module {
 public:
  /// The method's configuration.
  using Config = typename Method::Config;

  /// Shares `base`; the adapter is active and trainable.
  explicit LoRALinearImpl(torch::nn::Linear base, const Config& config = {}, const std::string& name = "default",
                          const InjectOptions& options = {})
      : base_layer(register_module("base_layer", std::move(base))) {
    const auto plan = detail::take_acceleration(*this);
    auto targeted = config;
    targeted.target_modules({"base_layer"});
    detail::ModuleWalk walk;
    const auto state = std::make_shared<detail::ModelAdapters>(
        walk.layer(base_layer.ptr(), "base_layer", /*file_path=*/""), base_layer->parameters(), nullptr);
    detail::add_adapter(*state, targeted, name, options);
    if (plan != nullptr) state->accelerate(plan, /*stays=*/true);
    detail::accelerate_by_default(*state, options.accelerate());
    state->install({name}, {});
    state->set_trainable({name});
  }

  /// x: [*, in] → [*, out].
  at::Tensor forward(const at::Tensor& x) { return base_layer->forward(x); }

  torch::nn::Linear base_layer;  ///< The given layer.
};

/// Holder of a LoRALinearImpl: `lora::LoRALinear<>(torch::nn::Linear(768, 768), lora::LoraConfig().r(8))`.
template <class Method = LoRA>
class LoRALinear : public torch::nn::ModuleHolder<LoRALinearImpl<Method>> {
 public:
  using torch::nn::ModuleHolder<LoRALinearImpl<Method>>::ModuleHolder;
  /// The module that it holds.
  using Impl = LoRALinearImpl<Method>;
};

LORA_NAMESPACE_END
