// The laws of an injected model whose frozen products are oneDNN's, and the life of an acceleration.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/lora.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "harness/dense_oracle.h"
#include "harness/message_of.h"
#include "harness/models.h"
#include "harness/operators.h"
#include "harness/script_models.h"
#include "harness/values.h"

namespace acceleration_test {
namespace {

using harness::HostCase;
using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr double kScaling = 3.0 / 2.0;  // alpha ≠ r
constexpr const char* kOneDnnOperator = "mkldnn::_linear_pointwise";

std::shared_ptr<lora::ProductPlan> always_onednn() {
  return std::make_shared<lora::ProductPlan>(lora::ProductKernel::kOneDnn);
}

lora::LoraConfig config(const HostCase& host) {
  return lora::LoraConfig().r(2).lora_alpha(3).target_modules(host.targets);
}

/// Whether any weight member of a module that multiplies stands for something else than itself.
bool has_carrier(torch::nn::Module& model) {
  for (const auto& module : model.modules()) {
    if (auto* linear = dynamic_cast<torch::nn::LinearImpl*>(module.get())) {
      if (!linear->weight.has_storage()) return true;
    }
  }
  return false;
}

class AcceleratedHost : public ::testing::TestWithParam<HostCase> {
 protected:
  harness::Subject make(at::ScalarType dtype = at::kFloat) const {
    auto subject = GetParam().make();
    subject.module->to(dtype);
    return subject;
  }
  at::Tensor x() const { return harness::normal(GetParam().input, 3, at::kFloat); }

  /// Adapters with values, in a model whose every product is oneDNN's.
  lora::Adapters inject(const harness::Subject& model) const {
    lora::accelerate(*model.module, always_onednn());
    auto adapters = lora::inject(*model.module, config(GetParam()));
    harness::fill(adapters);
    return adapters;
  }
};

std::vector<std::string> operators_of(const harness::Subject& model, const at::Tensor& x) {
  const auto input = x.detach().clone().requires_grad_(true);
  const harness::OperatorRecorder recorder;
  model.forward(input).sum().backward();
  return recorder.names();
}

TEST_P(AcceleratedHost, StartsAtTheOutputOfTheDisabledAdapters) {
  const auto model = make();
  lora::accelerate(*model.module, always_onednn());
  const auto adapters = lora::inject(*model.module, config(GetParam()).lora_dropout(0.5));
  const auto adapted = model.forward(x());
  const lora::DisableAdapters guard(adapters);
  EXPECT_TRUE(at::equal(adapted, model.forward(x())));
}

TEST_P(AcceleratedHost, GivesTheDenseModelsOutputAndGradients) {
  const auto model = make();
  const auto adapters = inject(model);
  const harness::DenseOracle oracle(GetParam(), at::kFloat, adapters, {{"default", kScaling}});
  const double rounding = 32 * harness::epsilon(at::kFloat);
  const auto input = x().requires_grad_(true);
  const auto y = model.forward(input);
  EXPECT_LT(harness::relative_error(y, oracle.forward(input)), rounding);

  const auto g = harness::normal(y.sizes(), 8, at::kFloat);
  y.backward(g);
  const auto expected = oracle.gradients(input, g);
  EXPECT_LT(harness::relative_error(input.grad(), expected.at("x")), 4 * rounding);
  for (const auto& [name, tensor] : adapters.named_parameters()) {
    EXPECT_LT(harness::relative_error(tensor.grad(), expected.at(name)), 4 * rounding) << name;
  }
}

TEST_P(AcceleratedHost, MergesAndUnmergesInItsBaseAlone) {
  const auto model = make();
  const auto before = harness::base_bytes(*model.module);
  auto adapters = inject(model);
  const harness::DenseOracle oracle(GetParam(), at::kFloat, adapters, {{"default", kScaling}});
  const auto unmerged = model.forward(x());
  for (int cycle = 0; cycle < 3; ++cycle) {
    adapters.merge();
    EXPECT_LT(harness::relative_error(model.forward(x()), oracle.forward(x())), 32 * harness::epsilon(at::kFloat));
    adapters.unmerge();
    EXPECT_TRUE(at::equal(model.forward(x()), unmerged));
  }
  EXPECT_EQ(harness::base_bytes(*model.module), before);
}

TEST_P(AcceleratedHost, RunsTheAcceleratedModelsOperatorsOnceMergedOrUnloaded) {
  const auto plain = make();
  for (auto& parameter : plain.module->parameters()) parameter.set_requires_grad(false);
  const auto frozen = operators_of(plain, x());
  lora::accelerate(*plain.module, always_onednn());
  const auto accelerated = operators_of(plain, x());

  const auto model = make();
  auto adapters = inject(model);
  adapters.merge();
  EXPECT_EQ(operators_of(model, x()), accelerated) << "merged";
  adapters.unload();
  for (auto& parameter : model.module->parameters()) parameter.set_requires_grad(false);
  EXPECT_EQ(operators_of(model, x()), accelerated) << "unloaded";
  lora::end_acceleration(*model.module);
  EXPECT_EQ(operators_of(model, x()), frozen) << "not accelerated any more";
}

INSTANTIATE_TEST_SUITE_P(Laws, AcceleratedHost, ::testing::ValuesIn(harness::host_cases()), harness::case_name);

const HostCase& mlp() {
  const auto& hosts = harness::host_cases();
  return *std::find_if(hosts.begin(), hosts.end(), [](const HostCase& host) { return host.name == "Mlp"; });
}

class Acceleration : public ::testing::Test {
 protected:
  Acceleration() {
    model_.module->to(at::kFloat);
    x_ = harness::normal(mlp().input, 3, at::kFloat);
  }
  void freeze() {
    for (auto& parameter : model_.module->parameters()) parameter.set_requires_grad(false);
  }

