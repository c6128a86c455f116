// The cross entropy of rows of logits against the formula in float64: every dtype, size and instruction set.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <lora/functional/linear_cross_entropy.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "functional/dense_loss.h"
#include "harness/instruction_sets.h"
#include "harness/num_threads.h"
#include "harness/values.h"

namespace cross_entropy_kernel_test {
namespace {

using dense_loss::DenseLoss;
using dense_loss::expect_within;
using harness::epsilon;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

template <class T>
at::Tensor run_rows(lora::detail::InstructionSet set, const at::Tensor& logits, const at::Tensor& labels,
                    double smoothing, bool gradient) {
  std::vector<double> losses;
  for (int64_t row = 0; row < logits.size(0); ++row) {
    losses.push_back(lora::detail::run_register_kernel<lora::detail::CrossEntropyKernel>(
        set,
        lora::detail::CrossEntropyRow<T>{logits.template mutable_data_ptr<T>() + row * logits.size(1), logits.size(1),
                                         labels[row].template item<int64_t>(), smoothing, gradient}));
  }
  return at::tensor(losses, at::kDouble);
}

at::Tensor run_rows(lora::detail::InstructionSet set, const at::Tensor& logits, const at::Tensor& labels,
                    double smoothing, bool gradient) {
  switch (logits.scalar_type()) {
    case at::kDouble:
      return run_rows<double>(set, logits, labels, smoothing, gradient);
    case at::kFloat:
      return run_rows<float>(set, logits, labels, smoothing, gradient);
    case at::kBFloat16:
      return run_rows<c10::BFloat16>(set, logits, labels, smoothing, gradient);
    default:
      return run_rows<c10::Half>(set, logits, labels, smoothing, gradient);
  }
}

class CrossEntropyRows : public ::testing::TestWithParam<std::tuple<at::ScalarType, int64_t>> {
 protected:
  at::ScalarType dtype() const { return std::get<0>(GetParam()); }
  int64_t classes() const { return std::get<1>(GetParam()); }

  /// Rows of small and large logits, rising, falling and equal ones, so that the maximum stands anywhere.
  at::Tensor logits() const {
    const auto rising = at::arange(classes(), at::kDouble) * (60.0 / static_cast<double>(classes()));
    return at::cat({harness::normal({3, classes()}, 1), harness::normal({1, classes()}, 2) * 30, rising.unsqueeze(0),
                    (100 - rising).unsqueeze(0), at::full({1, classes()}, -50.0, at::kDouble)})
        .to(dtype());
  }
  at::Tensor labels() const { return at::arange(7, at::kLong).mul(classes() - 1).floor_divide(6); }
};

TEST_P(CrossEntropyRows, EqualTheFormulaInEveryInstructionSet) {
  for (const double smoothing : {0.0, 0.1, 1.0}) {
    const DenseLoss expected(logits().to(at::kDouble), labels(), smoothing, at::zeros({7, 1}, at::kDouble), dtype());
    for (const auto set : harness::instruction_sets()) {
      auto z = logits();
      expect_within(run_rows(set, z, labels(), smoothing, false), expected.losses, "loss alone");
      EXPECT_TRUE(at::equal(z, logits())) << "the logits stay where no gradient is asked for";
      expect_within(run_rows(set, z, labels(), smoothing, true), expected.losses, "loss");
      expect_within(z, expected.gradient, "gradient");
    }
  }
}

TEST_P(CrossEntropyRows, EqualTheFormulaByOperators) {
  for (const double smoothing : {0.0, 0.1, 1.0}) {
    auto expected = DenseLoss(logits().to(at::kDouble), labels(), smoothing, at::zeros({7, 1}, at::kDouble), dtype());
    // Losses in float32, from log p and not from the sum.
    const double wide = epsilon(dtype() == at::kDouble ? at::kDouble : at::kFloat);
    const auto log_p = at::log_softmax(logits().to(at::kDouble), 1);
    expected.losses.bound += 4 * wide * (log_p.abs().amax(1) + 1);
    expected.gradient.bound += log_p.exp() * log_p.abs() * 2 * wide;
    const auto z = logits();
    expect_within(lora::detail::cross_entropy_by_operators(z, labels(), smoothing, true), expected.losses, "loss");
    expect_within(z, expected.gradient, "gradient");
  }
}

TEST_P(CrossEntropyRows, AreTheSameOnOneThreadAndOnTwo) {
  std::vector<at::Tensor> results;
  for (const int count : {1, 2}) {
    const harness::NumThreads guard(count);
    const auto z = logits().repeat({9, 1});
    results.push_back(lora::detail::cross_entropy_of_rows(z, labels().repeat({9}), 0.1, true));
    results.push_back(z);
  }
  EXPECT_TRUE(at::equal(results[0], results[2]));
  EXPECT_TRUE(at::equal(results[1], results[3]));
}

// Vectors of 16, blocks of 4096, tasks of 32768.
INSTANTIATE_TEST_SUITE_P(Kernel, CrossEntropyRows,
                         ::testing::Combine(::testing::Values(at::kDouble, at::kFloat, at::kBFloat16, at::kHalf),
                                            ::testing::Values(1, 2, 15, 16, 17, 100, 4095, 4096, 4097, 9000, 40000)),
                         [](const auto& tested) {
                           return std::string(c10::toString(std::get<0>(tested.param))) + "_" +
                                  std::to_string(std::get<1>(tested.param));
                         });

TEST(CrossEntropyKernel, KnowsInfiniteLogitsAndNaN) {
  const auto label = at::tensor({1}, at::kLong);
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf}) {
    for (const auto set : harness::instruction_sets()) {
      for (const int64_t place : {0, 20, 36}) {
        const auto with = [&](double value) {
          auto z = at::zeros({1, 37}, dtype);
          z[0][place] = value;
          return z;
        };
        auto masked = with(-kInfinity);
        EXPECT_NEAR(run_rows(set, masked, label, 0, true).item<double>(), std::log(36), 1e-6);
        EXPECT_EQ(masked[0][place].item<double>(), 0) << "a class that is ruled out gets no gradient";
        EXPECT_NEAR(masked.to(at::kDouble).sum().item<double>(), 0, 36 * epsilon(dtype));
        for (const double value : {kInfinity, std::nan(""), -std::nan("")}) {
          auto z = with(value);
          EXPECT_TRUE(std::isnan(run_rows(set, z, label, 0, true).item<double>())) << value << " at " << place;
        }
      }
      auto none = at::full({1, 37}, -kInfinity, dtype);
      EXPECT_FALSE(std::isfinite(run_rows(set, none, label, 0, true).item<double>()));
    }
  }
}

}  // namespace
}  // namespace cross_entropy_kernel_test
