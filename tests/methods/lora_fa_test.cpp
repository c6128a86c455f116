// LoRA-FA: the gradients of B, and three steps of PEFT's optimizer (tests/golden/methods/lorafa).
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/lora.h>

#include <cmath>
#include <map>
#include <string>

#include "harness/dense_oracle.h"
#include "harness/message_of.h"
#include "harness/values.h"
#include "oracles/models.h"

namespace lora_fa_test {
namespace {

using harness::relative_error;
using Tensors = std::map<std::string, at::Tensor>;

Tensors tensors_of(const lora::Adapters& adapters) {
  Tensors tensors;
  for (const auto& [name, tensor] : adapters.named_tensors("default")) tensors[name] = tensor;
  return tensors;
}

TEST(LoraFa, MapsTheGradientOfBByTheInverseOfAsProducts) {
  torch::manual_seed(7);
  Mlp model;
  model->to(at::kDouble);
  const auto adapters = lora::inject(*model, lora::LoraConfig().r(3).lora_alpha(7).target_modules({"up", "down"}));
  harness::fill(adapters);
  const auto x = harness::normal({5, 12}, 3);
  const auto gradients = [&] {
    model->zero_grad();
    model->forward(x).square().sum().backward();
    Tensors found;
    for (const auto& [name, tensor] : tensors_of(adapters)) {
      found[name] = tensor.grad().defined() ? tensor.grad().clone() : at::Tensor();
    }
    return found;
  };
  const auto plain = gradients();
  {
    const lora::LoraFa only_B(adapters);
    const auto mapped = gradients();
    for (const std::string module : {"up", "down"}) {
      const auto A = tensors_of(adapters).at(module + ".lora_default.lora_A").detach();
      const auto s = 7.0 / 3;
      const auto inverse = (at::mm(A, A.t()) + 1e-8 * at::eye(3, at::kDouble)).inverse() / (s * s);
      const auto name = module + ".lora_default.lora_B";
      EXPECT_LT(relative_error(mapped.at(name), at::mm(plain.at(name), inverse)), 1e-9) << name;
      EXPECT_FALSE(tensors_of(adapters).at(module + ".lora_default.lora_A").requires_grad());
    }
  }
  const auto after = gradients();
  for (const auto& [name, gradient] : plain) EXPECT_TRUE(at::equal(after.at(name), gradient)) << name;
}

TEST(LoraFa, TakesPeftsSteps) {
  const auto golden = lora::load_safetensors(LORA_SOURCE_DIR "/tests/golden/methods/lorafa/steps.safetensors");
  Mlp model;
  const auto adapters = lora::inject(*model, lora::LoraConfig()
                                                 .r(3)
                                                 .lora_alpha(7)
                                                 .rank_pattern({{"down", 5}})
                                                 .alpha_pattern({{"down", 2}})
                                                 .target_modules({"up", "down"}));
  auto tensors = tensors_of(adapters);
  const at::NoGradGuard no_grad;
  for (const std::string module : {"up", "down"}) {
    for (const std::string factor : {"lora_A", "lora_B"}) {
      tensors.at(module + ".lora_default." + factor).copy_(golden.at("start." + module + "." + factor + ".weight"));
    }
  }
  const lora::LoraFa only_B(adapters);
  constexpr double lr = 0.01, decay = 0.1, beta1 = 0.9, beta2 = 0.999, eps = 1e-6;
  Tensors m, v;
  for (int step = 1; step <= 3; ++step) {
    const auto prefix = "step_" + std::to_string(step) + ".";
    for (const std::string module : {"up", "down"}) {
      auto& B = tensors.at(module + ".lora_default.lora_B");
      const auto& given = golden.at(prefix + module + ".lora_B.weight.grad");
      B.mutable_grad() = at::Tensor();
      {
        const at::AutoGradMode with_grad(true);
        (B * given).sum().backward();
      }
      const auto g = B.grad();
      m[module] = step == 1 ? (1 - beta1) * g : beta1 * m[module] + (1 - beta1) * g;
      v[module] = step == 1 ? (1 - beta2) * g * g : beta2 * v[module] + (1 - beta2) * g * g;
      EXPECT_LT(relative_error(m[module], golden.at(prefix + module + ".lora.exp_avg_B")), 1e-4) << prefix << module;
      // PEFT's step of Adam: eps before the correction, then the decay.
      const auto rate = lr * std::sqrt(1 - std::pow(beta2, step)) / (1 - std::pow(beta1, step));
      B.sub_(rate * m[module] / (v[module].sqrt() + eps));
      B.sub_(lr * decay * B);
      EXPECT_LT(relative_error(B, golden.at(prefix + module + ".lora_B.weight")), 1e-5) << prefix << module;
    }
  }
}

TEST(LoraFa, KeepsNoInputsForTheBackward) {
  torch::manual_seed(7);
  torch::nn::Sequential model(torch::nn::Linear(64, 8));
  const auto adapters = lora::inject(*model, lora::LoraConfig().r(2).target_modules({"0"}));
  harness::fill(adapters);
  const auto holds_input = [&] {
    auto x = at::randn({32, 64});
    const auto uses = x.use_count();
    const auto y = model->forward(x);
    EXPECT_TRUE(y.requires_grad());
    return x.use_count() > uses;
  };
  EXPECT_TRUE(holds_input());
  const lora::LoraFa only_B(adapters);
  EXPECT_FALSE(holds_input());
}

TEST(LoraFa, RefusesWhatHasNoPlainFactors) {
  Mlp model;
  auto adapters = lora::inject(*model, lora::LoraConfig().use_dora(true).target_modules({"up"}));
  EXPECT_THAT(harness::message_of([&] { lora::LoraFa fa(adapters); }), ::testing::HasSubstr("without plain factors"));
  adapters.unload();
  const auto vera = lora::inject(*model, lora::VeraConfig().r(4).target_modules({"up"}));
  EXPECT_THAT(harness::message_of([&] { lora::LoraFa fa(vera); }), ::testing::HasSubstr("without plain factors"));
}

}  // namespace
}  // namespace lora_fa_test
