// Schedules against transformers' own, on groups with a learning rate each.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/lora.h>
#include <torch/optim/adamw.h>
#include <torch/optim/sgd.h>

#include <cmath>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "harness/temp_folder.h"
#include "oracles/models.h"

namespace schedule_test {
namespace {

using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

std::vector<double> rates(const torch::optim::Optimizer& optimizer) {
  std::vector<double> result;
  for (const auto& group : optimizer.param_groups()) result.push_back(group.options().get_lr());
  return result;
}

/// An optimizer with a group for each learning rate.
torch::optim::SGD optimizer_of(const std::vector<double>& lrs) {
  std::vector<torch::optim::OptimizerParamGroup> groups;
  for (const auto lr : lrs) {
    groups.emplace_back(std::vector<at::Tensor>{at::zeros({2}).requires_grad_(true)},
                        std::make_unique<torch::optim::SGDOptions>(lr));
  }
  return torch::optim::SGD(groups, torch::optim::SGDOptions(1e-3));
}

TEST(Schedule, IsThatOfTransformers) {
  const std::map<std::string, lora::ScheduleType> types{{"constant", lora::ScheduleType::kConstant},
                                                        {"linear", lora::ScheduleType::kLinear},
                                                        {"cosine", lora::ScheduleType::kCosine}};
  const auto rows = nlohmann::json::parse(read_bytes(LORA_SOURCE_DIR "/tests/golden/schedules.json"));
  ASSERT_EQ(rows.size(), 18U);
  for (const auto& row : rows) {
    const auto options = lora::ScheduleOptions()
                             .type(types.at(row["type"]))
                             .warmup_steps(row["warmup_steps"])
                             .total_steps(row["total_steps"])
                             .num_cycles(row["num_cycles"]);
    const auto base = row["base_lrs"].get<std::vector<double>>();
    auto optimizer = optimizer_of(base);
    lora::Schedule schedule(optimizer, options);
    EXPECT_EQ(schedule.base_lrs(), base);
    EXPECT_EQ(lora::schedule_name(options.type()), row["type"]);
    for (const auto& expected : row["lrs"]) {
      const auto step = schedule.current_step();
      for (size_t group = 0; group < base.size(); ++group) {
        const auto lr = expected[group].get<double>();
        EXPECT_NEAR(rates(optimizer)[group], lr, 1e-7 * lr) << row["type"] << ", step " << step;
        EXPECT_NEAR(base[group] * lora::schedule_factor(options, step), lr, 1e-7 * lr);
      }
      optimizer.step();
      schedule.step();
    }
  }
}

TEST(Schedule, KeepsTheRatioOfLoraPlus) {
  Mlp model;
  const auto adapters = lora::inject(*model, lora::LoraConfig().target_modules({"up"}));
  const auto adamw = torch::optim::AdamWOptions(1e-3);
  torch::optim::AdamW optimizer(lora::param_groups(adapters, adamw, lora::LoraPlusOptions().lr_ratio(16)));
  lora::Schedule schedule(optimizer,
                          lora::ScheduleOptions().type(lora::ScheduleType::kCosine).warmup_steps(2).total_steps(9));
  EXPECT_EQ(rates(optimizer), (std::vector<double>{0, 0}));
  for (int step = 1; step < 9; ++step) {
    schedule.step();
    const auto found = rates(optimizer);
    ASSERT_GT(found[0], 0);
    EXPECT_DOUBLE_EQ(found[1], 16 * found[0]);
  }
}

TEST(Schedule, GoesToAnyStep) {
  const auto options = lora::ScheduleOptions().type(lora::ScheduleType::kLinear).warmup_steps(3).total_steps(11);
  auto walked = optimizer_of({0.5, 2});
  lora::Schedule schedule(walked, options);
  for (int step = 0; step < 7; ++step) schedule.step();
  auto jumped = optimizer_of({0.5, 2});
  lora::Schedule(jumped, options).go_to(7);
  EXPECT_EQ(rates(jumped), rates(walked));
  schedule.go_to(0);
  EXPECT_EQ(rates(walked), (std::vector<double>{0, 0}));
}

TEST(Schedule, RefusesOptionsThatMeanNothing) {
  auto optimizer = optimizer_of({1});
  const auto with = [&](const lora::ScheduleOptions& options) {
    return [&optimizer, options] { lora::Schedule schedule(optimizer, options); };
  };
  using Options = lora::ScheduleOptions;
  EXPECT_THAT(with(Options().warmup_steps(-1)), ThrowsMessage<c10::ValueError>(HasSubstr("warmup_steps = -1")));
  EXPECT_THAT(with(Options().total_steps(-1)), ThrowsMessage<c10::ValueError>(HasSubstr("total_steps = -1")));
  EXPECT_THAT(with(Options().type(lora::ScheduleType::kLinear)),
              ThrowsMessage<c10::ValueError>(HasSubstr("total_steps = 0, expected 1 or more for a linear schedule")));
  EXPECT_THAT(with(Options().type(lora::ScheduleType::kCosine).total_steps(5).num_cycles(NAN)),
              ThrowsMessage<c10::ValueError>(HasSubstr("num_cycles = nan")));
  EXPECT_THAT([] { lora::schedule_factor(Options(), -2); }, ThrowsMessage<c10::ValueError>(HasSubstr("step -2")));
  EXPECT_EQ(rates(optimizer), (std::vector<double>{1}));
}

TEST(Schedule, RefusesGroupsThatCameLater) {
  auto optimizer = optimizer_of({1, 2});
  lora::Schedule schedule(optimizer, lora::ScheduleOptions().warmup_steps(4));
  optimizer.add_param_group(torch::optim::OptimizerParamGroup({at::zeros({1}).requires_grad_(true)}));
  EXPECT_THAT([&] { schedule.step(); }, ThrowsMessage<lora::StateError>(HasSubstr("found 3 parameter groups")));
}

}  // namespace
}  // namespace schedule_test
