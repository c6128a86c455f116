#pragma once

#include <lora/inject/find.h>
#include <lora/inject/model_adapters.h>
#include <lora/version.h>
#include <lora/weight/product_plan.h>

#include <memory>
#include <utility>

LORA_NAMESPACE_BEGIN

/// Lets every product of a model with a frozen matrix, in Linear layers, attention and whatever else keeps its weight
/// in a place that inject knows, run by the fastest kernel; see ProductPlan. For inference without adapters, and for
/// models that are to stay accelerated when their adapters are unloaded: inject does it by itself.
///
/// `model` is a torch::nn::Module& or a torch::jit::Module&; a weight is frozen where no gradient is wanted of it. The
/// choices go into `plan`, by default one that all models of the process share. Returns the plan.
template <class Model>
std::shared_ptr<ProductPlan> accelerate(Model& model, std::shared_ptr<ProductPlan> plan = nullptr) {
  if (plan == nullptr) plan = ProductPlan::of_process();
  detail::check_no_inference_mode("accelerate");
  detail::check_key_owner();
  for (const auto& [adapters, root, is_part] : detail::find_adapters(model)) {
    const auto lock = adapters->change("accelerate");
    adapters->accelerate(plan, /*stays=*/true);
  }
  detail::walk_model(model)->accelerate(plan, /*stays=*/true);  // what is outside of the layers that have adapters
  return plan;
}

/// Goes back to LibTorch's own products; adapters stay. Nothing happens to a model that is not accelerated.
template <class Model>
void end_acceleration(Model& model) {
  for (const auto& [adapters, root, is_part] : detail::find_adapters(model)) {
    const auto lock = adapters->change("end_acceleration");
    adapters->end_acceleration();
  }
}

/// The plan of an accelerated model; null for any other.
template <class Model>
std::shared_ptr<ProductPlan> acceleration_of(const Model& model) {
  for (const auto& [adapters, root, is_part] : detail::find_adapters(model)) {
    if (adapters->calls()->plan() != nullptr) return adapters->calls()->plan();
  }
  return nullptr;
}

LORA_NAMESPACE_END
