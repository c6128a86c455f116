// The gradients of rows scaled by numbers, against LibTorch's operators in float64, with every instruction set.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <lora/weight/scaled_rows.h>

#include <cstdint>
#include <utility>

#include "harness/dense_oracle.h"
#include "harness/instruction_sets.h"
#include "harness/num_threads.h"
#include "harness/values.h"

namespace scaled_rows_test {
namespace {

TEST(ScaleGradients, AreThoseOfTheProduct) {
  for (const auto set : harness::instruction_sets()) {
    for (const auto dtype : {at::kFloat, at::kBFloat16, at::kHalf, at::kDouble}) {
      for (const auto& [rows, columns] :
           {std::pair<int64_t, int64_t>{1, 1}, {3, 17}, {7, 256}, {5, 259}, {0, 4}, {64, 700}}) {
        const auto dy = harness::normal({rows, columns}, 1, dtype), y = harness::normal({rows, columns}, 2, dtype);
        const auto scale = harness::normal({columns}, 3, dtype == at::kDouble ? at::kDouble : at::kFloat);
        const auto [result, sums] = lora::detail::scale_gradients(dy, y, scale, set);
        ASSERT_EQ(result.scalar_type(), dtype);
        const auto wide = dy.to(at::kDouble);
        const auto product = wide * scale.to(at::kDouble);
        EXPECT_LE(harness::excess(result, product, harness::ulp(product, dtype)), 0) << rows << " x " << columns;
        const auto expected = (wide * y.to(at::kDouble)).sum(0);
        const auto bound = (wide * y.to(at::kDouble)).abs().sum(0) * static_cast<double>(rows + 2) *
                           harness::epsilon(dtype == at::kDouble ? at::kDouble : at::kFloat);
        EXPECT_LE(harness::excess(sums, expected, bound), 0) << rows << " x " << columns;
      }
    }
  }
}

TEST(ScaleGradients, DoNotDependOnTheNumberOfThreads) {
  const auto dy = harness::normal({33, 1000}, 1, at::kFloat), y = harness::normal({33, 1000}, 2, at::kFloat);
  const auto scale = harness::normal({1000}, 3, at::kFloat);
  const auto run = [&](int threads) {
    const harness::NumThreads scope(threads);
    return lora::detail::scale_gradients(dy, y, scale);
  };
  const auto several = run(3), one = run(1);
  EXPECT_TRUE(at::equal(one.first, several.first));
  EXPECT_TRUE(at::equal(one.second, several.second));
}

}  // namespace
}  // namespace scaled_rows_test
