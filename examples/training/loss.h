#pragma once

#include <ATen/ATen.h>
#include <torch/types.h>
#include <torch/utils.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

#include "models/gpt2.h"   // defines: GPT2LMHeadModel, GPT2Inputs
#include "text/batches.h"  // defines: Batch

/// What the model reads for tokens [batch, length]: them alone, or learned vectors in front of them.
using Reading = std::function<GPT2Inputs(const torch::Tensor& input_ids)>;

inline GPT2Inputs read_tokens(const torch::Tensor& input_ids) { return {input_ids, {}, {}}; }

/// Mean cross entropy (nats) of the batch's labelled tokens; the head sees the rows that have a label and no others.
inline torch::Tensor text_loss(GPT2LMHeadModel& model, const Batch& batch, const Reading& read = read_tokens) {
  const auto last = batch.input_ids.size(1) - 1;
  const auto hidden =
      model->transformer->forward(read(batch.input_ids.slice(1, 0, last)));  // position i predicts token i + 1
  const auto in_front = hidden.size(1) - last;                               // learned embeddings have no label
  const auto labels = at::constant_pad_nd(batch.labels.slice(1, 1), {in_front, 0}, Batch::kIgnored).reshape({-1});
  const auto rows = (labels != Batch::kIgnored).nonzero().squeeze(1);
  const auto logits = model->lm_head(hidden.reshape({-1, hidden.size(2)}).index_select(0, rows));
  return at::cross_entropy_loss(logits.to(torch::kFloat32), labels.index_select(0, rows));
}

/// Mean loss (nats) of a token over all batches, without dropout; exp of it is the perplexity.
inline double evaluate(GPT2LMHeadModel& model, const std::vector<Batch>& batches, const Reading& read = read_tokens) {
  torch::NoGradGuard no_grad;
  const bool was_training = model->is_training();
  model->eval();
  double sum = 0.0, tokens = 0.0;
  for (const auto& batch : batches) {
    const auto count = (batch.labels != Batch::kIgnored).sum().item<double>();
    sum += text_loss(model, batch, read).item<double>() * count;
    tokens += count;
  }
  model->train(was_training);
  return sum / tokens;
}
