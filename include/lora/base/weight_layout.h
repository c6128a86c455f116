#pragma once

#include <ATen/core/Tensor.h>
#include <lora/version.h>

LORA_NAMESPACE_BEGIN
namespace detail {

/// How a parameter holds the matrix [out, in] that updates are counted in.
enum class WeightLayout {
  kRows,     ///< [out, in]: its module computes x · Wᵀ.
  kColumns,  ///< [in, out]: its module computes x · W.
  kTable,    ///< [in, out] of an embedding, a row an entry: its module looks rows up.
  kKernel,   ///< [out, ...] of a convolution or a bilinear form, in = the product of the rest.
  kPlain,    ///< No matrix of a product: a bias, a gain, a running mean.
};

inline bool is_transposed(WeightLayout layout) {
  return layout == WeightLayout::kColumns || layout == WeightLayout::kTable;
}

/// A tensor in a parameter's layout as [out, in]; a view where its strides allow.
inline at::Tensor as_matrix(const at::Tensor& stored, WeightLayout layout) {
  if (is_transposed(layout)) return stored.t();
  return layout == WeightLayout::kKernel ? stored.flatten(1) : stored;
}

}  // namespace detail
LORA_NAMESPACE_END
