#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addcmul.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/scalar_tensor.h>
#include <lora/detail/instruction_set.h>
#include <lora/detail/lanes.h>
#include <lora/detail/parallel.h>
#include <lora/detail/plain_tensor.h>
#include <lora/version.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>

LORA_NAMESPACE_BEGIN
namespace detail {

/// beta·addend + alpha·y ⊙ scale, in y's dtype with one rounding; `scale` is one number for each of y's last elements.
inline at::Tensor scaled_sum(const at::Tensor& y, const at::Tensor& scale, double alpha,
                             const std::optional<at::Tensor>& addend, double beta) {
  const auto factor = !scale.defined() ? at::scalar_tensor(alpha, y.options()) : alpha == 1 ? scale : scale * alpha;
  if (!addend) return (y * factor).to(y.scalar_type());
  return at::addcmul(beta == 1 ? *addend : *addend * beta, y, factor).to(y.scalar_type());
}

/// The same in y's memory, which is read and written once.
inline at::Tensor scaled_sum_(at::Tensor& y, const at::Tensor& scale, double alpha,
                              const std::optional<at::Tensor>& addend, double beta) {
  const bool one_type = scale.defined() && scale.scalar_type() == y.scalar_type();
  if (!addend || !one_type || addend->scalar_type() != y.scalar_type()) {
    return scaled_sum(y, scale, alpha, addend, beta);
  }
  return at::addcmul_out(y, beta == 1 ? *addend : *addend * beta, y, alpha == 1 ? scale : scale * alpha);
}

/// Columns [begin, end) of `result` = dy ⊙ scale and of `sums` = Σ over rows of dy ⊙ y, each number read once.
template <int64_t width>
struct ScaleGradientKernel {
  using Floats = Vector<float, width>;

  template <class T>
  LORA_ALWAYS_INLINE static void run(int64_t rows, int64_t stride, int64_t begin, int64_t end, const T* dy, const T* y,
                                     const float* scale, T* result, float* sums) {
    for (auto column = begin; column < end; ++column) sums[column] = 0;
    for (int64_t row = 0; row < rows; ++row) {
      const auto* const from = dy + row * stride;
      const auto* const values = y + row * stride;
      auto* const to = result + row * stride;
      auto column = begin;
      for (; column + width <= end; column += width) {
        Floats d, value, factor, sum;
        load(from + column, d);
        load(values + column, value);
        load(scale + column, factor);
        load(sums + column, sum);
        sum += d * value;
        d *= factor;
        store(d, to + column);
        store(sum, sums + column);
      }
      for (; column < end; ++column) {
        const auto d = static_cast<float>(from[column]);
        sums[column] += d * static_cast<float>(values[column]);
        to[column] = static_cast<T>(d * scale[column]);
      }
    }
  }
};

/// dy ⊙ scale [rows, columns] and Σ over rows of dy ⊙ y [columns] in the scale's dtype: the gradients of y ⊙ scale by y
/// and by the scale.
inline std::pair<at::Tensor, at::Tensor> scale_gradients(const at::Tensor& dy, const at::Tensor& y,
                                                         const at::Tensor& scale,
                                                         InstructionSet set = instruction_set()) {
  const bool by_kernel = is_plain_cpu_tensor(dy) && is_plain_cpu_tensor(y) && dy.scalar_type() == y.scalar_type() &&
                         is_plain_cpu_tensor(scale) && scale.scalar_type() == at::kFloat && dy.is_contiguous() &&
                         y.is_contiguous() && scale.is_contiguous();
  if (!by_kernel) return {scaled_sum(dy, scale, 1, {}, 0), (dy * y).sum(0, /*keepdim=*/false, scale.scalar_type())};
  constexpr int64_t kColumns = 256;
  const auto rows = dy.size(0), columns = dy.size(1);
  auto result = at::empty_like(dy), sums = at::empty({columns}, scale.options().requires_grad(false));
  visit_plain_dtype(dy.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto *const from = dy.const_data_ptr<T>(), *const values = y.const_data_ptr<T>();
    const auto* const factors = scale.const_data_ptr<float>();
    auto* const to = result.mutable_data_ptr<T>();
    auto* const sum = sums.mutable_data_ptr<float>();
    parallel_tasks((columns + kColumns - 1) / kColumns, [&](int64_t task) {
      const auto begin = task * kColumns;
      run_register_kernel<ScaleGradientKernel>(set, rows, columns, begin, std::min(begin + kColumns, columns), from,
                                               values, factors, to, sum);
    });
  });
  return {result, sums};
}

}  // namespace detail
LORA_NAMESPACE_END
