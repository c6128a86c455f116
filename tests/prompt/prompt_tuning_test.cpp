// lora::PromptTuning: embeddings in front of a batch, their gradients and labels, and GPT-2 behind them, alone and with
// LoRA, against PEFT's values.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/adapters.h>
#include <lora/prompt/prompt_tuning.h>
#include <torch/optim/adamw.h>
#include <torch/serialize.h>

#include <cmath>
#include <cstdint>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "examples/models/gpt2.h"
#include "examples/models/gpt2_checkpoint.h"
#include "harness/dense_oracle.h"
#include "harness/message_of.h"
#include "harness/small_gpt2.h"
#include "harness/values.h"

namespace prompt_tuning_test {
namespace {

using harness::expect_decodes_as_it_reads;
using harness::message_of;
using harness::relative_error;
using harness::small_gpt2;
using harness::small_ids;
using lora::PromptTuning;
using lora::PromptTuningConfig;
using testing::HasSubstr;

constexpr double kTolerance = 1e-5;
const std::string kGolden = LORA_SOURCE_DIR "/tests/golden/";

PromptTuningConfig config(int64_t tokens, int64_t token_dim) {
  return PromptTuningConfig().num_virtual_tokens(tokens).token_dim(token_dim);
}

PromptTuning small_prompt() { return PromptTuning(config(4, 24), harness::normal({4, 24}, 8, at::kFloat)); }

at::Tensor logits_of(GPT2LMHeadModel& model, const PromptTuning& prompt, const at::Tensor& ids) {
  return model->forward(GPT2Inputs{{}, prompt->prepend(model->transformer->wte(ids)), {}});
}

/// Of the tokens, the first of which the last virtual token predicts.
at::Tensor loss_of(const at::Tensor& logits, const PromptTuning& prompt, const at::Tensor& ids) {
  const auto labels = prompt->pad_labels(ids);
  return at::cross_entropy_loss(logits.slice(1, 0, -1).reshape({-1, logits.size(2)}), labels.slice(1, 1).reshape(-1));
}

TEST(PromptTuning, StandsInFrontOfEveryRowOfABatch) {
  const auto prompt = small_prompt();
  const auto rows = prompt->embedding->weight.detach();
  const auto batch = prompt->embeddings(3);
  ASSERT_EQ(batch.sizes(), at::IntArrayRef({3, 4, 24}));
  EXPECT_EQ(batch.const_data_ptr(), rows.const_data_ptr());
  EXPECT_EQ(batch.stride(0), 0);
  EXPECT_EQ(prompt->embeddings(3, at::kHalf).scalar_type(), at::kHalf);
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const auto tokens = harness::normal({3, 6, 24}, 9, dtype);
    const auto joined = prompt->prepend(tokens);
    ASSERT_EQ(joined.sizes(), at::IntArrayRef({3, 10, 24}));
    EXPECT_EQ(joined.scalar_type(), dtype);
    for (int64_t b = 0; b < 3; ++b) EXPECT_TRUE(at::equal(joined[b].narrow(0, 0, 4), rows.to(dtype)));
    EXPECT_TRUE(at::equal(joined.narrow(1, 4, 6), tokens));
  }
}

TEST(PromptTuning, AddsTheGradientsOfABatchUp) {
  const auto prompt = small_prompt();
  const auto weights = harness::normal({3, 10, 24}, 2, at::kFloat);
  (prompt->prepend(at::zeros({3, 6, 24})) * weights).sum().backward();
  EXPECT_LT(relative_error(prompt->embedding->weight.grad(), weights.narrow(1, 0, 4).sum(0)), 1e-6);
}

TEST(PromptTuning, PadsLabelsAndMasks) {
  const auto prompt = small_prompt();
  const auto x = at::tensor({1, 0, 1, 1}, at::kLong).view({2, 2});
  const auto with = [&](int64_t value) { return at::cat({at::full({2, 4}, value, at::kLong), x}, 1); };
  EXPECT_TRUE(at::equal(prompt->pad_labels(x), with(-100)));
  EXPECT_TRUE(at::equal(prompt->pad_labels(x, -1), with(-1)));
  EXPECT_TRUE(at::equal(prompt->pad_mask(x), with(1)));
}

TEST(PromptTuning, HasAsManyNumbersAsTheFormula) {
  const auto tensors = PromptTuning(config(7, 40))->trainable_tensors();
  ASSERT_EQ(tensors.size(), 1U);
  EXPECT_EQ(tensors[0].name, "embedding.weight");
  EXPECT_EQ(tensors[0].tensor.numel(), 7 * 40);
}

TEST(PromptTuning, StartsAsPeftDoesOrWithGivenEmbeddings) {
  at::manual_seed(4);
  const PromptTuning prompt(config(60, 90));
  EXPECT_NEAR(prompt->embedding->weight.mean().item<double>(), 0, 0.05);
  EXPECT_NEAR(prompt->embedding->weight.std().item<double>(), 1, 0.05);
  auto model = small_gpt2();
  auto small = small_prompt();
  const auto rows = model->transformer->wte->weight.index_select(0, at::tensor({3, 7, 3, 9}, at::kLong));
  small->start(rows.to(at::kBFloat16));
  EXPECT_TRUE(at::equal(small->embedding->weight, rows.to(at::kBFloat16).to(at::kFloat)));
  small->start(rows);
  // Rows of the model's own embedding are its tokens.
  const auto tokens = at::tensor({3, 7, 3, 9}, at::kLong).expand({2, 4});
  const auto found = logits_of(model, small, small_ids());
  EXPECT_TRUE(at::equal(found, model->forward(at::cat({tokens, small_ids()}, 1))));
}

TEST(PromptTuning, RefusesWhatDoesNotFit) {
  auto prompt = small_prompt();
  const auto before = harness::bytes_of(prompt->embedding->weight);
  const auto message = [](const auto& function) { return message_of<c10::ValueError>(function); };
  EXPECT_THAT(message([&] {
                prompt->start(at::zeros({3, 24}));
              }),
              HasSubstr("[lora::PromptTuning::start] found values [3, 24] of float, expected numbers [4, 24]"));
  EXPECT_THAT(message([&] { prompt->start(at::full({4, 24}, std::nan(""))); }), HasSubstr("found NaN"));
  EXPECT_EQ(harness::bytes_of(prompt->embedding->weight), before);
  EXPECT_THAT(message([&] {
                prompt->prepend(at::zeros({2, 3, 25}));
              }),
              HasSubstr("[lora::PromptTuning::prepend] found embeddings [2, 3, 25], expected [batch, length, 24]"));
  EXPECT_THAT(message([&] { prompt->embeddings(0); }),
              HasSubstr("[lora::PromptTuning::embeddings] found a batch of 0, expected one sequence or more"));
  EXPECT_THAT(message([] { const PromptTuning refused(config(0, 24)); }),
              HasSubstr("[lora::PromptTuningConfig] found num_virtual_tokens = 0, expected 1 to"));
  EXPECT_THAT(message([] { const PromptTuning refused(config(3, -2)); }), HasSubstr("found token_dim = -2"));
}

TEST(PromptTuning, IsAnOrdinaryModule) {
  const auto prompt = small_prompt();
  const auto expected = prompt->embedding->weight.detach().clone();
  std::stringstream archive;
  torch::save(prompt, archive);
  PromptTuning other(config(4, 24));
  torch::load(other, archive);
  EXPECT_TRUE(at::equal(other->embedding->weight, expected));
  const auto copy = std::dynamic_pointer_cast<lora::PromptTuningImpl>(prompt->clone());
  other->to(at::kDouble);
  EXPECT_EQ(other->embeddings(1).scalar_type(), at::kDouble);
  prompt->embedding->weight.detach().zero_();
  EXPECT_TRUE(at::equal(copy->embedding->weight, expected));
}

TEST(PromptTuning, ComputesWhatPythonComputed) {
  const auto data = lora::load_safetensors(kGolden + "gpt2/expected.safetensors"),
             expected = lora::load_safetensors(kGolden + "methods/prompts/prompt/expected.safetensors");
  const auto& ids = data.at("ids");
  auto model = load_gpt2(kGolden + "gpt2/model");
  const auto prompt = lora::load_prompt_tuning(kGolden + "methods/prompts/prompt");
  const auto logits = logits_of(model, prompt, ids);
  EXPECT_LT(relative_error(logits, expected.at("y")), kTolerance);
  EXPECT_LT(relative_error(loss_of(logits, prompt, ids), expected.at("loss")), kTolerance);
  (logits.narrow(1, 5, 17) * data.at("g")).sum().backward();
  EXPECT_LT(relative_error(prompt->embedding->weight.grad(), expected.at("prompt_embeddings.grad")), kTolerance);
}

TEST(PromptTuning, TrainsBesideLora) {
  at::manual_seed(6);
  auto model = small_gpt2();
  auto adapters = lora::inject(*model, lora::LoraConfig().r(2).target_modules({"c_attn", "mlp.c_proj"}));
  const auto base = harness::base_bytes(*model);
  const PromptTuning prompt(config(4, 24));
  auto tensors = adapters.trainable_tensors();
  for (auto& tensor : prompt->trainable_tensors()) tensors.push_back(tensor);
  torch::optim::AdamW optimizer(lora::param_groups(tensors, torch::optim::AdamWOptions(2e-2)));
  std::vector<double> losses;
  for (int step = 0; step < 25; ++step) {
    optimizer.zero_grad();
    const auto loss = loss_of(logits_of(model, prompt, small_ids()), prompt, small_ids());
    loss.backward();
    losses.push_back(loss.item<double>());
    if (step == 1) {
      for (const auto& tensor : tensors) EXPECT_GT(harness::largest(tensor.tensor.grad()), 0) << tensor.name;
    }
    optimizer.step();
  }
  EXPECT_LT(losses.back(), 0.5 * losses.front());
  EXPECT_EQ(harness::base_bytes(*model), base);
}

TEST(PromptTuning, DecodesAsItReads) {
  const at::NoGradGuard no_grad;
  auto model = small_gpt2();
  const auto prompt = small_prompt();
  const auto ids = [](const std::vector<int64_t>& tokens) { return torch::tensor(tokens, at::kLong).unsqueeze(0); };
  const auto inputs = [&](const std::vector<int64_t>& tokens) {
    return GPT2Inputs{{}, prompt->prepend(model->transformer->wte(ids(tokens))), {}};
  };
  expect_decodes_as_it_reads(model, inputs, 25);
}

}  // namespace
}  // namespace prompt_tuning_test
