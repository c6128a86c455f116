#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/ScalarType.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <lora/version.h>

LORA_NAMESPACE_BEGIN
namespace detail {

/// Whether a CPU tensor's memory is all that it is: strided, not wrapped, batched, conjugated or traced, and without a
/// forward-mode gradient.
inline bool is_plain_cpu_memory(const at::Tensor& tensor) {
  using Key = c10::DispatchKey;
  constexpr c10::DispatchKeySet plain{Key::CPU, Key::ADInplaceOrView, Key::AutogradCPU, Key::AutocastCPU};
  return tensor.defined() && plain.isSupersetOf(tensor.key_set()) && tensor.device().is_cpu() &&
         tensor.layout() == at::kStrided && !tensor._fw_grad(/*level=*/0).defined() &&
         !c10::impl::tls_is_dispatch_key_included(Key::Tracer);
}

/// Whether a CPU kernel of ours may take a tensor's memory for all that it is, of float32, bfloat16 or half.
inline bool is_plain_cpu_tensor(const at::Tensor& tensor) {
  if (!is_plain_cpu_memory(tensor)) return false;
  const auto dtype = tensor.scalar_type();
  return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
}

/// Whether no other handle holds the tensor and no other tensor its memory, so that nobody sees what is written there.
/// LibTorch hands gradients from node to node in this way and keeps those that it is the only one to hold.
inline bool is_sole_owner(const at::Tensor& tensor) {
  return tensor.use_count() == 1 && tensor.storage().use_count() == 1;
}

/// Calls visit(T()) with the type of a plain tensor's elements.
template <class Visit>
void visit_plain_dtype(at::ScalarType dtype, const Visit& visit) {
  switch (dtype) {
    case at::kFloat:
      return visit(float());
    case at::kBFloat16:
      return visit(c10::BFloat16());
    default:
      return visit(c10::Half());
  }
}

}  // namespace detail
LORA_NAMESPACE_END
