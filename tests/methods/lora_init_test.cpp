// How A and B begin.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <lora/lora.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/linear.h>

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>

namespace lora_init_test {
namespace {

at::Tensor draw(const lora::LoraConfig& config, int64_t in, int64_t out, const std::string& tensor) {
  torch::nn::Sequential model(torch::nn::Linear(in, out));
  const auto adapters = lora::inject(*model, lora::LoraConfig(config).target_modules({"0"}));
  return adapters.named_parameters()[tensor == "A" ? 0 : 1].second.detach().clone();
}

TEST(LoraInit, HasTheStatisticsOfPeft) {
  const auto golden = nlohmann::json::parse(std::ifstream(LORA_SOURCE_DIR "/tests/golden/init_statistics.json"));
  at::manual_seed(3);
  for (const auto& row : golden) {
    const auto in = row["in"].get<int64_t>(), out = row["out"].get<int64_t>(), r = row["r"].get<int64_t>();
    const bool gaussian = row["init_lora_weights"] == "gaussian";
    const auto config =
        lora::LoraConfig().r(r).init_lora_weights(gaussian ? lora::LoraInit::kGaussian : lora::LoraInit::kKaiming);
    std::vector<at::Tensor> draws;
    for (int64_t i = 0; i < row["samples"].get<int64_t>() / (in * r); ++i) {
      draws.push_back(draw(config, in, out, "A").flatten());
    }
    const auto A = at::cat(draws).to(at::kDouble);
    const auto samples = static_cast<double>(A.numel());
    const auto deviation = row["a_std_by_definition"].get<double>();
    // Five standard errors of the mean, and of the standard deviation with the golden kurtosis.
    EXPECT_NEAR(A.mean().item<double>(), 0, 5 * deviation / std::sqrt(samples));
    const auto kurtosis = row["a_kurtosis"].get<double>();
    EXPECT_NEAR(A.std().item<double>() / deviation, 1, 5 * std::sqrt((kurtosis - 1) / (4 * samples)));
    const auto bound = gaussian ? A.abs().max().item<double>() : 1 / std::sqrt(static_cast<double>(in));
    EXPECT_LE(A.abs().max().item<double>(), bound);
    EXPECT_EQ(draw(config, in, out, "B").abs().max().item<double>(), 0);
  }
}

TEST(LoraInit, FollowsTheSeed) {
  for (const auto init : {lora::LoraInit::kKaiming, lora::LoraInit::kGaussian}) {
    const auto config = lora::LoraConfig().r(3).init_lora_weights(init);
    at::manual_seed(5);
    const auto first = draw(config, 7, 4, "A");
    const auto second = draw(config, 7, 4, "A");
    at::manual_seed(5);
    EXPECT_TRUE(at::equal(draw(config, 7, 4, "A"), first));
    EXPECT_FALSE(at::equal(first, second));
  }
}

TEST(LoraInit, LoadingDrawsNoRandomNumber) {
  const lora::LoRA method(lora::LoraConfig().r(2));
  at::manual_seed(9);
  const auto expected = at::rand({3});
  at::manual_seed(9);
  lora::UpdateSpec spec{};
  spec.in_features = spec.out_features = 4;
  spec.options = at::kFloat;
  spec.initialise = false;
  method.create(spec);
  EXPECT_TRUE(at::equal(at::rand({3}), expected));
}

}  // namespace
}  // namespace lora_init_test
