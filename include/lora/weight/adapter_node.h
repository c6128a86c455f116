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

  /// Adds the tensors of one weight's adapter, each below the child that it names.
  void add(const std::shared_ptr<AdaptedWeight>& weight, const WeightAdapter& adapter) {
    weights_.push_back(weight);
    for (const auto& [child, named] : adapter.tensors()) {
      auto* module = this;
      if (!child.empty()) {
        if (!named_children().contains(child)) {
          register_module(child, std::make_shared<AdapterNode>(child, nullptr, method_));
        }
        module = static_cast<AdapterNode*>(named_children()[child].get());
      }
      if (named.role == TensorRole::kBuffer) {
        module->register_buffer(named.name, named.tensor);
      } else {
        module->register_parameter(named.name, named.tensor, named.tensor.requires_grad());
      }
    }
  }

  const std::shared_ptr<void>& owner() const { return owner_; }
  void set_owner(std::shared_ptr<void> owner) { owner_ = std::move(owner); }

  bool is_serializable() const override { return false; }

  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override {
    torch::nn::Module::to(device, method_->tensor_dtype(dtype), non_blocking);
    cast_buffers(dtype);
    moved(device, dtype);
  }
  void to(torch::Dtype dtype, bool non_blocking = false) override {
    torch::nn::Module::to(method_->tensor_dtype(dtype), non_blocking);
    cast_buffers(dtype);
    moved(std::nullopt, dtype);
  }
  void to(torch::Device device, bool non_blocking = false) override {
    torch::nn::Module::to(device, non_blocking);
    moved(device, std::nullopt);
  }

 private:
  /// A copy of a buffer keeps the model's dtype: what is written to it must not go to a cast of it.
  void cast_buffers(at::ScalarType dtype) {
    for (auto& buffer : buffers(/*recurse=*/false)) {
      if (buffer.is_floating_point()) buffer.set_data(buffer.to(dtype));
    }
  }

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
