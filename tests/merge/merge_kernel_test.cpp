// The merge kernel against sums in long double: every size, dtype, instruction set and number of threads.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/merge/merge.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "harness/dense_oracle.h"
#include "harness/instruction_sets.h"
#include "harness/num_threads.h"
#include "harness/values.h"

namespace merge_kernel_test {
namespace {

using lora::detail::InstructionSet;
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

// The kernel works in blocks of 4 rows and up to 64 columns.
const std::vector<Shape> kShapes{
    {"one_element", 1, 1, {{0, 1, 1}}},
    {"below_a_vector", 3, 15, {{0, 3, 2}}},
    {"a_vector", 2, 16, {{0, 2, 3}}},
    {"two_vectors_and_one", 5, 33, {{0, 5, 4}}},
    {"a_block", 4, 64, {{0, 4, 8}}},
    {"beyond_a_block", 5, 65, {{0, 5, 5}}},
    {"many_blocks", 66, 1030, {{0, 66, 3}}},
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
  std::vector<at::Tensor> results;
  for (const int count : {1, 2}) {
    const harness::NumThreads guard(count);
    std::vector<std::unique_ptr<MergeJob>> jobs;
    jobs.push_back(make_job(shape(), dtype()));
    jobs.push_back(make_job(kShapes[6], dtype()));
    lora::detail::merge_weights(jobs);
    results.push_back(jobs[0]->merged);
    results.push_back(jobs[1]->merged);
  }
  EXPECT_TRUE(at::equal(results[0], results[2]));
  EXPECT_TRUE(at::equal(results[1], results[3]));
}

INSTANTIATE_TEST_SUITE_P(Kernel, MergeShape,
                         ::testing::Combine(::testing::ValuesIn(kShapes),
                                            ::testing::Values(at::kDouble, at::kFloat, at::kBFloat16, at::kHalf)),
                         [](const auto& tested) {
                           return std::get<0>(tested.param).name + "_" + c10::toString(std::get<1>(tested.param));
                         });

/// The columns [left, left + columns) of a job's rows [first, first + rows), merged by one version of the kernel as a
/// matrix of their own.
struct Part {
  int64_t first, rows, left, columns;
};

template <class T>
using SumOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

/// A job's factors as the kernel takes them.
template <class T>
class KernelInput {
 public:
  KernelInput(const MergeJob& job, const Part& part)
      : base_(job.base.narrow(0, part.first, part.rows).narrow(1, part.left, part.columns).contiguous()) {
    for (const auto& [begin, update] : job.updates) {
      kept_.push_back((update.B * update.scaling).contiguous());
      const auto* B = kept_.back().template const_data_ptr<SumOf<T>>();
      panels_.push_back(lora::detail::merge_panels<T, SumOf<T>>(update.A.narrow(1, part.left, part.columns)));
      factors_.push_back(
          {panels_.back().data(), B, update.A.size(0), begin - part.first, begin - part.first + update.B.size(0)});
    }
  }

  /// Tiles of so many rows and columns; returns W′ and how many of its elements are not finite.
  std::pair<at::Tensor, int64_t> run(InstructionSet set, int64_t rows, int64_t columns) const {
    auto merged = at::full_like(base_, 77);
    int64_t bad = 0;
    for (int64_t first = 0; first < base_.size(0); first += rows) {
      for (int64_t left = 0; left < base_.size(1); left += columns) {
        bad += lora::detail::run_register_kernel<lora::detail::MergeTileKernel>(
            set, lora::detail::MergeTile<T, SumOf<T>>{
                     base_.template const_data_ptr<T>(), merged.template mutable_data_ptr<T>(), base_.size(1),
                     factors_.data(), static_cast<int64_t>(factors_.size()), first,
                     std::min(first + rows, base_.size(0)), left, std::min(left + columns, base_.size(1))});
      }
    }
    return {merged, bad};
  }

