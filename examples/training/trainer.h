#pragma once

#include <torch/nn/utils/clip_grad.h>
#include <torch/optim/optimizer.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "models/gpt2.h"        // defines: GPT2LMHeadModel
#include "text/batches.h"       // defines: Batch, BatchStream
#include "training/loss.h"      // defines: text_loss, evaluate
#include "training/progress.h"  // defines: Progress

/// A training whose loss is no number any more.
class DivergedError : public std::runtime_error {
 public:
  explicit DivergedError(std::size_t step)
      : std::runtime_error("the loss is not finite at step " + std::to_string(step) + "; a lower --lr may help") {}
};

struct CurvePoint {
  double step, loss;
};

struct TrainOptions {
  std::size_t steps = 300;
  std::size_t warmup = 20;       // steps of linear warm-up; a linear decay to zero follows
  std::size_t evaluations = 10;  // evenly spaced over the steps, the last one after the last step
  double clip_norm = 1.0;        // of the whole gradient
};

struct TrainReport {
  std::vector<CurvePoint> train;  // one a step
  std::vector<CurvePoint> dev;
  double seconds = 0.0;     // without the evaluations
  std::int64_t tokens = 0;  // read, without padding
};

/// Factor on every group's learning rate at `step`, counted from 0.
inline double warmup_then_linear(std::size_t step, std::size_t warmup, std::size_t steps) {
  if (step < warmup) return static_cast<double>(step + 1) / static_cast<double>(warmup);
  return static_cast<double>(steps - step) / static_cast<double>(steps - warmup);
}

/// Takes `options.steps` optimizer steps on `stream`; the model is left in evaluation mode.
inline TrainReport train(GPT2LMHeadModel& model, torch::optim::Optimizer& optimizer, BatchStream& stream,
                         const std::vector<Batch>& dev, const TrainOptions& options, Progress& progress) {
  using Clock = std::chrono::steady_clock;
  TrainReport report;
  std::vector<double> rates;
  std::vector<torch::Tensor> trained;
  for (auto& group : optimizer.param_groups()) {
    rates.push_back(group.options().get_lr());
    trained.insert(trained.end(), group.params().begin(), group.params().end());
  }
  const auto device = model->lm_head->weight.device();
  const auto every = std::max<std::size_t>(1, options.steps / std::max<std::size_t>(1, options.evaluations));
  report.dev.push_back({0.0, evaluate(model, dev)});
  model->train();
  for (std::size_t step = 0; step < options.steps; ++step) {
    const auto begin = Clock::now();
    const auto factor = warmup_then_linear(step, options.warmup, options.steps);
    for (std::size_t group = 0; group < rates.size(); ++group) {
      optimizer.param_groups()[group].options().set_lr(rates[group] * factor);
    }
    const auto batch = stream.next().to(device);
    optimizer.zero_grad();
    const auto loss = text_loss(model, batch);
    loss.backward();
    torch::nn::utils::clip_grad_norm_(trained, options.clip_norm);
    optimizer.step();
    const auto value = loss.item<double>();
    if (!std::isfinite(value)) throw DivergedError(step + 1);
    report.tokens += batch.tokens;
    report.seconds += std::chrono::duration<double>(Clock::now() - begin).count();
    report.train.push_back({static_cast<double>(step + 1), value});
    progress.show(step + 1, value, static_cast<double>(report.tokens) / report.seconds, report.seconds);
    if ((step + 1) % every == 0 || step + 1 == options.steps) {
      report.dev.push_back({static_cast<double>(step + 1), evaluate(model, dev)});
    }
  }
  progress.finish();
  model->eval();
  return report;
}
