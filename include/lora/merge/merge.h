#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <lora/detail/instruction_set.h>
#include <lora/detail/parallel.h>
#include <lora/detail/tensor_memory.h>
#include <lora/merge/merge_kernel.h>
#include <lora/methods/method.h>
#include <lora/version.h>
#include <torch/arg.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN

/// How adapters are merged.
class MergeOptions {
 public:
  /// Whether W0 is kept beside W′, so that unmerge() can go back. Without it the weights are replaced one at a time,
  /// the registered parameters too, after all have been computed once to find NaN and infinite values: for models that
  /// are larger than half the memory. The adapters are unloaded with it, and there is no way back.
  TORCH_ARG(bool, keep_base) = true;
};

/// What a merge takes, or took.
struct MergeReport {
  /// Parameters that are replaced.
  int64_t weights = 0;
  /// Of memory on top: second copies until unmerge(), whose memory then waits for the next merge or for a system that
  /// lacks memory; or the largest W′ while it is put in place. Where LibTorch's operators merge (methods whose ΔW is
  /// more than s·B·A, and all devices but the CPU and, with lora::cuda, CUDA's), they take up to five more of one
  /// weight at a time, in fp32 for a half base.
  int64_t bytes = 0;
};

namespace detail {

/// One weight to merge: W′ = base + Σ scaling·B·A, each update from its first row of the [out, in] matrix on, and
/// + Σ ΔW of updates that are more than such a product.
struct MergeJob {
  struct DenseUpdate {
    int64_t begin;
    std::shared_ptr<const Update> update;
    BaseRows base;
  };

  std::string path;
  at::Tensor base;
  bool transposed = false;  // base and W′ are [in, out]
  std::vector<std::pair<int64_t, LowRank>> updates;
  std::vector<DenseUpdate> dense;
  at::Tensor merged;
  std::atomic<int64_t> non_finite{0};
};

/// A [rank, columns] as MergeFactors<Sum> take it for a base of `T`.
template <class T, class Sum>
std::vector<Sum> merge_panels(const at::Tensor& A) {
  const auto source = A.to(c10::CppTypeToScalarType<Sum>::value).contiguous();
  const auto rank = source.size(0), columns = source.size(1);
  const auto* from = source.template const_data_ptr<Sum>();
  std::vector<Sum> panels(static_cast<size_t>((columns + kMergePanel - 1) / kMergePanel * kMergePanel * rank));
  for (int64_t left = 0; left < columns; left += kMergePanel) {
    const auto width = std::min(columns - left, kMergePanel);
    for (int64_t r = 0; r < rank; ++r) {
      auto* const to = panels.data() + left * rank + r * kMergePanel;
      const auto* const row = from + r * columns + left;
      for (int64_t i = 0; i < width; ++i) to[kSplitsColumns<T> ? i % 2 * (kMergePanel / 2) + i / 2 : i] = row[i];
    }
  }
  return panels;
}

/// The tiles of one job, ready to run in any order on any thread.
class MergeTiles {
 public:
  virtual ~MergeTiles() = default;
  virtual int64_t count() const = 0;
  virtual void run(int64_t tile) = 0;
};

template <class T, class Sum>
class TypedMergeTiles final : public MergeTiles {
 public:
  explicit TypedMergeTiles(MergeJob& job) : job_(job), base_(job.base.contiguous()) {
    job_.merged = TensorMemory::instance().empty_like(base_);
    const auto dtype = c10::CppTypeToScalarType<Sum>::value;
    int64_t rank = 1;
    for (const auto& [begin, update] : job.updates) {
      auto right = update.A.to(dtype), left = update.B.to(dtype);
      auto scaling = static_cast<Sum>(update.scaling);
      auto first = begin;
      if (job.transposed) {  // (B·A)ᵀ = Aᵀ·Bᵀ, whose columns are B's rows; B is scaled in both, for the same bits
        auto columns = at::zeros({right.size(0), base_.size(1)}, right.options());
        columns.narrow(1, begin, left.size(0)).copy_((left * update.scaling).t());
        left = right.t();
        right = columns;
        scaling = 1;
        first = 0;
      }
      rank += left.size(1);
      updates_.push_back({merge_panels<T, Sum>(right), left.contiguous(), scaling, first});
    }
    const auto bytes_of_row = std::max<int64_t>(base_.size(1) * static_cast<int64_t>(sizeof(T)), 1);
    rows_ = std::max<int64_t>(kTileBytes / bytes_of_row, 8);
    columns_ =
        std::max<int64_t>(kFactorBytes / (rank * static_cast<int64_t>(sizeof(Sum))) / kMergePanel, 1) * kMergePanel;
  }

  int64_t count() const override { return (base_.size(0) + rows_ - 1) / rows_; }

  void run(int64_t tile) override {
    const auto first = tile * rows_, last = std::min(first + rows_, base_.size(0));
    std::vector<std::vector<Sum>> scaled;
    std::vector<MergeFactors<Sum>> factors;
    for (const auto& update : updates_) {
      const auto rank = update.left.size(1);
      const auto begin = std::max(first, update.begin), end = std::min(last, update.begin + update.left.size(0));
      if (begin >= end) continue;
      const auto* const left = update.left.template const_data_ptr<Sum>() + (begin - update.begin) * rank;
      scaled.emplace_back(left, left + (end - begin) * rank);
      for (auto& element : scaled.back()) element *= update.scaling;
      factors.push_back({update.panels.data(), scaled.back().data(), rank, begin, end});
    }
    int64_t bad = 0;
    for (int64_t left = 0; left < base_.size(1); left += columns_) {
      bad += run_register_kernel<MergeTileKernel>(
          instruction_set(),
          MergeTile<T, Sum>{base_.template const_data_ptr<T>(), job_.merged.template mutable_data_ptr<T>(),
                            base_.size(1), factors.data(), static_cast<int64_t>(factors.size()), first, last, left,
                            std::min(left + columns_, base_.size(1))});
    }
    if (bad != 0) job_.non_finite += bad;
  }

