// The merge kernel against sums in long double: every size, dtype, instruction set and number of threads.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/merge/merge.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "harness/dense_oracle.h"
#include "harness/instruction_sets.h"
#include "harness/values.h"

namespace merge_kernel_test {
namespace {

using lora::detail::MergeJob;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

struct UpdateRows {
  int64_t begin, rows, rank;
};

struct Shape {
  std::string name;
  int64_t rows, columns;
  std::vector<UpdateRows> updates;
};

void PrintTo(const Shape& shape, std::ostream* out) { *out << shape.name; }

// The kernel works in tiles of 64 x 512 elements and vectors of 16.
const std::vector<Shape> kShapes{
    {"one_element", 1, 1, {{0, 1, 1}}},
    {"below_a_vector", 3, 15, {{0, 3, 2}}},
    {"a_vector", 2, 16, {{0, 2, 3}}},
    {"two_vectors_and_one", 5, 33, {{0, 5, 4}}},
    {"a_tile", 64, 512, {{0, 64, 8}}},
    {"beyond_a_tile", 65, 513, {{0, 65, 5}}},
    {"many_tiles", 66, 1030, {{0, 66, 3}}},
    {"high_rank", 9, 50, {{0, 9, 64}}},
    {"parts", 30, 37, {{0, 10, 2}, {20, 10, 3}}},
    {"two_adapters_that_overlap", 70, 40, {{0, 70, 4}, {3, 65, 2}, {69, 1, 1}}},
    {"a_row", 1, 600, {{0, 1, 2}}},
    {"a_column", 600, 1, {{0, 600, 2}}},
    {"no_rows", 0, 7, {{0, 0, 2}}},
    {"no_columns", 7, 0, {{0, 7, 2}}},
};

/// A job whose W0 outweighs its update, so that a sum which rounds more often than once shows.
std::unique_ptr<MergeJob> make_job(const Shape& shape, at::ScalarType dtype, double size_of_update = 1e-2) {
  auto job = std::make_unique<MergeJob>();
  job->path = shape.name;
  job->base = harness::normal({shape.rows, shape.columns}, 1, dtype);
  const auto wide = dtype == at::kDouble ? at::kDouble : at::kFloat;
  uint64_t seed = 2;
  for (const auto& update : shape.updates) {
    job->updates.emplace_back(update.begin, lora::LowRank{harness::normal({update.rank, shape.columns}, seed, wide),
                                                          harness::normal({update.rows, update.rank}, seed + 1, wide),
                                                          size_of_update * static_cast<double>(seed)});
    seed += 2;
  }
  return job;
}

using Wide = std::vector<long double>;

Wide widened(const at::Tensor& tensor) {
  const auto plain = tensor.to(at::kDouble).contiguous();
  return {plain.const_data_ptr<double>(), plain.const_data_ptr<double>() + plain.numel()};
}

/// The largest |W′ − exact| over its bound: half an ulp plus r·ε·Σ|s·b·a|, one more rounding for a base narrower than
/// float32.
double worst(const MergeJob& job, const at::Tensor& merged) {
  const auto rows = job.base.size(0);
  const auto columns = job.base.size(1);
  auto exact = widened(job.base);
  Wide magnitude(exact.size()), rank(exact.size());
  for (const auto& [begin, update] : job.updates) {
    const auto A = widened(update.A);
    const auto B = widened(update.B);
    const auto r = update.A.size(0);
    for (int64_t i = 0; i < update.B.size(0); ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        const auto at = static_cast<size_t>((begin + i) * columns + j);
        for (int64_t k = 0; k < r; ++k) {
          const auto term = static_cast<long double>(update.scaling) * B[static_cast<size_t>(i * r + k)] *
                            A[static_cast<size_t>(k * columns + j)];
          exact[at] += term;
          magnitude[at] += std::abs(term);
        }
        rank[at] += static_cast<long double>(r);
      }
    }
  }
  const auto dtype = job.base.scalar_type();
  const auto sum_dtype = dtype == at::kDouble ? at::kDouble : at::kFloat;
  std::vector<double> rounded(exact.begin(), exact.end());
  const auto expected = at::from_blob(rounded.data(), {rows, columns}, at::kDouble);
  const auto half = widened(harness::ulp(expected, dtype) / 2);
  const auto half_of_sum = widened(harness::ulp(expected, sum_dtype) / 2);
  const auto found = widened(merged);
  double result = 0;
  for (size_t i = 0; i < exact.size(); ++i) {
    const auto bound = half[i] + rank[i] * static_cast<long double>(harness::epsilon(sum_dtype)) * magnitude[i] +
                       (dtype == sum_dtype ? 0 : half_of_sum[i]);
    result = std::max(result, static_cast<double>(std::abs(found[i] - exact[i]) / bound));
  }
  return result;
}

class MergeShape : public ::testing::TestWithParam<std::tuple<Shape, at::ScalarType>> {
 protected:
  const Shape& shape() const { return std::get<0>(GetParam()); }
  at::ScalarType dtype() const { return std::get<1>(GetParam()); }
};

TEST_P(MergeShape, RoundsOnce) {
  for (const double size : {1e-3, 1e-1, 10.0}) {
    std::vector<std::unique_ptr<MergeJob>> jobs;
    jobs.push_back(make_job(shape(), dtype(), size));
    const auto base = jobs[0]->base.clone();
    lora::detail::merge_weights(jobs);
    EXPECT_EQ(jobs[0]->merged.sizes(), base.sizes());
    EXPECT_EQ(jobs[0]->merged.scalar_type(), dtype());
    EXPECT_LE(worst(*jobs[0], jobs[0]->merged), 1) << "s·B·A of size " << size;
    EXPECT_TRUE(at::equal(jobs[0]->base, base));
  }
}

TEST_P(MergeShape, IsTheSameOnOneThreadAndOnTwo) {
  const auto threads = at::get_num_threads();
  std::vector<at::Tensor> results;
  for (const int count : {1, 2}) {
    at::set_num_threads(count);
    std::vector<std::unique_ptr<MergeJob>> jobs;
    jobs.push_back(make_job(shape(), dtype()));
    jobs.push_back(make_job(kShapes[6], dtype()));
    lora::detail::merge_weights(jobs);
    results.push_back(jobs[0]->merged);
    results.push_back(jobs[1]->merged);
  }
  at::set_num_threads(threads);
  EXPECT_TRUE(at::equal(results[0], results[2]));
  EXPECT_TRUE(at::equal(results[1], results[3]));
}

INSTANTIATE_TEST_SUITE_P(Kernel, MergeShape,
                         ::testing::Combine(::testing::ValuesIn(kShapes),
                                            ::testing::Values(at::kDouble, at::kFloat, at::kBFloat16, at::kHalf)),
                         [](const auto& tested) {
                           return std::get<0>(tested.param).name + "_" + c10::toString(std::get<1>(tested.param));
                         });

/// Runs every version of the kernel that this processor has over a job.
template <class T, class Sum>
void check_instruction_sets(const Shape& shape, at::ScalarType dtype) {
  const auto job = make_job(shape, dtype);
  std::vector<lora::detail::MergeFactors<Sum>> factors;
  std::vector<at::Tensor> kept;
  for (const auto& [begin, update] : job->updates) {
    kept.push_back(update.B * update.scaling);
    factors.push_back({update.A.template const_data_ptr<Sum>(), kept.back().template const_data_ptr<Sum>(),
                       update.A.size(0), begin, begin + update.B.size(0)});
  }
  for (const auto set : harness::instruction_sets()) {
    const auto merged = at::full_like(job->base, 77);
    const auto bad = lora::detail::run_kernel<lora::detail::MergeTileKernel>(
        set, lora::detail::MergeTile<T, Sum>{job->base.template const_data_ptr<T>(),
                                             merged.template mutable_data_ptr<T>(), shape.columns, factors.data(),
                                             static_cast<int64_t>(factors.size()), 0, shape.rows, 0, shape.columns});
    EXPECT_EQ(bad, 0);
    EXPECT_LE(worst(*job, merged), 1) << static_cast<int>(set) << " " << shape.name << " " << c10::toString(dtype);
  }
}

TEST(InstructionSets, AllStayWithinTheBound) {
  for (const auto& shape : kShapes) {
    check_instruction_sets<double, double>(shape, at::kDouble);
    check_instruction_sets<float, float>(shape, at::kFloat);
    check_instruction_sets<c10::BFloat16, float>(shape, at::kBFloat16);
    check_instruction_sets<c10::Half, float>(shape, at::kHalf);
  }
}

/// Every 16-bit number through the kernel with an update of zero: the conversions in both directions.
TEST(HalfPrecision, KeepsEveryFiniteNumberAndCountsTheOthers) {
  for (const auto dtype : {at::kBFloat16, at::kHalf}) {
    const auto all = at::arange(0, 65536, at::kInt).to(at::kShort).view(dtype).view({256, 256});
    auto job = std::make_unique<MergeJob>();
    job->path = "all";
    job->base = all;
    job->updates.emplace_back(0, lora::LowRank{at::zeros({1, 256}), at::zeros({256, 1}), 1});
    std::vector<std::unique_ptr<MergeJob>> jobs;
    jobs.push_back(std::move(job));
    const auto finite = at::isfinite(all);
    EXPECT_THROW(lora::detail::merge_weights(jobs), c10::ValueError);
    EXPECT_EQ(jobs[0]->non_finite.load(), (~finite).sum().item<int64_t>());
    EXPECT_TRUE(at::equal(jobs[0]->merged.masked_select(finite), all.masked_select(finite)));
  }
}

/// Sums that lie half way between two numbers, just below and just above: ties go to even, as LibTorch rounds.
TEST(HalfPrecision, RoundsAsLibTorchDoes) {
  for (const auto dtype : {at::kBFloat16, at::kHalf}) {
    const auto value = at::cat({harness::normal({4096}, 5, at::kFloat), harness::normal({4096}, 6, at::kFloat) * 1e-6,
                                at::arange(1, 4097, at::kFloat) + 0.5, at::arange(1, 4097, at::kFloat) * 0x1p-26});
    auto job = std::make_unique<MergeJob>();
    job->path = "ties";
    job->base = at::zeros({1, value.numel()}, dtype);
    job->updates.emplace_back(0, lora::LowRank{value.unsqueeze(0), at::ones({1, 1}), 1});
    std::vector<std::unique_ptr<MergeJob>> jobs;
    jobs.push_back(std::move(job));
    lora::detail::merge_weights(jobs);
    EXPECT_TRUE(at::equal(jobs[0]->merged.squeeze(0), value.to(dtype)));
  }
}

TEST(NonFinite, IsCountedWhereverItStands) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf}) {
    for (const double value : {std::nan(""), kInfinity, -kInfinity}) {
      for (const int64_t column : {0, 15, 31, 32, 36}) {
        std::vector<std::unique_ptr<MergeJob>> jobs;
        jobs.push_back(make_job({"weight", 30, 37, {{0, 10, 2}}}, dtype));
        jobs[0]->base[17][column] = value;
        EXPECT_THAT([&] { lora::detail::merge_weights(jobs); },
                    ThrowsMessage<c10::ValueError>(HasSubstr("found 1 NaN or infinite values")))
            << c10::toString(dtype) << " column " << column;
      }
    }
  }
}

}  // namespace
}  // namespace merge_kernel_test
