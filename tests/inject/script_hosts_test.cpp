// The laws on TorchScript models, after their executor has optimised, against a dense oracle.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/adapters.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/serialization/import.h>

#include <map>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "harness/operators.h"
#include "harness/script_models.h"
#include "harness/temp_folder.h"
#include "harness/values.h"

namespace script_hosts_test {
namespace {

using harness::run;
using harness::ScriptCase;
using harness::ScriptOracle;
using lora::LoraConfig;

constexpr double kTolerance = 1e-11;  // float64, relative to the largest expected value

double difference(const at::Tensor& found, const at::Tensor& expected) {
  return harness::largest(found.detach() - expected) / std::max(harness::largest(expected), 1e-300);
}

class ScriptHosts : public ::testing::TestWithParam<ScriptCase> {
 protected:
  ScriptHosts() : model_(GetParam().make()), x_(harness::normal(GetParam().input, 101)) {
    harness::warm_up(model_, x_);
  }

  static LoraConfig config() { return LoraConfig().r(3).lora_alpha(7).target_modules(GetParam().targets); }

  lora::Adapters inject_filled() {
    auto adapters = lora::inject(model_, config());
    harness::fill(adapters);
    return adapters;
  }

  /// Gradients of (y·g).sum() by x and by every A and B.
  std::map<std::string, at::Tensor> gradients(const lora::Adapters& adapters, const at::Tensor& g, bool of_x) {
    auto x = x_.clone().requires_grad_(of_x);
    const auto y = run(model_, x);
    std::vector<std::string> names;
    std::vector<at::Tensor> inputs;
    for (const auto& [name, tensor] : adapters.named_parameters()) {
      names.push_back(name);
      inputs.push_back(tensor);
    }
    if (of_x) {
      names.emplace_back("x");
      inputs.push_back(x);
    }
    const auto found = torch::autograd::grad({y}, inputs, {g}, false, false, /*allow_unused=*/true);
    std::map<std::string, at::Tensor> result;
    for (size_t i = 0; i < names.size(); ++i) result[names[i]] = found[i];
    return result;
  }

  static std::string compare(const std::map<std::string, at::Tensor>& found,
                             const std::map<std::string, at::Tensor>& expected) {
    std::string wrong;
    for (const auto& [name, gradient] : found) {
      if (!gradient.defined()) {
        wrong += name + " has no gradient; ";
      } else if (!(difference(gradient, expected.at(name)) <= kTolerance)) {
        wrong += name + " differs by " + std::to_string(difference(gradient, expected.at(name))) + "; ";
      }
    }
    return wrong;
  }

