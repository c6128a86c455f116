#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <lora/methods/cached.h>
#include <lora/methods/lora_update.h>
#include <lora/methods/method.h>
#include <lora/version.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// ‖W0ᵢ‖² of each row, in the dtype of sums.
inline at::Tensor squared_row_norm(const at::Tensor& W0) {
  return at::linalg_vector_norm(W0, 2, {1}, /*keepdim=*/false, accumulation_dtype(W0.scalar_type())).square();
}

/// W0·Aᵀ [out, r] in A's dtype. A base of another one is widened a block of rows at a time: never as a whole.
inline at::Tensor multiply_rows(const at::Tensor& W0, const at::Tensor& A) {
  if (W0.scalar_type() == A.scalar_type()) return at::mm(W0, A.t());
  constexpr int64_t kBlockNumbers = int64_t{1} << 18;
  const auto rows = std::max<int64_t>(kBlockNumbers / std::max<int64_t>(W0.size(1), 1), 1);
  auto result = at::empty({W0.size(0), A.size(0)}, A.options());
  for (int64_t begin = 0; begin < W0.size(0); begin += rows) {
    const auto size = std::min(rows, W0.size(0) - begin);
    auto block = result.narrow(0, begin, size);
    at::mm_out(block, W0.narrow(0, begin, size).to(A.scalar_type()), A.t());
  }
  return result;
}

}  // namespace detail

/// W′ = m/n ⊙ (W0 + s·B·A) with m [out] and n = ‖W0 + s·B·A‖ of each row, which takes no gradient (Liu et al. 2024,
/// arXiv 2402.09353, equations 5 and 11); r·(in + out) + out parameters.
///
/// ΔW = W′ − W0, of several adapters the sum of theirs. n² = ‖W0‖² + 2s·(B ⊙ W0Aᵀ)·1 + s²·(B(AAᵀ) ⊙ B)·1, so that B·A
/// is never formed; it is kept until W0, A or B change. A row with n = 0 keeps its factor 1. Dropout acts on the input
/// of A alone.
class DoraUpdate final : public LoraUpdate {
 public:
  /// `magnitude`: m [out]; row_norms(W0) is the start, where W′ = W0.
  DoraUpdate(at::Tensor A, at::Tensor B, at::Tensor magnitude, double scaling, bool embedding = false)
      : LoraUpdate(std::move(A), std::move(B), scaling, embedding), magnitude_(std::move(magnitude)) {}

  /// m.
  const at::Tensor& magnitude() const { return magnitude_; }

  /// ‖W0‖ of each row, [out].
  static at::Tensor row_norms(const at::Tensor& W0) { return detail::squared_row_norm(W0).sqrt(); }

  std::vector<UpdateTensor> tensors() const override {
    auto tensors = LoraUpdate::tensors();
    tensors.push_back({"lora_magnitude_vector", magnitude_, TensorRole::kScale});
    return tensors;
  }

  Factors factors(const BaseRows& base) const override {
    // B takes m/n, so that the sum with W0's rows is W′ at once.
    return factors_.get_or_record({&base.values(), &A_, &B_, &magnitude_}, [&] {
      const auto n = norm(base);
      const auto scale = at::where(n > 0, magnitude_ / n, at::ones_like(n));
      return Factors{{LowRank{A_, scale.unsqueeze(1) * B_, scaling_}}, scale, {}};
    });
  }

  std::shared_ptr<Update> clone(const TensorCopier& copy) const override {
    return std::make_shared<DoraUpdate>(copy(A_), copy(B_), copy(magnitude_), scaling_, embedding_);
  }

 private:
  at::Tensor norm(const BaseRows& base) const {
    return norm_.get({&base.values(), &A_, &B_}, [&] {
      const auto W0 = base.matrix();
      const auto squared = base_norm_.get({&base.values()}, [&] { return detail::squared_row_norm(W0); });
      const auto A = A_.to(squared.scalar_type()), B = B_.to(squared.scalar_type());
      const auto cross = (detail::multiply_rows(W0, A) * B).sum(1);
      const auto own = (at::mm(B, at::mm(A, A.t())) * B).sum(1);
      return (squared + 2 * scaling_ * cross + scaling_ * scaling_ * own).clamp_min(0).sqrt();
    });
  }

  at::Tensor magnitude_;
  detail::Cached<at::Tensor> base_norm_, norm_;
  detail::Cached<Factors> factors_;
};

LORA_NAMESPACE_END
