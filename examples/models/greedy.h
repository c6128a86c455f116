#pragma once

#include <torch/types.h>
#include <torch/utils.h>

#include <cstdint>
#include <vector>

#include "models/gpt2.h"  // defines: GPT2LMHeadModel, GPT2Cache

/// The most likely continuation of `tokens`, token by token, up to `end` (left out), `limit` tokens or the last
/// position.
inline std::vector<std::int64_t> greedy(GPT2LMHeadModel& model, const std::vector<std::int64_t>& tokens,
                                        std::int64_t end, std::size_t limit) {
  torch::NoGradGuard no_grad;
  const auto options = torch::TensorOptions().dtype(torch::kInt64).device(model->lm_head->weight.device());
  const auto room = model->config.n_positions - static_cast<std::int64_t>(tokens.size());
  GPT2Cache cache;
  std::vector<std::int64_t> written;
  auto input_ids = torch::tensor(tokens, torch::kInt64).to(options).unsqueeze(0);
  while (written.size() < limit && static_cast<std::int64_t>(written.size()) < room) {
    const auto next = model->forward(input_ids, &cache).select(1, -1).argmax(-1);
    const auto token = next.item<std::int64_t>();
    if (token == end) break;
    written.push_back(token);
    input_ids = next.unsqueeze(0);
  }
  return written;
}
