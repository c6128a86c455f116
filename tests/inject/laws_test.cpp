// The laws of an injected model, for every kind of host: equal at the start, right values and gradients, an untouched
// base, low-rank operators only.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/lora.h>
#include <torch/csrc/autograd/autograd.h>

#include <memory>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "harness/dense_oracle.h"
#include "harness/models.h"
#include "harness/operators.h"
#include "harness/values.h"

namespace laws_test {
namespace {

using harness::HostCase;
using ::testing::ElementsAre;
using ::testing::IsEmpty;

constexpr double kScaling = 3.0 / 2.0;  // alpha ≠ r

lora::LoraConfig config(const HostCase& host) {
  return lora::LoraConfig().r(2).lora_alpha(3).target_modules(host.targets);
}

using Parameter = std::tuple<HostCase, at::ScalarType>;

class EveryHost : public ::testing::TestWithParam<Parameter> {
 protected:
  const HostCase& host() const { return std::get<0>(GetParam()); }
  at::ScalarType dtype() const { return std::get<1>(GetParam()); }
  harness::Subject subject() const {
    auto subject = host().make();
    subject.module->to(dtype());
    return subject;
  }
  /// The same model, equally frozen: at::matmul decides by requires_grad how it folds its input.
  harness::Subject frozen() const {
    auto plain = subject();
    for (auto& parameter : plain.module->parameters()) parameter.set_requires_grad(false);
    return plain;
  }
  at::Tensor x() const { return harness::normal(host().input, 3, dtype()); }
};

TEST_P(EveryHost, StartsAtTheFrozenModelsOutput) {
  const auto model = subject();
  lora::inject(*model.module, config(host()).lora_dropout(0.5));
  EXPECT_TRUE(at::equal(model.forward(x()), frozen().forward(x())));
}

TEST_P(EveryHost, KeepsEveryBaseTensor) {
  const auto model = subject();
  const auto before = harness::base_bytes(*model.module);
  auto adapters = lora::inject(*model.module, config(host()));
  EXPECT_EQ(harness::base_bytes(*model.module), before) << "injecting";

  harness::fill(adapters);
  for (int step = 0; step < 2; ++step) {
    model.forward(x()).sum().backward();
    const at::NoGradGuard no_grad;
    for (auto& parameter : model.module->parameters()) {
      if (parameter.grad().defined()) parameter.sub_(parameter.grad(), 0.01);
    }
  }
  EXPECT_EQ(harness::base_bytes(*model.module), before) << "training";
  EXPECT_ANY_THROW(model.forward(at::ones({2, 50}, dtype())));
  EXPECT_EQ(harness::base_bytes(*model.module), before) << "an exception in a forward";
  adapters.merge();
  model.forward(x());
  EXPECT_EQ(harness::base_bytes(*model.module), before) << "merging";
  adapters.unload();
  EXPECT_EQ(harness::base_bytes(*model.module), before) << "unloading";
  EXPECT_TRUE(at::equal(model.forward(x()), subject().forward(x())));
}

TEST_P(EveryHost, UnmergesAndSwitchesBitForBit) {
  const auto model = subject();
  auto adapters = lora::inject(*model.module, config(host()));
  adapters.add(config(host()).r(3), "other");
  harness::fill(adapters);
  harness::fill(adapters, "other", 70);
  const auto unmerged = model.forward(x());
  const auto before = harness::parameter_state(*model.module);
  for (int cycle = 0; cycle < 20; ++cycle) {
    adapters.merge();
    adapters.set_active({"other"});
    adapters.set_active({"default", "other"});
    adapters.set_active({"default"});
    adapters.unmerge();
  }
  EXPECT_EQ(harness::parameter_state(*model.module), before);
  EXPECT_TRUE(at::equal(model.forward(x()), unmerged));
  adapters.set_active({});
  EXPECT_TRUE(at::equal(model.forward(x()), frozen().forward(x())));
}

TEST_P(EveryHost, MergesEachWeightWithOneRounding) {
  const auto model = subject();
  auto adapters = lora::inject(*model.module, config(host()));
  harness::fill(adapters);
  const harness::DenseOracle oracle(host(), dtype(), adapters, {{"default", kScaling}});
  const auto expected = oracle.forward(x());
  const double rounding = 16 * harness::epsilon(dtype());
  EXPECT_LT(harness::relative_error(model.forward(x()), expected), rounding) << "unmerged";
  adapters.merge();
  const auto merged = model.forward(x());
  EXPECT_LT(harness::relative_error(merged, expected), rounding) << "merged";

  adapters.merge_and_unload();
  const auto plain = frozen();
  const at::NoGradGuard no_grad;
  auto weights = plain.module->named_parameters();
  for (const auto& named : model.module->named_parameters()) weights[named.key()].copy_(named.value());
  for (const auto& [name, weight] : oracle.weights()) {
    EXPECT_LE(harness::excess(weights[name], weight.value, harness::weight_bound(weight, dtype())), 0) << name;
  }
  EXPECT_TRUE(at::equal(plain.forward(x()), merged)) << "the plain model with W'";
}

TEST_P(EveryHost, MergesWithoutTheBaseToTheSameBits) {
  const auto at_once = subject(), one_by_one = subject();
  for (const auto* model : {&at_once, &one_by_one}) {
    auto adapters = lora::inject(*model->module, config(host()));
    harness::fill(adapters);
    if (model == &at_once) adapters.merge_and_unload();
    if (model == &one_by_one) adapters.merge(lora::MergeOptions().keep_base(false));
  }
  EXPECT_NE(harness::base_bytes(*one_by_one.module), harness::base_bytes(*subject().module));
  EXPECT_EQ(harness::base_bytes(*one_by_one.module), harness::base_bytes(*at_once.module));
  EXPECT_TRUE(at::equal(one_by_one.forward(x()), at_once.forward(x())));
  EXPECT_THROW(lora::adapters_of(*one_by_one.module), lora::StateError);
}

TEST_P(EveryHost, MergesSomeOfTheActiveAdapters) {
  const auto model = subject();
  auto adapters = lora::inject(*model.module, config(host()));
  adapters.add(config(host()).r(3).lora_alpha(-4), "other");
  harness::fill(adapters);
  harness::fill(adapters, "other", 70);
  adapters.set_active({"default", "other"});
  const harness::DenseOracle oracle(host(), dtype(), adapters, {{"default", kScaling}, {"other", -4.0 / 3}});
  const auto expected = oracle.forward(x());
  for (const auto* merged : {"default", "other"}) {
    adapters.merge({merged});
    EXPECT_LT(harness::relative_error(model.forward(x()), expected), 16 * harness::epsilon(dtype())) << merged;
    adapters.unmerge();
  }
}

TEST_P(EveryHost, RestoresParametersOnUnload) {
  const auto model = subject();
  model.module->parameters().front().set_requires_grad(false);
  const auto before = harness::parameter_state(*model.module);
  auto adapters = lora::inject(*model.module, config(host()));
  EXPECT_NE(harness::parameter_state(*model.module), before);
  harness::fill(adapters);
  adapters.merge();
  adapters.unload();
  EXPECT_EQ(harness::parameter_state(*model.module), before);
  EXPECT_THROW(adapters.merge(), lora::StateError);
}

INSTANTIATE_TEST_SUITE_P(Laws, EveryHost,
                         ::testing::Combine(::testing::ValuesIn(harness::host_cases()),
                                            ::testing::Values(at::kDouble, at::kFloat, at::kBFloat16, at::kHalf)),
                         [](const auto& tested) {
                           return std::get<0>(tested.param).name + "_" + c10::toString(std::get<1>(tested.param));
                         });

class EveryHostInFloat64 : public ::testing::TestWithParam<HostCase> {
 protected:
  at::Tensor x() const { return harness::normal(GetParam().input, 3); }
  /// A model with one filled adapter, active.
  lora::Adapters inject(const harness::Subject& model) const {
    model.module->to(at::kDouble);
    auto adapters = lora::inject(*model.module, config(GetParam()));
    harness::fill(adapters);
    return adapters;
  }
};

TEST_P(EveryHostInFloat64, ComputesTheDenseSumAndItsGradients) {
  const auto model = GetParam().make();
  const auto adapters = inject(model);
  const harness::DenseOracle oracle(GetParam(), at::kDouble, adapters, {{"default", kScaling}});
  const auto input = x().requires_grad_(true);
  const auto y = model.forward(input);
  EXPECT_LT(harness::relative_error(y, oracle.forward(x())), 1e-12);
  EXPECT_GT(harness::relative_error(model.forward(x()), GetParam().make().forward(x().to(at::kFloat))), 1e-2)
      << "the adapter is to matter";

  const auto g = harness::normal(y.sizes(), 5);
  (y * g).sum().backward();
  auto expected = oracle.gradients(x(), g);
  EXPECT_LT(harness::relative_error(input.grad(), expected.at("x")), 1e-12);
  ASSERT_EQ(adapters.named_parameters().size() + 1, expected.size());
  for (const auto& [name, tensor] : adapters.named_parameters()) {
    ASSERT_TRUE(tensor.grad().defined()) << name;
    EXPECT_LT(harness::relative_error(tensor.grad(), expected.at(name)), 1e-12) << name;
  }
}

TEST_P(EveryHostInFloat64, SumsSeveralAdaptersMergedOrNot) {
  const auto model = GetParam().make();
  auto adapters = inject(model);
  adapters.add(config(GetParam()).r(3).lora_alpha(-4), "other");
  harness::fill(adapters, "other", 70);
  adapters.set_active({"default", "other"});
  const harness::DenseOracle oracle(GetParam(), at::kDouble, adapters, {{"default", kScaling}, {"other", -4.0 / 3.0}});
  const auto expected = oracle.forward(x());
  EXPECT_LT(harness::relative_error(model.forward(x()), expected), 1e-12);
  adapters.merge({"other"});
  EXPECT_LT(harness::relative_error(model.forward(x()), expected), 1e-12) << "partly merged";
  adapters.merge();
  EXPECT_LT(harness::relative_error(model.forward(x()), expected), 1e-12) << "merged";
}

TEST_P(EveryHostInFloat64, NeedsNoDenseWeightForwardOrBackward) {
  const auto model = GetParam().make();
  const auto adapters = inject(model);
  std::set<const void*> known;
  for (const auto& parameter : model.module->parameters()) known.insert(parameter.storage().data());
  const auto registered = model.module->named_parameters();
  const auto input = x().requires_grad_(true);

  const harness::OperatorRecorder recorder;
  model.forward(input).sum().backward();
  if (!GetParam().dense_operator.empty()) {
    EXPECT_THAT(adapters.fallbacks(), ElementsAre(::testing::Pair(GetParam().dense_operator, 1)));
    return;
  }
  EXPECT_THAT(adapters.fallbacks(), IsEmpty());
  for (const auto& rows : GetParam().rows) {
    const auto weight = registered[rows.parameter];
    EXPECT_THAT(recorder.makers_of(weight.sizes(), known), IsEmpty()) << rows.parameter;
  }
  for (const auto& [name, tensor] : adapters.named_parameters()) {
    if (name.find("lora_B") == std::string::npos) continue;
    EXPECT_THAT(recorder.makers_of({tensor.size(0), x().size(-1)}, known), IsEmpty()) << name;
  }
}

/// Operators of a forward and a backward to the input.
std::vector<std::string> operators_of(const harness::Subject& model, const at::Tensor& x) {
  model.module->zero_grad();
  const auto input = x.detach().clone().requires_grad_(true);
  const harness::OperatorRecorder recorder;
  model.forward(input).sum().backward();
  return recorder.names();
}

TEST_P(EveryHostInFloat64, RunsThePlainModelsOperatorsOnceMergedOrUnloaded) {
  const auto plain = GetParam().make();
  plain.module->to(at::kDouble);
  const auto trainable = operators_of(plain, x());
  for (auto& parameter : plain.module->parameters()) parameter.set_requires_grad(false);
  const auto frozen = operators_of(plain, x());
  ASSERT_FALSE(frozen.empty());

  const auto model = GetParam().make();
  model.module->to(at::kDouble);
  const auto unaccelerated = lora::InjectOptions().accelerate(false);
  auto adapters = lora::inject(*model.module, config(GetParam()), "default", unaccelerated);
  harness::fill(adapters);
  EXPECT_NE(operators_of(model, x()), frozen) << "unmerged";
  adapters.merge();
  EXPECT_EQ(operators_of(model, x()), frozen) << "merged";
  adapters.unload();
  EXPECT_EQ(operators_of(model, x()), trainable) << "unloaded";

  auto again = inject(model);
  again.merge_and_unload();
  EXPECT_EQ(operators_of(model, x()), trainable) << "merged and unloaded";
}

TEST_P(EveryHostInFloat64, MergesForGoodWithTheFlagsOfBefore) {
  const auto model = GetParam().make();
  auto adapters = inject(model);
  const harness::DenseOracle oracle(GetParam(), at::kDouble, adapters, {{"default", kScaling}});
  adapters.merge_and_unload();
  const auto registered = model.module->named_parameters();
  for (const auto& [name, weight] : oracle.weights()) {
    EXPECT_LE(harness::excess(registered[name], weight.value, harness::weight_bound(weight, at::kDouble)), 0) << name;
    EXPECT_TRUE(registered[name].requires_grad()) << name;
  }
  EXPECT_LT(harness::relative_error(model.forward(x()), oracle.forward(x())), 1e-12);
  EXPECT_EQ(registered.size(), GetParam().make().module->named_parameters().size());
}

INSTANTIATE_TEST_SUITE_P(Laws, EveryHostInFloat64, ::testing::ValuesIn(harness::host_cases()), harness::case_name);

}  // namespace
}  // namespace laws_test