 private:
  at::Tensor base_;
  std::vector<at::Tensor> kept_;
  std::vector<std::vector<SumOf<T>>> panels_;
  std::vector<lora::detail::MergeFactors<SumOf<T>>> factors_;
};

constexpr int64_t kAll = int64_t{1} << 30;

Part whole(const MergeJob& job) { return {0, job.base.size(0), 0, job.base.size(1)}; }

/// W′ of the version for an instruction set.
at::Tensor merged_by(InstructionSet set, const MergeJob& job, const Part& part, int64_t rows = kAll,
                     int64_t columns = kAll, int64_t* non_finite = nullptr) {
  const auto result = [&]() -> std::pair<at::Tensor, int64_t> {
    switch (job.base.scalar_type()) {
      case at::kDouble:
        return KernelInput<double>(job, part).run(set, rows, columns);
      case at::kFloat:
        return KernelInput<float>(job, part).run(set, rows, columns);
      case at::kBFloat16:
        return KernelInput<c10::BFloat16>(job, part).run(set, rows, columns);
      default:
        return KernelInput<c10::Half>(job, part).run(set, rows, columns);
    }
  }();
  if (non_finite != nullptr) {
    *non_finite = result.second;
  } else {
    EXPECT_EQ(result.second, 0);
  }
  return result.first;
}

constexpr auto kDtypes = {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf};

TEST(InstructionSets, AllStayWithinTheBound) {
  for (const auto& shape : kShapes) {
    for (const auto dtype : kDtypes) {
      const auto job = make_job(shape, dtype);
      for (const auto set : harness::instruction_sets()) {
        EXPECT_LE(worst(*job, merged_by(set, *job, whole(*job))), 1)
            << static_cast<int>(set) << " " << shape.name << " " << c10::toString(dtype);
      }
    }
  }
}

/// Products are added by the same fused instruction, one after the other, whatever the width of the register.
TEST(InstructionSets, OfAvxGiveTheSameBits) {
  if (harness::instruction_sets().back() != InstructionSet::kAvx512) GTEST_SKIP() << "this processor has no AVX-512";
  for (const auto& shape : kShapes) {
    for (const auto dtype : kDtypes) {
      const auto job = make_job(shape, dtype);
      EXPECT_TRUE(at::equal(merged_by(InstructionSet::kAvx2, *job, whole(*job)),
                            merged_by(InstructionSet::kAvx512, *job, whole(*job))))
          << shape.name << " " << c10::toString(dtype);
    }
  }
}

TEST(InstructionSets, RoundTheFloatSumToHalfPrecisionOnce) {
  for (const auto& shape : kShapes) {
    for (const auto dtype : {at::kBFloat16, at::kHalf}) {
      const auto job = make_job(shape, dtype, 0.3);
      MergeJob wide;
      wide.base = job->base.to(at::kFloat);
      wide.updates = job->updates;
      for (const auto set : harness::instruction_sets()) {
        EXPECT_TRUE(at::equal(merged_by(set, *job, whole(*job)), merged_by(set, wide, whole(wide)).to(dtype)))
            << static_cast<int>(set) << " " << shape.name << " " << c10::toString(dtype);
      }
    }
  }
}

/// W′ in tiles, and of a part of the rows and columns alone, has the bits of W′ as a whole.
TEST(InstructionSets, GiveAnElementTheSameBitsInEveryPlace) {
  const Shape shape{"places", 45, 333, {{0, 45, 5}, {6, 11, 3}, {16, 29, 2}}};
  for (const auto dtype : kDtypes) {
    const auto job = make_job(shape, dtype, 0.3);
    for (const auto set : harness::instruction_sets()) {
      const auto expected = merged_by(set, *job, whole(*job));
      for (const int64_t rows : {1, 3, 7, 8}) {
        for (const int64_t columns : {64, 192}) {
          EXPECT_TRUE(at::equal(merged_by(set, *job, whole(*job), rows, columns), expected))
              << static_cast<int>(set) << " " << c10::toString(dtype) << " in tiles of " << rows << " x " << columns;
        }
      }
      for (const int64_t left : {0, 1, 2, 15, 64, 129}) {
        for (const int64_t columns : {1, 2, 31, 32, 64, 65, 128, 204}) {
          EXPECT_TRUE(at::equal(merged_by(set, *job, {0, 45, left, columns}), expected.narrow(1, left, columns)))
              << static_cast<int>(set) << " " << c10::toString(dtype) << " columns " << left << " and " << columns;
        }
      }
    }
  }
}

/// A weight of several tiles, with more columns of A than a tile takes at once.
TEST(Tiles, JoinToTheWhole) {
  for (const auto dtype : kDtypes) {
    std::vector<std::unique_ptr<MergeJob>> jobs;
    jobs.push_back(make_job({"many_tiles", 17, 66001, {{0, 17, 3}, {5, 9, 2}}}, dtype));
    lora::detail::merge_weights(jobs);
    EXPECT_TRUE(at::equal(jobs[0]->merged, merged_by(lora::detail::instruction_set(), *jobs[0], whole(*jobs[0]))));
  }
}

/// The largest finite number of a dtype and the least that, added to it, gives an infinite one: half an ulp.
std::pair<double, double> edge(at::ScalarType dtype) {
  const auto largest = dtype == at::kDouble     ? std::numeric_limits<double>::max()
                       : dtype == at::kFloat    ? double{std::numeric_limits<float>::max()}
                       : dtype == at::kBFloat16 ? 0x1.FEp127
                                                : 65504.0;
  return {largest, harness::ulp(at::full({1}, largest, at::kDouble), dtype).item<double>() / 2};
}

TEST(InstructionSets, CountWhatBecomesInfiniteAsItIsRounded) {
  for (const auto dtype : kDtypes) {
    const auto [largest, half] = edge(dtype);
    const auto wide = dtype == at::kDouble ? at::kDouble : at::kFloat;
    for (const auto set : harness::instruction_sets()) {
      for (const int64_t column : {0, 1, 31, 32, 63, 64, 70, 77}) {
        for (const double sign : {1.0, -1.0}) {
          MergeJob job;
          job.base = at::zeros({6, 78}, dtype);
          job.base[5][column] = sign * largest;
          const auto A = at::zeros({1, 78}, wide);
          // The sum itself is rounded where its dtype is the base's: to even, which is the infinite one.
          for (const double part : {1.0, 0.99}) {
            A[0][column] = sign * half * part;
            const auto B = at::zeros({6, 1}, wide);
            B[5][0] = 1;
            job.updates = {{0, lora::LowRank{A, B, 1}}};
            int64_t bad = -1;
            const auto merged = merged_by(set, job, whole(job), kAll, kAll, &bad);
            EXPECT_EQ(bad, part == 1 ? 1 : 0) << static_cast<int>(set) << " " << c10::toString(dtype) << " " << column;
            EXPECT_EQ(merged[5][column].item<double>(),
                      sign * (part == 1 ? std::numeric_limits<double>::infinity() : largest));
          }
        }
      }
    }
  }
}

/// No NaN is lost, whatever its bits: memory that was filled with ones holds them too.
TEST(InstructionSets, FindANaNOfAnyPayload) {
  for (const auto dtype : kDtypes) {
    const auto wide = dtype == at::kDouble ? at::kDouble : at::kFloat;
    for (const auto set : harness::instruction_sets()) {
      MergeJob job;
      job.base = at::zeros({3, 70}, dtype);
      const auto A = at::zeros({1, 70}, wide);
      std::memset(A.narrow(1, 69, 1).mutable_data_ptr(), 0xff, static_cast<size_t>(A.element_size()));
      job.updates = {{1, lora::LowRank{A, at::ones({1, 1}, wide), 1}}};
      int64_t bad = 0;
      merged_by(set, job, whole(job), kAll, kAll, &bad);
      EXPECT_EQ(bad, 1) << static_cast<int>(set) << " " << c10::toString(dtype);
    }
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
