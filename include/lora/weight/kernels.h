#pragma once

#include <ATen/autocast_mode.h>
#include <ATen/ops/_autocast_to_reduced_precision_ops.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/slice.h>
#include <c10/core/WrapDimMinimal.h>
#include <lora/version.h>
#include <lora/weight/adapted_weight.h>
#include <lora/weight/product.h>

#include <algorithm>
#include <optional>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// A plain tensor for any tensor: the dense weight of a carrier, counted under the operator's name where it is formed.
inline at::Tensor plain(const at::Tensor& tensor, const char* operator_name) {
  auto* carrier = tensor.defined() ? as_carrier(tensor) : nullptr;
  if (carrier == nullptr) return tensor;
  const auto& weight = *carrier->weight();
  const auto active = weight.snapshot();
  for (const auto& adapter : active->active) {
    if (!adapter->forms_dense() || weight.calls()->disabled()) continue;
    weight.calls()->count_fallback(operator_name);
    break;
  }
  return dense_weight(*carrier);
}

/// The carrier behind a tensor that stands for a matrix, else null.
inline AdaptedWeightImpl* as_matrix_carrier(const at::Tensor& tensor) {
  auto* carrier = tensor.defined() ? as_carrier(tensor) : nullptr;
  return carrier != nullptr && carrier->is_matrix() ? carrier : nullptr;
}

// Products. The low-rank form is for a plain input and an adapted right-hand side; a carrier anywhere else is dense.

inline at::Tensor linear_kernel(const at::Tensor& input, const at::Tensor& weight,
                                const std::optional<at::Tensor>& bias) {
  const auto x = plain(input, "aten::linear");
  std::optional<at::Tensor> b;
  if (bias && bias->defined()) b = plain(*bias, "aten::linear");
  auto* carrier = as_matrix_carrier(weight);
  if (carrier == nullptr) return at::linear(x, plain(weight, "aten::linear"), b);
  return adapted_product(
      x, *carrier, carrier->view().transpose(), b, 1, 1, "aten::linear",
      [](const auto& rows, const auto& matrix, const auto& addend) { return at::linear(rows, matrix.t(), addend); });
}

inline at::Tensor matmul_kernel(const at::Tensor& self, const at::Tensor& other) {
  const auto x = plain(self, "aten::matmul");
  auto* carrier = as_matrix_carrier(other);
  if (carrier == nullptr) return at::matmul(x, plain(other, "aten::matmul"));
  return adapted_product(x, *carrier, carrier->view(), {}, 1, 1, "aten::matmul",
                         [](const auto& rows, const auto& matrix, const auto&) { return at::matmul(rows, matrix); });
}

inline at::Tensor mm_kernel(const at::Tensor& self, const at::Tensor& other) {
  const auto x = plain(self, "aten::mm");
  auto* carrier = as_matrix_carrier(other);
  if (carrier == nullptr) return at::mm(x, plain(other, "aten::mm"));
  return adapted_product(x, *carrier, carrier->view(), {}, 1, 1, "aten::mm",
                         [](const auto& rows, const auto& matrix, const auto&) { return at::mm(rows, matrix); });
}

inline at::Tensor addmm_kernel(const at::Tensor& self, const at::Tensor& mat1, const at::Tensor& mat2,
                               const at::Scalar& beta, const at::Scalar& alpha) {
  const auto bias = plain(self, "aten::addmm");
  const auto x = plain(mat1, "aten::addmm");
  auto* carrier = as_matrix_carrier(mat2);
  if (carrier == nullptr) return at::addmm(bias, x, plain(mat2, "aten::addmm"), beta, alpha);
  return adapted_product(x, *carrier, carrier->view(), bias, beta.toDouble(), alpha.toDouble(), "aten::addmm",
                         [&](const auto& rows, const auto& matrix, const auto& addend) {
                           return at::addmm(*addend, rows, matrix, beta, alpha);
                         });
}

// Views. The carrier of a matrix is closed under transposing and slicing: rows of ΔW are rows of B, columns are columns
// of A. Of any other parameter a view is one of its values.

inline at::Tensor t_kernel(const at::Tensor& self) {
  auto* carrier = as_matrix_carrier(self);
  if (carrier == nullptr) return plain(self, "aten::t").t();
  carrier->synchronise();
  return make_view(*carrier, carrier->view().transpose());
}

inline at::Tensor numpy_t_kernel(const at::Tensor& self) {
  return as_matrix_carrier(self) != nullptr ? t_kernel(self) : plain(self, "aten::numpy_T").numpy_T();
}

inline at::Tensor transpose_kernel(const at::Tensor& self, int64_t dim0, int64_t dim1) {
  if (as_matrix_carrier(self) == nullptr) return plain(self, "aten::transpose").transpose(dim0, dim1);
  return c10::maybe_wrap_dim(dim0, 2) == c10::maybe_wrap_dim(dim1, 2) ? self : t_kernel(self);
}

