// The merge kernel of CUDA devices, run on the host by loops in place of threads: the same function, table and all.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <lora/cuda/merge_body.h>
#include <lora/cuda/merge_plan.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "harness/dense_oracle.h"
#include "harness/merge_jobs.h"
#include "harness/values.h"

namespace merge_body_test {
namespace {

using harness::make_job;
using harness::MergeShape;
using lora::cuda::detail::ElementType;
using lora::cuda::detail::MergePlan;
using lora::detail::MergeJob;

/// A block of threads as a loop, whose direction changes from step to step: threads of one step must not need each
/// other.
template <class T>
class LoopBlock {
 public:
  using Merger = lora::cuda::detail::TileMerger<T>;

  template <class Step>
  void run(const Step& step) {
    backwards_ = !backwards_;
    for (int i = 0; i < Merger::Shape::kThreads; ++i) {
      const int thread = backwards_ ? Merger::Shape::kThreads - 1 - i : i;
      step(thread, registers_[static_cast<size_t>(thread)]);
    }
  }
  typename Merger::Slices& slices() { return *slices_; }
  void add(unsigned long long* counter, unsigned count) { *counter += count; }

 private:
  bool backwards_ = false;
  std::vector<typename Merger::Registers> registers_ = std::vector<typename Merger::Registers>(Merger::Shape::kThreads);
  std::unique_ptr<typename Merger::Slices> slices_ = std::make_unique<typename Merger::Slices>();
};

template <class T>
void run_tiles(const MergePlan& plan, std::vector<unsigned long long>& non_finite) {
  const lora::cuda::detail::MergeTable table{plan.matrices().data(), static_cast<int64_t>(plan.matrices().size()),
                                             plan.updates().data(), non_finite.data()};
  LoopBlock<T> block;
  for (int64_t tile = 0; tile < plan.tiles(); ++tile) lora::cuda::detail::TileMerger<T>(table, tile).run(block);
}

/// What merge.cpp does on a device.
void run_on_host(const MergePlan& plan) {
  std::vector<unsigned long long> non_finite(plan.matrices().size());
  switch (plan.type()) {
    case ElementType::kFloat:
      run_tiles<float>(plan, non_finite);
      break;
    case ElementType::kDouble:
      run_tiles<double>(plan, non_finite);
      break;
    case ElementType::kBFloat16:
      run_tiles<c10::BFloat16>(plan, non_finite);
      break;
    case ElementType::kHalf:
      run_tiles<c10::Half>(plan, non_finite);
      break;
  }
  for (size_t i = 0; i < non_finite.size(); ++i) plan.jobs()[i]->non_finite = static_cast<int64_t>(non_finite[i]);
}

/// Merges jobs of one dtype.
void merge(const std::vector<MergeJob*>& jobs) {
  MergePlan plan(*lora::cuda::detail::element_type(jobs.front()->base.scalar_type()));
  for (auto* job : jobs) plan.add(*job);
  run_on_host(plan);
}

// Tiles have 64 or 32 rows and 64, 128 or 256 columns; ranks go by 16.
const std::vector<MergeShape> kShapes{
    {"one_element", 1, 1, {{0, 1, 1}}},
    {"below_a_vector", 3, 7, {{0, 3, 2}}},
    {"whole_tiles", 64, 256, {{0, 64, 8}}},
    {"edges_in_vectors", 70, 272, {{0, 70, 5}}},
    {"rows_out_of_line", 65, 259, {{0, 65, 3}}},
    {"more_ranks_than_a_slice", 64, 256, {{0, 64, 16}, {0, 64, 37}}},
    {"parts", 96, 256, {{0, 30, 2}, {61, 30, 3}}},
    {"adapters_that_overlap", 130, 40, {{0, 130, 4}, {3, 65, 2}, {129, 1, 1}}},
    {"transposed", 64, 256, {{0, 256, 8}}, true},
    {"transposed_parts", 33, 300, {{0, 100, 4}, {200, 100, 17}}, true},
    {"a_column", 200, 1, {{0, 200, 2}}},
    {"no_rows", 0, 7, {{0, 0, 2}}},
    {"no_columns", 7, 0, {{0, 7, 2}}},
};

/// W′ by its definition, one element after the other: updates summed in order by fused multiply-adds, the scaling
/// rounded into B, W0 last, one rounding.
template <class T, class Sum>
at::Tensor defined(const MergeJob& job) {
  const auto result = job.base.contiguous().clone();
  const auto by_rows = job.transposed ? result.t() : result;
  std::vector<at::Tensor> A, B;
  for (const auto& update : job.updates) {
    A.push_back(update.second.A.to(c10::CppTypeToScalarType<Sum>::value).contiguous());
    B.push_back((update.second.B.to(c10::CppTypeToScalarType<Sum>::value) * update.second.scaling).contiguous());
  }
  for (int64_t i = 0; i < by_rows.size(0); ++i) {
    for (int64_t j = 0; j < by_rows.size(1); ++j) {
      Sum sum = 0;
      for (size_t k = 0; k < A.size(); ++k) {
        const auto row = i - job.updates[k].first;
        const auto rank = A[k].size(0);
        if (row < 0 || row >= B[k].size(0)) continue;
        for (int64_t r = 0; r < rank; ++r) {
          sum = std::fma(B[k].template const_data_ptr<Sum>()[row * rank + r],
                         A[k].template const_data_ptr<Sum>()[r * by_rows.size(1) + j], sum);
        }
      }
      auto* value = result.template mutable_data_ptr<T>() + i * by_rows.stride(0) + j * by_rows.stride(1);
      *value = static_cast<T>(static_cast<Sum>(*value) + sum);
    }
  }
  return result;
}

at::Tensor defined(const MergeJob& job) {
  switch (job.base.scalar_type()) {
    case at::kDouble:
      return defined<double, double>(job);
    case at::kFloat:
      return defined<float, float>(job);
    case at::kBFloat16:
      return defined<c10::BFloat16, float>(job);
    default:
      return defined<c10::Half, float>(job);
  }
}

/// How far W′ is beyond the bound around W0 + Σ s·B·A in float64.
double excess(const MergeJob& job) {
  const auto weight = harness::dense_weight(job);
  return harness::excess(job.merged, weight.value, harness::weight_bound(weight, job.base.scalar_type()));
}

class HostMerge : public ::testing::TestWithParam<std::tuple<MergeShape, at::ScalarType>> {
 protected:
  const MergeShape& shape() const { return std::get<0>(GetParam()); }
  at::ScalarType dtype() const { return std::get<1>(GetParam()); }
};

TEST_P(HostMerge, IsItsDefinitionBitForBit) {
  for (const auto factor_dtype : {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf}) {
    const auto job = make_job(shape(), dtype(), factor_dtype);
    const auto base = job->base.clone();
    merge({job.get()});
    EXPECT_TRUE(at::equal(job->merged, defined(*job))) << c10::toString(factor_dtype);
    EXPECT_TRUE(at::equal(job->base, base));
    EXPECT_EQ(job->non_finite.load(), 0);
  }
}

TEST_P(HostMerge, RoundsOnce) {
  for (const double size : {1e-3, 1e-1, 10.0}) {
    const auto job = make_job(shape(), dtype(), dtype() == at::kDouble ? at::kDouble : at::kFloat, size);
    merge({job.get()});
    EXPECT_LE(excess(*job), 0) << "s·B·A of size " << size;
  }
}

INSTANTIATE_TEST_SUITE_P(Kernel, HostMerge,
                         ::testing::Combine(::testing::ValuesIn(kShapes),
                                            ::testing::Values(at::kDouble, at::kFloat, at::kBFloat16, at::kHalf)),
                         [](const auto& tested) {
                           return std::get<0>(tested.param).name + "_" + c10::toString(std::get<1>(tested.param));
                         });

TEST(HostMergeTable, HoldsManyMatrices) {
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf}) {
    std::vector<std::unique_ptr<MergeJob>> owned;
    std::vector<MergeJob*> jobs;
    for (int copies = 0; copies < 2; ++copies) {
      for (const auto& shape : kShapes) {
        owned.push_back(make_job(shape, dtype, at::kFloat, 0.1 * (copies + 1)));
        jobs.push_back(owned.back().get());
      }
    }
    merge(jobs);
    for (const auto* job : jobs) EXPECT_TRUE(at::equal(job->merged, defined(*job))) << job->path;
  }
}

