// Files of tensors alone: PEFT's adapter_model.bin and the files of loralib, whose layouts reference values give.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/lora.h>
#include <torch/nn/modules/container/modulelist.h>

#include <filesystem>
#include <map>
#include <memory>
#include <string>

#include "harness/message_of.h"
#include "harness/models.h"
#include "harness/temp_folder.h"
#include "harness/values.h"
#include "oracles/models.h"

namespace loralib_test {
namespace {

using harness::message_of;
using lora::LoraConfig;
using ::testing::AllOf;
using ::testing::HasSubstr;
using Tensors = std::map<std::string, at::Tensor>;

const std::string kOptions = LORA_SOURCE_DIR "/tests/golden/options/";

TEST(PickledAdapters, GiveWhatPeftComputes) {
  Reader reader;
  const auto values = lora::load_safetensors(kOptions + "reader/base.safetensors");
  {
    const at::NoGradGuard no_grad;
    for (auto& [name, tensor] : state_dict(*reader)) tensor.copy_(values.at(name));
  }
  reader->eval();
  const auto ids = lora::load_safetensors(kOptions + "reader/data.safetensors").at("x");
  const auto expected = lora::load_safetensors(kOptions + "reader/pickle/expected.safetensors").at("y");
  auto adapters = lora::load(*reader, kOptions + "reader/pickle");
  EXPECT_TRUE(at::allclose(reader->forward(ids), expected, 1e-5, 1e-6));

  const TempFolder folder;
  std::filesystem::copy(kOptions + "reader/pickle/adapter_model.bin", folder / "adapter_model.bin");
  const auto config = LoraConfig().r(3).lora_alpha(7).target_modules({"wte", "conv"});
  adapters.load(folder / "adapter_model.bin", config, "alone");
  adapters.set_active({"alone"});
  EXPECT_TRUE(at::allclose(reader->forward(ids), expected, 1e-5, 1e-6)) << "without its configuration";
}

TEST(Loralib, OfALinearLayerAndAnEmbedding) {
  torch::manual_seed(4);
  struct Model : torch::nn::Module {
    Model()
        : wte(register_module("wte", torch::nn::Embedding(9, 6))), fc(register_module("fc", torch::nn::Linear(6, 5))) {}
    at::Tensor forward(const at::Tensor& ids) { return fc(wte(ids)); }
    torch::nn::Embedding wte;
    torch::nn::Linear fc;
  } model;
  const Tensors tensors{{"wte.lora_A", harness::normal({2, 9}, 1, at::kFloat)},
                        {"wte.lora_B", harness::normal({6, 2}, 2, at::kFloat)},
                        {"fc.lora_A", harness::normal({2, 6}, 3, at::kFloat)},
                        {"fc.lora_B", harness::normal({5, 2}, 4, at::kFloat)},
                        {"fc.bias", harness::normal({5}, 5, at::kFloat)}};
  const TempFolder folder;
  lora::save_torch_pickle(tensors, folder / "lora.pt");
  const auto ids = at::arange(9);
  // loralib's formulas: (A·scaling)ᵀ rows by B, and x·Aᵀ·Bᵀ·scaling.
  const auto W = model.wte->weight + 1.5 * (tensors.at("wte.lora_B").mm(tensors.at("wte.lora_A"))).t();
  const auto V = model.fc->weight + 1.5 * tensors.at("fc.lora_B").mm(tensors.at("fc.lora_A"));
  const auto expected = at::linear(W.index_select(0, ids), V, tensors.at("fc.bias"));
  const auto config =
      LoraConfig().r(2).lora_alpha(3).target_modules({"wte", "fc"}).bias(lora::BiasCopies::kAdaptedOnly);
  lora::load(model, folder / "lora.pt", config);
  EXPECT_TRUE(at::allclose(model.forward(ids), expected, 1e-5, 1e-6));
}

TEST(Loralib, OfAFusedProjectionHasBOfItsPartsAlone) {
  torch::manual_seed(4);
  harness::Fused model;  // Linear(12, 30): q, k, v of 10 rows
  const auto A = harness::normal({4, 12}, 1, at::kFloat), B = harness::normal({20, 2}, 2, at::kFloat);
  const TempFolder folder;
  lora::save_torch_pickle({{"c_attn.lora_A", A}, {"c_attn.lora_B", B}}, folder / "lora.bin");
  const auto x = harness::normal({3, 12}, 3, at::kFloat);
  auto expected = model->forward(x).detach();
  expected.narrow(1, 0, 10).add_(x.mm(A.narrow(0, 0, 2).t()).mm(B.narrow(0, 0, 10).t()), 1.5);
  expected.narrow(1, 20, 10).add_(x.mm(A.narrow(0, 2, 2).t()).mm(B.narrow(0, 10, 10).t()), 1.5);
  const auto config = LoraConfig().r(2).lora_alpha(3);
  lora::load(*model, folder / "lora.bin", LoraConfig(config).target_modules({"c_attn[q,v]"})).unload();
  auto adapters = lora::load(*model, folder / "lora.bin", LoraConfig(config).target_modules({"c_attn[q,v]"}));
  EXPECT_TRUE(at::allclose(model->forward(x), expected, 1e-5, 1e-6));
  adapters.unload();
  EXPECT_THAT(
      message_of([&] { lora::load(*model, folder / "lora.bin", LoraConfig(config).target_modules({"c_attn"})); }),
      AllOf(HasSubstr("found [4, 12], expected [2, 12] for c_attn.lora_A"),
            HasSubstr("found [20, 2], expected [30, 2] for c_attn.lora_B")));
}

/// RoBERTa's modules that the paper's adapter names, in their sizes.
std::shared_ptr<torch::nn::Module> roberta() {
  const auto with = [](torch::nn::Module& parent, const std::string& name) {
    auto child = std::make_shared<torch::nn::Module>(name);
    parent.register_module(name, child);
    return child;
  };
  auto root = std::make_shared<torch::nn::Module>("Roberta");
  const auto encoder = with(*with(*root, "roberta"), "encoder");
  const auto layers = with(*encoder, "layer");
  for (int i = 0; i < 12; ++i) {
    const auto self = with(*with(*with(*layers, std::to_string(i)), "attention"), "self");
    for (const auto* name : {"query", "key", "value"}) self->register_module(name, torch::nn::Linear(768, 768));
  }
  const auto classifier = with(*root, "classifier");
  classifier->register_module("dense", torch::nn::Linear(768, 768));
  classifier->register_module("out_proj", torch::nn::Linear(768, 3));
  return root;
}

TEST(Loralib, ThePapersRobertaLoadsWithEveryTensorAccountedFor) {
  const std::string file = LORA_SOURCE_DIR "/../shared/data/roberta_mnli_lora/roberta_base_lora_mnli.bin";
  if (!std::filesystem::exists(file)) GTEST_SKIP() << "needs ../shared/data/roberta_mnli_lora";
  const auto tensors = lora::load_torch_pickle(file);
  ASSERT_EQ(tensors.size(), 52U);
  const auto config =
      LoraConfig().r(8).lora_alpha(16).target_modules({"query", "value"}).modules_to_save({"classifier"});
  const auto model = roberta();
  const auto adapters = lora::load(*model, file, config);
  size_t found = 0;
  for (const auto& [name, tensor] : adapters.named_tensors("default")) {
    auto key = name;
    key.erase(key.find("lora_default."), std::string("lora_default.").size());
    ASSERT_EQ(tensors.count(key), 1U) << key;
    EXPECT_TRUE(at::equal(tensor, tensors.at(key))) << key;
    ++found;
  }
  EXPECT_EQ(found, tensors.size());

  const TempFolder folder;
  adapters.save(folder.path());
  const auto again = roberta();
  const auto loaded = lora::load(*again, folder.path());
  const auto before = adapters.named_tensors("default"), after = loaded.named_tensors("default");
  ASSERT_EQ(after.size(), before.size());
  for (size_t i = 0; i < before.size(); ++i)
    EXPECT_TRUE(at::equal(after[i].second, before[i].second)) << before[i].first;
  lora::adapters_of(*again).unload();
  EXPECT_THAT(message_of([&] { lora::load(*again, file, LoraConfig(config).target_modules({"query"})); }),
              AllOf(HasSubstr("24 problems"), HasSubstr("attention.self.value.lora_A, expected none")));
}

TEST(Folders, WithSeveralAdaptersLoadAtOnce) {
  Mlp mlp;
  auto adapters = lora::inject(*mlp, LoraConfig().r(2).target_modules({"up"}));
  adapters.add(LoraConfig().r(3).target_modules({"up", "down"}), "other");
  adapters.add(LoraConfig().r(1).target_modules({"down"}), "third");
  for (const auto& name : adapters.names()) harness::fill(adapters, name, 7);
  const TempFolder folder;
  adapters.save(folder.path());
  const auto x = harness::normal({5, 12}, 3, at::kFloat);
  Mlp copy;
  {
    const at::NoGradGuard no_grad;
    for (auto& parameter : copy->named_parameters()) {
      parameter.value().copy_(mlp->named_parameters()[parameter.key()]);
    }
  }
  auto loaded = lora::load_all(*copy, folder.path());
  EXPECT_EQ(loaded.names(), adapters.names());
  EXPECT_EQ(loaded.active(), (std::vector<std::string>{"default"}));
  for (const std::vector<std::string>& active :
       {std::vector<std::string>{"default"}, {"other"}, {"third", "default"}}) {
    adapters.set_active(active);
    loaded.set_active(active);
    EXPECT_TRUE(at::equal(copy->forward(x), mlp->forward(x)));
  }
  const TempFolder empty;
  EXPECT_THAT(message_of([&] { lora::load_all(*copy, empty.path()); }), HasSubstr("found adapters in the model"));
  loaded.unload();
  EXPECT_THAT(message_of([&] { lora::load_all(*copy, empty.path()); }), HasSubstr("found no adapter_config.json"));
}

TEST(KeepBase, FalseReplacesOneWeightAtATime) {
  torch::manual_seed(2);
  Mlp mlp;
  auto adapters = lora::inject(*mlp, LoraConfig().r(2).lora_alpha(3).target_modules({"up", "down"}));
  harness::fill(adapters);
  const auto x = harness::normal({5, 12}, 3, at::kFloat);
  const auto unmerged = mlp->forward(x);
  const auto options = lora::MergeOptions().keep_base(false);
  EXPECT_EQ(adapters.merge_cost().bytes, (20 * 12 + 8 * 20) * 4);
  EXPECT_EQ(adapters.merge_cost(options).bytes, 20 * 12 * 4) << "the largest alone";
  auto kept = adapters;
  kept.merge();
  const auto merged = mlp->forward(x);
  kept.unmerge();

  {
    const at::NoGradGuard no_grad;
    adapters.named_tensors("default")[3].second[0][0] = std::numeric_limits<float>::infinity();
  }
  const auto before = harness::parameter_state(*mlp);
  EXPECT_THROW(adapters.merge(options), c10::ValueError);
  EXPECT_EQ(harness::parameter_state(*mlp), before) << "found in the pass before anything is replaced";
  harness::fill(adapters);

  const auto report = adapters.merge(options);
  EXPECT_EQ(report.weights, 2);
  EXPECT_EQ(report.bytes, 20 * 12 * 4);
  EXPECT_TRUE(at::equal(mlp->forward(x), merged));
  EXPECT_TRUE(at::equal(mlp->named_parameters()["up.weight"], mlp->up->weight));
  EXPECT_THROW(adapters.unmerge(), lora::StateError);
  EXPECT_THROW(lora::adapters_of(*mlp), lora::StateError);
  EXPECT_TRUE(at::allclose(mlp->forward(x), unmerged, 1e-5, 1e-6));
}

TEST(MergeCost, CountsCopiesThatAreCast) {
  Mlp mlp;
  mlp->to(at::kBFloat16);
  const auto adapters = lora::inject(*mlp, LoraConfig().target_modules({"up"}).modules_to_save({"down"}));
  EXPECT_EQ(adapters.merge_cost().bytes, (20 * 12 + 8 * 20) * 2);
}

TEST(KeepBase, FalseTakesAllActiveAdapters) {
  Mlp mlp;
  auto adapters = lora::inject(*mlp, LoraConfig().r(2).target_modules({"up"}));
  adapters.add(LoraConfig().r(2).target_modules({"down"}), "other");
  adapters.set_active({"default", "other"});
  EXPECT_THROW(adapters.merge({"default"}, lora::MergeOptions().keep_base(false)), lora::StateError);
  adapters.merge({"default"});
  EXPECT_NO_THROW(adapters.merge(lora::MergeOptions().keep_base(false)));
}

}  // namespace
}  // namespace loralib_test