  torch::jit::Module model_;
  at::Tensor x_;
};

TEST_P(ScriptHosts, FindsItsWeights) {
  const auto report = lora::inject(model_, config()).report();
  std::vector<std::string> found;
  for (const auto& entry : report.entries) {
    for (const auto& module : entry.modules) found.push_back(module.path);
  }
  EXPECT_THAT(found, ::testing::UnorderedElementsAreArray(GetParam().sites));
}

TEST_P(ScriptHosts, BeginsAtTheFrozenModelBitForBit) {
  auto plain = GetParam().make();
  for (const auto& parameter : plain.parameters()) parameter.set_requires_grad(false);
  const auto expected = run(plain, x_);
  const auto adapters = lora::inject(model_, config());
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(at::equal(run(model_, x_), expected)) << "run " << i;
  const lora::DisableAdapters guard(adapters);
  EXPECT_TRUE(at::equal(run(model_, x_), expected));
}

TEST_P(ScriptHosts, OutputsAndGradientsMatchTheOracleOnEveryRun) {
  const auto adapters = inject_filled();
  ScriptOracle oracle(GetParam(), adapters, {{"default", 7.0 / 3}});
  const auto y = oracle.forward(x_);
  const auto g = harness::normal(y.sizes(), 103);
  const auto expected = oracle.gradients(x_, g);
  ASSERT_EQ(adapters.named_parameters().size(), expected.size() - 1);
  for (int i = 0; i < 6; ++i) {
    EXPECT_LE(difference(run(model_, x_), y), kTolerance) << "run " << i;
    EXPECT_EQ(compare(gradients(adapters, g, i % 2 == 0), expected), "") << "run " << i;
  }
  const at::NoGradGuard no_grad;
  for (int i = 0; i < 3; ++i) EXPECT_LE(difference(run(model_, x_), y), kTolerance) << "without gradient, run " << i;
  EXPECT_THAT(adapters.fallbacks(), ::testing::IsEmpty());
}

TEST_P(ScriptHosts, NeedNoDenseWeightForwardOrBackward) {
  std::set<const void*> known;
  for (const auto& parameter : model_.parameters()) known.insert(parameter.storage().data());
  const auto adapters = inject_filled();
  const auto plain = GetParam().make();
  const auto x = x_.clone().requires_grad_(true);
  const harness::OperatorRecorder recorder;
  for (int i = 0; i < 3; ++i) run(model_, x).sum().backward();
  EXPECT_FALSE(recorder.names().empty());
  for (const auto& rows : GetParam().rows) {
    const auto weight = harness::submodule(plain, rows.module).attr(rows.attribute).toTensor();
    EXPECT_THAT(recorder.makers_of(weight.sizes(), known), ::testing::IsEmpty()) << rows.attribute;
  }
}

TEST_P(ScriptHosts, GradientsAreRightOnEveryThread) {
  const auto adapters = inject_filled();
  ScriptOracle oracle(GetParam(), adapters, {{"default", 7.0 / 3}});
  const auto g = harness::normal(oracle.forward(x_).sizes(), 103);
  const auto expected = oracle.gradients(x_, g);
  std::vector<std::string> wrong(4);
  std::vector<std::thread> threads;
  for (size_t i = 0; i < wrong.size(); ++i) {
    threads.emplace_back([&, i] {
      try {
        for (int k = 0; k < 10; ++k) wrong[i] += compare(gradients(adapters, g, k % 2 == 0), expected);
      } catch (const std::exception& error) {
        wrong[i] += error.what();
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_THAT(wrong, ::testing::Each(""));
}

TEST_P(ScriptHosts, MergesToTheOracleAndGoesBackBitForBit) {
  const auto before = harness::script_state(model_);
  auto adapters = inject_filled();
  const auto unmerged = run(model_, x_).detach();
  ScriptOracle oracle(GetParam(), adapters, {{"default", 7.0 / 3}});
  for (int cycle = 0; cycle < 3; ++cycle) {
    EXPECT_GT(adapters.merge().bytes, 0);
    for (int i = 0; i < 3; ++i) EXPECT_LE(difference(run(model_, x_), oracle.forward(x_)), kTolerance);
    adapters.unmerge();
    EXPECT_TRUE(at::equal(run(model_, x_), unmerged)) << "cycle " << cycle;
  }
  adapters.merge();
  adapters.unload();
  EXPECT_EQ(harness::script_state(model_), before);
}

TEST_P(ScriptHosts, UnloadGivesTheModelBackAndItsExecutorOptimisesAgain) {
  const auto before = harness::script_state(model_);
  const auto expected = run(model_, x_).detach();
  ASSERT_TRUE(harness::is_optimised(model_));
  auto adapters = inject_filled();
  harness::warm_up(model_, x_);
  EXPECT_FALSE(harness::is_optimised(model_));
  adapters.unload();
  EXPECT_EQ(harness::script_state(model_), before);
  EXPECT_TRUE(at::equal(run(model_, x_), expected));
  harness::warm_up(model_, x_);
  EXPECT_TRUE(harness::is_optimised(model_));
  EXPECT_TRUE(at::equal(run(model_, x_), expected));
}

TEST_P(ScriptHosts, MergedForGoodIsAPlainModelThatSavesAndLoads) {
  const auto plain = model_.deepcopy();
  for (const bool one_by_one : {false, true}) {
    model_ = plain.deepcopy();
    auto adapters = inject_filled();
    ScriptOracle oracle(GetParam(), adapters, {{"default", 7.0 / 3}});
    if (one_by_one) adapters.merge(lora::MergeOptions().keep_base(false));
    if (!one_by_one) adapters.merge_and_unload();
    EXPECT_LE(difference(run(model_, x_), oracle.forward(x_)), kTolerance);
    std::stringstream archive;
    model_.save(archive);
    auto loaded = torch::jit::load(archive);
    EXPECT_LE(difference(run(loaded, x_), oracle.forward(x_)), kTolerance);
    EXPECT_THROW(lora::adapters_of(model_), lora::StateError);
  }
}

TEST_P(ScriptHosts, SeveralAdaptersSwitchAndMergeInPart) {
  auto adapters = inject_filled();
  adapters.add(config().r(2).lora_alpha(5), "other");
  harness::fill(adapters, "other", 31);
  const auto expected = [&](const std::vector<std::pair<std::string, double>>& scalings) {
    return ScriptOracle(GetParam(), adapters, scalings).forward(x_);
  };
  const auto both = expected({{"default", 7.0 / 3}, {"other", 2.5}});
  adapters.set_active({"other"});
  EXPECT_LE(difference(run(model_, x_), expected({{"other", 2.5}})), kTolerance);
  adapters.set_active({"default", "other"});
  EXPECT_LE(difference(run(model_, x_), both), kTolerance);
  adapters.merge({"other"});
  EXPECT_LE(difference(run(model_, x_), both), kTolerance);
  adapters.merge();
  EXPECT_LE(difference(run(model_, x_), both), kTolerance);
  adapters.set_active({"default"});
  EXPECT_LE(difference(run(model_, x_), expected({{"default", 7.0 / 3}})), kTolerance);
  adapters.unmerge();
  adapters.set_active({});
  EXPECT_TRUE(at::equal(run(model_, x_), expected({})));
  adapters.remove("default");
  adapters.set_active({"other"});
  EXPECT_LE(difference(run(model_, x_), expected({{"other", 2.5}})), kTolerance);
}

TEST_P(ScriptHosts, WhatIsSavedLoadsBitForBit) {
  const TempFolder folder;
  const auto adapters = inject_filled();
  adapters.save(folder.path());
  auto twin = GetParam().make();
  harness::warm_up(twin, x_);
  const auto loaded = lora::load(twin, folder.path());
  const auto tensors = adapters.named_tensors("default");
  const auto read = loaded.named_tensors("default");
  ASSERT_EQ(read.size(), tensors.size());
  for (size_t i = 0; i < read.size(); ++i) {
    EXPECT_EQ(read[i].first, tensors[i].first);
    EXPECT_TRUE(at::equal(read[i].second, tensors[i].second)) << read[i].first;
  }
  EXPECT_TRUE(at::equal(run(twin, x_), run(model_, x_)));
}

INSTANTIATE_TEST_SUITE_P(, ScriptHosts, ::testing::ValuesIn(harness::script_cases()), harness::script_case_name);

}  // namespace
}  // namespace script_hosts_test
