// Parameter groups: every option filled in, the learning rates of LoRA+, and the steps of Python's optimizers.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/lora.h>
#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/sgd.h>

#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <tuple>

#include "harness/temp_folder.h"
#include "oracles/models.h"

namespace param_groups_test {
namespace {

using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

lora::Adapters inject(Mlp& model) {
  return lora::inject(*model, lora::LoraConfig().r(3).target_modules({"up", "down"}));
}

TEST(ParamGroups, CarryEveryOption) {
  Mlp model;
  const auto adapters = inject(model);
  const auto options = torch::optim::AdamWOptions(3e-4).betas({0.8, 0.9}).eps(1e-5).weight_decay(0.25).amsgrad(true);
  const auto groups = lora::param_groups(adapters, options, lora::LoraPlusOptions().lr_ratio(16));
  ASSERT_EQ(groups.size(), 2U);
  for (const auto& group : groups) {
    const auto& found = static_cast<const torch::optim::AdamWOptions&>(group.options());
    EXPECT_EQ(found.betas(), options.betas());
    EXPECT_EQ(found.eps(), 1e-5);
    EXPECT_EQ(found.weight_decay(), 0.25);
    EXPECT_TRUE(found.amsgrad());
    EXPECT_EQ(group.params().size(), 2U);
  }
  EXPECT_EQ(groups[0].options().get_lr(), 3e-4);
  EXPECT_EQ(groups[1].options().get_lr(), 16 * 3e-4);
  // The first group is A, [r, in]; the second B, [out, r].
  EXPECT_EQ(groups[0].params()[0].size(0), 3);
  EXPECT_EQ(groups[1].params()[0].size(1), 3);
}

// From LibTorch 2.15 on an optimizer overwrites what in a group is as in its options' constructor: here 1e-3 and 0.
TEST(ParamGroups, ReachTheOptimizerAsTheyAre) {
  const auto options = torch::optim::AdamOptions(1e-3 / 16).weight_decay(0.25);
  torch::optim::Adam optimizer(
      lora::param_groups({{"factor", at::ones({2, 3}).requires_grad_(), lora::TensorRole::kOutput},
                          {"gain", at::ones({3}).requires_grad_(), lora::TensorRole::kInput}},
                         options, lora::LoraPlusOptions().lr_ratio(16)));
  EXPECT_EQ(optimizer.param_groups()[0].options().get_lr(), 1e-3);
  EXPECT_EQ(static_cast<torch::optim::AdamOptions&>(optimizer.param_groups()[1].options()).weight_decay(), 0);
}

TEST(ParamGroups, OfPlainLoraAreOne) {
  Mlp model;
  const auto adapters = inject(model);
  const auto groups = lora::param_groups(adapters, torch::optim::SGDOptions(0.1).momentum(0.5));
  ASSERT_EQ(groups.size(), 1U);
  const auto& found = groups[0].params();
  const auto expected = adapters.parameters();
  ASSERT_EQ(found.size(), expected.size());
  for (size_t i = 0; i < found.size(); ++i) EXPECT_TRUE(found[i].is_same(expected[i]));
}

TEST(ParamGroups, TakeLearningRatesByName) {
  Mlp model;
  const auto adapters = inject(model);
  const auto groups = lora::param_groups(adapters, torch::optim::SGDOptions(1),
                                         lora::LoraPlusOptions().lr("lora_B", 2).lr("down.lora_default.lora_B", 4));
  std::multiset<std::pair<double, size_t>> found;
  for (const auto& group : groups) found.emplace(group.options().get_lr(), group.params().size());
  EXPECT_EQ(found, (std::multiset<std::pair<double, size_t>>{{1, 2}, {2, 1}, {4, 1}}));
}

TEST(ParamGroups, RefuseWhatWouldDoNothing) {
  Mlp model;
  auto adapters = inject(model);
  const auto with = [&](const lora::LoraPlusOptions& plus) {
    return [&adapters, plus] { lora::param_groups(adapters, torch::optim::SGDOptions(1), plus); };
  };
  EXPECT_THAT(with(lora::LoraPlusOptions().lr_ratio(0)), ThrowsMessage<c10::ValueError>(HasSubstr("lr_ratio = 0")));
  EXPECT_THAT(with(lora::LoraPlusOptions().lr_ratio(INFINITY)), ThrowsMessage<c10::ValueError>(HasSubstr("= inf")));
  EXPECT_THAT(with(lora::LoraPlusOptions().lr("lora_C", 1)), ThrowsMessage<c10::ValueError>(HasSubstr("\"lora_C\"")));
  EXPECT_THAT(with(lora::LoraPlusOptions().lr("lora_A", -1)), ThrowsMessage<c10::ValueError>(HasSubstr("rate -1")));
  adapters.set_trainable({});
  EXPECT_THAT(with({}), ThrowsMessage<c10::ValueError>(HasSubstr("no trainable tensor")));
}

/// Learning rate, weight decay and tensors of each group, those without a tensor left out.
using GroupTable = std::multiset<std::tuple<double, double, std::set<std::string>>>;

GroupTable found_groups(torch::nn::Module& model, const lora::LoraConfig& config) {
  auto adapters = lora::inject(model, config);
  const auto options = torch::optim::AdamWOptions(1e-3).weight_decay(0.01);
  const auto plus = lora::LoraPlusOptions().lr_ratio(16).lr_embedding(1e-6);
  GroupTable table;
  for (const auto& group : lora::param_groups(adapters, options, plus)) {
    std::set<std::string> names;
    for (const auto& [name, tensor] : adapters.named_parameters()) {
      for (const auto& member : group.params()) {
        if (member.is_same(tensor)) names.insert(name);
      }
    }
    const auto& found = static_cast<const torch::optim::AdamWOptions&>(group.options());
    table.emplace(found.lr(), found.weight_decay(), names);
  }
  adapters.unload();
  return table;
}

/// tests/golden/loraplus_groups.json, by PEFT's create_loraplus_optimizer.
GroupTable pefts_groups(const std::string& name) {
  const auto json = nlohmann::json::parse(read_bytes(LORA_SOURCE_DIR "/tests/golden/loraplus_groups.json"));
  const std::map<std::string, std::string> ours{{"fc.lora_A.default.weight", "fc.lora_default.lora_A"},
                                                {"fc.lora_B.default.weight", "fc.lora_default.lora_B"},
                                                {"fc.lora_B.default.bias", "fc.lora_default.lora_B_bias"},
                                                {"wte.lora_embedding_A.default", "wte.lora_default.lora_embedding_A"},
                                                {"wte.lora_embedding_B.default", "wte.lora_default.lora_embedding_B"}};
  GroupTable table;
  for (const auto& group : json.at(name)) {
    std::set<std::string> names;
    for (const auto& parameter : group.at("parameters")) names.insert(ours.at(parameter));
    if (!names.empty()) table.emplace(group.at("lr"), group.at("weight_decay"), names);
  }
  return table;
}

TEST(ParamGroups, AreThoseOfPeftsLoraPlus) {
  struct Model : torch::nn::Module {
    Model() {
      register_module("wte", torch::nn::Embedding(11, 6));
      register_module("fc", torch::nn::Linear(6, 4));
    }
  } model;
  const auto config = lora::LoraConfig().r(2);
  EXPECT_EQ(found_groups(model, lora::LoraConfig(config).target_modules({"wte", "fc"})), pefts_groups("embedding"));
  EXPECT_EQ(found_groups(model, lora::LoraConfig(config).target_modules({"fc"}).lora_bias(true)),
            pefts_groups("lora_bias"));
}

TEST(ParamGroups, PullNoVectorToZero) {
  struct Model : torch::nn::Module {
    Model() {
      register_module("norm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({6})));
      register_module("fc", torch::nn::Linear(6, 4));
    }
  } model;
  const auto config = lora::LoraConfig().r(2).target_modules({"fc"}).modules_to_save({"norm"});
  for (const auto& [lr, decay, names] : found_groups(model, config)) {
    EXPECT_EQ(decay, names.count("norm.lora_default.weight") != 0 ? 0 : 0.01) << *names.begin();
  }
}

struct Step {
  std::string variant, suffix;
  double ratio;
};

class GoldenStep : public ::testing::TestWithParam<Step> {};

/// Forward, gradients and one AdamW step, against Python PEFT and its create_loraplus_optimizer.
TEST_P(GoldenStep, IsThatOfPython) {
  const std::string folder = LORA_SOURCE_DIR "/tests/golden/mlp/";
  Mlp model;
  {
    const at::NoGradGuard no_grad;
    for (auto& [name, tensor] : lora::load_safetensors(folder + "base.safetensors")) {
      model->named_parameters()[name].copy_(tensor);
    }
  }
  auto data = lora::load_safetensors(folder + "data.safetensors");
  auto expected = lora::load_safetensors(folder + GetParam().variant + "/expected.safetensors");
  auto adapters = lora::load(*model, folder + GetParam().variant);
  adapters.set_trainable({"default"});
  const auto close = [](const at::Tensor& found, const at::Tensor& wanted) {
    return at::allclose(found.detach(), wanted, /*rtol=*/1e-5, /*atol=*/1e-6);
  };

  const auto x = data.at("x").clone().requires_grad_(true);
  const auto y = model->forward(x);
  EXPECT_TRUE(close(y, expected.at("y")));
  (y * data.at("g")).sum().backward();
  EXPECT_TRUE(close(x.grad(), expected.at("dx")));

  const auto options = torch::optim::AdamWOptions(1e-3).weight_decay(0.01);
  torch::optim::AdamW optimizer(
      lora::param_groups(adapters, options, lora::LoraPlusOptions().lr_ratio(GetParam().ratio)));
  optimizer.step();
  for (const auto& [name, tensor] : adapters.named_parameters()) {
    auto key = name;  // "up.lora_default.lora_A" is "up.lora_A" in the file
    key.erase(key.find("lora_default."), std::string("lora_default.").size());
    EXPECT_TRUE(close(tensor.grad(), expected.at(key + ".grad"))) << key;
    EXPECT_TRUE(close(tensor, expected.at(key + GetParam().suffix))) << key;
  }
}

INSTANTIATE_TEST_SUITE_P(Variants, GoldenStep,
                         ::testing::Values(Step{"plain", ".adamw", 1}, Step{"plain", ".adamw_loraplus", 16},
                                           Step{"rslora", ".adamw", 1}, Step{"rslora", ".adamw_loraplus", 16},
                                           Step{"patterns", ".adamw", 1}, Step{"patterns", ".adamw_loraplus", 16},
                                           Step{"one_target", ".adamw", 1}, Step{"one_target", ".adamw_loraplus", 16}),
                         [](const auto& row) {
                           return row.param.variant + (row.param.ratio == 1 ? "_adamw" : "_loraplus");
                         });

}  // namespace
}  // namespace param_groups_test
