#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <lora/detail/torch_compat.h>
#include <lora/version.h>

#include <cstdint>
#include <exception>
#include <optional>
#include <string>

LORA_NAMESPACE_BEGIN

/// A kernel for the product with a frozen matrix.
enum class ProductKernel {
  kAten,    ///< LibTorch's own operator.
  kOneDnn,  ///< oneDNN's, by the operator mkldnn::_linear_pointwise.
};

/// "ATen" or "oneDNN".
inline const char* to_string(ProductKernel kernel) { return kernel == ProductKernel::kAten ? "ATen" : "oneDNN"; }

namespace detail {

/// Operators that are called while it lives go to the backend alone: without autograd, autocast and adapted weights.
class PlainDispatch {
  at::AutoDispatchBelowADInplaceOrView no_autograd_;
  c10::impl::ExcludeDispatchKeyGuard no_autocast_{c10::autocast_dispatch_keyset};
  c10::impl::ExcludeDispatchKeyGuard no_carrier_{kAdaptedWeightKey};
};

/// The operator, or nothing in a LibTorch without it. It has no gradient, and its result claims to have one.
inline const std::optional<c10::OperatorHandle>& onednn_operator() {
  static const auto found = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
  return found;
}

inline bool has_onednn_product() { return onednn_operator().has_value(); }

/// x [*, in] · matrix [in, out] (+ bias [out]) by oneDNN, to be called without autograd.
inline at::Tensor onednn_product(const at::Tensor& x, const at::Tensor& matrix, const std::optional<at::Tensor>& bias) {
  // By the stack: the C++ types of its signature are not the same in all versions of LibTorch.
  torch::jit::Stack stack;
  torch::jit::push(stack, x.contiguous(), matrix.t(), bias ? c10::IValue(*bias) : c10::IValue(), "none",
                   c10::List<std::optional<at::Scalar>>(), "");
  onednn_operator()->callBoxed(&stack);
  return stack.front().toTensor();
}

/// Whether oneDNN has a product for the dtype on this processor.
inline bool onednn_has(at::ScalarType dtype) {
  const auto works = [](at::ScalarType tried) {
    const c10::InferenceMode no_inference(false);
    const PlainDispatch plain;
    const auto tensor = at::zeros({16, 16}, at::TensorOptions(tried).device(at::kCPU));
    try {
      onednn_product(tensor, tensor, std::nullopt);
      return true;
    } catch (const std::exception&) {  // of oneDNN itself, without a type that is known here
      return false;
    }
  };
  static const bool has_float = works(at::kFloat), has_bfloat16 = works(at::kBFloat16), has_half = works(at::kHalf);
  return (dtype == at::kFloat && has_float) || (dtype == at::kBFloat16 && has_bfloat16) ||
         (dtype == at::kHalf && has_half);
}

/// Whether oneDNN takes the product with a matrix [in, out]: one with elements, whose memory is dense in either
/// direction.
inline bool onednn_takes(const at::Tensor& matrix) {
  if (!matrix.device().is_cpu() || matrix.numel() == 0 || !has_onednn_product()) return false;
  return (matrix.is_contiguous() || matrix.t().is_contiguous()) && onednn_has(matrix.scalar_type());
}

/// x [*, in] · matrix [in, out] by the given kernel, to be called without autograd.
inline at::Tensor multiply(ProductKernel kernel, const at::Tensor& x, const at::Tensor& matrix) {
  if (kernel == ProductKernel::kOneDnn && onednn_takes(matrix)) return onednn_product(x, matrix, std::nullopt);
  return at::matmul(x, matrix);
}

/// sum [rows, out] += x [rows, r] · matrix [r, out] by the given kernel, to be called without autograd.
inline void add_product(ProductKernel kernel, at::Tensor sum, const at::Tensor& x, const at::Tensor& matrix) {
  // oneDNN's operator adds to no tensor, so that the sum is read once more: from here on it is quicker still.
  constexpr int64_t kLeastRank = 64;
  if (kernel == ProductKernel::kOneDnn && x.size(1) >= kLeastRank && onednn_takes(matrix)) {
    sum.add_(onednn_product(x, matrix, std::nullopt));
  } else {
    sum.addmm_(x, matrix);
  }
}

}  // namespace detail
LORA_NAMESPACE_END
