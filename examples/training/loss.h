#pragma once

#include <ATen/ATen.h>
#include <torch/types.h>
#include <torch/utils.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "models/gpt2.h"   // defines: GPT2LMHeadModel
#include "text/batches.h"  // defines: Batch

/// Mean cross entropy (nats) of the batch's labelled tokens; the head sees the rows that have a label and no others.
inline torch::Tensor text_loss(GPT2LMHeadModel& model, const Batch& batch) {
  const auto last = batch.input_ids.size(1) - 1;
  const auto hidden =
      model->transformer->forward(batch.input_ids.slice(1, 0, last));  // position i predicts token i + 1
  const auto labels = batch.labels.slice(1, 1).reshape({-1});
  const auto rows = (labels != Batch::kIgnored).nonzero().squeeze(1);
  const auto logits = model->lm_head(hidden.reshape({-1, hidden.size(2)}).index_select(0, rows));
  return at::cross_entropy_loss(logits.to(torch::kFloat32), labels.index_select(0, rows));
}

/// Mean loss (nats) of a token over all batches, without dropout; exp of it is the perplexity.
inline double evaluate(GPT2LMHeadModel& model, const std::vector<Batch>& batches) {
  torch::NoGradGuard no_grad;
  const bool was_training = model->is_training();
  model->eval();
  double sum = 0.0, tokens = 0.0;
  for (const auto& batch : batches) {
    const auto count = (batch.labels != Batch::kIgnored).sum().item<double>();
    sum += text_loss(model, batch).item<double>() * count;
    tokens += count;
  }
  model->train(was_training);
  return sum / tokens;
}
