// lora::PrefixTuning: the layout of its keys and values, its gradients, and GPT-2 behind it, alone and with LoRA,
// against PEFT's values.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/adapters.h>
#include <lora/functional/fast_operators.h>
#include <lora/functional/recompute.h>
#include <lora/prompt/prefix_tuning.h>
#include <lora/training_state.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/optim/adamw.h>
#include <torch/serialize.h>

#include <cmath>
#include <cstdint>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "examples/models/gpt2.h"
#include "examples/models/gpt2_checkpoint.h"
#include "harness/dense_oracle.h"
#include "harness/message_of.h"
#include "harness/operators.h"
#include "harness/small_gpt2.h"
#include "harness/temp_folder.h"
#include "harness/values.h"

namespace prefix_tuning_test {
namespace {

using harness::expect_decodes_as_it_reads;
using harness::message_of;
using harness::relative_error;
using harness::small_gpt2;
using harness::small_ids;
using lora::PrefixTuning;
using lora::PrefixTuningConfig;
using testing::HasSubstr;

constexpr double kTolerance = 1e-5;
const std::string kGolden = LORA_SOURCE_DIR "/tests/golden/";

PrefixTuningConfig config(int64_t tokens, int64_t layers, int64_t heads, int64_t token_dim) {
  return PrefixTuningConfig().num_virtual_tokens(tokens).num_layers(layers).num_attention_heads(heads).token_dim(
      token_dim);
}

/// Every parameter from a seed.
template <class Holder>
void fill(Holder& module, uint64_t seed, double scale = 0.5) {
  const at::NoGradGuard no_grad;
  for (auto& named : module->named_parameters()) {
    named.value().copy_(harness::normal(named.value().sizes(), seed++) * scale);
  }
}

PrefixTuning small_prefix() {
  PrefixTuning prefix(config(5, 2, 3, 24));
  fill(prefix, 70);
  return prefix;
}

std::map<std::string, at::Tensor> golden(const std::string& file) { return lora::load_safetensors(kGolden + file); }

TEST(PrefixTuning, LaysKeysAndValuesOutAsPeft) {
  const int64_t n = 3, layers = 2, heads = 2, size = 5;
  PrefixTuning prefix(config(n, layers, heads, heads * size));
  fill(prefix, 1);
  const auto rows = prefix->embedding->weight.detach();
  ASSERT_EQ(rows.sizes(), at::IntArrayRef({n, 2 * layers * heads * size}));
  const auto past = prefix->past_key_values(4);
  ASSERT_EQ(past.size(), 2U);
  for (int64_t layer = 0; layer < layers; ++layer) {
    const auto& [key, value] = past[static_cast<size_t>(layer)];
    for (const auto& [x, which] : {std::pair(key, 0), std::pair(value, 1)}) {
      ASSERT_EQ(x.sizes(), at::IntArrayRef({4, heads, n, size}));
      for (int64_t i = 0; i < x.numel(); ++i) {
        const auto e = i % size, t = i / size % n, h = i / size / n % heads, b = i / size / n / heads;
        const auto column = ((2 * layer + which) * heads + h) * size + e;
        EXPECT_EQ(x[b][h][t][e].item<float>(), rows[t][column].item<float>());
      }
    }
  }
}

TEST(PrefixTuning, SharesOneMatrixAmongTheRowsOfABatch) {
  const auto prefix = small_prefix();
  const auto* const begin = prefix->embedding->weight.const_data_ptr<float>();
  const auto* const end = begin + prefix->embedding->weight.numel();
  for (const auto& [key, value] : prefix->past_key_values(7)) {
    for (const auto& x : {key, value}) {
      EXPECT_EQ(x.stride(0), 0);
      EXPECT_GE(x.const_data_ptr<float>(), begin);
      EXPECT_LT(x.const_data_ptr<float>(), end);
    }
  }
}

TEST(PrefixTuning, IsHandedOutInTheDtypeThatIsAskedFor) {
  const auto prefix = small_prefix();
  const auto exact = prefix->past_key_values(2), rounded = prefix->past_key_values(2, at::kBFloat16);
  EXPECT_EQ(prefix->embedding->weight.scalar_type(), at::kFloat);
  EXPECT_EQ(exact[1].second.scalar_type(), at::kFloat);
  EXPECT_TRUE(at::equal(rounded[1].second, exact[1].second.to(at::kBFloat16)));
  rounded[1].second.to(at::kFloat).sum().backward();
  EXPECT_EQ(prefix->embedding->weight.grad().scalar_type(), at::kFloat);
}

TEST(PrefixTuning, AddsTheGradientsOfABatchUp) {
  const auto prefix = small_prefix();
  const int64_t n = 5, heads = 3, size = 8, batch = 4;
  const auto past = prefix->past_key_values(batch);
  auto expected = at::zeros({n, 4, heads, size});
  at::Tensor loss = at::zeros({});
  for (int64_t i = 0; i < 4; ++i) {
    const auto& pair = past[static_cast<size_t>(i / 2)];
    const auto weights = harness::normal({batch, heads, n, size}, 20 + static_cast<uint64_t>(i), at::kFloat);
    loss = loss + ((i % 2 == 0 ? pair.first : pair.second) * weights).sum();
    expected.select(1, i).copy_(weights.sum(0).transpose(0, 1));
  }
  loss.backward();
  EXPECT_LT(relative_error(prefix->embedding->weight.grad(), expected.reshape({n, -1})), 1e-6);
}

int64_t count_numbers(const PrefixTuning& prefix) {
  int64_t count = 0;
  for (const auto& named : prefix->trainable_tensors()) count += named.tensor.numel();
  return count;
}

TEST(PrefixTuning, HasAsManyNumbersAsTheFormula) {
  const int64_t n = 7, layers = 3, heads = 5, width = 40, hidden = 11;
  const auto own = config(n, layers, heads, width);
  EXPECT_EQ(count_numbers(PrefixTuning(own)), n * 2 * layers * width);
  const auto projected = [&](int64_t h) { return n * width + (width + 1) * h + (h + 1) * 2 * layers * width; };
  auto through = own;
  through.prefix_projection(true);
  EXPECT_EQ(count_numbers(PrefixTuning(through)), projected(width));
  EXPECT_EQ(count_numbers(PrefixTuning(through.encoder_hidden_size(hidden))), projected(hidden));
}

TEST(PrefixTuning, IsWhatTheProjectionMakes) {
  PrefixTuning prefix(config(4, 2, 3, 12).prefix_projection(true).encoder_hidden_size(7));
  fill(prefix, 30);
  std::map<std::string, at::Tensor> wide;
  for (const auto& named : prefix->named_parameters()) wide[named.key()] = named.value().detach().to(at::kDouble);
  const auto hidden =
      (wide.at("embedding.weight").matmul(wide.at("transform.0.weight").t()) + wide.at("transform.0.bias")).tanh();
  const auto expected = hidden.matmul(wide.at("transform.2.weight").t()) + wide.at("transform.2.bias");
  EXPECT_LT(relative_error(prefix->prompt_embeddings(), expected), 1e-6);
  for (const auto& [key, value] : prefix->past_key_values(2)) EXPECT_TRUE(key.requires_grad() && value.requires_grad());
}

TEST(PrefixTuning, StartsAsPeftDoes) {
  at::manual_seed(4);
  const auto drawn = PrefixTuning(config(50, 2, 2, 100))->embedding->weight.detach();
  EXPECT_NEAR(drawn.mean().item<double>(), 0, 0.03);
  EXPECT_NEAR(drawn.std().item<double>(), 1, 0.03);
  const auto zero = config(5, 2, 3, 24).init_weights(lora::PrefixInit::kZero);
  EXPECT_EQ(harness::largest(PrefixTuning(zero)->prompt_embeddings()), 0);
  auto through = zero;
  const PrefixTuning projected(through.prefix_projection(true));
  EXPECT_EQ(harness::largest(projected->prompt_embeddings()), 0);
  EXPECT_GT(harness::largest(projected->embedding->weight), 0);
  EXPECT_GT(harness::largest(projected->transform->first->weight), 0);
}

// A prefix of what the model has for real tokens is these tokens.
TEST(PrefixTuning, StartsWithRealTokens) {
  const at::NoGradGuard no_grad;
  auto model = small_gpt2();
  const auto ids = small_ids().narrow(0, 0, 1);
  GPT2Cache cache;
  model->forward(ids.narrow(1, 0, 5), &cache);
  auto prefix = small_prefix();
  prefix->start(cache.layers);
  const auto found = model->forward(GPT2Inputs{ids.narrow(1, 5, 4), {}, prefix->past_key_values(1)});
  EXPECT_LT(relative_error(found, model->forward(ids).narrow(1, 5, 4)), kTolerance);
}

TEST(PrefixTuning, RefusesAStartThatDoesNotFit) {
  auto prefix = small_prefix();
  const auto before = harness::bytes_of(prefix->embedding->weight);
  auto past = small_prefix()->past_key_values(1);
  const auto message = [&](const lora::PastKeyValues& start) {
    return message_of<c10::ValueError>([&] { prefix->start(start); });
  };
  EXPECT_THAT(message({past[0]}), HasSubstr("[lora::PrefixTuning::start] found 1 layers, expected 2"));
  EXPECT_THAT(message(small_prefix()->past_key_values(2)),
              HasSubstr("found [2, 3, 5, 8] of float in layer 0, expected"));
  past[1].second = past[1].second.detach().clone();
  past[1].second[0][1][2][3] = std::nan("");
  EXPECT_THAT(message(past),
              HasSubstr("[lora::PrefixTuning::start] found NaN or infinite values, expected finite ones"));
  EXPECT_EQ(harness::bytes_of(prefix->embedding->weight), before);
  PrefixTuning projected(config(5, 2, 3, 24).prefix_projection(true));
  EXPECT_THAT(message_of<c10::ValueError>([&] { projected->start(small_prefix()->past_key_values(1)); }),
              HasSubstr("[lora::PrefixTuning::start] found prefix_projection, expected none"));
}

TEST(PrefixTuning, TakesGivenValues) {
  const auto values = harness::normal({5, 96}, 1, at::kFloat);
  const auto own = config(5, 2, 3, 24);
  const PrefixTuning prefix(own, values);
  EXPECT_TRUE(prefix->embedding->weight.requires_grad());
  EXPECT_EQ(prefix->embedding->weight.const_data_ptr(), values.const_data_ptr());
  const auto message = [&](PrefixTuningConfig config, const at::Tensor& given) {
    return message_of<c10::ValueError>([&] { const PrefixTuning refused(config, given); });
  };
  EXPECT_THAT(message(own, values.t()),
              HasSubstr("[lora::PrefixTuning::PrefixTuning] found values [96, 5] of float, expected numbers [5, 96]"));
  EXPECT_THAT(message(own, values.to(at::kLong)), HasSubstr("[5, 96] of long"));
  EXPECT_THAT(message(own, values / 0), HasSubstr("found NaN or infinite values"));
  auto through = own;
  EXPECT_THAT(message(through.prefix_projection(true), values), HasSubstr("found prefix_projection, expected none"));
}

TEST(PrefixTuning, RefusesOptionsThatMakeNoSense) {
  const auto message = [](const PrefixTuningConfig& wrong) {
    return message_of<c10::ValueError>([&] { const PrefixTuning prefix(wrong); });
  };
  EXPECT_THAT(message(PrefixTuningConfig()),
              HasSubstr("[lora::PrefixTuningConfig] found num_virtual_tokens = 0, expected 1"));
  EXPECT_THAT(message(config(5, 2, 3, 0)), HasSubstr("found token_dim = 0"));
  EXPECT_THAT(message(config(5, 0, 3, 24)), HasSubstr("found num_layers = 0"));
  EXPECT_THAT(message(config(5, 2, -3, 24)), HasSubstr("found num_attention_heads = -3"));
  EXPECT_THAT(message(config(5, 2, 5, 24)),
              HasSubstr("found token_dim = 24, expected a multiple of num_attention_heads = 5"));
  EXPECT_THAT(message(config(5, 2, 3, 24).encoder_hidden_size(-1)), HasSubstr("found encoder_hidden_size = -1"));
  EXPECT_THAT(message(config(5, 2, 3, 24).num_transformer_submodules(2)),
              HasSubstr("expected 1: virtual tokens of one stack"));
  EXPECT_THAT(message_of<c10::ValueError>([] { small_prefix()->past_key_values(0); }),
              HasSubstr("[lora::PrefixTuning::past_key_values] found a batch of 0"));
}

TEST(PrefixTuning, PadsMasksWithOnes) {
  const auto mask = at::tensor({1, 1, 0, 1, 0, 0}, at::kLong).view({2, 3});
  const auto expected = at::tensor({1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 0}, at::kLong).view({2, 8});
  EXPECT_TRUE(at::equal(small_prefix()->pad_mask(mask), expected));
  EXPECT_TRUE(at::equal(small_prefix()->pad_mask(mask.to(at::kBool)), expected.to(at::kBool)));
}

TEST(PrefixTuning, IsAnOrdinaryModule) {
  PrefixTuning prefix(config(4, 2, 3, 12).prefix_projection(true));
  fill(prefix, 40);
  const auto expected = prefix->prompt_embeddings().detach();
  std::stringstream archive;
  torch::save(prefix, archive);
  PrefixTuning other(prefix->config());
  torch::load(other, archive);
  EXPECT_TRUE(at::equal(other->prompt_embeddings(), expected));
  const auto copy = std::dynamic_pointer_cast<lora::PrefixTuningImpl>(prefix->clone());
  fill(prefix, 90);
  EXPECT_TRUE(at::equal(copy->prompt_embeddings(), expected));
  prefix->to(at::kDouble);
  EXPECT_EQ(prefix->past_key_values(1)[0].first.scalar_type(), at::kDouble);
  prefix->transform->first->weight.set_requires_grad(false);
  std::vector<std::string> names;
  for (const auto& named : prefix->trainable_tensors()) names.push_back(named.name);
  EXPECT_THAT(names,
              testing::ElementsAre("embedding.weight", "transform.0.bias", "transform.2.weight", "transform.2.bias"));
}

class GoldenPrefix : public ::testing::TestWithParam<std::string> {};

TEST_P(GoldenPrefix, ComputesWhatPythonComputed) {
  const auto directory = "methods/prompts/" + GetParam();
  const auto data = golden("gpt2/expected.safetensors"), expected = golden(directory + "/expected.safetensors");
  const auto &ids = data.at("ids"), &g = data.at("g");
  auto model = load_gpt2(kGolden + "gpt2/model");
  for (const bool fast : {false, true}) {
    const auto prefix = lora::load_prefix_tuning(kGolden + directory);
    auto operators = fast ? std::make_unique<lora::FastOperators>() : nullptr;
    const auto logits = model->forward(GPT2Inputs{ids, {}, prefix->past_key_values(2)});
    EXPECT_LT(relative_error(logits, expected.at("y")), kTolerance);
    const auto loss = at::cross_entropy_loss(logits.slice(1, 0, -1).reshape({-1, 96}), ids.slice(1, 1).reshape(-1));
    EXPECT_LT(relative_error(loss, expected.at("loss")), kTolerance);
    (logits * g).sum().backward();
    EXPECT_LT(relative_error(prefix->embedding->weight.grad(), expected.at("prompt_embeddings.grad")), kTolerance);
  }
}

INSTANTIATE_TEST_SUITE_P(, GoldenPrefix, testing::Values("prefix", "prefix_projection"),
                         [](const auto& test) { return test.param; });

TEST(PrefixTuning, ProjectsAsPythonDoes) {
  const auto data = golden("gpt2/expected.safetensors"),
             expected = golden("methods/prompts/prefix_projection/expected.safetensors");
  PrefixTuning prefix(config(5, 2, 4, 32).prefix_projection(true).encoder_hidden_size(24));
  {
    const at::NoGradGuard no_grad;
    for (auto& named : prefix->named_parameters()) named.value().copy_(expected.at(named.key()));
  }
  const auto stored = lora::load_safetensors(kGolden + "methods/prompts/prefix_projection/adapter_model.safetensors");
  EXPECT_LT(relative_error(prefix->prompt_embeddings(), stored.at("prompt_embeddings")), kTolerance);
  auto model = load_gpt2(kGolden + "gpt2/model");
  const auto logits = model->forward(GPT2Inputs{data.at("ids"), {}, prefix->past_key_values(2)});
  EXPECT_LT(relative_error(logits, expected.at("y")), kTolerance);
  (logits * data.at("g")).sum().backward();
  for (const auto& named : prefix->named_parameters()) {
    EXPECT_LT(relative_error(named.value().grad(), expected.at(named.key() + ".grad")), kTolerance) << named.key();
  }
}

at::Tensor loss_of(GPT2LMHeadModel& model, const PrefixTuning& prefix, const at::Tensor& ids) {
  const auto logits = model->forward(GPT2Inputs{ids, {}, prefix->past_key_values(ids.size(0))});
  return at::cross_entropy_loss(logits.slice(1, 0, -1).reshape({-1, 50}), ids.slice(1, 1).reshape(-1));
}

TEST(PrefixTuning, HasTheSameGradientsWithRecomputedLayers) {
  auto model = small_gpt2();
  const auto prefix = small_prefix();
  const auto gradient = [&] {
    return torch::autograd::grad({loss_of(model, prefix, small_ids())}, {prefix->embedding->weight})[0];
  };
  const auto expected = gradient();
  model->transformer->run_layer = [](const auto& layer, const at::Tensor& x) { return lora::recompute(layer, x); };
  EXPECT_TRUE(at::equal(gradient(), expected));
}

// Nothing of [batch, heads, tokens, keys] is made behind a prefix either.
TEST(PrefixTuning, TrainsByFastAttention) {
  auto model = small_gpt2();
  const auto prefix = small_prefix();
  const auto ids = small_ids();
  const auto plain = torch::autograd::grad({loss_of(model, prefix, ids)}, {prefix->embedding->weight})[0];
  const lora::FastOperators fast;
  const harness::OperatorRecorder recorder;
  const auto found = torch::autograd::grad({loss_of(model, prefix, ids)}, {prefix->embedding->weight})[0];
  EXPECT_LT(relative_error(found, plain), kTolerance);
  EXPECT_THAT(recorder.makers_of({2, 3, 9, 14}, {}), testing::IsEmpty());
  for (const auto& name : recorder.names()) EXPECT_THAT(name, testing::Not(HasSubstr("flash_attention")));
}

TEST(PrefixTuning, TrainsBesideLora) {
  at::manual_seed(6);
  auto model = small_gpt2();
  auto adapters = lora::inject(*model, lora::LoraConfig().r(2).target_modules({"c_attn", "mlp.c_proj"}));
  const auto base = harness::base_bytes(*model);
  PrefixTuning prefix(config(5, 2, 3, 24));
  const auto start = harness::bytes_of(prefix->embedding->weight);
  auto tensors = adapters.trainable_tensors();
  for (auto& tensor : prefix->trainable_tensors()) tensors.push_back(tensor);
  const auto groups = lora::param_groups(tensors, torch::optim::AdamWOptions(1e-2),
                                         lora::LoraPlusOptions().lr_ratio(2).lr("embedding.weight", 5e-2));
  ASSERT_EQ(groups.size(), 3U);
  EXPECT_EQ(groups[2].options().get_lr(), 5e-2);
  torch::optim::AdamW optimizer(groups);
  std::vector<double> losses;
  for (int step = 0; step < 25; ++step) {
    optimizer.zero_grad();
    const auto loss = loss_of(model, prefix, small_ids());
    loss.backward();
    losses.push_back(loss.item<double>());
    if (step == 1) {
      for (const auto& tensor : tensors) EXPECT_GT(harness::largest(tensor.tensor.grad()), 0) << tensor.name;
    }
    optimizer.step();
  }
  EXPECT_LT(losses.back(), 0.5 * losses.front());
  EXPECT_NE(harness::bytes_of(prefix->embedding->weight), start);
  EXPECT_EQ(harness::base_bytes(*model), base);
  EXPECT_THAT(adapters.fallbacks(), testing::IsEmpty());
  // The update is merged, the prefix stays in front.
  const at::NoGradGuard no_grad;
  const auto unmerged = loss_of(model, prefix, small_ids());
  adapters.merge();
  EXPECT_LT(relative_error(loss_of(model, prefix, small_ids()), unmerged), kTolerance);
}

TEST(PrefixTuning, IsPartOfATrainingState) {
  const TempFolder folder;
  const auto prefix = small_prefix(), other = small_prefix();
  torch::optim::AdamW optimizer(lora::param_groups(prefix->trainable_tensors(), torch::optim::AdamWOptions(1e-2))),
      second(lora::param_groups(other->trainable_tensors(), torch::optim::AdamWOptions(1e-2)));
  auto model = small_gpt2();
  const auto step = [&](const PrefixTuning& of, torch::optim::AdamW& by) {
    by.zero_grad();
    loss_of(model, of, small_ids()).backward();
    by.step();
  };
  step(prefix, optimizer);
  lora::TrainingState()
      .tensors(prefix->named_parameters().pairs())
      .optimizer(optimizer)
      .save(folder / "run.safetensors");
  step(prefix, optimizer);
  ASSERT_TRUE(lora::TrainingState()
                  .tensors(other->named_parameters().pairs())
                  .optimizer(second)
                  .load(folder / "run.safetensors"));
  step(other, second);
  EXPECT_TRUE(at::equal(other->embedding->weight, prefix->embedding->weight));
}

TEST(PrefixTuning, DecodesAsItReads) {
  const at::NoGradGuard no_grad;
  auto model = small_gpt2();
  const auto prefix = small_prefix();
  const auto inputs = [&](const std::vector<int64_t>& tokens) {
    return GPT2Inputs{torch::tensor(tokens, at::kLong).unsqueeze(0), {}, prefix->past_key_values(1)};
  };
  // 32 positions, of which the prefix has 5 and the input 3.
  expect_decodes_as_it_reads(model, inputs, 24);
}

}  // namespace
}  // namespace prefix_tuning_test
