#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/linalg_svd.h>
#include <ATen/ops/where.h>
#include <lora/version.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

LORA_NAMESPACE_BEGIN
namespace detail {

/// The first principal components of rows that come in batches, none of which is kept (Ross et al. 2008, "Incremental
/// learning for robust visual tracking", section 2): the SVD of the components so far, the new rows and the change of
/// the mean.
class IncrementalPca {
 public:
  explicit IncrementalPca(int64_t count) : count_(count) {}

  /// Rows [n, in] with n ≥ the number of components.
  void add(const at::Tensor& batch) {
    const auto rows = batch.to(at::kDouble);
    const auto n = static_cast<double>(rows.size(0)), total = seen_ + n;
    const auto mean = rows.mean(0);
    const auto centred = rows - mean;
    auto matrix = centred;
    auto deviation = centred.square().sum();
    if (seen_ > 0) {
      const auto change = (mean_ - mean) * std::sqrt(seen_ / total * n);
      deviation = deviation + deviation_ + change.square().sum();
      matrix = at::cat({singular_values_.unsqueeze(1) * components_, centred, change.unsqueeze(0)});
      mean_ = mean_ * (seen_ / total) + mean * (n / total);
    } else {
      mean_ = mean;
    }
    deviation_ = deviation;
    seen_ = total;
    const auto [U, S, V] = at::linalg_svd(matrix, /*full_matrices=*/false);
    const auto k = std::min(count_, S.size(0));
    singular_values_ = S.narrow(0, 0, k);
    const auto rows_of_V = V.narrow(0, 0, k);
    // The sign of a component is free: its largest number is positive.
    const auto largest = rows_of_V.gather(1, rows_of_V.abs().argmax(1, /*keepdim=*/true));
    components_ = at::where(largest < 0, -rows_of_V, rows_of_V);
  }

  int64_t count() const { return count_; }
  /// Unit vectors [count or fewer, in] by falling variance; undefined before the first batch.
  const at::Tensor& components() const { return components_; }
  const at::Tensor& singular_values() const { return singular_values_; }
  /// The share of each component in the variance of all rows.
  at::Tensor explained_variance_ratio() const { return singular_values_.square() / deviation_; }

 private:
  int64_t count_;
  double seen_ = 0;
  at::Tensor mean_, deviation_, components_, singular_values_;
};

}  // namespace detail
LORA_NAMESPACE_END