 private:
  // The system clears a huge page for the first thread that writes to it: others are to be elsewhere meanwhile.
  static constexpr int64_t kTileBytes = 2 << 20;
  // The columns of A that the rows of a tile share stay in the first cache level; whole rows of GPT-2's width at r = 8,
  // since the processor reads ahead in what is left out of a row.
  static constexpr int64_t kFactorBytes = 28 << 10;

  /// Rows from `begin` on += scaling · left · A.
  struct Update {
    std::vector<Sum> panels;
    at::Tensor left;  // [rows, rank]
    Sum scaling;
    int64_t begin;
  };

  MergeJob& job_;
  at::Tensor base_;
  std::vector<Update> updates_;
  int64_t rows_ = 0;
  int64_t columns_ = 0;
};

/// The tiles of a job on the CPU; null for a device or dtype without a kernel.
inline std::unique_ptr<MergeTiles> merge_tiles(MergeJob& job) {
  if (!job.base.device().is_cpu() || !job.dense.empty()) return nullptr;
  switch (job.base.scalar_type()) {
    case at::kDouble:
      return std::make_unique<TypedMergeTiles<double, double>>(job);
    case at::kFloat:
      return std::make_unique<TypedMergeTiles<float, float>>(job);
    case at::kBFloat16:
      return std::make_unique<TypedMergeTiles<c10::BFloat16, float>>(job);
    case at::kHalf:
      return std::make_unique<TypedMergeTiles<c10::Half, float>>(job);
    default:
      return nullptr;
  }
}

/// The same sum by LibTorch's operators, for devices and updates without a kernel of ours.
inline void merge_by_operators(MergeJob& job) {
  const auto dtype = accumulation_dtype(job.base.scalar_type());
  auto update_sum = at::zeros(job.base.sizes(), job.base.options().dtype(dtype));
  const auto by_rows = job.transposed ? update_sum.t() : update_sum;
  for (const auto& [begin, update] : job.updates) {
    by_rows.narrow(0, begin, update.B.size(0)).addmm_(update.B.to(dtype), update.A.to(dtype), 1, update.scaling);
  }
  for (const auto& [begin, update, base] : job.dense) {
    by_rows.narrow(0, begin, update->out_features()).add_(update->dense(base));
  }
  job.merged = (job.base.to(dtype) + update_sum).to(job.base.scalar_type());
  job.non_finite = job.merged.numel() - at::isfinite(job.merged).sum().item<int64_t>();
}

/// Merges jobs whose bases are on CUDA devices; set where a program is linked with lora::cuda.
inline std::atomic<void (*)(const std::vector<MergeJob*>&)> merge_on_cuda{nullptr};

/// Merges what the CPU's kernels do not: fills `merged` and `non_finite`.
inline void merge_others(const std::vector<MergeJob*>& jobs) {
  const auto on_cuda = merge_on_cuda.load();
  std::vector<MergeJob*> cuda_jobs;
  for (auto* job : jobs) {
    if (on_cuda != nullptr && job->base.is_cuda() && job->dense.empty()) {
      cuda_jobs.push_back(job);
    } else {
      merge_by_operators(*job);
    }
  }
  if (!cuda_jobs.empty()) on_cuda(cuda_jobs);
}

/// Computes every job's W′ in one threaded pass. Throws a c10::ValueError that names each weight with a NaN or infinite
/// result; nothing but the jobs' own buffers is written.
inline void merge_weights(std::vector<std::unique_ptr<MergeJob>>& jobs) {
  const c10::InferenceMode no_inference(false);  // W′ made in it could not be saved for a backward outside of it
  const c10::NoGradGuard no_grad;
  std::vector<std::unique_ptr<MergeTiles>> tiles;
  std::vector<std::pair<MergeTiles*, int64_t>> tasks;
  std::vector<MergeJob*> others;
  for (auto& job : jobs) {
    auto job_tiles = merge_tiles(*job);
    if (job_tiles == nullptr) {
      others.push_back(job.get());
      continue;
    }
    for (int64_t i = 0; i < job_tiles->count(); ++i) tasks.emplace_back(job_tiles.get(), i);
    tiles.push_back(std::move(job_tiles));
  }
  parallel_tasks(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const auto& [job_tiles, tile] = tasks[static_cast<size_t>(i)];
    job_tiles->run(tile);
  });
  merge_others(others);

  std::string problems;
  for (const auto& job : jobs) {
    if (job->non_finite == 0) continue;
    problems += (problems.empty() ? "" : "\n") + ("[lora::merge] found " + std::to_string(job->non_finite.load())) +
                " NaN or infinite values in W', expected finite ones at " + job->path +
                "; check the base weight, lora_A and lora_B there; nothing was changed";
  }
  TORCH_CHECK_VALUE(problems.empty(), problems);
}

}  // namespace detail
LORA_NAMESPACE_END
