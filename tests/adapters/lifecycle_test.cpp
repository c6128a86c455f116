// The handle and the model: who finds whom, what each outlives, and what an error in the middle leaves.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/lora.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/modules/rnn.h>
#include <torch/nn/modules/transformercoder.h>

#include <functional>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "harness/models.h"
#include "harness/values.h"
#include "harness/wrapped_lora.h"

namespace lifecycle_test {
namespace {

using ::testing::AllOf;
using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::ThrowsMessage;

lora::LoraConfig config() { return lora::LoraConfig().r(2).lora_alpha(3).target_modules({"up", "down"}); }
at::Tensor input() { return harness::normal({5, 12}, 3, at::kFloat); }

Mlp make_mlp() { return (torch::manual_seed(7), Mlp()); }

TEST(Handle, IsCopiedAndFoundAgain) {
  auto model = make_mlp();
  EXPECT_THROW(lora::adapters_of(*model), lora::StateError);
  std::optional<lora::Adapters> first = lora::inject(*model, config());
  const auto copy = *first;
  harness::fill(copy);
  EXPECT_TRUE(copy == *first);
  first.reset();
  EXPECT_TRUE(lora::adapters_of(*model) == copy);
  auto found = lora::adapters_of(*model);
  found.merge();
  EXPECT_THAT(copy.merged(), ElementsAre("default"));
}

TEST(Handle, MayGoWhileTheModelTrainsOn) {
  auto model = make_mlp();
  harness::fill(lora::inject(*model, config()));
  const auto y = model->forward(input()).detach();
  EXPECT_FALSE(at::equal(y, make_mlp()->forward(input())));
  EXPECT_EQ(model->parameters().size(), 7u);
  lora::adapters_of(*model).merge();
  EXPECT_THAT(lora::adapters_of(*model).merged(), ElementsAre("default")) << "merged, no handle alive";
  lora::adapters_of(*model).unmerge();
  EXPECT_TRUE(at::equal(model->forward(input()), y));
  lora::adapters_of(*model).unload();
  EXPECT_TRUE(at::equal(model->forward(input()), make_mlp()->forward(input())));
}

TEST(Handle, OutlivesTheModelWithoutHarm) {
  std::optional<lora::Adapters> adapters;
  at::Tensor weight;
  {
    auto model = make_mlp();
    adapters = lora::inject(*model, config().lora_dropout(0.5));
    harness::fill(*adapters);
    weight = model->up->weight;
  }
  EXPECT_THROW(adapters->merge(), lora::StateError);
  EXPECT_THROW(adapters->set_active({}), lora::StateError);
  EXPECT_EQ(adapters->parameters().size(), 4u);
  EXPECT_NO_THROW(at::linear(input(), weight)) << "a weight that somebody kept";
}

TEST(Handle, AndModelFreeTheirMemory) {
  at::Tensor base, factor;
  {
    auto model = make_mlp();
    auto adapters = lora::inject(*model, config());
    adapters.add(config(), "other");
    adapters.merge();
    model->forward(input());
    adapters.unmerge();
    base = model->named_parameters()["up.weight"];
    factor = adapters.parameters().front();
  }
  EXPECT_EQ(base.use_count(), 1u);
  EXPECT_EQ(factor.use_count(), 1u);
}

TEST(Inject, RefusesASecondTimeAndNamesTheWay) {
  auto model = make_mlp();
  auto adapters = lora::inject(*model, config());
  EXPECT_THAT([&] { lora::inject(*model, config(), "other"); }, ThrowsMessage<lora::StateError>(HasSubstr("add(")));
  adapters.unload();
  EXPECT_NO_THROW(lora::inject(*model, config(), "other"));
}

TEST(Inject, RefusesAModelInsideAndAroundAnAdaptedOne) {
  harness::Deep outer;
  auto& inner = *outer->trunk;
  auto adapters = lora::inject(inner, lora::LoraConfig().target_modules({"proj"}));
  EXPECT_THROW(lora::inject(*outer, lora::LoraConfig().target_modules({"back"})), lora::StateError);
  EXPECT_TRUE(lora::adapters_of(*outer) == adapters);
  adapters.unload();
  lora::inject(*outer, lora::LoraConfig().target_modules({"proj"}));
  EXPECT_THROW(lora::inject(inner, lora::LoraConfig().target_modules({"back"})), lora::StateError);
}

TEST(Inject, ReachesAModelOnTheStack) {
  torch::manual_seed(7);
  harness::DeepImpl model;
  const auto x = harness::normal({3, 10}, 3, at::kFloat);
  const auto plain = model.forward(x).detach();
  auto adapters = lora::inject(model, lora::LoraConfig().target_modules({"proj"}));
  EXPECT_TRUE(adapters.verify([&] { return model.forward(x); }).ok());
  harness::fill(adapters);
  EXPECT_FALSE(at::equal(model.forward(x), plain));
  adapters.unload();
  EXPECT_TRUE(at::equal(model.forward(x), plain));
}

/// A host whose child already has the adapter's name stops the injection at its second module.
TEST(Inject, LeavesTheModelAsItWasAfterAnErrorInTheMiddle) {
  auto model = make_mlp();
  model->down->register_module("lora_default", torch::nn::Linear(1, 1));
  const auto before = harness::parameter_state(*model);
  const auto plain = model->forward(input());
  const auto modules = model->modules().size();
  EXPECT_THROW(lora::inject(*model, config()), c10::Error);
  EXPECT_EQ(harness::parameter_state(*model), before);
  EXPECT_EQ(model->modules().size(), modules);
  EXPECT_TRUE(at::equal(model->forward(input()), plain));
  EXPECT_THROW(lora::adapters_of(*model), lora::StateError);
  EXPECT_NO_THROW(lora::inject(*model, config(), "other"));
}

/// LoRA whose tensors LibTorch does not take as parameters, for their names hold a dot.
class DottedUpdate final : public harness::WrappedUpdate {
 public:
  using WrappedUpdate::WrappedUpdate;
  std::vector<lora::UpdateTensor> tensors() const override {
    auto tensors = WrappedUpdate::tensors();
    tensors.back().name = "lora.B";
    return tensors;
  }
};

TEST(Inject, TakesBackALayerThatItWasAt) {
  auto model = make_mlp();
  const auto before = harness::parameter_state(*model);
  const auto modules = model->modules().size();
  const harness::WrappedConfig dotted{config(), [](auto update) { return std::make_shared<DottedUpdate>(update); }};
  EXPECT_THROW(lora::inject(*model, dotted), c10::Error);
  EXPECT_EQ(harness::parameter_state(*model), before);
  EXPECT_EQ(model->modules().size(), modules);
  EXPECT_NO_THROW(lora::inject(*model, config()));
}

TEST(Inject, LeavesAloneWhatIsExcluded) {
  torch::nn::TransformerEncoder encoder(
      torch::nn::TransformerEncoderOptions(torch::nn::TransformerEncoderLayerOptions(16, 4).dim_feedforward(24), 2));
  const auto adapters = lora::inject(
      *encoder, lora::LoraConfig().r(2).target_modules({"self_attn"}).exclude_modules({"layers.0.self_attn"}));
  const auto report = adapters.report();
  std::vector<std::string> paths;
  for (const auto& module : report.entries.front().modules) paths.push_back(module.path);
  EXPECT_THAT(paths, ElementsAre("layers.1.self_attn.in_proj", "layers.1.self_attn.out_proj"));

  struct Bags : torch::nn::Module {
    Bags() { register_module("proj", torch::nn::EmbeddingBag(3, 4)); }
  };
  struct Patches : torch::nn::Module {
    Patches() {
      register_module("embed", std::make_shared<Bags>());
      register_module("proj", torch::nn::Linear(4, 4));
    }
  } patches;
  EXPECT_THROW(lora::inject(patches, lora::LoraConfig().target_modules({"proj"})), c10::ValueError);
  EXPECT_NO_THROW(lora::inject(patches, lora::LoraConfig().target_modules({"proj"}).exclude_modules({"embed.proj"})));
}

TEST(Changes, AreRefusedForAReplacedLayerUntilItIsUnloaded) {
  auto model = make_mlp();
  auto adapters = lora::inject(*model, config());
  harness::fill(adapters);
  model->down = model->replace_module("down", torch::nn::Linear(torch::nn::LinearOptions(20, 8).bias(false)));
  const auto y = model->forward(input()).detach();
  const auto weight = model->up->weight;
  for (const std::function<void()>& change : {std::function<void()>([&] { adapters.set_active({}); }),
                                              {[&] { adapters.merge(); }},
                                              {[&] { adapters.add(config(), "other"); }}}) {
    EXPECT_THAT(change,
                ThrowsMessage<lora::StateError>(AllOf(HasSubstr("found down destroyed"), HasSubstr("unload()"))));
    EXPECT_THAT(adapters.active(), ElementsAre("default"));
    EXPECT_TRUE(model->up->weight.is_same(weight));
    EXPECT_TRUE(at::equal(model->forward(input()), y));
  }
  adapters.unload();
  EXPECT_TRUE(at::equal(model->up->weight, make_mlp()->up->weight));
  EXPECT_TRUE(model->up->weight.requires_grad());
  EXPECT_NO_THROW(lora::inject(*model, config()));
}

TEST(Save, AfterUnloadIsAnError) {
  auto model = make_mlp();
  auto adapters = lora::inject(*model, config());
  adapters.merge_and_unload();
  EXPECT_THAT([&] { adapters.save("nowhere"); }, ThrowsMessage<lora::StateError>(HasSubstr("before unload()")));
}

TEST(Inject, RefusesLayersThatItCannotReachByName) {
  torch::nn::Sequential model(torch::nn::LSTM(3, 4), torch::nn::GRU(4, 4), torch::nn::Linear(4, 2));
  EXPECT_THAT(
      [&] {
        lora::inject(*model, lora::LoraConfig().target_modules({"0", "1"}));
      },
      ThrowsMessage<c10::ValueError>(AllOf(HasSubstr("LSTM"), HasSubstr("at 0"), HasSubstr("GRU"), HasSubstr("at 1"))));
  const auto adapters = lora::inject(*model, lora::LoraConfig().target_modules("all-linear"));
  EXPECT_THAT(adapters.named_tensors("default"), ::testing::SizeIs(2));
}

TEST(Unload, TwiceIsAnErrorAndInjectStartsAnew) {
  auto model = make_mlp();
  auto adapters = lora::inject(*model, config());
  adapters.unload();
  EXPECT_THAT([&] { adapters.unload(); }, ThrowsMessage<lora::StateError>(HasSubstr("lora::inject")));
  EXPECT_THROW(adapters.set_active({}), lora::StateError);
  EXPECT_THROW(adapters.add(config(), "b"), lora::StateError);
  EXPECT_THROW(adapters.verify([&] { return model->forward(input()); }), lora::StateError);
  const auto again = lora::inject(*model, config());
  EXPECT_THAT(again.names(), ElementsAre("default"));
  EXPECT_FALSE(again == adapters);
}

TEST(Verify, FindsEveryTargetAliveAndRestoresEverything) {
  for (const auto& host : harness::host_cases()) {
    const auto subject = host.make();
    auto adapters =
        lora::inject(*subject.module, lora::LoraConfig().r(2).target_modules(host.targets).lora_dropout(0.3));
    std::vector<at::Tensor> values;
    for (const auto& tensor : adapters.parameters()) values.push_back(tensor.detach().clone());
    const auto x = harness::normal(host.input, 3, at::kFloat);
    torch::manual_seed(1);
    const auto drawn = at::rand({2});
    torch::manual_seed(1);
    const auto report = adapters.verify([&] { return subject.forward(x); });
    EXPECT_TRUE(at::equal(at::rand({2}), drawn)) << "the random generator's state";
    EXPECT_TRUE(report.output_changes) << host.name;
    EXPECT_THAT(report.dead_targets, IsEmpty()) << host.name;
    const auto after = adapters.parameters();
    for (size_t i = 0; i < after.size(); ++i) {
      EXPECT_TRUE(at::equal(after[i], values[i]));
      EXPECT_TRUE(after[i].requires_grad());
      EXPECT_FALSE(after[i].grad().defined());
    }
  }
}

TEST(Verify, NamesTargetsThatTheForwardDoesNotRun) {
  auto model = make_mlp();
  const auto adapters = lora::inject(*model, config());
  const auto x = input();
  const auto only_up = adapters.verify([&] { return model->up(x); });
  EXPECT_TRUE(only_up.output_changes);
  EXPECT_THAT(only_up.dead_targets, ElementsAre("down.lora_default.lora_A", "down.lora_default.lora_B"));
  EXPECT_FALSE(only_up.ok());
  const auto nothing = adapters.verify([&] { return x * 2; });
  EXPECT_FALSE(nothing.output_changes);
  EXPECT_EQ(nothing.dead_targets.size(), 4u);
  EXPECT_THROW(adapters.verify([&]() -> at::Tensor { throw std::runtime_error("in the forward"); }),
               std::runtime_error);
  EXPECT_EQ(harness::largest(adapters.parameters()[1]), 0) << "B is back at zero";
}

TEST(Report, CountsEveryParameterOnce) {
  harness::Tied tied;
  const auto report = lora::inject(*tied, lora::LoraConfig().r(2).target_modules({"mix"})).report();
  EXPECT_EQ(report.trainable_parameters, 2 * (6 + 6));
  EXPECT_EQ(report.total_parameters, 15 * 6 + 6 * 6 + 6 + 2 * (6 + 6)) << "the tied weight once";

  harness::Twice twice;
  const auto shared = lora::inject(*twice, lora::LoraConfig().r(2).target_modules({"first"})).report();
  EXPECT_EQ(shared.total_parameters, 9 * 12 + 9 + 2 * (9 + 12)) << "a module with two names once";
}

TEST(Report, ListsTargetsShapesAndNotes) {
  const auto subject = harness::host_cases()[8].make();  // self-attention
  const auto adapters =
      lora::inject(*subject.module, lora::LoraConfig().r(2).target_modules({"in_proj[q,v]", "out_proj"}));
  const auto report = adapters.report();
  ASSERT_EQ(report.entries.size(), 2u);
  EXPECT_EQ(report.entries[0].target, "in_proj[q,v]");
  ASSERT_EQ(report.entries[0].modules.size(), 1u);
  EXPECT_EQ(report.entries[0].modules[0].path, "attn.in_proj");
  EXPECT_EQ(report.entries[0].modules[0].parts, "[q,v]");
  EXPECT_EQ(report.entries[0].modules[0].out_features, 48);
  EXPECT_EQ(report.entries[0].modules[0].in_features, 16);
  EXPECT_EQ(report.entries[0].modules[0].parameters, 2 * 2 * (16 + 16));
  EXPECT_EQ(report.trainable_parameters, 3 * 2 * (16 + 16));
  std::ostringstream printed;
  printed << report;
  EXPECT_THAT(printed.str(), AllOf(HasSubstr("attn.in_proj[q,v]"), HasSubstr("[48, 16]"), HasSubstr("192 of")));

  harness::Tied tied;
  const auto notes = lora::inject(*tied, lora::LoraConfig().target_modules({"head"})).report().notes;
  EXPECT_THAT(notes, ElementsAre(AllOf(HasSubstr("head"), HasSubstr("wte.weight"))));
  EXPECT_THROW(adapters.report("other"), c10::ValueError);
}

}  // namespace
}  // namespace lifecycle_test