TEST(HostMergeTable, ReadsFactorsInTheirStrides) {
  for (const bool transposed : {false, true}) {
    const MergeShape shape{"strided", 48, 80, {{0, transposed ? 80 : 48, 6}}, transposed};
    const auto job = make_job(shape, at::kFloat, at::kFloat);
    auto& update = job->updates[0].second;
    update.A = update.A.t().contiguous().t();
    update.B = at::cat({update.B, update.B}, 1).narrow(1, 0, 6);
    merge({job.get()});
    EXPECT_TRUE(at::equal(job->merged, defined(*job)));
  }
}

TEST(HostMergeTable, ReadsABaseThatIsOutOfLine) {
  const auto job = make_job({"base", 65, 128, {{0, 65, 4}}}, at::kBFloat16, at::kFloat);
  const auto buffer = at::empty({65 * 128 + 1}, at::kBFloat16);
  job->base = buffer.narrow(0, 1, 65 * 128).view({65, 128}).copy_(job->base);
  merge({job.get()});
  EXPECT_TRUE(at::equal(job->merged, defined(*job)));
}

TEST(HostMergeTable, ChecksAWeightWithoutUpdates) {
  const auto job = make_job({"merged_elsewhere", 70, 300, {}}, at::kHalf, at::kFloat);
  job->merged = job->base.clone();
  job->merged[69][299] = std::numeric_limits<double>::infinity();
  const auto before = job->merged.clone();
  MergePlan plan(ElementType::kHalf);
  plan.add_check(*job);
  run_on_host(plan);
  EXPECT_EQ(job->non_finite.load(), 1);
  EXPECT_TRUE(at::equal(job->merged, before));
}

