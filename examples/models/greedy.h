#pragma once

#include <torch/types.h>
#include <torch/utils.h>

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "models/gpt2.h"  // defines: GPT2LMHeadModel, GPT2Inputs, GPT2Cache

/// The most likely continuation of one sequence of tokens or embeddings, behind a past or none, token by token, up to
/// `end` (left out), `limit` tokens or the last position.
inline std::vector<std::int64_t> greedy(GPT2LMHeadModel& model, GPT2Inputs inputs, std::int64_t end,
                                        std::size_t limit) {
  torch::NoGradGuard no_grad;
  GPT2Cache cache{std::move(inputs.past_key_values)};
  inputs.past_key_values.clear();
  const auto length = (inputs.input_ids.defined() ? inputs.input_ids : inputs.inputs_embeds).size(1);
  const auto room = model->config.n_positions - cache.length() - length;
  std::vector<std::int64_t> written;
  while (written.size() < limit && static_cast<std::int64_t>(written.size()) < room) {
    const auto next = model->forward(inputs, &cache).select(1, -1).argmax(-1);
    const auto token = next.item<std::int64_t>();
    if (token == end) break;
    written.push_back(token);
    inputs = {next.unsqueeze(0), {}, {}};
  }
  return written;
}

/// The same behind tokens alone.
inline std::vector<std::int64_t> greedy(GPT2LMHeadModel& model, const std::vector<std::int64_t>& tokens,
                                        std::int64_t end, std::size_t limit) {
  const auto options = torch::TensorOptions().dtype(torch::kInt64).device(model->lm_head->weight.device());
  return greedy(model, GPT2Inputs{torch::tensor(tokens, torch::kInt64).to(options).unsqueeze(0), {}, {}}, end, limit);
}
