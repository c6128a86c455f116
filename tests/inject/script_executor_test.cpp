// TorchScript's own ways: its executor, autocast, train and eval, to and save, and who owns what.
#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <c10/core/InferenceMode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/adapters.h>
#include <lora/io/safetensors.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/runtime/graph_executor.h>
#include <torch/csrc/jit/serialization/import.h>

#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "harness/message_of.h"
#include "harness/script_models.h"
#include "harness/temp_folder.h"
#include "harness/values.h"

namespace script_executor_test {
namespace {

using harness::message_of;
using harness::run;
using lora::LoraConfig;
using ::testing::AllOf;
using ::testing::HasSubstr;

const std::string kScripts = LORA_SOURCE_DIR "/tests/golden/script/";

LoraConfig both_layers() { return LoraConfig().r(3).lora_alpha(7).target_modules({"up", "down"}); }

size_t profiled_runs() { return torch::jit::getNumProfiledRuns(); }

class ScriptExecutor : public ::testing::Test {
 protected:
  ScriptExecutor() : x_(harness::normal({5, 12}, 101)), before_(profiled_runs()) {}
  ~ScriptExecutor() override { EXPECT_EQ(profiled_runs(), before_) << "the switch was not put back"; }

  /// Every adapter tensor gets a gradient, also on the runs in which an executor would have optimised.
  static void expect_gradients(torch::jit::Module& model, const lora::Adapters& adapters, const at::Tensor& x) {
    for (int i = 0; i < 4; ++i) {
      run(model, x).sum().backward();
      for (const auto& [name, tensor] : adapters.named_parameters()) {
        EXPECT_TRUE(tensor.grad().defined()) << name << ", run " << i;
        tensor.mutable_grad() = at::Tensor();
      }
    }
  }

