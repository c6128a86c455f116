// The typed module: bitwise what inject gives, and one handle for all of a model.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/lora.h>

#include <map>
#include <memory>
#include <string>

#include "harness/models.h"
#include "harness/temp_folder.h"
#include "harness/values.h"
#include "oracles/models.h"

namespace lora_linear_test {
namespace {

using ::testing::ElementsAre;

/// The Mlp of the oracles, written with adapters in mind.
struct WrittenImpl : torch::nn::Module {
  WrittenImpl()
      : up(register_module("up", lora::LoRALinear<>(torch::nn::Linear(12, 20), lora::LoraConfig().r(3).lora_alpha(7)))),
        down(register_module("down", lora::LoRALinear<>(torch::nn::Linear(torch::nn::LinearOptions(20, 8).bias(false)),
                                                        lora::LoraConfig().r(2).lora_alpha(5)))) {}
  at::Tensor forward(const at::Tensor& x) { return down(at::tanh(up(x))); }
  lora::LoRALinear<> up, down;
};
TORCH_MODULE(Written);

/// The same values in a plain Mlp, adapted by inject.
lora::Adapters twin(Mlp& plain, Written& written) {
  const at::NoGradGuard no_grad;
  const auto parameters = written->named_parameters();
  for (auto& named : plain->named_parameters()) {
    auto path = named.key();
    named.value().copy_(parameters[path.insert(path.find('.'), ".base_layer")]);
  }
  auto adapters = lora::inject(*plain, lora::LoraConfig()
                                           .r(3)
                                           .lora_alpha(7)
                                           .target_modules({"up", "down"})
                                           .rank_pattern({{"down", 2}})
                                           .alpha_pattern({{"down", 5}}));
  const auto from = lora::adapters_of(*written).parameters();
  auto to = adapters.parameters();
  for (size_t i = 0; i < to.size(); ++i) to[i].copy_(from[i]);
  return adapters;
}

TEST(LoRALinear, EqualsInjectBitwise) {
  Written written;
  harness::fill(lora::adapters_of(*written));
  Mlp plain;
  auto injected = twin(plain, written);
  const auto x = harness::normal({5, 12}, 1, at::kFloat);
  const auto y = written->forward(x), expected = plain->forward(x);
  EXPECT_TRUE(at::equal(y, expected));
  y.sum().backward();
  expected.sum().backward();
  const auto found = lora::adapters_of(*written).parameters(), wanted = injected.parameters();
  for (size_t i = 0; i < found.size(); ++i) EXPECT_TRUE(at::equal(found[i].grad(), wanted[i].grad()));
  lora::adapters_of(*written).merge();
  injected.merge();
  EXPECT_TRUE(at::equal(written->forward(x), plain->forward(x)));
}

TEST(LoRALinear, SavesWhatInjectSavesUnderTheLayersOwnNames) {
  Written written;
  harness::fill(lora::adapters_of(*written));
  Mlp plain;
  auto injected = twin(plain, written);
  const TempFolder folder;
  lora::adapters_of(*written).save(folder / "written");
  injected.save(folder / "injected");
  const auto found = lora::load_safetensors(folder / "written/adapter_model.safetensors");
  const auto wanted = lora::load_safetensors(folder / "injected/adapter_model.safetensors");
  ASSERT_EQ(found.size(), wanted.size());
  for (const auto& [name, tensor] : wanted) EXPECT_TRUE(at::equal(found.at(name), tensor)) << name;

  Mlp loaded;
  {
    const at::NoGradGuard no_grad;
    auto parameters = loaded->named_parameters();
    for (const auto& [name, tensor] : state_dict(*plain)) {
      if (parameters.contains(name)) parameters[name].copy_(tensor);
    }
  }
  lora::load(*loaded, folder / "written");
  const auto x = harness::normal({5, 12}, 1, at::kFloat);
  EXPECT_TRUE(at::equal(loaded->forward(x), plain->forward(x)));
}

TEST(LoRALinear, SharesTheGivenLayer) {
  torch::nn::Linear base(4, 6);
  lora::LoRALinear<lora::LoRA> layer(base, lora::LoraConfig().r(2));
  EXPECT_EQ(layer->base_layer.get(), base.get());
  EXPECT_TRUE(layer->named_parameters()["base_layer.weight"].is_same(base->named_parameters()["weight"]));
}

TEST(LoRALinear, IsWhatASingleLinearNeeds) {
  torch::nn::Linear alone(4, 6);
  torch::nn::MultiheadAttention attention(8, 2);
  for (auto* model : std::initializer_list<torch::nn::Module*>{alone.get(), attention.get()}) {
    EXPECT_THAT([&] { lora::inject(*model, lora::LoraConfig().target_modules("all-linear")); },
                ::testing::ThrowsMessage<c10::ValueError>(::testing::HasSubstr("as the model itself")));
  }
}

TEST(LoRALinear, OldHandlesFollowToTheModelsOwn) {
  Written written;
  const auto of_up = lora::adapters_of(*written->up);
  const auto of_all = lora::adapters_of(*written);
  EXPECT_TRUE(of_up == of_all);
  EXPECT_EQ(of_up.parameters().size(), 4U);
  std::vector<std::string> names;
  for (const auto& [name, tensor] : of_all.named_parameters()) names.push_back(name);
  EXPECT_THAT(names, ElementsAre("up.base_layer.lora_default.lora_A", "up.base_layer.lora_default.lora_B",
                                 "down.base_layer.lora_default.lora_A", "down.base_layer.lora_default.lora_B"));
}

TEST(LoRALinear, IsNotJoinedUnderAGuardAndKeepsItsCounts) {
  Written written;
  const auto of_up = lora::adapters_of(*written->up);
  {
    const lora::DisableAdapters off(of_up);
    EXPECT_THAT([&] { lora::adapters_of(*written); },
                ::testing::ThrowsMessage<lora::StateError>(::testing::HasSubstr("found adapters disabled at up")));
  }
  written->up->base_layer->weight.clone();
  const auto of_all = lora::adapters_of(*written);
  EXPECT_EQ(of_all.fallbacks().at("aten::clone"), 1);
  const lora::DisableAdapters off(of_up);  // the old handle's guard is the model's
  harness::fill(of_all);
  const auto x = harness::normal({5, 12}, 1, at::kFloat);
  const auto plain = written->forward(x);
  lora::adapters_of(*written).unload();
  EXPECT_TRUE(at::equal(written->forward(x), plain));
}

TEST(LoRALinear, IsNotJoinedWhereItsActiveChoiceDiffers) {
  Written written;
  auto of_up = lora::adapters_of(*written->up);
  of_up.set_active({});
  EXPECT_THAT([&] { lora::adapters_of(*written); },
              ::testing::ThrowsMessage<lora::StateError>(::testing::HasSubstr("unlike in other layers")));
  of_up.set_active({"default"});
  EXPECT_THAT(lora::adapters_of(*written).active(), ElementsAre("default"));
}

/// A layer does not know the model around it: its weight may be another module's too.
TEST(LoRALinear, MergedForGoodLeavesATiedEmbeddingAlone) {
  torch::nn::Embedding table(5, 4);
  lora::LoRALinear<> head(
      torch::nn::Linear(std::shared_ptr<torch::nn::LinearImpl>(harness::TiedHead(table->weight).ptr())),
      lora::LoraConfig().r(2));
  auto adapters = lora::adapters_of(*head);
  harness::fill(adapters);
  const auto bytes = harness::bytes_of(table->weight);
  const auto x = harness::normal({3, 4}, 1, at::kFloat);
  const auto expected = head->forward(x).detach();
  adapters.merge_and_unload();
  EXPECT_EQ(harness::bytes_of(table->weight), bytes);
  EXPECT_LT(harness::largest(head->forward(x) - expected), 1e-5);
  EXPECT_TRUE(head->named_parameters()["base_layer.weight"].is_same(head->base_layer->weight));
}

TEST(LoRALinear, AsTheModelItselfHasNoNameForAFile) {
  const TempFolder folder;
  lora::LoRALinear<> layer(torch::nn::Linear(4, 6), lora::LoraConfig().r(2));
  EXPECT_THAT([&] { lora::adapters_of(*layer).save(folder.path()); },
              ::testing::ThrowsMessage<c10::ValueError>(::testing::HasSubstr("as the model itself")));
}

TEST(LoRALinear, UnloadsToThePlainLayers) {
  Written written;
  auto adapters = lora::adapters_of(*written);
  harness::fill(adapters);
  const auto x = harness::normal({5, 12}, 1, at::kFloat);
  const lora::DisableAdapters off(adapters);
  const auto plain = written->forward(x);
  adapters.unload();
  EXPECT_TRUE(at::equal(written->forward(x), plain));
  EXPECT_TRUE(written->up->base_layer->weight.requires_grad());
  EXPECT_THROW(lora::adapters_of(*written), lora::StateError);
}

}  // namespace
}  // namespace lora_linear_test
