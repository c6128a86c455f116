#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/matmul.h>
#include <c10/util/SmallVector.h>
#include <lora/base/base_rows.h>
#include <lora/version.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

LORA_NAMESPACE_BEGIN

/// An update as scaling · B · A with A [r, in] and B [out, r].
struct LowRank {
  at::Tensor A;        ///< [r, in]
  at::Tensor B;        ///< [out, r]
  double scaling = 1;  ///< On the product.
};

/// ΔW = diag(rows)·W0·diag(columns) − W0 + Σ s·B·A: the form in which an update reaches products, lookups and
/// convolutions without ever being formed.
struct Factors {
  c10::SmallVector<LowRank, 2> terms;  ///< The sum.
  at::Tensor rows;                     ///< [out]; undefined: ones.
  at::Tensor columns;                  ///< [in], of a convolution's kernel [channels]; undefined: ones.

  /// Whether W0 itself stays as it is.
  bool is_sum() const { return !rows.defined() && !columns.defined(); }
};

/// An update whose factors are frozen, x·ΔWᵀ = (((x·Aᵀ) ⊙ middle)·Bᵀ) ⊙ rows.
struct FrozenFactors {
  at::Tensor A;       ///< [r, in]
  at::Tensor middle;  ///< [r]
  at::Tensor B;       ///< [out, r]
  at::Tensor rows;    ///< [out]
};

/// What a tensor of an adapter is to an optimizer.
enum class TensorRole {
  kInput,      ///< A factor that starts at random, as LoRA's A.
  kOutput,     ///< A factor that starts at zero, as LoRA's B: LoRA+ gives it a higher learning rate.
  kEmbedding,  ///< A factor of an embedding's update.
  kScale,      ///< Numbers that rows or columns are multiplied by, as DoRA's magnitudes.
  kCopy,       ///< Values that stand in place of the base's: of modules_to_save, biases and token rows.
  kBuffer,     ///< The copy of a buffer, as of a running mean: it belongs to the adapter and takes no gradient.
  kFrozen,     ///< A factor that is never trained.
};

/// Whether gradients are wanted of tensors with this role.
inline bool is_trained(TensorRole role) { return role != TensorRole::kBuffer && role != TensorRole::kFrozen; }

/// How a tensor of an update lies in a file.
struct StoredForm {
  std::string name;   ///< Below the weight's module, as "lora_A.weight"; empty: the tensor's own.
  int64_t rows = -1;  ///< The dimension that counts the rows of W0; -1: none.
  double other = 0;   ///< What stands there for rows without an update.
};

/// A tensor of an adapter under its own name, as "lora_A".
struct UpdateTensor {
  std::string name;        ///< Below the adapter's node.
  at::Tensor tensor;       ///< The tensor itself, no copy.
  TensorRole role;         ///< What it is to an optimizer.
  StoredForm stored = {};  ///< How files have it.
};

/// Copies a tensor; one that is given twice has one copy.
using TensorCopier = std::function<at::Tensor(const at::Tensor&)>;

/// ΔW [out, in] of one adapter on one weight, or on one row range of it.
class Update {
 public:
  virtual ~Update() = default;

  /// Columns of ΔW.
  virtual int64_t in_features() const = 0;
  /// Rows of ΔW.
  virtual int64_t out_features() const = 0;

  /// All tensors, in a fixed order; they stay the same tensors for the life of the update.
  virtual std::vector<UpdateTensor> tensors() const = 0;

  /// ΔW in factors, in the adapter's dtype, differentiable in the update's tensors; `base` is W0. Not called where
  /// is_factored() is false.
  virtual Factors factors(const BaseRows& base) const = 0;
  /// Whether ΔW has factors. Without, every use of the weight but has_product()'s forms the dense ΔW.
  virtual bool is_factored() const { return true; }

  /// Whether product() is quicker than the factors, or all there is.
  virtual bool has_product() const { return false; }
  /// x·ΔWᵀ [*, out] for x [*, in], differentiable in x and the update's tensors.
  virtual at::Tensor product(const at::Tensor& /*x*/) const { return {}; }

  /// The same update with frozen factors, for training: a product with them has no gradient as large as B. Nothing
  /// where it has none.
  virtual std::optional<FrozenFactors> frozen_factors() const { return std::nullopt; }

  /// ΔW [out, in], differentiable in the update's tensors.
  virtual at::Tensor dense(const BaseRows& base) const;

  /// What the layer's bias is multiplied by, [out]; undefined: nothing.
  virtual at::Tensor bias_scale() const { return {}; }

  /// A copy with tensors of its own.
  virtual std::shared_ptr<Update> clone(const TensorCopier& copy) const = 0;

  /// s of ΔW = s·B·A, for methods that have one.
  virtual double scaling() const { return 1; }
};

/// The dtype in which sums with a base of the given dtype are formed: at least float32.
inline at::ScalarType accumulation_dtype(at::ScalarType base) { return base == at::kDouble ? at::kDouble : at::kFloat; }

namespace detail {

/// Factors::columns as one number for each of the `in` columns.
inline at::Tensor scale_of_columns(const at::Tensor& columns, int64_t in) {
  return columns.size(0) == in ? columns : columns.repeat_interleave(in / columns.size(0));
}

}  // namespace detail

inline at::Tensor Update::dense(const BaseRows& base) const {
  const auto factors = this->factors(base);
  at::Tensor delta;
  if (!factors.is_sum()) {
    const auto matrix = base.matrix();
    const auto W0 = matrix.to(accumulation_dtype(matrix.scalar_type()));
    delta = W0;
    if (factors.rows.defined()) delta = factors.rows.unsqueeze(1) * delta;
    if (factors.columns.defined()) delta = delta * detail::scale_of_columns(factors.columns, in_features());
    delta = delta - W0;
  }
  for (const auto& term : factors.terms) {
    const auto product = at::matmul(term.B * term.scaling, term.A);
    delta = delta.defined() ? delta + product : product;
  }
  return delta;
}

/// An update of some rows of a weight.
struct UpdatePart {
  std::string name;                ///< Of a fused projection's part, as "q"; empty: the whole weight.
  int64_t begin = 0;               ///< Its first row.
  std::shared_ptr<Update> update;  ///< ΔW of the rows.

  /// W0's rows in the parameter's values.
  BaseRows base(const at::Tensor& values, detail::WeightLayout layout) const {
    return {values, layout, begin, update->out_features()};
  }
};

LORA_NAMESPACE_END