inline at::Tensor narrow_kernel(const at::Tensor& self, int64_t dim, int64_t start, int64_t length) {
  auto* carrier = as_matrix_carrier(self);
  if (carrier == nullptr) return plain(self, "aten::narrow").narrow(dim, start, length);
  carrier->synchronise();
  dim = c10::maybe_wrap_dim(dim, 2);
  const auto size = carrier->view().size(dim);
  if (start < 0) start += size;
  TORCH_CHECK_INDEX(start >= 0 && length >= 0 && start + length <= size,
                    "[lora::weight] found the range start = ", start, ", length = ", length,
                    ", expected one inside dimension ", dim, " of size ", size);
  return make_view(*carrier, carrier->view().narrow(dim, start, length));
}

inline at::Tensor slice_kernel(const at::Tensor& self, int64_t dim, std::optional<int64_t> start,
                               std::optional<int64_t> end, int64_t step) {
  if (step != 1 || as_matrix_carrier(self) == nullptr) {
    return at::slice(plain(self, "aten::slice"), dim, start, end, step);
  }
  const auto size = as_carrier(self)->view().size(c10::maybe_wrap_dim(dim, 2));
  const auto clamp = [size](int64_t index) {
    return std::min(std::max<int64_t>(index < 0 ? index + size : index, 0), size);
  };
  const auto first = clamp(start.value_or(0));
  return narrow_kernel(self, dim, first, std::max<int64_t>(clamp(end.value_or(size)) - first, 0));
}

inline std::vector<at::Tensor> split_kernel(const at::Tensor& self, int64_t split_size, int64_t dim) {
  if (as_matrix_carrier(self) == nullptr) return plain(self, "aten::split").split(split_size, dim);
  const auto size = as_carrier(self)->view().size(c10::maybe_wrap_dim(dim, 2));
  TORCH_CHECK_VALUE(split_size > 0, "[lora::weight] found the split size ", split_size, ", expected a positive one");
  std::vector<at::Tensor> pieces;
  for (int64_t start = 0; start < size; start += split_size) {
    pieces.push_back(narrow_kernel(self, dim, start, std::min(split_size, size - start)));
  }
  return pieces;
}

inline std::vector<at::Tensor> split_with_sizes_kernel(const at::Tensor& self, at::IntArrayRef sizes, int64_t dim) {
  if (as_matrix_carrier(self) == nullptr) return plain(self, "aten::split_with_sizes").split_with_sizes(sizes, dim);
  std::vector<at::Tensor> pieces;
  int64_t start = 0;
  for (const auto size : sizes) {
    pieces.push_back(narrow_kernel(self, dim, start, size));
    start += size;
  }
  TORCH_CHECK_VALUE(start == as_carrier(self)->view().size(c10::maybe_wrap_dim(dim, 2)),
                    "[lora::weight] found split sizes that sum to ", start, ", expected the size of dimension ", dim);
  return pieces;
}

inline std::vector<at::Tensor> chunk_kernel(const at::Tensor& self, int64_t chunks, int64_t dim) {
  if (as_matrix_carrier(self) == nullptr) return plain(self, "aten::chunk").chunk(chunks, dim);
  const auto size = as_carrier(self)->view().size(c10::maybe_wrap_dim(dim, 2));
  TORCH_CHECK_VALUE(chunks > 0, "[lora::weight] found ", chunks, " chunks, expected a positive number");
  return split_kernel(self, (size + chunks - 1) / chunks, dim);
}

// The value without its gradient: TorchScript's optimised plans take it of every input.
inline at::Tensor detach_kernel(const at::Tensor& self) {
  const auto& weight = *as_carrier(self)->weight();
  if (weight.wants_gradient()) weight.host().check_detached();
  return plain(self, "aten::detach").detach();
}

// TorchScript's autocast pass casts the operands of a product. With autocast on, the product's kernel casts the base
// and the factors itself.
inline at::Tensor autocast_kernel(const at::Tensor& self, bool cuda_enabled, bool cpu_enabled,
                                  at::ScalarType cuda_dtype, at::ScalarType cpu_dtype) {
  if (at::autocast::is_autocast_enabled(self.device().type())) return self;
  return at::_ops::_autocast_to_reduced_precision::call(plain(self, "aten::_autocast_to_reduced_precision"),
                                                        cuda_enabled, cpu_enabled, cuda_dtype, cpu_dtype);
}

// set_data asks this first, so that exchanging a carrier's data, or a tensor's data for a carrier, says what to do.
inline bool compatible_shallow_copy_kernel(const at::Tensor&, const at::Tensor&) { AdaptedWeightImpl::refuse_copy(); }

}  // namespace detail
LORA_NAMESPACE_END
