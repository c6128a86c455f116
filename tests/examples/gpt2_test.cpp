#include "examples/models/gpt2.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/io/safetensors.h>
#include <torch/csrc/autograd/autograd.h>

#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>
#include <string>
#include <vector>

#include "examples/models/gpt2_checkpoint.h"
#include "examples/models/greedy.h"
#include "harness/message_of.h"
#include "harness/temp_folder.h"

namespace gpt2_test {
namespace {

using harness::message_of;
using testing::AllOf;
using testing::Contains;
using testing::HasSubstr;

const std::string kGolden = LORA_SOURCE_DIR "/tests/golden/gpt2";

GPT2Config small_config() {
  GPT2Config config;
  config.vocab_size = 50;
  config.n_positions = 32;
  config.n_embd = 24;
  config.n_layer = 2;
  config.n_head = 3;
  config.n_inner = 40;
  return config;
}

std::map<std::string, at::Tensor> golden_tensors() {
  return lora::load_safetensors(kGolden + "/model/model.safetensors");
}

std::string error_of(const std::string& directory) {
  return message_of([&] { load_gpt2(directory); });
}

/// A folder with the golden checkpoint, to be changed.
struct Checkpoint {
  Checkpoint() { std::filesystem::copy(kGolden + "/model", folder.path()); }
  std::string save(const std::map<std::string, at::Tensor>& tensors) const {
    lora::save_safetensors(tensors, folder / "model.safetensors");
    return error_of(folder.path().string());
  }
  std::string set(const std::string& field, const nlohmann::json& value) const {
    auto json = nlohmann::json::parse(read_bytes(kGolden + "/model/config.json"));
    json[field] = value;
    write_bytes(folder / "config.json", json.dump());
    return error_of(folder.path().string());
  }
  TempFolder folder;
};

TEST(GPT2, HasTheLogitsOfTransformers) {
  at::NoGradGuard no_grad;
  const auto expected = lora::load_safetensors(kGolden + "/expected.safetensors");
  auto model = load_gpt2(kGolden + "/model");
  const auto& logits = expected.at("logits_base");
  const auto difference = (model->forward(expected.at("ids")) - logits).abs().max().item<double>();
  EXPECT_LE(difference, 1e-5 * logits.abs().max().item<double>());
}

TEST(GPT2, HasTheNamesOfHuggingFace) {
  const GPT2LMHeadModel model(small_config());
  std::vector<std::string> names;
  for (const auto& parameter : model->named_parameters()) names.push_back(parameter.key());
  for (const auto* const name :
       {"transformer.wte.weight", "transformer.wpe.weight", "transformer.h.0.ln_1.weight",
        "transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_attn.bias", "transformer.h.1.attn.c_proj.weight",
        "transformer.h.1.ln_2.bias", "transformer.h.1.mlp.c_fc.weight", "transformer.h.1.mlp.c_proj.bias",
        "transformer.ln_f.weight", "lm_head.weight"}) {
    EXPECT_THAT(names, Contains(name));
  }
  EXPECT_EQ(names.size(), 2U + 2U * 12U + 2U + 1U);
  EXPECT_TRUE(model->lm_head->weight.is_same(model->transformer->wte->weight));
  EXPECT_TRUE(model->named_parameters()["lm_head.weight"].is_same(model->transformer->wte->weight));
}

TEST(GPT2, StaysTiedWhenItIsMovedToADtype) {
  GPT2LMHeadModel model(small_config());
  model->to(at::kBFloat16);
  EXPECT_EQ(model->lm_head->weight.scalar_type(), at::kBFloat16);
  EXPECT_TRUE(model->lm_head->weight.is_same(model->transformer->wte->weight));
}

TEST(GPT2, ReadsThroughItsCacheWhatItReadsAtOnce) {
  at::NoGradGuard no_grad;
  GPT2LMHeadModel model(small_config());
  const auto ids = at::randint(50, {2, 12}, at::kLong);
  const auto logits = model->forward(ids);
  GPT2Cache cache;
  const auto first = model->forward(ids.narrow(1, 0, 5), &cache);
  const auto middle = model->forward(ids.narrow(1, 5, 6), &cache);
  const auto last = model->forward(ids.narrow(1, 11, 1), &cache);
  EXPECT_EQ(cache.length(), 12);
  EXPECT_TRUE(at::allclose(at::cat({first, middle, last}, 1), logits, 1e-4, 1e-5));
}

// In one piece as through the cache, and with the gradients of the whole.
TEST(GPT2, ReadsBehindAPast) {
  GPT2LMHeadModel model(small_config());
  const auto ids = at::randint(50, {2, 12}, at::kLong);
  GPT2Cache cache;
  model->forward(ids.narrow(1, 0, 5), &cache);
  const auto behind = model->forward(GPT2Inputs{ids.narrow(1, 5, 7), {}, cache.layers});
  const auto logits = model->forward(ids);
  EXPECT_TRUE(at::allclose(behind, logits.narrow(1, 5, 7), 1e-4, 1e-5));
  EXPECT_EQ(cache.length(), 5);  // only read
  const auto weight = model->transformer->h->ptr<GPT2BlockImpl>(0)->attn->c_attn->weight;
  const auto gradient = [&](const at::Tensor& of) {
    return torch::autograd::grad({of.square().sum()}, {weight}, {}, /*retain_graph=*/true)[0];
  };
  EXPECT_TRUE(at::allclose(gradient(behind), gradient(logits.narrow(1, 5, 7)), 1e-3, 1e-4));
  EXPECT_EQ(model->forward(GPT2Inputs{ids.narrow(1, 5, 7), {}, {}}, &cache).sizes(), behind.sizes());
  EXPECT_EQ(cache.length(), 12);
}

TEST(GPT2, ReadsEmbeddingsInPlaceOfTokens) {
  GPT2LMHeadModel model(small_config());
  const auto ids = at::randint(50, {2, 12}, at::kLong);
  const auto embeds = model->transformer->wte(ids).detach().requires_grad_(true);
  const auto logits = model->forward(GPT2Inputs{{}, embeds, {}});
  EXPECT_TRUE(at::equal(logits, model->forward(ids)));
  const auto gradient = torch::autograd::grad({logits.sum()}, {embeds})[0];
  EXPECT_GT(gradient.abs().min().item<double>(), 0);
}

TEST(GPT2, RefusesInputsThatMakeNoSense) {
  GPT2LMHeadModel model(small_config());
  const auto ids = at::zeros({1, 4}, at::kLong);
  GPT2Cache cache;
  model->forward(ids, &cache);
  const auto message = [&](const GPT2Inputs& inputs, GPT2Cache* with = nullptr) {
    return message_of<c10::ValueError>([&] { model->forward(inputs, with); });
  };
  EXPECT_THAT(message({}), HasSubstr("[GPT2] found neither of input_ids and inputs_embeds"));
  EXPECT_THAT(message({ids, at::zeros({1, 4, 24}), {}}), HasSubstr("found both of input_ids and inputs_embeds"));
  EXPECT_THAT(message({ids, {}, {cache.layers[0]}}), HasSubstr("found a past of 1 layers, expected 2"));
  EXPECT_THAT(message({ids, {}, cache.layers}, &cache), HasSubstr("found past_key_values beside a cache"));
  EXPECT_THAT(message({at::zeros({1, 29}, at::kLong), {}, cache.layers}),
              HasSubstr("found 33 tokens, expected at most"));
}

TEST(GPT2, IgnoresWhatStandsOnTheRight) {
  at::NoGradGuard no_grad;
  GPT2LMHeadModel model(small_config());
  auto ids = at::randint(50, {1, 9}, at::kLong);
  const auto logits = model->forward(ids).narrow(1, 0, 6);
  ids.narrow(1, 6, 3).fill_(0);
  EXPECT_TRUE(at::allclose(model->forward(ids).narrow(1, 0, 6), logits, 1e-5, 1e-6));
}

TEST(GPT2, ReadsPackedSequencesAsEachByItself) {
  GPT2LMHeadModel model(small_config());
  const auto ids = at::randint(50, {16}, at::kLong);
  const GPT2Packed packed{ids, {5, 1, 7, 3}, {{0}, {1}, {2}, {2, 3}}};
  const auto pieces = model->transformer->forward_packed(packed).split_with_sizes(packed.lengths);
  const auto tokens = ids.split_with_sizes(packed.lengths);
  for (const auto& sequence : packed.sequences) {
    std::vector<at::Tensor> own_tokens, own_hidden;
    for (const auto piece : sequence) {
      own_tokens.push_back(tokens[piece]);
      own_hidden.push_back(pieces[piece]);
    }
    const auto alone = model->transformer->forward(at::cat(own_tokens).unsqueeze(0)).squeeze(0);
    EXPECT_TRUE(at::allclose(at::cat(own_hidden), alone, 1e-5, 1e-6));
  }
}

TEST(GPT2, RefusesPackedSequencesThatDoNotFit) {
  GPT2LMHeadModel model(small_config());
  const auto message = [&](std::vector<std::int64_t> lengths, std::vector<std::vector<std::size_t>> sequences) {
    return message_of([&] {
      const auto tokens = std::accumulate(lengths.begin(), lengths.end(), std::int64_t{0});
      model->transformer->forward_packed({at::zeros({tokens}, at::kLong), lengths, sequences});
    });
  };
  EXPECT_THAT(message({30, 3}, {{0, 1}}), HasSubstr("[GPT2] found 33 tokens, expected at most 32"));
  EXPECT_THAT(message({2, 3}, {{0}, {2}}), HasSubstr("[GPT2] found piece 2 in a sequence, expected one of 2"));
  EXPECT_THAT(message({2, 3}, {{0}}), HasSubstr("[GPT2] found piece 1 in no sequence"));
  EXPECT_THAT(message({2, 3, 4}, {{0, 2}, {1, 2}}), HasSubstr("[GPT2] found piece 2 behind 2 and 3 tokens"));
}

TEST(GPT2, SharesTheBeginningsOfSequencesWithTheSameGradients) {
  GPT2LMHeadModel model(small_config());
  const auto prompt = at::randint(50, {6}, at::kLong), first = at::randint(50, {4}, at::kLong),
             second = at::randint(50, {3}, at::kLong);
  const auto run = [&](const GPT2Packed& packed, at::IntArrayRef answers) {
    model->zero_grad();
    const auto pieces = model->transformer->forward_packed(packed).split_with_sizes(packed.lengths);
    at::Tensor loss;
    for (const auto piece : answers) {
      const auto part = pieces[static_cast<std::size_t>(piece)].square().sum();
      loss = loss.defined() ? loss + part : part;
    }
    loss.backward();
    std::vector<at::Tensor> gradients{loss.detach()};
    for (const auto& parameter : model->transformer->parameters()) gradients.push_back(parameter.grad().clone());
    return gradients;
  };
  const auto apart = run({at::cat({prompt, first, prompt, second}), {6, 4, 6, 3}, {{0, 1}, {2, 3}}}, {1, 3});
  const auto shared = run({at::cat({prompt, first, second}), {6, 4, 3}, {{0, 1}, {0, 2}}}, {1, 2});
  for (std::size_t i = 0; i < apart.size(); ++i) {
    EXPECT_TRUE(at::allclose(shared[i], apart[i], 1e-4, 1e-4 * apart[i].abs().max().item<double>())) << i;
  }
}

TEST(GPT2, RunsItsLayersAsItIsTold) {
  GPT2LMHeadModel model(small_config());
  const auto ids = at::randint(50, {1, 6}, at::kLong);
  const auto expected = model->forward(ids);
  int layers = 0;
  model->transformer->run_layer = [&](const auto& layer, const torch::Tensor& x) {
    ++layers;
    return layer(x);
  };
  EXPECT_TRUE(at::equal(model->forward(ids), expected));
  EXPECT_EQ(layers, model->config.n_layer);
}

TEST(GPT2, RefusesMoreTokensThanPositions) {
  GPT2LMHeadModel model(small_config());
  EXPECT_THROW(model->forward(at::zeros({1, 33}, at::kLong)), c10::ValueError);
}

TEST(GPT2, WritesGreedilyUpToItsLastPosition) {
  GPT2LMHeadModel model(small_config());
  model->eval();
  EXPECT_EQ(greedy(model, {1, 2, 3}, /*end=*/-1, 100).size(), 29U);
  EXPECT_EQ(greedy(model, {1, 2, 3}, /*end=*/-1, 4).size(), 4U);
  at::NoGradGuard no_grad;
  std::vector<std::int64_t> tokens = {1, 2, 3};
  for (const auto token : greedy(model, tokens, -1, 4)) {
    EXPECT_EQ(
        token,
        model->forward(torch::tensor(tokens, at::kLong).unsqueeze(0)).select(1, -1).argmax().item<std::int64_t>());
    tokens.push_back(token);
  }
}

TEST(GPT2Checkpoint, IsBitwiseWhatWasSaved) {
  const TempFolder folder;
  GPT2LMHeadModel model(small_config());
  save_gpt2(model, folder / "model", 0);
  const auto loaded = load_gpt2(folder / "model");
  EXPECT_EQ(loaded->config.n_inner, 40);
  const auto parameters = loaded->named_parameters();
  for (const auto& parameter : model->named_parameters()) {
    EXPECT_TRUE(at::equal(parameters[parameter.key()], parameter.value())) << parameter.key();
  }
}

TEST(GPT2Checkpoint, TakesNamesWithoutPrefixAndOldBuffers) {
  const Checkpoint checkpoint;
  std::map<std::string, at::Tensor> tensors;
  for (const auto& [name, tensor] : golden_tensors()) tensors[name.substr(std::string("transformer.").size())] = tensor;
  tensors["h.0.attn.bias"] = at::ones({1, 1, 64, 64});
  tensors["h.0.attn.masked_bias"] = at::full({}, -1e4);
  tensors["lm_head.weight"] = tensors["wte.weight"];
  EXPECT_EQ(checkpoint.save(tensors), "");
}

TEST(GPT2Checkpoint, ListsEveryTensorThatDoesNotFit) {
  const Checkpoint checkpoint;
  auto tensors = golden_tensors();
  tensors.erase("transformer.ln_f.bias");
  tensors["transformer.h.0.mlp.c_fc.weight"] = at::zeros({128, 32});
  tensors["transformer.wpe.weight"] = at::zeros({64, 32}, at::kLong);
  tensors["transformer.h.7.ln_1.weight"] = at::zeros({32});
  EXPECT_THAT(checkpoint.save(tensors),
              AllOf(HasSubstr("no transformer.ln_f.bias"),
                    HasSubstr("c_fc.weight of float [128, 32], expected numbers of shape [32, 128]"),
                    HasSubstr("found transformer.wpe.weight"), HasSubstr("unexpected transformer.h.7.ln_1.weight")));
}

TEST(GPT2Checkpoint, RefusesAHeadOfItsOwn) {
  const Checkpoint checkpoint;
  auto tensors = golden_tensors();
  tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1;
  EXPECT_THAT(checkpoint.save(tensors), HasSubstr("expected a tied head"));
}

TEST(GPT2Checkpoint, RefusesAConfigurationThatItDoesNotCompute) {
  const Checkpoint checkpoint;
  EXPECT_THAT(checkpoint.set("activation_function", "relu"),
              HasSubstr("activation_function = \"relu\", expected \"gelu_new\""));
  EXPECT_THAT(checkpoint.set("model_type", "llama"), HasSubstr("model_type"));
  EXPECT_THAT(checkpoint.set("n_head", 5), HasSubstr("n_embd = 32, expected a multiple of n_head = 5"));
  EXPECT_THAT(checkpoint.set("n_head", 0), HasSubstr("n_head = 0, expected 1 to"));
  EXPECT_THAT(checkpoint.set("n_layer", "two"), HasSubstr("n_layer = \"two\""));
  EXPECT_THAT(checkpoint.set("n_layer", 10'000'000), HasSubstr("expected n_layer = 10000000 layers"));
  EXPECT_THAT(checkpoint.set("vocab_size", nullptr), HasSubstr("vocab_size"));
  EXPECT_THAT(checkpoint.set("layer_norm_epsilon", 0), HasSubstr("layer_norm_epsilon"));
}

TEST(GPT2Checkpoint, RefusesATruncatedFile) {
  const Checkpoint checkpoint;
  const auto bytes = read_bytes(kGolden + "/model/model.safetensors");
  for (const auto size : {std::size_t{0}, std::size_t{4}, std::size_t{100}, bytes.size() - 1}) {
    write_bytes(checkpoint.folder / "model.safetensors", bytes.substr(0, size));
    EXPECT_THAT(error_of(checkpoint.folder.path().string()), HasSubstr("model.safetensors")) << size;
  }
  std::filesystem::remove(checkpoint.folder / "model.safetensors");
  EXPECT_THAT(error_of(checkpoint.folder.path().string()), HasSubstr("model.safetensors"));
}

}  // namespace
}  // namespace gpt2_test
