// LoRA: how the update is scaled, and its products by blocks.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <lora/lora.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/linear.h>

#include <string>
#include <vector>

#include "harness/dense_oracle.h"
#include "harness/values.h"

namespace lora_test {
namespace {

TEST(Scaling, IsAlphaOverRankOrItsRoot) {
  const auto scaling = [](lora::LoraConfig config, const std::string& path) {
    return lora::LoRA(config.target_modules({"layer"})).scaling({path});
  };
  EXPECT_DOUBLE_EQ(scaling(lora::LoraConfig(), "x"), 1);
  EXPECT_DOUBLE_EQ(scaling(lora::LoraConfig().r(3).lora_alpha(7), "x"), 7.0 / 3);
  EXPECT_DOUBLE_EQ(scaling(lora::LoraConfig().r(9).lora_alpha(6).use_rslora(true), "x"), 2);
  EXPECT_DOUBLE_EQ(scaling(lora::LoraConfig().r(4).lora_alpha(-2), "x"), -0.5);
  const auto patterns = lora::LoraConfig().r(4).lora_alpha(8).rank_pattern({{"up", 16}}).alpha_pattern({{"up", 4}});
  EXPECT_DOUBLE_EQ(scaling(patterns, "h.0.up"), 0.25);
  EXPECT_DOUBLE_EQ(scaling(patterns, "h.0.pup"), 2);
}

TEST(Scaling, OfRsLoraReachesTheOutput) {
  torch::manual_seed(7);
  torch::nn::Sequential model(torch::nn::Linear(12, 9));
  model->to(at::kDouble);
  const auto x = harness::normal({5, 12}, 3);
  const auto plain = model->forward(x).detach();
  const auto adapters =
      lora::inject(*model, lora::LoraConfig().r(9).lora_alpha(6).use_rslora(true).target_modules({"0"}));
  harness::fill(adapters);
  const auto tensors = adapters.named_tensors("default");
  const auto expected = plain + 2 * x.mm(tensors[0].second.t()).mm(tensors[1].second.t());
  EXPECT_LT(harness::relative_error(model->forward(x), expected), 1e-13);
}

TEST(LoraUpdate, IsItsFactorsProduct) {
  const auto A = harness::normal({3, 11}, 1);
  const auto B = harness::normal({7, 3}, 2);
  const lora::LoraUpdate update(A, B, -1.5);
  EXPECT_LT(harness::relative_error(update.dense({}), -1.5 * B.mm(A)), 1e-14);
  EXPECT_EQ(update.in_features(), 11);
  EXPECT_EQ(update.out_features(), 7);
}

}  // namespace
}  // namespace lora_test
