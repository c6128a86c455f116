#pragma once

#include <lora/methods/method.h>
#include <lora/version.h>
#include <lora/weight/adapted_weight.h>
#include <torch/nn/module.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// The child module of a host with one adapter's tensors, so that parameters(), to(), zero_grad() and the like reach
/// them. Archives of the plain model neither hold nor expect it.
class AdapterNode final : public torch::nn::Module {
 public:
  /// `owner` is the shared state of the model's adapters, kept alive by the model through this node.
  AdapterNode(std::string name, std::shared_ptr<void> owner, std::shared_ptr<const Method> method)
      : torch::nn::Module(std::move(name)), owner_(std::move(owner)), method_(std::move(method)) {}

  /// Adds the tensors of one weight's updates: below a child with the part's name where there are parts, else below
  /// `weight_name`, which is empty for a module with one weight.
  void add(const std::shared_ptr<AdaptedWeight>& weight, const WeightAdapter& adapter, const std::string& weight_name) {
    weights_.push_back(weight);
    for (const auto& part : adapter.parts) {
      const auto& child = part.name.empty() ? weight_name : part.name;
      auto* module = this;
      if (!child.empty()) {
        module = register_module(child, std::make_shared<AdapterNode>(child, nullptr, method_)).get();
      }
      for (const auto& named : part.update->tensors()) {
        module->register_parameter(named.name, named.tensor, named.tensor.requires_grad());
      }
    }
  }

  const std::shared_ptr<void>& owner() const { return owner_; }
  void set_owner(std::shared_ptr<void> owner) { owner_ = std::move(owner); }

  bool is_serializable() const override { return false; }

  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override {
    torch::nn::Module::to(device, method_->tensor_dtype(dtype), non_blocking);
    moved(device, dtype);
  }
  void to(torch::Dtype dtype, bool non_blocking = false) override {
    torch::nn::Module::to(method_->tensor_dtype(dtype), non_blocking);
    moved(std::nullopt, dtype);
  }
  void to(torch::Device device, bool non_blocking = false) override {
    torch::nn::Module::to(device, non_blocking);
    moved(device, std::nullopt);
  }

 private:
  void moved(std::optional<c10::Device> device, std::optional<at::ScalarType> dtype) {
    for (const auto& weak : weights_) {
      if (const auto weight = weak.lock()) weight->moved(device, dtype);
    }
  }

  std::shared_ptr<void> owner_;
  std::shared_ptr<const Method> method_;
  std::vector<std::weak_ptr<AdaptedWeight>> weights_;
};

}  // namespace detail
LORA_NAMESPACE_END
