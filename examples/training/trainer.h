#pragma once

#include <lora/train/schedule.h>  // defines: Schedule
#include <torch/nn/utils/clip_grad.h>
#include <torch/optim/optimizer.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "models/gpt2.h"        // defines: GPT2LMHeadModel
#include "text/batches.h"       // defines: Batch, BatchStream
#include "training/loss.h"      // defines: text_loss, evaluate, Reading
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
  std::size_t evaluations = 10;  // evenly spaced over the steps, the last one after the last step
  double clip_norm = 1.0;        // of the whole gradient
  Reading read = read_tokens;    // what the model reads of a batch
};

struct TrainReport {
  std::vector<CurvePoint> train;  // one a step
  std::vector<CurvePoint> dev;
  double seconds = 0.0;     // without the evaluations
  std::int64_t tokens = 0;  // read, without padding
};

/// Takes optimizer steps on `stream` up to `options.steps`; the model is left in evaluation mode. `report` is that of
/// the steps already taken; `after_step` is called with it after each further one.
inline TrainReport train(GPT2LMHeadModel& model, torch::optim::Optimizer& optimizer, lora::Schedule& schedule,
                         BatchStream& stream, const std::vector<Batch>& dev, const TrainOptions& options,
                         Progress& progress, TrainReport report = {},
                         const std::function<void(const TrainReport&)>& after_step = {}) {
  using Clock = std::chrono::steady_clock;
  std::vector<torch::Tensor> trained;
  for (const auto& group : optimizer.param_groups()) {
    trained.insert(trained.end(), group.params().begin(), group.params().end());
  }
  const auto device = model->lm_head->weight.device();
  const auto every = std::max<std::size_t>(1, options.steps / std::max<std::size_t>(1, options.evaluations));
  if (report.dev.empty()) report.dev.push_back({0.0, evaluate(model, dev, options.read)});
  model->train();
  for (auto step = report.train.size(); step < options.steps; ++step) {
    const auto begin = Clock::now();
    const auto batch = stream.next().to(device);
    optimizer.zero_grad();
    const auto loss = text_loss(model, batch, options.read);
    loss.backward();
    torch::nn::utils::clip_grad_norm_(trained, options.clip_norm);
    optimizer.step();
    schedule.step();
    const auto value = loss.item<double>();
    if (!std::isfinite(value)) throw DivergedError(step + 1);
    report.tokens += batch.tokens;
    report.seconds += std::chrono::duration<double>(Clock::now() - begin).count();
    report.train.push_back({static_cast<double>(step + 1), value});
    progress.show(step + 1, value, static_cast<double>(report.tokens) / report.seconds, report.seconds);
    if ((step + 1) % every == 0 || step + 1 == options.steps) {
      report.dev.push_back({static_cast<double>(step + 1), evaluate(model, dev, options.read)});
    }
    if (after_step) after_step(report);
  }
  progress.finish();
  model->eval();
  return report;
}
