#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/linalg_qr.h>
#include <ATen/ops/linalg_svd.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/randn.h>
#include <lora/methods/update.h>
#include <lora/version.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <utility>

LORA_NAMESPACE_BEGIN
namespace detail {

/// The first k singular values of W [m, n] with their vectors: W ≈ U·diag(S)·V, U [m, k], V [k, n].
struct TruncatedSvd {
  at::Tensor U, S, V;

  /// U·diag(S)·V of the first k as s·B·A, the roots of S in both factors.
  LowRank factors(double s, int64_t k) const {
    const auto root = (S.narrow(0, 0, k) / std::abs(s)).sqrt();
    return {root.unsqueeze(1) * V.narrow(0, 0, k), U.narrow(1, 0, k) * root * (s < 0 ? -1 : 1), s};
  }
};

inline TruncatedSvd exact_svd(const at::Tensor& W, int64_t k) {
  const auto [U, S, V] = at::linalg_svd(W, /*full_matrices=*/false);
  return {U.narrow(1, 0, k), S.narrow(0, 0, k), V.narrow(0, 0, k)};
}

/// The same by a random projection to k + 10 columns and `iterations` power iterations, each of them orthogonalised
/// (Halko, Martinsson and Tropp 2011, arXiv 0909.4061, algorithms 4.4 and 5.1). Draws from the global generator.
inline TruncatedSvd randomised_svd(const at::Tensor& W, int64_t k, int64_t iterations) {
  constexpr int64_t kOversampling = 10;
  const auto columns = std::min({k + kOversampling, W.size(0), W.size(1)});
  const auto basis = [](const at::Tensor& matrix) { return std::get<0>(at::linalg_qr(matrix)); };
  auto Q = basis(at::matmul(W, at::randn({W.size(1), columns}, W.options())));
  for (int64_t i = 0; i < iterations; ++i) Q = basis(at::matmul(W, basis(at::matmul(W.t(), Q))));
  const auto [U, S, V] = at::linalg_svd(at::matmul(Q.t(), W), /*full_matrices=*/false);
  return {at::matmul(Q, U).narrow(1, 0, k), S.narrow(0, 0, k), V.narrow(0, 0, k)};
}

/// The same of a product B·A, B [m, r] and A [r, n], without forming it: by QR of both factors.
inline TruncatedSvd svd_of_product(const at::Tensor& B, const at::Tensor& A, int64_t k) {
  const auto [Q_B, R_B] = at::linalg_qr(B);
  const auto [Q_A, R_A] = at::linalg_qr(A.t());
  const auto core = exact_svd(at::matmul(R_B, R_A.t()), k);
  return {at::matmul(Q_B, core.U), core.S, at::matmul(core.V, Q_A.t())};
}

}  // namespace detail
LORA_NAMESPACE_END