  at::Tensor x_;
  size_t before_;
};

TEST_F(ScriptExecutor, TheSwitchIsPutBackByUnload) {
  auto model = harness::script_layers();
  auto adapters = lora::inject(model, both_layers());
  EXPECT_GT(profiled_runs(), before_);
  adapters.unload();
  EXPECT_EQ(profiled_runs(), before_);
}

TEST_F(ScriptExecutor, AMergedModelIsOptimisedAsOneThatNeverHadAnAdapter) {
  auto plain = harness::script_layers();
  for (const auto& parameter : plain.parameters()) parameter.set_requires_grad(false);
  const auto x = x_.clone().requires_grad_(true);
  harness::warm_up(plain, x);
  run(plain, x);
  const auto expected = torch::jit::lastExecutedOptimizedGraph()->toString(false);

  auto model = harness::script_layers();
  auto adapters = lora::inject(model, both_layers());
  harness::fill(adapters);
  const auto y = run(model, x).detach();
  for (int cycle = 0; cycle < 2; ++cycle) {
    adapters.merge();
    EXPECT_EQ(profiled_runs(), before_);
    harness::warm_up(model, x);
    EXPECT_TRUE(harness::is_optimised(model));
    EXPECT_LT(harness::largest(run(model, x) - y), 1e-10);
    EXPECT_EQ(torch::jit::lastExecutedOptimizedGraph()->toString(false), expected);

    adapters.unmerge();
    EXPECT_GT(profiled_runs(), before_);
    expect_gradients(model, adapters, x);
  }
}

TEST_F(ScriptExecutor, APartlyMergedModelKeepsTheGradientsOfTheRest) {
  auto model = harness::script_layers();
  auto adapters = lora::inject(model, both_layers());
  adapters.add(LoraConfig().r(2).target_modules({"up"}), "other");
  adapters.set_active({"default", "other"});
  adapters.set_trainable({"other"});
  adapters.merge({"default"});
  EXPECT_GT(profiled_runs(), before_);
  expect_gradients(model, adapters, x_);
}

TEST_F(ScriptExecutor, ADeepCopyIsThePlainModelOfWhatIsActive) {
  auto model = harness::script_layers();
  auto adapters = lora::inject(model, both_layers());
  harness::fill(adapters);
  const auto expected = run(model, x_).detach();
  auto copy = model.deepcopy();
  EXPECT_LT(harness::largest(run(copy, x_) - expected), 1e-10);
  EXPECT_THROW(lora::adapters_of(copy), lora::StateError);
  adapters.unload();
  EXPECT_LT(harness::largest(run(copy, x_) - expected), 1e-10);
}

TEST_F(ScriptExecutor, TheSwitchIsPutBackByMergeAndUnloadAndByTheLastRemove) {
  auto model = harness::script_layers();
  lora::inject(model, both_layers()).merge_and_unload();
  EXPECT_EQ(profiled_runs(), before_);
  lora::inject(model, both_layers()).remove("default");
  EXPECT_EQ(profiled_runs(), before_);
}

TEST_F(ScriptExecutor, TheSwitchIsPutBackWhereAnInjectionFails) {
  auto model = harness::script_layers();
  harness::warm_up(model, x_);
  const auto state = harness::script_state(model);
  EXPECT_THROW(lora::inject(model, LoraConfig().target_modules({"upp"})), c10::ValueError);
  EXPECT_THROW(lora::inject(model, both_layers(), "lora"), c10::ValueError);
  EXPECT_THROW(lora::load(model, "/nowhere"), lora::FormatError);
  EXPECT_EQ(profiled_runs(), before_);
  EXPECT_EQ(harness::script_state(model), state);
  harness::warm_up(model, x_);
  EXPECT_TRUE(harness::is_optimised(model));
}

TEST_F(ScriptExecutor, TheSwitchIsPutBackWhereTheModelGoesFirst) {
  {
    auto model = harness::script_layers();
    lora::inject(model, both_layers());
    EXPECT_GT(profiled_runs(), before_);
  }
  EXPECT_EQ(profiled_runs(), before_);
}

TEST_F(ScriptExecutor, TwoAdaptedModelsShareTheSwitch) {
  auto one = harness::script_layers(), two = harness::script_layers();
  harness::warm_up(one, x_);
  harness::warm_up(two, x_);
  auto first = lora::inject(one, both_layers());
  auto second = lora::inject(two, both_layers());
  first.unload();
  EXPECT_GT(profiled_runs(), before_);
  expect_gradients(two, second, x_);
  second.unload();
  EXPECT_EQ(profiled_runs(), before_);
}

TEST_F(ScriptExecutor, AModelAroundTheAdaptedOneThatWasOptimisedIsToldApart) {
  auto model = harness::script_layers();
  harness::warm_up(model, x_);
  auto body = model.attr("body").toModule();
  auto adapters = lora::inject(body, both_layers());
  const auto message = message_of([&] {
    for (int i = 0; i < 4; ++i) {
      for (const auto& tensor : adapters.parameters()) tensor.mutable_grad() = at::Tensor();
      const auto y = run(model, x_);
      if (!y.requires_grad()) throw std::logic_error("no gradient, and no error");
      y.sum().backward();
      for (const auto& tensor : adapters.parameters()) {
        if (!tensor.grad().defined()) throw std::logic_error("no gradient, and no error");
      }
    }
  });
  EXPECT_THAT(message, ::testing::AnyOf("", HasSubstr("inject into the module whose forward is called")));
  adapters.unload();
  auto around = lora::inject(model, both_layers());
  expect_gradients(model, around, x_);
}

TEST_F(ScriptExecutor, AutocastStaysLowRankAndKeepsItsGradients) {
  for (const bool before : {false, true}) {
    auto model = harness::script_layers();
    model.to(at::kFloat);
    auto plain = model.deepcopy();
    const auto x = x_.to(at::kFloat);
    at::autocast::set_autocast_enabled(at::kCPU, before);
    if (before) harness::warm_up(model, x);
    at::autocast::set_autocast_enabled(at::kCPU, true);
    const auto adapters = lora::inject(model, both_layers());
    for (const auto& parameter : plain.parameters()) parameter.set_requires_grad(false);
    const auto expected = run(plain, x);
    EXPECT_TRUE(at::equal(run(model, x), expected));
    harness::fill(adapters);
    for (int i = 0; i < 4; ++i) {
      const auto y = run(model, x);
      EXPECT_EQ(y.scalar_type(), expected.scalar_type());
      y.sum().backward();
      for (const auto& [name, tensor] : adapters.named_parameters()) {
        EXPECT_TRUE(tensor.grad().defined()) << name << ", run " << i;
        EXPECT_EQ(tensor.grad().scalar_type(), at::kFloat);
        tensor.mutable_grad() = at::Tensor();
      }
    }
    at::autocast::set_autocast_enabled(at::kCPU, false);
    const auto full = run(model, x);
    at::autocast::set_autocast_enabled(at::kCPU, true);
    EXPECT_LT(harness::largest(run(model, x) - full), 0.05 * harness::largest(full));
    EXPECT_THAT(adapters.fallbacks(), ::testing::IsEmpty());
    at::autocast::set_autocast_enabled(at::kCPU, false);
    at::autocast::clear_cache();
  }
}

TEST_F(ScriptExecutor, InjectionLeavesAutocastAsItIs) {
  auto model = harness::script_layers();
  at::autocast::set_autocast_enabled(at::kCPU, true);
  auto adapters = lora::inject(model, both_layers());
  EXPECT_TRUE(at::autocast::is_autocast_enabled(at::kCPU));
  EXPECT_FALSE(at::autocast::is_autocast_enabled(at::kCUDA));
  at::autocast::set_autocast_enabled(at::kCPU, false);
  adapters.unload();
  EXPECT_FALSE(at::autocast::is_autocast_enabled(at::kCPU));
}

TEST_F(ScriptExecutor, DropoutFollowsTrainAndEval) {
  auto model = harness::script_layers();
  const auto base = run(model, x_).detach();
  auto adapters = lora::inject(model, both_layers().lora_dropout(0.5));
  harness::fill(adapters);
  const auto first = run(model, x_), second = run(model, x_);
  EXPECT_FALSE(at::equal(first, second));
  model.eval();
  const auto fixed = run(model, x_);
  EXPECT_TRUE(at::equal(run(model, x_), fixed));
  harness::ScriptOracle oracle(harness::script_cases()[0], adapters, {{"default", 7.0 / 3}});
  EXPECT_LT(harness::largest(fixed - oracle.forward(x_)), 1e-10);
  model.train();
  EXPECT_FALSE(at::equal(run(model, x_), run(model, x_)));
  adapters.set_active({});
  EXPECT_TRUE(at::equal(run(model, x_), base));
}

TEST_F(ScriptExecutor, DropoutDropsTheAdaptersInputAndScalesTheRest) {
  auto model = harness::script_linear(1, 1, false, 1);
  auto adapters = lora::inject(model, LoraConfig()
                                          .r(1)
                                          .target_if([](const auto&, const auto&) { return true; })
                                          .target_script_if([](const auto&, const auto&) { return true; })
                                          .lora_dropout(0.25));
  harness::fill(adapters);
  const auto x = at::ones({40000, 1}, at::kDouble);
  model.eval();
  const auto full = run(model, x) - at::linear(x, model.attr("weight").toTensor().detach() * 0);
  adapters.set_active({});
  const auto base = run(model, x);
  adapters.set_active({"default"});
  model.train();
  const auto ratio = ((run(model, x) - base) / (full - base)).detach();
  const auto kept = ratio != 0;
  EXPECT_NEAR(kept.to(at::kDouble).mean().item<double>(), 0.75, 0.02);
  EXPECT_TRUE(at::allclose(ratio.masked_select(kept), at::full({1}, 1 / 0.75, at::kDouble)));
}

TEST_F(ScriptExecutor, ToIsRefusedWithAHintWhileUnmerged) {
  auto model = harness::script_layers();
  auto adapters = lora::inject(model, both_layers());
  const auto expected = run(model, x_).detach();
  EXPECT_THAT(message_of([&] { model.to(at::kFloat); }), HasSubstr("call unload() or merge() on the adapters first"));
  EXPECT_TRUE(at::equal(run(model, x_), expected));
}

TEST_F(ScriptExecutor, SaveIsRefusedWithAHintWhileUnmergedAndWorksMerged) {
  auto model = harness::script_layers();
  auto adapters = lora::inject(model, both_layers());
  harness::fill(adapters);
  const auto expected = run(model, x_).detach();
  std::stringstream refused;
  EXPECT_THAT(message_of([&] { model.save(refused); }), HasSubstr("call unload() or merge() on the adapters before"));
  EXPECT_TRUE(at::equal(run(model, x_), expected));

  adapters.merge();
  const auto merged = run(model, x_).detach();
  std::stringstream archive;
  model.save(archive);
  auto loaded = torch::jit::load(archive);
  EXPECT_TRUE(at::equal(run(loaded, x_), merged));
  EXPECT_THROW(lora::adapters_of(loaded), lora::StateError);
  adapters.unmerge();
  EXPECT_TRUE(at::equal(run(model, x_), expected));
}

TEST_F(ScriptExecutor, ToOnAMergedModelTakesTheBaseAndTheAdaptersAlong) {
  auto model = harness::script_layers();
  auto adapters = lora::inject(model, both_layers());
  harness::fill(adapters);
  adapters.merge();
  model.to(at::kFloat);
  adapters.unmerge();
  for (const auto& named : model.named_parameters()) EXPECT_EQ(named.value.scalar_type(), at::kFloat) << named.name;
  for (const auto& tensor : adapters.parameters()) EXPECT_EQ(tensor.scalar_type(), at::kFloat);
  const auto unmerged = run(model, x_.to(at::kFloat));
  adapters.merge();
  EXPECT_LT(harness::largest(run(model, x_.to(at::kFloat)) - unmerged), 1e-5);
  model.to(at::kDouble);
  adapters.unload();
  for (const auto& named : model.named_parameters()) EXPECT_EQ(named.value.scalar_type(), at::kDouble) << named.name;
}

TEST_F(ScriptExecutor, AdaptersAreFoundAgainWithEveryHandleGone) {
  auto model = harness::script_layers();
  {
    auto adapters = lora::inject(model, both_layers());
    harness::fill(adapters);
  }
  const auto unmerged = run(model, x_).detach();
  lora::adapters_of(model).merge();
  EXPECT_THAT(lora::adapters_of(model).merged(), ::testing::ElementsAre("default"));
  EXPECT_LT(harness::largest(run(model, x_) - unmerged), 1e-10);
  lora::adapters_of(model).unmerge();
  EXPECT_TRUE(at::equal(run(model, x_), unmerged));
  EXPECT_THROW(lora::inject(model, both_layers()), lora::StateError);
  lora::adapters_of(model).unload();
  EXPECT_THROW(lora::adapters_of(model), lora::StateError);
}

using WeakTensor = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;

TEST_F(ScriptExecutor, NothingIsKeptAliveByACycle) {
  for (const bool merged : {false, true}) {
    std::vector<WeakTensor> tensors;
    {
      auto model = harness::script_layers();
      auto adapters = lora::inject(model, both_layers());
      for (const auto& tensor : adapters.parameters()) tensors.emplace_back(tensor.getIntrusivePtr());
      for (const auto& tensor : model.parameters()) tensors.emplace_back(tensor.getIntrusivePtr());
      run(model, x_).sum().backward();
      if (merged) adapters.merge();
      run(model, x_);
    }
    for (const auto& tensor : tensors) EXPECT_TRUE(tensor.expired()) << "merged: " << merged;
  }
}

TEST_F(ScriptExecutor, AHandleThatOutlivesTheModelDoesNoHarm) {
  std::vector<WeakTensor> tensors;
  {
    auto model = std::make_unique<torch::jit::Module>(harness::script_layers());
    auto adapters = lora::inject(*model, both_layers());
    for (const auto& tensor : adapters.parameters()) tensors.emplace_back(tensor.getIntrusivePtr());
    for (const auto& tensor : model->parameters()) tensors.emplace_back(tensor.getIntrusivePtr());
    model.reset();
    EXPECT_EQ(adapters.named_parameters().size(), 4U);
  }
  for (const auto& tensor : tensors) EXPECT_TRUE(tensor.expired());
}

TEST_F(ScriptExecutor, DropoutFollowsTheModelWithEveryHandleGone) {
  auto model = harness::script_layers();
  harness::fill(lora::inject(model, both_layers().lora_dropout(0.5)));
  EXPECT_FALSE(at::equal(run(model, x_), run(model, x_)));
  model.eval();
  EXPECT_TRUE(at::equal(run(model, x_), run(model, x_)));
}

TEST_F(ScriptExecutor, AShallowCopyRunsOnWhenTheModelIsGone) {
  auto model = std::make_unique<torch::jit::Module>(harness::script_linear(12, 8, true, 1));
  auto adapters = std::make_unique<lora::Adapters>(lora::inject(
      *model, LoraConfig().lora_dropout(0.5).target_script_if([](const auto&, const auto&) { return true; })));
  harness::fill(*adapters);
  auto copy = model->copy();
  adapters.reset();
  model.reset();
  EXPECT_FALSE(at::equal(run(copy, x_), run(copy, x_)));
  EXPECT_EQ(lora::adapters_of(copy).names().size(), 1U);
  run(copy, x_);
}

TEST_F(ScriptExecutor, AdaptersOfAPartDoNotChangeTheWhole) {
  auto model = harness::script_layers();
  harness::fill(lora::inject(model, both_layers()));
  const auto expected = run(model, x_).detach();
  auto up = harness::submodule(model, "body.up");
  {
    auto part = lora::adapters_of(up);
    EXPECT_THAT(message_of([&] { part.merge(); }), HasSubstr("expected the whole model"));
  }
  EXPECT_TRUE(at::equal(run(model, x_), expected));
  lora::adapters_of(model).merge();
  EXPECT_LT(harness::largest(run(model, x_) - expected), 1e-10);
}

TEST_F(ScriptExecutor, AFrozenModelIsRefusedByName) {
  auto model = torch::jit::load(kScripts + "mlp_frozen.pt");
  EXPECT_THAT(message_of([&] { lora::inject(model, both_layers()); }),
              AllOf(HasSubstr("\"up\""), HasSubstr("2 weights frozen into constants"), HasSubstr("torch.jit.freeze")));
}

TEST_F(ScriptExecutor, AnEmbeddingThatIsAlsoMultipliedWithIsNoted) {
  torch::jit::Module table("Embedding");
  harness::add_parameter(table, "weight", {15, 6}, 1);
  torch::jit::Module model("Root");
  model.register_module("wte", table);
  model.define(
      "def forward(self, ids):\n  e = torch.embedding(self.wte.weight, ids)\n  return torch.linear(e, "
      "self.wte.weight)\n");
  const auto ids = at::arange(15);
  const auto W0 = table.attr("weight").toTensor().detach().clone();
  auto adapters = lora::inject(model, LoraConfig().r(2).lora_alpha(3).target_modules({"wte"}));
  EXPECT_THAT(adapters.report().notes, ::testing::ElementsAre(HasSubstr("wte is multiplied with as well")));
  harness::fill(adapters);
  const auto A = adapters.parameters()[0].detach(), B = adapters.parameters()[1].detach();
  const auto expected = at::linear(W0 + 1.5 * A.t().mm(B.t()), W0);  // the head stays
  EXPECT_LT(harness::largest(model.forward({ids}).toTensor() - expected), 1e-12);
  EXPECT_THAT(adapters.fallbacks(), ::testing::IsEmpty());
  adapters.merge();
  EXPECT_LT(harness::largest(model.forward({ids}).toTensor() - expected), 1e-12) << "merged";
  EXPECT_THAT(message_of([&] { adapters.merge_and_unload(); }), HasSubstr("looked up and multiplied with"));
  EXPECT_LT(harness::largest(model.forward({ids}).toTensor() - expected), 1e-12) << "refused";
  adapters.unload();
  EXPECT_TRUE(at::equal(model.forward({ids}).toTensor(), at::linear(W0, W0)));
}

TEST_F(ScriptExecutor, ATiedHeadOfALoadedArchiveIsNoted) {
  auto model = torch::jit::load(kScripts + "gpt2_traced.pt");
  const auto all = lora::inject(model, LoraConfig().target_modules("all-linear")).report();
  EXPECT_THAT(all.notes, ::testing::Contains(AllOf(HasSubstr("lm_head"), HasSubstr("transformer.wte.weight"))));
  lora::adapters_of(model).unload();
  const auto head = lora::inject(model, LoraConfig().target_modules({"lm_head"})).report();
  EXPECT_THAT(head.notes, ::testing::Contains(HasSubstr("lm_head is tied to transformer.wte.weight")));
}

TEST_F(ScriptExecutor, MergingInInferenceModeGivesWeightsThatGradientsPass) {
  for (const auto& script : harness::script_cases()) {
    auto model = script.make();
    auto adapters = lora::inject(model, LoraConfig().r(2).target_modules(script.targets));
    {
      const c10::InferenceMode inference;
      adapters.merge();
    }
    const auto x = harness::normal(script.input, 101).requires_grad_(true);
    EXPECT_NO_THROW(run(model, x).sum().backward()) << script.name;
    EXPECT_TRUE(x.grad().defined()) << script.name;
  }
}

TEST_F(ScriptExecutor, UnmergingInInferenceModeGivesCarriersThatTrain) {
  auto model = harness::script_layers();
  auto adapters = lora::inject(model, both_layers());
  {
    const c10::InferenceMode inference;
    adapters.merge();
    adapters.unmerge();
    EXPECT_THROW(adapters.verify([&] { return run(model, x_); }), lora::StateError);
  }
  EXPECT_TRUE(adapters.verify([&] { return run(model, x_); }).ok());
  adapters.set_trainable({});
  adapters.set_trainable({"default"});
  expect_gradients(model, adapters, x_);
}

TEST_F(ScriptExecutor, SeveralInjectionsAreNotJoined) {
  auto model = harness::script_layers();
  auto up = harness::submodule(model, "body.up"), down = harness::submodule(model, "body.down");
  const auto any = LoraConfig().r(2).target_script_if([](const auto&, const auto&) { return true; });
  const auto first = lora::inject(up, any), second = lora::inject(down, any);
  EXPECT_THAT(message_of([&] { lora::adapters_of(model); }), HasSubstr("adapters of several injections"));
}

TEST_F(ScriptExecutor, VerifyReachesAnAdapterThatIsNotTrainedAndLeavesItSo) {
  const TempFolder folder;
  auto source = torch::jit::load(kScripts + "encoder_scripted.pt");
  lora::inject(source, LoraConfig().r(3).target_modules("all-linear")).save(folder.path());
  auto model = torch::jit::load(kScripts + "encoder_scripted.pt");
  model.eval();
  const auto x = lora::load_safetensors(kScripts + "encoder_expected.safetensors").at("x");
  const auto adapters = lora::load(model, folder.path());
  const auto report = adapters.verify([&] { return run(model, x); });
  EXPECT_TRUE(report.ok()) << report;
  EXPECT_THAT(adapters.parameters(), ::testing::IsEmpty());
  EXPECT_FALSE(run(model, x).requires_grad());
}

TEST_F(ScriptExecutor, InferenceModeIsRefused) {
  auto model = harness::script_layers();
  {
    const c10::InferenceMode inference;
    EXPECT_THROW(lora::inject(model, both_layers()), lora::StateError);
  }
  const auto adapters = lora::inject(model, both_layers());
  const auto expected = run(model, x_).detach();
  const c10::InferenceMode inference;
  EXPECT_TRUE(at::equal(run(model, x_), expected));
}

TEST_F(ScriptExecutor, AScriptedEncoderTrainsInEvalToo) {
  auto model = torch::jit::load(kScripts + "encoder_scripted.pt");
  const auto golden = lora::load_safetensors(kScripts + "encoder_expected.safetensors");
  model.eval();
  const auto adapters = lora::inject(model, LoraConfig().r(3).lora_alpha(7).target_modules("all-linear"));
  EXPECT_LT(harness::largest(run(model, golden.at("x")) - golden.at("y")), 1e-5);
  harness::fill(adapters);
  at::Tensor y;
  for (int i = 0; i < 4; ++i) {
    y = run(model, golden.at("x"));
    (y * y).sum().backward();
    for (const auto& [name, tensor] : adapters.named_parameters()) {
      EXPECT_TRUE(tensor.grad().defined()) << name << ", run " << i;
      tensor.mutable_grad() = at::Tensor();
    }
  }
  EXPECT_THAT(adapters.fallbacks(), ::testing::IsEmpty());
  const at::NoGradGuard no_grad;  // the layer takes PyTorch's fused kernel, which wants dense weights
  EXPECT_LT(harness::largest(run(model, golden.at("x")) - y), 1e-4);
}

}  // namespace
}  // namespace script_executor_test
