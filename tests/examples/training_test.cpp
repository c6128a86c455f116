#include <gtest/gtest.h>
#include <torch/optim/adamw.h>
#include <torch/optim/sgd.h>

#include <cmath>
#include <string>
#include <vector>

#include "examples/training/line_plot.h"
#include "examples/training/peak_memory.h"
#include "examples/training/trainer.h"
#include "harness/sanitizer.h"
#include "harness/temp_folder.h"

namespace training_test {
namespace {

GPT2LMHeadModel tiny_model() {
  torch::manual_seed(3);
  GPT2Config config;
  config.vocab_size = 20;
  config.n_positions = 16;
  config.n_embd = 16;
  config.n_layer = 1;
  config.n_head = 2;
  return GPT2LMHeadModel(config);
}

/// Token t is followed by t + 1.
std::vector<Sample> counting_samples() {
  std::vector<Sample> samples;
  for (std::int64_t first = 0; first < 12; ++first)
    samples.push_back({{first, first + 1, first + 2, first + 3, first + 4}, 1});
  return samples;
}

TEST(Loss, IsThatOfAllLogitsOnTheLabelledRows) {
  auto model = tiny_model();
  const auto batch = collate({{{1, 2, 3, 4}, 2}, {{5, 6}, 1}}, {0, 1});
  const auto logits = model->forward(batch.input_ids).slice(1, 0, 3).reshape({-1, 20});
  const auto expected = at::cross_entropy_loss(logits, batch.labels.slice(1, 1).reshape({-1}));
  EXPECT_NEAR(text_loss(model, batch).item<double>(), expected.item<double>(), 1e-5);
}

TEST(Loss, WhatStandsInFrontHasNoLabel) {
  auto model = tiny_model();
  const auto batch = collate({{{1, 2, 3, 4}, 2}, {{5, 6}, 1}}, {0, 1});
  const auto in_front = model->transformer->wte(torch::tensor({{7, 8}, {7, 8}}));
  const Reading read = [&](const torch::Tensor& ids) {
    return GPT2Inputs{{}, torch::cat({in_front, model->transformer->wte(ids)}, 1), {}};
  };
  const auto tokens = collate({{{7, 8, 1, 2, 3, 4}, 4}, {{7, 8, 5, 6}, 3}}, {0, 1});
  EXPECT_NEAR(text_loss(model, batch, read).item<double>(), text_loss(model, tokens).item<double>(), 1e-5);
  GPT2Cache cache;
  model->transformer->forward(torch::tensor({{7, 8}, {7, 8}}), &cache);
  const Reading behind = [&](const torch::Tensor& ids) { return GPT2Inputs{ids, {}, cache.layers}; };
  EXPECT_NEAR(text_loss(model, batch, behind).item<double>(), text_loss(model, tokens).item<double>(), 1e-5);
}

TEST(Loss, EvaluationWeighsTokensNotBatches) {
  auto model = tiny_model();
  const std::vector<Sample> samples = {{{1, 2, 3, 4, 5, 6}, 1}, {{7, 8}, 1}, {{9, 3, 1}, 1}};
  EXPECT_NEAR(evaluate(model, batches_in_order(samples, 3)), evaluate(model, batches_in_order(samples, 1)), 1e-5);
}

lora::ScheduleOptions linear(std::int64_t warmup, std::int64_t steps) {
  return lora::ScheduleOptions().type(lora::ScheduleType::kLinear).warmup_steps(warmup).total_steps(steps);
}

TEST(Training, LearnsToCount) {
  auto model = tiny_model();
  torch::optim::AdamW optimizer(model->transformer->parameters(), torch::optim::AdamWOptions(1e-2));
  BatchStream stream(counting_samples(), 4, 1);
  const auto dev = batches_in_order(counting_samples(), 12);
  TrainOptions options;
  options.steps = 150;
  options.evaluations = 3;
  lora::Schedule schedule(optimizer, linear(20, 150));
  Progress progress("counting", options.steps);
  std::vector<double> rates;
  const auto report = train(model, optimizer, schedule, stream, dev, options, progress, {}, [&](const TrainReport&) {
    rates.push_back(optimizer.param_groups()[0].options().get_lr());
  });
  ASSERT_EQ(rates.size(), 150U);
  EXPECT_DOUBLE_EQ(rates[9], 0.5e-2);
  EXPECT_DOUBLE_EQ(rates[84], 0.5e-2);
  EXPECT_EQ(rates.back(), 0);
  EXPECT_EQ(report.train.size(), 150U);
  ASSERT_EQ(report.dev.size(), 4U);
  EXPECT_EQ(report.dev.back().step, 150);
  EXPECT_EQ(report.tokens, 150 * 4 * 5);
  EXPECT_GT(report.dev.front().loss, 2.5);
  EXPECT_LT(report.dev.back().loss, 0.3);
  EXPECT_FALSE(model->is_training());
}

TEST(Training, StopsWhenTheLossIsNoNumber) {
  auto model = tiny_model();
  torch::optim::SGD optimizer(model->transformer->parameters(), torch::optim::SGDOptions(1e38));
  BatchStream stream(counting_samples(), 4, 1);
  lora::Schedule schedule(optimizer, {});
  const TrainOptions options;
  Progress progress("diverging", options.steps);
  EXPECT_THROW(train(model, optimizer, schedule, stream, batches_in_order(counting_samples(), 12), options, progress),
               DivergedError);
}

TEST(PeakMemory, SeesALargeTensorAndForgetsItOnReset) {
  if (harness::kAddressSanitizer) GTEST_SKIP() << "the address sanitizer keeps freed memory";
  reset_peak_memory();
  const auto before = peak_memory_bytes();
  constexpr std::int64_t kBytes = 200'000'000;
  { const auto large = torch::ones({kBytes / 4}); }
  EXPECT_GT(peak_memory_bytes(), before + kBytes / 2);
  reset_peak_memory();
  EXPECT_LT(peak_memory_bytes(), before + kBytes / 2);
}

TEST(LinePlot, HoldsEachCurve) {
  const TempFolder folder;
  const auto path = folder / "plot.svg";
  write_line_plot(path, "title", "x", "y", {{"one", {{0, 2}, {10, 1}}}, {"two", {{0, 3}, {10, 0.5}}, true, true}});
  const auto svg = read_bytes(path);
  for (const auto* const part : {"<svg", ">title<", ">one<", ">two<", "<polyline", "<circle", "</svg>"}) {
    EXPECT_NE(svg.find(part), std::string::npos) << part;
  }
  EXPECT_THROW(write_line_plot(folder / "none/plot.svg", "", "", "", {{"one", {{0, 1}}}}), FileError);
}

}  // namespace
}  // namespace training_test
