#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/GradMode.h>
#include <c10/util/intrusive_ptr.h>
#include <lora/version.h>
#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>

#include <memory>
#include <string>
#include <type_traits>
#include <utility>

LORA_NAMESPACE_BEGIN
namespace detail {

/// What holds a node of the autograd graph: a std::shared_ptr, from LibTorch 2.15 on a c10::intrusive_ptr.
using NodePointer = decltype(torch::autograd::Edge::function);

template <class Node, class... Args>
auto make_node(Args&&... args) {
  if constexpr (std::is_same_v<NodePointer, std::shared_ptr<torch::autograd::Node>>) {
    return std::make_shared<Node>(std::forward<Args>(args)...);
  } else {
    return c10::make_intrusive<Node>(std::forward<Args>(args)...);
  }
}

/// For the end of a node's apply(): where the caller asks for a graph of the gradients, lets them lead to an error
/// instead of counting as constants.
inline void refuse_double_backward(const char* function, const torch::autograd::Node& node,
                                   torch::autograd::variable_list& gradients) {
  if (!at::GradMode::is_enabled()) return;
  const auto error = make_node<torch::autograd::Error>(
      "[" + std::string(function) +
          "] found a second derivative, expected a first one; compute the same with LibTorch's operators for that",
      torch::autograd::edge_list(node.next_edges()));
  for (auto& gradient : gradients) {
    if (!gradient.defined()) continue;
    gradient = gradient.detach();  // it may be a tensor of the caller's
    torch::autograd::create_gradient_edge(gradient, error);
  }
}

}  // namespace detail
LORA_NAMESPACE_END
