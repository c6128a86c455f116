// A run that is stopped and continued ends bitwise where the uninterrupted run ends; a file of another run is refused.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/lora.h>
#include <torch/csrc/jit/serialization/import.h>
#include <torch/optim/adagrad.h>
#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/lbfgs.h>
#include <torch/optim/rmsprop.h>
#include <torch/optim/sgd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "harness/damage.h"
#include "harness/num_threads.h"
#include "harness/problems_of.h"
#include "harness/temp_folder.h"
#include "harness/values.h"
#include "oracles/models.h"
#include "train/training.h"

namespace training_state_test {
namespace {

using harness::Choices;
using harness::kAdamW;
using harness::MakeOptimizer;
using harness::optimizer_maker;
using harness::problems_of;
using harness::Training;

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;
using ::testing::UnorderedElementsAre;

class TrainingState : public ::testing::Test {
 protected:
  /// A file of another run is refused with these problems, and nothing of the run changes.
  template <class Matcher>
  void expect_refused(Training& training, const Matcher& problems) const {
    const auto before = training.bytes();
    EXPECT_THAT(problems_of([&] { training.state.load(path); }), problems);
    EXPECT_EQ(training.bytes(), before);
  }

  TempFolder folder;
  std::string path = folder / "run.safetensors";

 private:
  const harness::NumThreads one_thread_{1};
};

TEST_F(TrainingState, AfterEveryStepEndsWhereTheUninterruptedRunEnds) {
  constexpr int kSteps = 8;
  const auto file = [&](int step) { return folder / std::to_string(step); };
  torch::manual_seed(1);
  Training whole;
  std::vector<double> losses;
  for (int step = 0; step < kSteps; ++step) {
    whole.state.set("step", step).set("losses", at::tensor(losses, at::kDouble)).save(file(step));
    losses.push_back(whole.step());
  }
  const auto end = whole.bytes();
  for (int step = 0; step < kSteps; ++step) {
    torch::manual_seed(static_cast<uint64_t>(100 + step));
    Training resumed;
    resumed.step();  // what was there before does not matter
    ASSERT_TRUE(resumed.state.load(file(step)));
    EXPECT_EQ(resumed.state.get<int>("step"), step);
    EXPECT_EQ(resumed.state.get<at::Tensor>("losses").numel(), step);
    EXPECT_EQ(resumed.schedule->current_step(), step);
    for (int left = step; left < kSteps; ++left) EXPECT_EQ(resumed.step(), losses[static_cast<size_t>(left)]);
    resumed.state.set("step", kSteps - 1).set("losses", whole.state.get<at::Tensor>("losses"));
    EXPECT_EQ(resumed.bytes(), end) << "from step " << step;
  }
}

TEST_F(TrainingState, ContinuesEveryOptimizerOfLibTorch) {
  using namespace torch::optim;
  const std::map<std::string, MakeOptimizer> optimizers{
      {"Adam", optimizer_maker<Adam>(AdamOptions(0.02).amsgrad(true).weight_decay(0.1), 4)},
      {"AdamW", optimizer_maker<AdamW>(AdamWOptions(0.02).betas({0.8, 0.95}), 4)},
      {"SGD", optimizer_maker<SGD>(SGDOptions(0.05), 4)},
      {"SGD with momentum", optimizer_maker<SGD>(SGDOptions(0.05).momentum(0.9).nesterov(true), 4)},
      {"RMSprop", optimizer_maker<RMSprop>(RMSpropOptions(0.01).momentum(0.5).centered(true), 4)},
      {"Adagrad", optimizer_maker<Adagrad>(AdagradOptions(0.05).lr_decay(0.1).initial_accumulator_value(0.2), 4)},
      {"LBFGS", optimizer_maker<LBFGS>(LBFGSOptions(0.1).max_iter(3).line_search_fn("strong_wolfe"))}};
  for (const auto& [name, optimizer] : optimizers) {
    Choices choices;
    choices.optimizer = optimizer;
    torch::manual_seed(2);
    Training whole(choices);
    whole.steps(4);
    whole.state.save(path);
    const auto middle = whole.bytes();
    whole.steps(4);
    Training resumed(choices);
    ASSERT_TRUE(resumed.state.load(path)) << name;
    EXPECT_EQ(resumed.bytes(), middle) << name;
    resumed.steps(4);
    EXPECT_EQ(resumed.bytes(), whole.bytes()) << name;
  }
}

/// The same groups and parameters, each the other way round.
MakeOptimizer reversed(const MakeOptimizer& make) {
  return [=](const lora::Adapters& adapters) -> std::unique_ptr<torch::optim::Optimizer> {
    auto optimizer = make(adapters);
    auto& groups = optimizer->param_groups();
    std::vector<torch::optim::OptimizerParamGroup> other_way(groups.rbegin(), groups.rend());
    for (auto& group : other_way) std::reverse(group.params().begin(), group.params().end());
    groups.swap(other_way);
    return optimizer;
  };
}

TEST_F(TrainingState, GoesByNamesNotByPositions) {
  torch::manual_seed(3);
  Training whole;
  whole.steps(3);
  whole.state.save(path);
  whole.steps(3);
  Choices choices;
  choices.optimizer = reversed(kAdamW);
  Training resumed(choices);
  ASSERT_TRUE(resumed.state.load(path));
  EXPECT_GT(resumed.optimizer->param_groups()[0].options().get_lr(),
            resumed.optimizer->param_groups()[1].options().get_lr());
  resumed.steps(3);
  auto found = resumed.bytes(), expected = whole.bytes();
  found.erase("rates");
  expected.erase("rates");
  EXPECT_EQ(found, expected);
}

TEST_F(TrainingState, RefusesAnotherOrderWhereTheOptimizerHasOneStateForAll) {
  Choices choices;
  choices.optimizer = optimizer_maker<torch::optim::LBFGS>(torch::optim::LBFGSOptions(0.1).max_iter(2));
  Training whole(choices);
  whole.steps(2);
  whole.state.save(path);
  choices.optimizer = reversed(choices.optimizer);
  Training other(choices);
  expect_refused(other, ElementsAre(HasSubstr("in another order, expected the same order")));
}

TEST_F(TrainingState, ContinuesAFullFineTuning) {
  struct Full {
    Full() { state.tensors(model->named_parameters().pairs()).optimizer(optimizer); }
    void steps(int count) {
      for (int i = 0; i < count; ++i) {
        optimizer.zero_grad();
        model->forward(at::randn({4, 12})).pow(2).mean().backward();
        optimizer.step();
      }
    }
    Mlp model;
    torch::optim::SGD optimizer{model->parameters(), torch::optim::SGDOptions(0.1).momentum(0.9)};
    lora::TrainingState state;
  };
  Full whole;
  whole.steps(2);
  whole.state.save(path);
  whole.steps(2);
  Full resumed;
  ASSERT_TRUE(resumed.state.load(path));
  resumed.steps(2);
  EXPECT_EQ(harness::base_bytes(*resumed.model), harness::base_bytes(*whole.model));
}

TEST_F(TrainingState, ContinuesATorchScriptModel) {
  struct Script {
    Script()
        : model(torch::jit::load(LORA_SOURCE_DIR "/tests/golden/script/mlp_scripted.pt")),
          adapters(lora::inject(model, Choices().config)),
          optimizer(lora::param_groups(adapters, torch::optim::AdamWOptions(0.1))) {
      state.adapters(adapters).optimizer(optimizer);
    }
    void steps(int count) {
      for (int i = 0; i < count; ++i) {
        optimizer.zero_grad();
        model.forward({at::randn({4, 12})}).toTensor().pow(2).mean().backward();
        optimizer.step();
      }
    }
    torch::jit::Module model;
    lora::Adapters adapters;
    torch::optim::AdamW optimizer;
    lora::TrainingState state;
  };
  Script whole;
  whole.steps(2);
  whole.state.save(path);
  whole.steps(2);
  Script resumed;
  ASSERT_TRUE(resumed.state.load(path));
  resumed.steps(2);
  const auto found = resumed.adapters.parameters(), expected = whole.adapters.parameters();
  for (size_t i = 0; i < expected.size(); ++i) EXPECT_TRUE(at::equal(found[i], expected[i]));
}

TEST_F(TrainingState, ContinuesOnAGpuWithItsRandomNumbers) {
  if (!at::globalContext().hasCUDA()) GTEST_SKIP() << "needs a GPU";
  Choices choices;
  choices.device = at::Device(at::kCUDA, 0);
  torch::manual_seed(12);
  Training whole(choices);
  whole.steps(3);
  whole.state.save(path);
  whole.steps(3);
  Training resumed(choices);
  ASSERT_TRUE(resumed.state.load(path));
  resumed.steps(3);
  EXPECT_EQ(resumed.bytes(), whole.bytes());
  EXPECT_EQ(resumed.bytes().count("random/cuda:0"), 1U);
  Training on_the_cpu;
  expect_refused(on_the_cpu, ElementsAre("found random/cuda:0, expected no such part of the run"));
}

TEST_F(TrainingState, KeepsABufferThatIsNoPartOfTheBase) {
  const auto statistics = at::zeros({4});
  Training first;
  first.state.tensors({{"statistics", statistics}});
  statistics.fill_(3);
  first.state.save(path);
  statistics.zero_();
  Training second;
  second.state.tensors({{"statistics", statistics}});
  ASSERT_TRUE(second.state.load(path));
  EXPECT_EQ(statistics.sum().item<float>(), 12);
}

TEST_F(TrainingState, KeepsOptionsThatWereChangedOnTheWay) {
  Training first;
  first.steps(2);
  auto& options = static_cast<torch::optim::AdamWOptions&>(first.optimizer->param_groups()[1].options());
  options.lr(0.123).weight_decay(0.456);
  first.state.save(path);
  Training second;
  ASSERT_TRUE(second.state.load(path));
  for (size_t i = 0; i < 2; ++i) {
    const auto& found = static_cast<torch::optim::AdamWOptions&>(second.optimizer->param_groups()[i].options());
    EXPECT_TRUE(found == static_cast<torch::optim::AdamWOptions&>(first.optimizer->param_groups()[i].options()));
  }
}

TEST_F(TrainingState, KeepsValuesOfEveryType) {
  Training first;
  first.state.set("whole", -7).set("big", int64_t{1} << 60).set("real", 0.1).set("nan", NAN).set("inf", -INFINITY);
  first.state.set("one", 1.0).set("text", "grüße \"a\"").set("empty", std::string()).set("flag", true);
  first.state.set("tensor", at::arange(6).view({2, 3})).set("none", at::empty({0, 2}));
  first.state.save(path);
  Training second;
  second.state.set("gone", 1);
  ASSERT_TRUE(second.state.load(path));
  const auto& state = second.state;
  EXPECT_EQ(state.get<int>("whole"), -7);
  EXPECT_EQ(state.get<int64_t>("big"), int64_t{1} << 60);
  EXPECT_EQ(state.get<double>("real"), 0.1);
  EXPECT_TRUE(std::isnan(state.get<double>("nan")));
  EXPECT_EQ(state.get<double>("inf"), -INFINITY);
  EXPECT_EQ(state.get<double>("one"), 1);
  EXPECT_EQ(state.get<std::string>("text"), "grüße \"a\"");
  EXPECT_EQ(state.get<std::string>("empty"), "");
  EXPECT_TRUE(state.get<bool>("flag"));
  EXPECT_TRUE(at::equal(state.get<at::Tensor>("tensor"), at::arange(6).view({2, 3})));
  EXPECT_EQ(state.get<at::Tensor>("none").sizes(), (at::IntArrayRef{0, 2}));
  EXPECT_THAT([&] { state.get<int>("gone"); }, ThrowsMessage<c10::ValueError>(HasSubstr("no value gone")));
  EXPECT_THAT([&] { state.get<int>("real"); },
              ThrowsMessage<c10::ValueError>(HasSubstr("real as a value of type Double")));
  EXPECT_THAT([&] { state.get<double>("text"); }, ThrowsMessage<c10::ValueError>(HasSubstr("type String")));
}

TEST_F(TrainingState, KeepsTheKernelsOfTheProducts) {
  // Shapes of no run, with choices that measuring would not come to.
  const auto shape = [](int64_t in) {
    lora::ProductShape result;
    result.rows = 64;
    result.in = in;
    result.out = 1 << 20;
    return result;
  };
  const auto fresh = [](Training& training) {
    const auto plan = std::make_shared<lora::ProductPlan>();
    lora::accelerate(*training.model, plan);
    return plan;
  };
  Training training;
  const auto plan = fresh(training);
  lora::ProductPlan::Choices choices;
  choices[shape(1)].kernel = lora::ProductKernel::kOneDnn;
  choices[shape(2)].kernel = lora::ProductKernel::kAten;
  for (auto& [known, choice] : lora::ProductPlan::Choices(choices)) {
    for (auto rows = int64_t{1}; rows < 64; rows *= 2) {  // so that nothing is left to be measured
      auto other = known;
      other.rows = rows;
      choices[other] = choice;
    }
  }
  plan->pin(choices);
  training.state.save(training.folder / "run");

  Training again;
  const auto read = fresh(again);
  ASSERT_TRUE(again.state.load(training.folder / "run"));
  ASSERT_EQ(read->choices().size(), choices.size());
  for (const auto& [known, choice] : read->choices()) EXPECT_EQ(choice.kernel, choices.at(known).kernel);
}

TEST_F(TrainingState, WithoutAFileThereIsNothingToLoad) {
  Training training;
  const auto before = training.bytes();
  EXPECT_FALSE(training.state.load(path));
  EXPECT_FALSE(training.state.load(folder / "no/such/folder"));
  EXPECT_EQ(training.bytes(), before);
}

TEST_F(TrainingState, NamesEverythingThatIsOfAnotherRun) {
  Training saved;
  saved.steps(2);
  saved.state.setting("data", "train.txt").save(path);
  Choices choices;
  choices.config.r(4).lora_dropout(0.5).target_modules({"up"});
  choices.schedule.warmup_steps(3);
  choices.base_seed = 6;
  choices.seed = 2;
  choices.optimizer = optimizer_maker<torch::optim::AdamW>(torch::optim::AdamWOptions(0.04), 16);
  Training other(choices);
  other.adapters->set_active({"default"});
  const std::string node = ".lora_default.lora_";
  expect_refused(other, UnorderedElementsAre(
                            HasSubstr(" for base hash"), "found 0.25, expected 0.5 for adapters.default.dropout",
                            "found 2.3333333333333335, expected 1.75 for adapters.default.scaling",
                            "found [\"default\",\"other\"], expected [\"default\"] for active",
                            "found 2, expected 3 for schedule.warmup_steps", "found 1, expected 2 for settings.seed",
                            "found \"train.txt\", expected nothing for settings.data",
                            "found Float [3, 12], expected Float [4, 12] for tensors/up" + node + "A",
                            "found Float [20, 3], expected Float [20, 4] for tensors/up" + node + "B",
                            "found tensors/down" + node + "A, expected no such part of the run",
                            "found tensors/down" + node + "B, expected no such part of the run",
                            "found down" + node + "A in the optimizer, expected it not there",
                            "found down" + node + "B in the optimizer, expected it not there"));
}

TEST_F(TrainingState, RefusesAnotherBaseLearningRate) {
  Training saved;
  saved.steps(2);
  saved.state.save(path);
  Choices choices;
  choices.optimizer = optimizer_maker<torch::optim::AdamW>(torch::optim::AdamWOptions(0.03).weight_decay(0.1), 8);
  Training other(choices);
  expect_refused(other, ElementsAre("found the base learning rate 0.48, expected 0.24 for the parameter group of "
                                    "up.lora_default.lora_B"));
}

TEST_F(TrainingState, RefusesAnotherOptimizerAndOtherGroups) {
  Training saved;
  saved.steps(2);
  saved.state.save(path);
  Choices choices;
  choices.optimizer = optimizer_maker<torch::optim::Adam>(torch::optim::AdamOptions(0.03), 16);
  Training adam(choices);
  expect_refused(adam, ElementsAre("found \"torch::optim::AdamW\", expected \"torch::optim::Adam\" for optimizer"));
  choices.optimizer = optimizer_maker<torch::optim::AdamW>(torch::optim::AdamWOptions(0.03), 1);
  Training one_group(choices);
  expect_refused(one_group, ::testing::Contains(HasSubstr("found 2 parameter groups, expected 1")));
  choices.optimizer = [](const lora::Adapters& adapters) {
    auto optimizer = kAdamW(adapters);
    auto& groups = optimizer->param_groups();
    groups[1].params().push_back(groups[0].params().back());
    groups[0].params().pop_back();
    return optimizer;
  };
  Training moved(choices);
  expect_refused(moved,
                 UnorderedElementsAre(HasSubstr("found down.lora_other.lora_A in the parameter group of up"),
                                      HasSubstr("found down.lora_other.lora_A in another parameter group than")));
}

TEST_F(TrainingState, RefusesAFileWithoutPartsOfTheRun) {
  Mlp model;
  const auto adapters = lora::inject(*model, Choices().config);
  lora::TrainingState().adapters(adapters).save(path);
  Training training;
  expect_refused(training, ::testing::AllOf(::testing::Contains(HasSubstr("expected \"torch::optim::AdamW\"")),
                                            ::testing::Contains(HasSubstr("found no tensors/down.lora_other.lora_A"))));
  adapters.save(folder / "peft");
  path = folder / "peft/adapter_model.safetensors";
  expect_refused(training, ElementsAre(HasSubstr("found no training state")));
  path = folder.path();
  expect_refused(training, ElementsAre(HasSubstr("")));
}

TEST_F(TrainingState, DamageIsFoundAndChangesNothing) {
  torch::manual_seed(8);
  Training training;
  training.steps(2);
  training.state.save(path);
  const auto saved = training.bytes();
  training.step();
  const auto before = training.bytes();
  const auto damaged = harness::damage(path, [&] {
    try {
      training.state.load(path);
    } catch (...) {
      EXPECT_EQ(training.bytes(), before);
      throw;
    }
    EXPECT_EQ(training.bytes(), saved) << "the whole file";
    training.step();
    ASSERT_EQ(training.bytes(), before);
  });
  EXPECT_EQ(damaged.cut + damaged.flipped, 0) << "checksums find everything";
}

TEST_F(TrainingState, RefusesALaterVersion) {
  Training training;
  training.state.save(path);
  auto file = lora::load_safetensors_with_metadata(path);
  file.metadata["lora.training_state"] = "2";
  lora::add_checksums(file.tensors, file.metadata);
  lora::save_safetensors(file.tensors, path, file.metadata);
  expect_refused(training, ElementsAre("found a training state of version 2, expected version 1"));
}

TEST_F(TrainingState, KeepsTheOldFileWhereSavingFails) {
  Training training;
  training.steps(1);
  training.state.save(path);
  const auto old = read_bytes(path);
  {
    const at::NoGradGuard no_grad;
    training.adapters->parameters()[1].fill_(NAN);
  }
  EXPECT_THAT([&] { training.state.save(path); },
              ThrowsMessage<c10::ValueError>(HasSubstr("NaN or infinite values in up.lora_default.lora_B")));
  EXPECT_EQ(read_bytes(path), old);
  ASSERT_TRUE(training.state.load(path));
  EXPECT_THAT(problems_of([&] { training.state.save(folder / "none/run"); }), ElementsAre(HasSubstr("folder")));
  EXPECT_THAT(problems_of([&] { training.state.set("text", "\xff").save(path); }), ElementsAre(HasSubstr("UTF-8")));
  EXPECT_EQ(read_bytes(path), old);
}

TEST_F(TrainingState, RefusesARunThatIsNotWhole) {
  Training training;
  training.state.save(path);
  const auto save = [&] { training.state.save(path); };
  const auto load = [&] { training.state.load(path); };
  training.adapters->merge({"other"});
  EXPECT_THAT(save, ThrowsMessage<lora::StateError>(HasSubstr("merged adapters")));
  EXPECT_THAT(load, ThrowsMessage<lora::StateError>(HasSubstr("merged adapters")));
  training.adapters->unmerge();
  Training second;
  training.state.schedule(*second.schedule);
  EXPECT_THAT(save, ThrowsMessage<c10::ValueError>(HasSubstr("schedule of another optimizer")));
  training.state.schedule(*training.schedule);
  training.state.optimizer(*second.optimizer).schedule(*second.schedule);
  EXPECT_THAT(save, ThrowsMessage<c10::ValueError>(HasSubstr("parameter of shape [3, 12] without a name")));
  EXPECT_THAT(load, ThrowsMessage<c10::ValueError>(HasSubstr("parameter of shape [3, 12] without a name")));
  training.state.optimizer(*training.optimizer).schedule(*training.schedule);
  training.state.tensors({{"up.lora_default.lora_A", at::zeros({1})}});
  EXPECT_THAT(save, ThrowsMessage<c10::ValueError>(HasSubstr("the tensor name up.lora_default.lora_A twice")));
  second.adapters->unload();
  EXPECT_THAT([&] { second.state.save(path); }, ThrowsMessage<lora::StateError>(HasSubstr("unloaded")));
}

}  // namespace
}  // namespace training_state_test
