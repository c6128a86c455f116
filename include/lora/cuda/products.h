#pragma once

#include <ATen/core/Tensor.h>
#include <lora/merge/merge.h>
#include <lora/version.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace cuda {
namespace detail {

/// A matrix as a BLAS takes it: row-major with `stride` elements from row to row, or the transpose of such a one.
struct BlasMatrix {
  char* data = nullptr;
  int64_t stride = 0;
  bool transposed = false;
};

/// merged [rows, columns] += scaling · left [rows, rank] · right [rank, columns].
struct Product {
  BlasMatrix left, right, merged;
  int64_t rows = 0, columns = 0, rank = 0;
  double scaling = 1;
  const std::string* path = nullptr;

  /// Equal for products that differ by their data alone.
  auto shape() const {
    return std::make_tuple(rows, columns, rank, scaling, left.stride, left.transposed, right.stride, right.transposed,
                           merged.stride);
  }
};

/// Products of one shape. `strided`: left, right and merged each lie at equal distances.
struct ProductBatch {
  std::vector<Product> products;
  bool strided = false;
};

/// Whether cuBLAS can form a job's W′ with one rounding: one dtype, and no element in two updates.
inline bool is_for_blas(const lora::detail::MergeJob& job) {
  const auto fits = [](int64_t size) { return size <= std::numeric_limits<int>::max(); };
  if (!fits(job.base.size(0)) || !fits(job.base.size(1))) return false;
  std::vector<std::pair<int64_t, int64_t>> rows;
  for (const auto& [begin, update] : job.updates) {
    if (update.A.scalar_type() != job.base.scalar_type() || update.B.scalar_type() != job.base.scalar_type()) {
      return false;
    }
    rows.emplace_back(begin, begin + update.B.size(0));
  }
  std::sort(rows.begin(), rows.end());
  for (size_t i = 1; i < rows.size(); ++i) {
    if (rows[i].first < rows[i - 1].second) return false;
  }
  return true;
}

/// A factor as a BLAS takes it, copied into `kept` where its strides are neither.
inline BlasMatrix blas_matrix(const at::Tensor& tensor, const at::Tensor& base, std::vector<at::Tensor>& kept) {
  auto here = tensor.to(base.device());
  const auto fits = [&](int64_t near, int64_t far) {
    return here.stride(near) == 1 && here.stride(far) >= std::max<int64_t>(here.size(near), 1) &&
           here.stride(far) <= std::numeric_limits<int>::max();
  };
  if (!fits(1, 0) && !fits(0, 1)) here = here.contiguous();
  kept.push_back(here);
  const bool transposed = !fits(1, 0) && fits(0, 1);
  const auto stride = std::max<int64_t>(here.stride(transposed ? 1 : 0), 1);
  return {static_cast<char*>(const_cast<void*>(here.const_data_ptr())), stride, transposed};
}

/// Adds a job's products, one for each update. `job.merged` is there and row-major.
inline void add_products(lora::detail::MergeJob& job, std::vector<Product>& products, std::vector<at::Tensor>& kept) {
  for (const auto& [begin, update] : job.updates) {
    Product product;
    product.left = blas_matrix(update.B, job.base, kept);
    product.right = blas_matrix(update.A, job.base, kept);
    product.rows = update.B.size(0);
    product.columns = update.A.size(1);
    product.rank = update.A.size(0);
    product.scaling = update.scaling;
    product.path = &job.path;
    const auto row_stride = job.merged.size(1);
    if (job.transposed) {  // (B·A)ᵀ = Aᵀ·Bᵀ
      std::swap(product.left, product.right);
      product.left.transposed = !product.left.transposed;
      product.right.transposed = !product.right.transposed;
      std::swap(product.rows, product.columns);
    }
    product.merged.data = static_cast<char*>(job.merged.mutable_data_ptr()) +
                          begin * (job.transposed ? 1 : row_stride) * job.merged.element_size();
    product.merged.stride = row_stride;
    if (product.rows > 0 && product.columns > 0 && product.rank > 0) products.push_back(product);
  }
}

/// Products by shape; within a batch by address.
inline std::vector<ProductBatch> batches_of(std::vector<Product> products) {
  std::map<decltype(Product().shape()), ProductBatch> by_shape;
  for (auto& product : products) by_shape[product.shape()].products.push_back(product);
  std::vector<ProductBatch> batches;
  for (auto& [shape, batch] : by_shape) {
    auto& all = batch.products;
    std::sort(all.begin(), all.end(), [](const auto& a, const auto& b) { return a.merged.data < b.merged.data; });
    const auto steps = [&](size_t i) {
      return std::make_tuple(all[i].left.data - all[i - 1].left.data, all[i].right.data - all[i - 1].right.data,
                             all[i].merged.data - all[i - 1].merged.data);
    };
    batch.strided = all.size() > 1;
    for (size_t i = 2; i < all.size(); ++i) batch.strided = batch.strided && steps(i) == steps(1);
    batches.push_back(std::move(batch));
  }
  return batches;
}

}  // namespace detail
}  // namespace cuda
LORA_NAMESPACE_END
