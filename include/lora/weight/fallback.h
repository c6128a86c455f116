#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <lora/detail/error.h>
#include <lora/version.h>
#include <lora/weight/adapted_weight.h>
#include <lora/weight/kernels.h>

#include <algorithm>
#include <string>

LORA_NAMESPACE_BEGIN
namespace detail {

inline bool is_carrier(const c10::IValue& value) {
  return value.isTensor() && value.toTensor().defined() && as_carrier(value.toTensor()) != nullptr;
}

inline bool holds_carrier(const c10::IValue& value) {
  if (is_carrier(value)) return true;
  if (!value.isList()) return false;
  for (const c10::IValue& element : value.toListRef()) {
    if (is_carrier(element)) return true;
  }
  return false;
}

inline bool stands_for_buffer(const at::Tensor& tensor) {
  const auto snapshot = as_carrier(tensor)->weight()->snapshot();
  const auto& active = snapshot->active;
  return !active.empty() && std::all_of(active.begin(), active.end(), [](const auto& a) { return a->copies_buffer; });
}

/// Every operator without a kernel of its own: the carriers among its arguments, in lists too, become dense weights,
/// differentiable in the adapters. An operator that writes to a carrier is refused, for its result would be lost; it
/// may write to what stands for one tensor as it is: BatchNorm counts in its buffers.
inline void dense_fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const auto name = c10::toString(op.operator_name());
  const auto first = stack->size() - arguments.size();
  for (size_t i = 0; i < arguments.size(); ++i) {
    auto& value = (*stack)[first + i];
    if (!holds_carrier(value)) continue;
    const bool writes = arguments[i].alias_info() != nullptr && arguments[i].alias_info()->isWrite();
    if (writes && !(value.isTensor() && stands_for_buffer(value.toTensor()))) {
      throw StateError("[lora::weight] found " + name +
                       " writing to an adapted weight, expected an operator that reads it; write to the module's "
                       "registered parameter, or call unload() on the adapters first");
    }
    if (value.isTensor()) {
      value = plain(value.toTensor(), name.c_str());
      continue;
    }
    auto list = value.toList().copy();
    for (size_t k = 0; k < list.size(); ++k) {
      const c10::IValue element = list.get(k);
      if (is_carrier(element)) list.set(k, plain(element.toTensor(), name.c_str()));
    }
    value = list;
  }
  op.callBoxed(stack);
}

}  // namespace detail
LORA_NAMESPACE_END