/// Every 16-bit number through the kernel with an update of zero: the conversions in both directions.
TEST(HostNonFinite, IsCountedAndNothingElseChanges) {
  for (const auto dtype : {at::kBFloat16, at::kHalf}) {
    const auto job = std::make_unique<MergeJob>();
    job->base = at::arange(0, 65536, at::kInt).to(at::kShort).view(dtype).view({256, 256});
    job->updates.emplace_back(0, lora::LowRank{at::zeros({1, 256}), at::zeros({256, 1}), 1});
    merge({job.get()});
    const auto finite = at::isfinite(job->base);
    EXPECT_EQ(job->non_finite.load(), (~finite).sum().item<int64_t>());
    EXPECT_TRUE(at::equal(job->merged.masked_select(finite), job->base.masked_select(finite)));
  }
}

TEST(HostNonFinite, IsCountedForItsMatrix) {
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf}) {
    const auto first = make_job(kShapes[3], dtype, at::kFloat), bad = make_job(kShapes[3], dtype, at::kFloat),
               last = make_job(kShapes[3], dtype, at::kFloat);
    bad->base[0][0] = std::nan("");
    bad->base[69][271] = -std::numeric_limits<double>::infinity();
    merge({first.get(), bad.get(), last.get()});
    EXPECT_EQ(first->non_finite.load(), 0);
    EXPECT_EQ(bad->non_finite.load(), 2);
    EXPECT_EQ(last->non_finite.load(), 0);
  }
}

/// As on the CPU, where rows outside of an update never see its factors.
TEST(HostNonFinite, StaysWithinTheRowsOfItsUpdate) {
  for (const bool transposed : {false, true}) {
    const auto job = make_job({"rows", 64, 64, {{10, 11, 3}, {0, 64, 2}}, transposed}, at::kFloat, at::kFloat);
    job->updates[0].second.A[1][5] = std::numeric_limits<double>::infinity();
    merge({job.get()});
    EXPECT_EQ(job->non_finite.load(), 11);
  }
}

TEST(HostNonFinite, IsWhatOverflowsTheDtype) {
  const auto job = make_job({"overflow", 4, 64, {{0, 4, 1}}}, at::kHalf, at::kFloat);
  job->updates[0].second = {at::ones({1, 64}), at::full({4, 1}, 1e5), 1};
  merge({job.get()});
  EXPECT_EQ(job->non_finite.load(), 4 * 64);
}

}  // namespace
}  // namespace merge_body_test
