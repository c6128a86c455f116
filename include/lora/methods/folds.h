#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/index_put.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <lora/version.h>

#include <cstdint>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// The first elements of x's last dimension, again and again, until there are `count`.
inline at::Tensor cycled(const at::Tensor& x, int64_t count) {
  const auto size = x.size(-1);
  if (count <= size) return x.narrow(-1, 0, count);
  std::vector<int64_t> times(static_cast<size_t>(x.dim()), 1);
  times.back() = (count + size - 1) / size;
  return x.repeat(times).narrow(-1, 0, count);
}

/// x [*, in] padded to whole groups of `size`, [*, groups, size]: with its own first elements, else with zeros.
inline at::Tensor grouped(const at::Tensor& x, int64_t size, bool cyclic) {
  const auto in = x.size(-1), padding = (size - in % size) % size;
  auto sizes = x.sizes().vec();
  sizes.back() = (in + padding) / size;
  sizes.push_back(size);
  if (padding == 0) return x.reshape(sizes);
  return (cyclic ? cycled(x, in + padding) : at::constant_pad_nd(x, {0, padding})).reshape(sizes);
}

/// The sum of the groups, [*, size]. Only what is left over of whole groups is copied.
inline at::Tensor folded(const at::Tensor& x, int64_t size, bool cyclic) {
  const auto in = x.size(-1), whole = in / size * size;
  if (whole == 0) return grouped(x, size, cyclic).squeeze(-2);
  const auto sum = grouped(x.narrow(-1, 0, whole), size, false).sum(-2);
  if (whole == in) return sum;
  const auto rest = x.narrow(-1, whole, in - whole);
  const auto missing = size - rest.size(-1);
  return sum + (cyclic ? at::cat({rest, cycled(x, missing)}, -1) : at::constant_pad_nd(rest, {0, missing}));
}

/// The matrix F [size, in] with folded(x) = x·Fᵀ.
inline at::Tensor fold_matrix(int64_t in, int64_t size, bool cyclic, const at::TensorOptions& options) {
  const auto count = cyclic ? (in + size - 1) / size * size : in;
  auto matrix = at::zeros({size, in}, options);
  const auto indices = at::TensorOptions(at::kLong).device(options.device());
  const auto at_groups = at::arange(count, indices);
  matrix.index_put_({at_groups.remainder(size), at_groups.remainder(in)}, at::ones({count}, options),
                    /*accumulate=*/true);
  return matrix;
}

}  // namespace detail
LORA_NAMESPACE_END
