// A small frozen GPT-2, and what it decodes behind virtual tokens.
#pragma once

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "examples/models/gpt2.h"
#include "examples/models/greedy.h"
#include "harness/values.h"

namespace harness {

inline GPT2LMHeadModel small_gpt2() {
  at::manual_seed(5);
  GPT2Config config;
  config.vocab_size = 50;
  config.n_positions = 32;
  config.n_embd = 24;
  config.n_layer = 2;
  config.n_head = 3;
  config.initializer_range = 0.3;
  GPT2LMHeadModel model(config);
  for (auto& parameter : model->parameters()) parameter.set_requires_grad(false);
  return model;
}

/// Token ids for it, [2, 9].
inline at::Tensor small_ids() { return (normal({2, 9}, 3) * 1e6).to(at::kLong).remainder(50); }

/// Greedy decoding behind virtual tokens writes what the model's logits say for the whole text, another text than
/// without them, and stops after `most` tokens, where the positions end.
inline void expect_decodes_as_it_reads(GPT2LMHeadModel& model,
                                       const std::function<GPT2Inputs(const std::vector<int64_t>&)>& inputs,
                                       size_t most) {
  std::vector<int64_t> tokens{1, 2, 3};
  const auto written = greedy(model, inputs(tokens), /*end=*/-1, 6);
  ASSERT_EQ(written.size(), 6U);
  for (const auto token : written) {
    EXPECT_EQ(token, model->forward(inputs(tokens)).select(1, -1).argmax().item<int64_t>());
    tokens.push_back(token);
  }
  EXPECT_NE(written, greedy(model, {1, 2, 3}, /*end=*/-1, 6));
  EXPECT_EQ(greedy(model, inputs({1, 2, 3}), /*end=*/-1, 100).size(), most);
}

}  // namespace harness
