#pragma once

#include <ATen/core/Tensor.h>
#include <lora/methods/method.h>
#include <lora/version.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN

/// ΔW = s·B·A with A [r, in], B [out, r] (Hu et al. 2021, arXiv 2106.09685, section 4.1); r·(in + out) parameters.
class LoraUpdate : public Update {
 public:
  /// `embedding`: the tensors have PEFT's names for an embedding's, lora_embedding_A [r, entries] and _B [out, r].
  LoraUpdate(at::Tensor A, at::Tensor B, double scaling, bool embedding = false)
      : A_(std::move(A)), B_(std::move(B)), scaling_(scaling), embedding_(embedding) {}

  int64_t in_features() const override { return A_.size(1); }
  int64_t out_features() const override { return B_.size(0); }
  /// r.
  int64_t rank() const { return A_.size(0); }
  double scaling() const override { return scaling_; }
  /// A, B and s.
  LowRank low_rank() const { return {A_, B_, scaling_}; }

  std::vector<UpdateTensor> tensors() const override {
    if (embedding_) {
      return {{"lora_embedding_A", A_, TensorRole::kEmbedding}, {"lora_embedding_B", B_, TensorRole::kEmbedding}};
    }
    return {{"lora_A", A_, TensorRole::kInput, {"lora_A.weight"}},
            {"lora_B", B_, TensorRole::kOutput, {"lora_B.weight"}}};
  }

  Factors factors(const BaseRows& /*base*/) const override { return {{low_rank()}, {}, {}}; }

  /// Rows of A that a file has for it.
  virtual int64_t stored_rank() const { return rank(); }
  /// The update's tensors that make the blocks of such a pair, as `use(tensor, A or B, first row of A, sign)`.
  virtual void for_each_stored(
      const std::function<void(const at::Tensor& tensor, bool is_A, int64_t first, double sign)>& use) const {
    use(A_, true, 0, 1);
    use(B_, false, 0, 1);
  }

  std::shared_ptr<Update> clone(const TensorCopier& copy) const override {
    return std::make_shared<LoraUpdate>(copy(A_), copy(B_), scaling_, embedding_);
  }

 protected:
  at::Tensor A_;    ///< [r, in]
  at::Tensor B_;    ///< [out, r]
  double scaling_;  ///< s
  bool embedding_;  ///< Whether the names are an embedding's.
};

/// ΔW = s·(B·A − B0·A0) with B0·A0 from the base: PiSSA's (Meng et al. 2024, arXiv 2404.02948, section 3) and OLoRA's
/// (Büyükakyüz 2024, arXiv 2406.01775) with the base as it is, in place of W0 − s·B0·A0 below s·B·A. r·(in + out)
/// trained parameters and as many frozen ones; in files a LoRA of rank 2r, A and A0 below each other, B and −B0 beside
/// each other.
class StartedLoraUpdate final : public LoraUpdate {
 public:
  /// Begins with B0·A0.
  StartedLoraUpdate(const at::Tensor& A0, const at::Tensor& B0, double scaling, bool embedding)
      : StartedLoraUpdate(A0.clone(), B0.clone(), A0, B0, scaling, embedding) {}
  /// With other factors.
  StartedLoraUpdate(at::Tensor A, at::Tensor B, at::Tensor A0, at::Tensor B0, double scaling, bool embedding)
      : LoraUpdate(std::move(A), std::move(B), scaling, embedding), A0_(std::move(A0)), B0_(std::move(B0)) {}

  /// A0 and B0.
  LowRank start() const { return {A0_, B0_, scaling_}; }

  std::vector<UpdateTensor> tensors() const override {
    auto tensors = LoraUpdate::tensors();
    tensors.push_back({"lora_A_start", A0_, TensorRole::kFrozen});
    tensors.push_back({"lora_B_start", B0_, TensorRole::kFrozen});
    return tensors;
  }

  Factors factors(const BaseRows& /*base*/) const override {
    return {{low_rank(), LowRank{A0_, B0_, -scaling_}}, {}, {}};
  }

  int64_t stored_rank() const override { return 2 * rank(); }
  void for_each_stored(
      const std::function<void(const at::Tensor& tensor, bool is_A, int64_t first, double sign)>& use) const override {
    LoraUpdate::for_each_stored(use);
    use(A0_, true, rank(), 1);
    use(B0_, false, rank(), -1);
  }

  std::shared_ptr<Update> clone(const TensorCopier& copy) const override {
    return std::make_shared<StartedLoraUpdate>(copy(A_), copy(B_), copy(A0_), copy(B0_), scaling_, embedding_);
  }

 private:
  at::Tensor A0_;
  at::Tensor B0_;
};

namespace detail {

inline const LoraUpdate& lora_update(const UpdatePart& part) { return static_cast<const LoraUpdate&>(*part.update); }

}  // namespace detail

LORA_NAMESPACE_END
