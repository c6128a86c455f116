// Adapters on disk: what is saved comes back bit for bit, and what Python PEFT saved computes what PEFT computed.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/lora.h>

#include <string>
#include <tuple>
#include <vector>

#include "harness/dense_oracle.h"
#include "harness/models.h"
#include "harness/temp_folder.h"
#include "harness/values.h"

namespace {

using harness::HostCase;
using ::testing::ElementsAre;

class SavedHost : public ::testing::TestWithParam<std::tuple<HostCase, at::ScalarType>> {
 protected:
  const HostCase& host() const { return std::get<0>(GetParam()); }
  harness::Subject subject() const {
    auto made = host().make();
    made.module->to(std::get<1>(GetParam()));
    return made;
  }
  at::Tensor x() const { return harness::normal(host().input, 3, std::get<1>(GetParam())); }
};

TEST_P(SavedHost, ComesBackBitForBit) {
  const TempFolder folder;
  const auto model = subject();
  auto adapters = lora::inject(*model.module, lora::LoraConfig().r(3).lora_alpha(7).target_modules(host().targets));
  adapters.add(lora::LoraConfig().r(2).lora_alpha(5).use_rslora(true).target_modules(host().targets), "other");
  harness::fill(adapters);
  harness::fill(adapters, "other", 70);
  adapters.save(folder.path().string());

  const auto fresh = subject();
  auto loaded = lora::load(*fresh.module, folder.path().string());
  loaded.load(folder / "other", "other");
  EXPECT_THAT(loaded.active(), ElementsAre("default"));
  for (const std::string name : {"default", "other"}) {
    const auto expected = adapters.named_tensors(name);
    const auto found = loaded.named_tensors(name);
    ASSERT_EQ(found.size(), expected.size());
    for (size_t i = 0; i < found.size(); ++i) {
      EXPECT_EQ(found[i].first, expected[i].first);
      EXPECT_EQ(harness::bytes_of(found[i].second), harness::bytes_of(expected[i].second)) << found[i].first;
    }
    adapters.set_active({name});
    loaded.set_active({name});
    EXPECT_TRUE(at::equal(fresh.forward(x()), model.forward(x()))) << name;
  }
}

INSTANTIATE_TEST_SUITE_P(Laws, SavedHost,
                         ::testing::Combine(::testing::ValuesIn(harness::host_cases()),
                                            ::testing::Values(at::kFloat, at::kBFloat16)),
                         [](const auto& tested) {
                           return std::get<0>(tested.param).name + "_" + c10::toString(std::get<1>(tested.param));
                         });

const std::string kGolden = LORA_SOURCE_DIR "/tests/golden/";

template <class Model>
void set_base(Model& model, const std::string& file) {
  const at::NoGradGuard no_grad;
  auto registered = model->named_parameters();
  for (const auto& [name, tensor] : lora::load_safetensors(file)) registered[name].copy_(tensor);
}

TEST(Peft, MergesToTheSameWeights) {
  for (const std::string variant : {"plain", "rslora", "patterns", "one_target"}) {
    Mlp model;
    set_base(model, kGolden + "mlp/base.safetensors");
    const auto x = lora::load_safetensors(kGolden + "mlp/data.safetensors").at("x");
    const auto expected = lora::load_safetensors(kGolden + "mlp/" + variant + "/expected.safetensors");
    lora::load(*model, kGolden + "mlp/" + variant).merge_and_unload();
    for (const auto& [name, weight] : expected) {
      const auto end = name.rfind(".merged");
      if (end == std::string::npos) continue;
      const auto merged = model->named_parameters()[name.substr(0, end) + ".weight"];
      EXPECT_LT(harness::relative_error(merged, weight), 1e-6) << variant << " " << name;
    }
    EXPECT_LT(harness::relative_error(model->forward(x), expected.at("y_merged")), 2e-6) << variant;
  }
}

TEST(Peft, SumsTwoAdapters) {
  Mlp model;
  set_base(model, kGolden + "mlp/base.safetensors");
  const auto x = lora::load_safetensors(kGolden + "mlp/data.safetensors").at("x");
  const auto expected = lora::load_safetensors(kGolden + "mlp/two_adapters/expected.safetensors");
  auto adapters = lora::load(*model, kGolden + "mlp/two_adapters");
  adapters.load(kGolden + "mlp/two_adapters/other", "other");
  for (const auto& [names, key] : std::vector<std::pair<std::vector<std::string>, std::string>>{
           {{"default"}, "y_default"}, {{"other"}, "y_other"}, {{"default", "other"}, "y_default_and_other"}}) {
    adapters.set_active(names);
    EXPECT_LT(harness::relative_error(model->forward(x), expected.at(key)), 2e-6) << key;
  }
}

TEST(Peft, AdaptsAttentionAsDefined) {
  MhaBlock model;
  set_base(model, kGolden + "mha/base.safetensors");
  const auto expected = lora::load_safetensors(kGolden + "mha/expected.safetensors");
  auto adapters = lora::load(*model, kGolden + "mha/adapter");
  adapters.set_trainable({"default"});
  const auto x = expected.at("x").clone().requires_grad_();
  const auto y = model->forward(x);
  EXPECT_LT(harness::relative_error(y, expected.at("y")), 2e-6);
  EXPECT_GT(harness::relative_error(y, expected.at("y_peft")), 1e-3) << "out_proj counts once";
  (y * expected.at("g")).sum().backward();
  EXPECT_LT(harness::relative_error(x.grad(), expected.at("dx")), 5e-6);
  for (const auto& [name, tensor] : adapters.named_parameters()) {
    const std::string key = (name.find("out_proj") == std::string::npos ? "attn.in_proj." : "attn.out_proj.") +
                            name.substr(name.rfind('.') + 1) + ".grad";
    EXPECT_LT(harness::relative_error(tensor.grad(), expected.at(key)), 5e-6) << name;
  }
  adapters.merge_and_unload();
  EXPECT_LT(harness::relative_error(model->attn->in_proj_weight, expected.at("attn.in_proj.merged")), 1e-6);
  EXPECT_LT(harness::relative_error(model->attn->out_proj->weight, expected.at("attn.out_proj.merged")), 1e-6);
}

}  // namespace
