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

/// A child module of a host through which to() reaches what stands in the place of the host's weights. Archives of the
/// plain model neither hold nor expect it.
class HostNode : public torch::nn::Module {
 public:
  /// `owner` is the shared state of the model's adapters, kept alive by the model through this node.
  HostNode(std::string name, std::shared_ptr<void> owner)
      : torch::nn::Module(std::move(name)), owner_(std::move(owner)) {}

  void add(const std::shared_ptr<AdaptedWeight>& weight) { weights_.push_back(weight); }

  const std::shared_ptr<void>& owner() const { return owner_; }
  void set_owner(std::shared_ptr<void> owner) { owner_ = std::move(owner); }

  bool is_serializable() const override { return false; }

  void to(torch::Device device, torch::Dtype dtype, bool /*non_blocking*/ = false) override { moved(device, dtype); }
  void to(torch::Dtype dtype, bool /*non_blocking*/ = false) override { moved(std::nullopt, dtype); }
  void to(torch::Device device, bool /*non_blocking*/ = false) override { moved(device, std::nullopt); }

 protected:
  void moved(std::optional<c10::Device> device, std::optional<at::ScalarType> dtype) {
    for (const auto& weak : weights_) {
      if (const auto weight = weak.lock()) weight->moved(device, dtype);
    }
  }

 private:
  std::shared_ptr<void> owner_;
  std::vector<std::weak_ptr<AdaptedWeight>> weights_;
};

/// The child module of a host with one adapter's tensors, so that parameters(), to(), zero_grad() and the like reach
/// them.
class AdapterNode final : public HostNode {
 public:
  AdapterNode(std::string name, std::shared_ptr<void> owner, std::shared_ptr<const Method> method)
      : HostNode(std::move(name), std::move(owner)), method_(std::move(method)) {}

  /// Adds the tensors of one weight's adapter, each below the child that it names.
  void add(const std::shared_ptr<AdaptedWeight>& weight, const WeightAdapter& adapter) {
    HostNode::add(weight);
    for (const auto& [child, named] : adapter.tensors()) {
      auto* module = this;
      if (!child.empty()) {
        if (!named_children().contains(child)) {
          register_module(child, std::make_shared<AdapterNode>(child, nullptr, method_));
        }
        module = static_cast<AdapterNode*>(named_children()[child].get());
      }
      if (!is_trained(named.role)) {
        module->register_buffer(named.name, named.tensor);
        if (named.role == TensorRole::kBuffer) module->copies_.push_back(named.tensor);
      } else {
        module->register_parameter(named.name, named.tensor, named.tensor.requires_grad());
      }
    }
  }

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
    for (auto& buffer : copies_) {
      if (buffer.is_floating_point()) buffer.set_data(buffer.to(dtype));
    }
  }

  std::shared_ptr<const Method> method_;
  std::vector<at::Tensor> copies_;  // of buffers
};

}  // namespace detail
LORA_NAMESPACE_END
