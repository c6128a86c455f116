#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/linalg_pinv.h>
#include <ATen/ops/matmul.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>
#include <lora/adapters.h>
#include <lora/methods/dora.h>
#include <lora/methods/lora_update.h>
#include <lora/version.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN

/// LoRA-FA (Zhang et al. 2023, arXiv 2308.03303): A is frozen, and the gradient of B becomes the one that comes nearest
/// to that of all of W, g ← g·(A·Aᵀ + 1e-8·I)⁺ / s² (Wang et al. 2024, arXiv 2407.18242). With any optimizer.
///
/// r·out trained parameters a weight; no input of an adapted product is kept for the backward. It holds while the
/// object lives: then A is trained again. What param_groups was given before has A in it, without a gradient.
///
/// Example:
/// ```
/// const lora::LoraFa only_B(adapters);
/// torch::optim::AdamW optimizer(lora::param_groups(adapters, torch::optim::AdamWOptions(2e-4)));
/// ```
class LoraFa {
 public:
  /// Of the trainable adapters. Throws a c10::ValueError where one has no plain A and B, as of DoRA or of another
  /// method.
  explicit LoraFa(const Adapters& adapters) {
    const c10::NoGradGuard no_grad;
    for (const auto& [path, update] : adapters.trainable_updates()) {
      const auto* lora = dynamic_cast<const LoraUpdate*>(update);
      TORCH_CHECK_VALUE(lora != nullptr && dynamic_cast<const DoraUpdate*>(update) == nullptr,
                        "[lora::LoraFa] found an adapter without plain factors, expected LoRA's A and B at ", path);
      const auto factors = lora->low_rank();
      const auto gram = at::matmul(factors.A, factors.A.t());
      const auto inverse = at::linalg_pinv(gram + 1e-8 * at::eye(gram.size(0), gram.options()));
      frozen_.push_back(factors.A.set_requires_grad(false));
      hooked_.push_back(
          {factors.B, factors.B.register_hook([map = inverse / (factors.scaling * factors.scaling)](
                                                  const at::Tensor& gradient) { return at::matmul(gradient, map); })});
    }
  }
  ~LoraFa() {
    for (auto& A : frozen_) A.set_requires_grad(true);
    for (auto& [B, hook] : hooked_) B.remove_hook(hook);
  }
  LoraFa(const LoraFa&) = delete;
  LoraFa& operator=(const LoraFa&) = delete;

 private:
  std::vector<at::Tensor> frozen_;
  std::vector<std::pair<at::Tensor, unsigned>> hooked_;
};

LORA_NAMESPACE_END
