// The choice of a kernel for each product: what it depends on, and that it stays.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/weight/product_plan.h>

#include <sstream>
#include <vector>

#include "harness/dense_oracle.h"
#include "harness/memory.h"
#include "harness/num_threads.h"
#include "harness/values.h"

namespace product_plan_test {
namespace {

using lora::ProductKernel;
using lora::ProductPlan;
using lora::ProductShape;
using ::testing::HasSubstr;

at::Tensor matrix(int64_t in, int64_t out, at::ScalarType dtype = at::kFloat) {
  return at::zeros({in, out}, at::TensorOptions(dtype));
}

/// Needs a LibTorch with oneDNN's product; without it there is nothing to choose.
class ProductPlanTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!ProductPlan::has_onednn()) GTEST_SKIP() << "this LibTorch has no mkldnn::_linear_pointwise";
  }
  ProductPlan plan_;
};

TEST_F(ProductPlanTest, MeasuresAShapeOnceForAllRowsOfItsClass) {
  for (const int64_t rows : {64, 65, 100, 4000}) plan_.choose(rows, matrix(512, 256));
  EXPECT_EQ(plan_.choices().size(), 1U);
  EXPECT_EQ(plan_.choices().begin()->first.rows, 64);
  plan_.choose(63, matrix(512, 256));
  plan_.choose(32, matrix(512, 256));
  EXPECT_EQ(plan_.choices().size(), 2U);
  const auto first = plan_.choices();
  plan_.choose(64, matrix(512, 256));
  for (const auto& [shape, choice] : plan_.choices()) {
    EXPECT_EQ(choice.aten_seconds, first.at(shape).aten_seconds) << "measured again";
    EXPECT_GT(choice.aten_seconds, 0);
    EXPECT_GT(choice.onednn_seconds, 0);
    EXPECT_EQ(choice.kernel == ProductKernel::kOneDnn, choice.onednn_seconds * 1.2 < choice.aten_seconds);
  }
}

TEST_F(ProductPlanTest, MeasuresInMemoryThatGoesBack) {
  const auto W = matrix(2048, 2048);
  const harness::LargestAllocation allocations;
  plan_.choose(64, W);
  EXPECT_EQ(plan_.choices().size(), 1U);
  EXPECT_LT(allocations.bytes(), static_cast<int64_t>(W.nbytes()) / 8);
}

TEST_F(ProductPlanTest, TellsLayoutsDtypesAndThreadsApart) {
  plan_.choose(64, matrix(512, 256));
  plan_.choose(64, matrix(256, 512).t());
  plan_.choose(64, matrix(256, 512));
  plan_.choose(64, matrix(512, 256, at::kBFloat16));
  const auto expected = lora::detail::onednn_has(at::kBFloat16) ? 4U : 3U;
  EXPECT_EQ(plan_.choices().size(), expected);
  const harness::NumThreads guard(at::get_num_threads() == 1 ? 2 : 1);
  plan_.choose(64, matrix(512, 256));
  EXPECT_EQ(plan_.choices().size(), expected + 1);
}

TEST_F(ProductPlanTest, LeavesToAtenWhatOneDnnHasNotOrIsSmall) {
  EXPECT_EQ(plan_.choose(1 << 20, matrix(64, 64, at::kDouble)), ProductKernel::kAten);
  EXPECT_EQ(plan_.choose(64, matrix(64, 64)), ProductKernel::kAten);
  EXPECT_EQ(plan_.choose(1 << 20, matrix(64, 128).narrow(1, 3, 64)), ProductKernel::kAten) << "strided";
  EXPECT_EQ(plan_.choose(0, matrix(4096, 4096)), ProductKernel::kAten);
  EXPECT_TRUE(plan_.choices().empty());
}

TEST_F(ProductPlanTest, GoesByPinnedChoices) {
  ProductShape shape;
  shape.rows = 64;
  shape.in = 512;
  shape.out = 256;
  shape.threads = at::get_num_threads();
  for (const auto kernel : {ProductKernel::kOneDnn, ProductKernel::kAten, ProductKernel::kOneDnn}) {
    plan_.pin({{shape, {kernel}}});
    EXPECT_EQ(plan_.choose(100, matrix(512, 256)), kernel);
  }
  EXPECT_EQ(plan_.choices().at(shape).aten_seconds, 0) << "measured though pinned";
}

TEST_F(ProductPlanTest, CompletesTheRowsOfKnownMatrices) {
  plan_.choose(64, matrix(512, 1024));
  plan_.complete();
  std::vector<int64_t> rows;
  for (const auto& [shape, choice] : plan_.choices()) rows.push_back(shape.rows);
  EXPECT_THAT(rows, ::testing::ElementsAre(8, 16, 32, 64)) << "fewer rows are small products";
}

TEST_F(ProductPlanTest, PrintsALineForEachChoice) {
  plan_.choose(64, matrix(256, 512).t());
  std::ostringstream text;
  text << plan_;
  EXPECT_THAT(text.str(),
              HasSubstr("products on " + ProductPlan::processor() + "\n64+ x 512 x 256 transposed, Float, "));
  EXPECT_THAT(text.str(), HasSubstr(" (ATen "));
}

TEST_F(ProductPlanTest, OfOneKernelTakesItForAllThatItHas) {
  ProductPlan onednn(ProductKernel::kOneDnn), aten(ProductKernel::kAten);
  EXPECT_EQ(onednn.choose(1, matrix(2, 2)), ProductKernel::kOneDnn);
  EXPECT_EQ(onednn.choose(1, matrix(2, 2, at::kDouble)), ProductKernel::kAten);
  EXPECT_EQ(aten.choose(4096, matrix(512, 512)), ProductKernel::kAten);
  EXPECT_TRUE(onednn.choices().empty());
}

TEST_F(ProductPlanTest, KernelsGiveTheSameProduct) {
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    if (!lora::detail::onednn_has(dtype)) continue;
    for (const bool transposed : {false, true}) {
      const auto x = harness::normal({3, 5, 33}, 1, dtype);
      const auto stored = harness::normal(transposed ? at::IntArrayRef{17, 33} : at::IntArrayRef{33, 17}, 2, dtype);
      const auto V = transposed ? stored.t() : stored;
      const auto bias = harness::normal({17}, 3, dtype);
      const auto expected = at::matmul(x.to(at::kDouble), V.to(at::kDouble)) + bias.to(at::kDouble);
      const auto bound = 36 * harness::epsilon(dtype);
      EXPECT_LT(harness::relative_error(lora::detail::onednn_product(x, V, bias), expected), bound);
      EXPECT_LT(
          harness::relative_error(lora::detail::onednn_product(x.transpose(0, 1), V, bias).transpose(0, 1), expected),
          bound);
    }
  }
}

}  // namespace
}  // namespace product_plan_test