  harness::Subject model_ = mlp().make();
  at::Tensor x_;
};

TEST_F(Acceleration, IsOnInInjectedModelsAndEndsWithTheirAdapters) {
  auto adapters = lora::inject(*model_.module, config(mlp()));
  EXPECT_EQ(lora::acceleration_of(*model_.module), lora::ProductPlan::of_process());
  adapters.unload();
  EXPECT_EQ(lora::acceleration_of(*model_.module), nullptr);
  EXPECT_FALSE(has_carrier(*model_.module));

  adapters = lora::inject(*model_.module, config(mlp()));
  adapters.merge_and_unload();
  EXPECT_EQ(lora::acceleration_of(*model_.module), nullptr);
  EXPECT_FALSE(has_carrier(*model_.module));
}

TEST_F(Acceleration, CanBeLeftOut) {
  const auto adapters = lora::inject(*model_.module, config(mlp()).target_modules({"up"}), "default",
                                     lora::InjectOptions().accelerate(false));
  EXPECT_EQ(lora::acceleration_of(*model_.module), nullptr);
  EXPECT_THAT(operators_of(model_, x_), Not(Contains(kOneDnnOperator)));
}

TEST_F(Acceleration, ReachesWeightsWithoutAnAdapter) {
  lora::accelerate(*model_.module, always_onednn());
  lora::inject(*model_.module, config(mlp()).target_modules({"up"}));
  model_.forward(x_);  // the first call asks what oneDNN has
  const auto names = operators_of(model_, x_);
  // Two layers: x·W and dy·W of each, and of the adapted one x·A, dy·B and the gradients of A and B.
  EXPECT_EQ(std::count(names.begin(), names.end(), kOneDnnOperator), 2 * 2 + 4);
}

TEST_F(Acceleration, ComputesNoGradientThatNobodyAsksFor) {
  lora::accelerate(*model_.module, always_onednn());
  lora::inject(*model_.module, config(mlp()).target_modules({"up"}));
  model_.forward(x_);  // the first call asks what oneDNN has
  const harness::OperatorRecorder recorder;
  model_.forward(x_).sum().backward();
  const auto& names = recorder.names();
  EXPECT_EQ(std::count(names.begin(), names.end(), kOneDnnOperator), 2 + 1 + 4) << "no gradient of x";
}

TEST_F(Acceleration, OfAModelWithoutAdaptersKeepsItsOutput) {
  freeze();
  const auto expected = model_.forward(x_);
  const auto plan = lora::accelerate(*model_.module, always_onednn());
  EXPECT_EQ(lora::acceleration_of(*model_.module), plan);
  EXPECT_THAT(operators_of(model_, x_), Contains(kOneDnnOperator));
  EXPECT_LT(harness::relative_error(model_.forward(x_), expected), 8 * harness::epsilon(at::kFloat));
  EXPECT_THAT(harness::message_of<lora::StateError>([&] { lora::adapters_of(*model_.module); }),
              HasSubstr("found no adapters in the model"));
  lora::end_acceleration(*model_.module);
  EXPECT_TRUE(at::equal(model_.forward(x_), expected));
  EXPECT_FALSE(has_carrier(*model_.module));
  lora::end_acceleration(*model_.module);  // of a plain model: nothing
}

TEST_F(Acceleration, LeavesWeightsThatAreTrainedToLibTorch) {
  const auto twin = mlp().make();
  twin.module->to(at::kFloat);
  lora::accelerate(*model_.module, always_onednn());
  const auto names = operators_of(model_, x_);
  EXPECT_THAT(names, Not(Contains(kOneDnnOperator)));
  operators_of(twin, x_);
  const auto expected = twin.module->named_parameters();
  for (const auto& parameter : model_.module->named_parameters()) {
    EXPECT_TRUE(at::equal(parameter.value().grad(), expected[parameter.key()].grad())) << parameter.key();
  }
}

TEST_F(Acceleration, StaysWhereItWasAskedFor) {
  const auto plan = lora::accelerate(*model_.module, always_onednn());
  auto adapters = lora::inject(*model_.module, config(mlp()));
  EXPECT_EQ(lora::acceleration_of(*model_.module), plan);
  adapters.merge();
  EXPECT_TRUE(has_carrier(*model_.module));
  adapters.merge_and_unload();
  EXPECT_EQ(lora::acceleration_of(*model_.module), plan);
  EXPECT_TRUE(has_carrier(*model_.module));
  EXPECT_THROW(adapters.merge(), lora::StateError);
  adapters = lora::inject(*model_.module, config(mlp()));
  EXPECT_EQ(lora::acceleration_of(*model_.module), plan);
  lora::end_acceleration(*model_.module);
  EXPECT_EQ(adapters.active(), std::vector<std::string>{"default"});
  adapters.unload();
  EXPECT_FALSE(has_carrier(*model_.module));
}

TEST_F(Acceleration, SurvivesAnInjectionThatFails) {
  const auto plan = lora::accelerate(*model_.module, always_onednn());
  EXPECT_ANY_THROW(lora::inject(*model_.module, config(mlp()).target_modules({"nowhere"})));
  EXPECT_EQ(lora::acceleration_of(*model_.module), plan);
  lora::inject(*model_.module, config(mlp()));
}

TEST_F(Acceleration, CanBeSwitchedWhileAdaptersAreMerged) {
  auto adapters = lora::inject(*model_.module, config(mlp()), "default", lora::InjectOptions().accelerate(false));
  harness::fill(adapters);
  adapters.merge();
  const auto merged = model_.forward(x_);
  EXPECT_FALSE(has_carrier(*model_.module));
  lora::accelerate(*model_.module, always_onednn());
  EXPECT_TRUE(has_carrier(*model_.module));
  EXPECT_LT(harness::relative_error(model_.forward(x_), merged), 8 * harness::epsilon(at::kFloat));
  lora::end_acceleration(*model_.module);
  EXPECT_TRUE(at::equal(model_.forward(x_), merged));
  EXPECT_EQ(adapters.merged(), std::vector<std::string>{"default"});
}

TEST_F(Acceleration, FollowsTheModelToAnotherDtype) {
  freeze();
  lora::accelerate(*model_.module, always_onednn());
  model_.module->to(at::kDouble);
  for (const auto& module : model_.module->modules()) {
    if (auto* linear = dynamic_cast<torch::nn::LinearImpl*>(module.get())) {
      EXPECT_EQ(linear->weight.scalar_type(), at::kDouble);
    }
  }
  const auto plain = mlp().make();
  plain.module->to(at::kFloat);
  plain.module->to(at::kDouble);
  EXPECT_TRUE(at::equal(model_.forward(x_.to(at::kDouble)), plain.forward(x_.to(at::kDouble))))
      << "oneDNN has no product of doubles";
}

TEST_F(Acceleration, IsInACopyToo) {
  torch::nn::Sequential model(torch::nn::Linear(12, 20), torch::nn::Linear(20, 8));
  const auto plan = lora::accelerate(*model, always_onednn());
  const auto adapters = lora::inject(*model, lora::LoraConfig().r(2).target_modules({"0"}));
  harness::fill(adapters);
  const auto expected = model->forward(x_);
  const auto copy = lora::clone(*model);
  EXPECT_EQ(lora::acceleration_of(*copy), plan);
  EXPECT_TRUE(at::equal(copy->forward(x_), expected));
  EXPECT_TRUE(at::equal(model->forward(x_), expected));
}

TEST_F(Acceleration, OfAWholeKeepsItsPartsFromInjection) {
  struct Outer : torch::nn::Module {};
  const auto outer = std::make_shared<Outer>();
  outer->register_module("inner", model_.module);
  lora::accelerate(*outer, always_onednn());
  EXPECT_THAT(harness::message_of<lora::StateError>([&] { lora::inject(*model_.module, config(mlp())); }),
              HasSubstr("found a part of a model that is accelerated as a whole"));
  lora::inject(*outer, config(mlp()));
}

TEST_F(Acceleration, ReachesLayersBesideThoseThatAreWrittenWithAnAdapter) {
  struct Mixed : torch::nn::Module {
    lora::LoRALinear<> first{torch::nn::Linear(8, 8), lora::LoraConfig().r(2)};
    torch::nn::Linear second{8, 8};
    Mixed() {
      register_module("first", first);
      register_module("second", second);
    }
  };
  Mixed model;
  const auto plan = lora::accelerate(model, always_onednn());
  EXPECT_FALSE(model.second->weight.has_storage());
  EXPECT_EQ(lora::adapters_of(model).names(), std::vector<std::string>{"default"});
  lora::end_acceleration(model);
  EXPECT_TRUE(model.second->weight.has_storage());
  EXPECT_EQ(lora::acceleration_of(model), nullptr);
}

TEST(ScriptAcceleration, IsOverWhereAModelIsMergedAsAWhole) {
  auto model = harness::script_layers();
  auto adapters = lora::inject(model, lora::LoraConfig().r(2).target_modules("all-linear"));
  harness::fill(adapters);
  EXPECT_NE(lora::acceleration_of(model), nullptr);
  adapters.merge();
  for (const auto& parameter : model.parameters()) EXPECT_TRUE(parameter.has_storage());
  adapters.unmerge();
  EXPECT_NE(lora::acceleration_of(model), nullptr);
  adapters.unload();
  EXPECT_EQ(lora::acceleration_of(model), nullptr);
  for (const auto& parameter : model.parameters()) EXPECT_TRUE(parameter.has_storage());
}

}  // namespace
}  // namespace acceleration_test
