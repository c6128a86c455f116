// Jobs of a merge as SiteMerger makes them, and what W′ should be.
#pragma once

#include <ATen/ATen.h>
#include <lora/merge/merge.h>

#include <cmath>
#include <cstdint>
#include <memory>
#include <ostream>
#include <string>
#include <vector>

#include "harness/dense_oracle.h"
#include "harness/values.h"

namespace harness {

/// Rows of the [out, in] matrix that an update changes, and its rank.
struct UpdateRows {
  int64_t begin, rows, rank;
};

/// A base [rows, columns] with its updates, whose rows are columns of a transposed base.
struct MergeShape {
  std::string name;
  int64_t rows, columns;
  std::vector<UpdateRows> updates;
  bool transposed = false;
};

inline void PrintTo(const MergeShape& shape, std::ostream* out) { *out << shape.name; }

/// A job on the CPU with factors of `factor_dtype`.
inline std::unique_ptr<lora::detail::MergeJob> make_job(const MergeShape& shape, at::ScalarType dtype,
                                                        at::ScalarType factor_dtype, double size_of_update = 1e-2,
                                                        uint64_t seed = 1) {
  auto job = std::make_unique<lora::detail::MergeJob>();
  job->path = shape.name;
  job->transposed = shape.transposed;
  job->base = normal({shape.rows, shape.columns}, seed++, dtype);
  const auto in = shape.transposed ? shape.rows : shape.columns;
  for (const auto& update : shape.updates) {
    job->updates.emplace_back(update.begin, lora::LowRank{normal({update.rank, in}, seed, factor_dtype),
                                                          normal({update.rows, update.rank}, seed + 1, factor_dtype),
                                                          size_of_update * static_cast<double>(seed)});
    seed += 2;
  }
  return job;
}

/// W0 + Σ s·B·A of a job on the CPU, in float64.
inline DenseWeight dense_weight(const lora::detail::MergeJob& job) {
  DenseWeight weight{job.base.to(at::kDouble, /*non_blocking=*/false, /*copy=*/true),
                     at::zeros(job.base.sizes(), at::kDouble)};
  for (const auto& [begin, update] : job.updates) {
    const auto A = update.A.to(at::kDouble), B = update.B.to(at::kDouble);
    const auto rows = [&, first = begin](const at::Tensor& tensor) {
      return (job.transposed ? tensor.t() : tensor).narrow(0, first, B.size(0));
    };
    rows(weight.value).add_(at::mm(B, A), update.scaling);
    rows(weight.magnitude).add_(at::mm(B.abs(), A.abs()), std::abs(update.scaling));
    weight.rank += A.size(0);
  }
  return weight;
}

}  // namespace harness
