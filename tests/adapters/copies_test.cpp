// What an adapter has copies of: whole modules, biases, rows of embeddings; and the bias of its updates.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/lora.h>
#include <torch/nn/modules/rnn.h>
#include <torch/optim/sgd.h>

#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "harness/message_of.h"
#include "harness/models.h"
#include "harness/temp_folder.h"
#include "harness/values.h"
#include "oracles/models.h"

namespace copies_test {
namespace {

using harness::message_of;
using lora::LoraConfig;
using ::testing::AllOf;
using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

at::Tensor ids() { return at::arange(28).remainder(11).view({4, 7}); }

Reader make_reader() {
  torch::manual_seed(3);
  Reader reader;
  reader->eval();
  return reader;
}

LoraConfig config() { return LoraConfig().r(2).lora_alpha(3).target_modules({"mix"}); }

TEST(Copies, BatchNormsOwnStatisticsFollowTheAdapterInTraining) {
  auto reader = make_reader();
  const auto before = harness::bytes_of(reader->norm->running_mean);
  auto plain = make_reader();
  auto adapters = lora::inject(*reader, config().modules_to_save({"norm"}));
  reader->train();
  plain->train();
  for (int step = 0; step < 3; ++step) {
    EXPECT_TRUE(at::equal(reader->forward(ids()), plain->forward(ids())));
  }
  EXPECT_EQ(harness::bytes_of(reader->named_buffers()["norm.running_mean"]), before) << "the base's stay";
  for (const auto& [name, tensor] : adapters.named_tensors("default")) {
    if (name == "norm.lora_default.running_mean") {
      EXPECT_TRUE(at::equal(tensor, plain->norm->running_mean));
    } else if (name == "norm.lora_default.num_batches_tracked") {
      EXPECT_EQ(tensor.item<int64_t>(), 3);
    }
  }
  adapters.unload();
  EXPECT_EQ(harness::bytes_of(reader->norm->running_mean), before);
}

TEST(Copies, HalfPrecisionModelsTrainThemInFloat32) {
  auto reader = make_reader();
  reader->to(at::kBFloat16);
  auto adapters = lora::inject(*reader, config().modules_to_save({"classifier", "norm"}).bias(lora::BiasCopies::kAll));
  for (const auto& [name, tensor] : adapters.named_parameters()) EXPECT_EQ(tensor.scalar_type(), at::kFloat) << name;
  reader->forward(ids()).sum().backward();
  for (const auto& [name, tensor] : adapters.named_parameters()) EXPECT_TRUE(tensor.grad().defined()) << name;
  const auto unmerged = reader->forward(ids());
  adapters.merge();
  EXPECT_EQ(reader->classifier->dense->weight.scalar_type(), at::kBFloat16);
  EXPECT_TRUE(at::allclose(reader->forward(ids()), unmerged, 1e-2, 1e-2));
  adapters.unmerge();
  reader->to(at::kFloat);
  EXPECT_NO_THROW(reader->forward(ids()));
}

TEST(Copies, OfTwoAdaptersAtOnceHaveNoSum) {
  auto reader = make_reader();
  auto adapters = lora::inject(*reader, config().bias(lora::BiasCopies::kAdaptedOnly));
  adapters.add(config().modules_to_save({"classifier"}), "head");
  adapters.add(config().modules_to_save({"h.0.mix", "classifier"}).target_modules({"h.1.mix"}), "other");
  adapters.set_active({"default", "head"});
  EXPECT_THAT(
      [&] {
        adapters.set_active({"default", "head", "other"});
      },
      ThrowsMessage<lora::StateError>(AllOf(HasSubstr("\"default\" and \"other\" active at h.0.mix.bias"),
                                            HasSubstr("\"head\" and \"other\" active at classifier.dense.weight"))));
  EXPECT_EQ(adapters.active(), (std::vector<std::string>{"default", "head"}));
}

TEST(Copies, CannotStayUnmergedBelowMergedUpdates) {
  auto reader = make_reader();
  auto adapters = lora::inject(*reader, config());
  adapters.add(config().modules_to_save({"h.0.mix"}).target_modules({"h.1.mix"}), "copy");
  adapters.set_active({"default", "copy"});
  harness::fill(adapters, "default");
  harness::fill(adapters, "copy", 30);
  const auto unmerged = reader->forward(ids());
  EXPECT_THAT([&] { adapters.merge({"default"}); },
              ThrowsMessage<lora::StateError>(HasSubstr("\"copy\" unmerged with a copy in place of the base")));
  EXPECT_TRUE(at::equal(reader->forward(ids()), unmerged));
  adapters.merge();
  EXPECT_TRUE(at::allclose(reader->forward(ids()), unmerged, 1e-5, 1e-5));
}

TEST(Copies, NamesThatMatchNothingAndHiddenParametersAreErrors) {
  struct Gated : torch::nn::Module {
    Gated() : gain(register_parameter("gain", at::ones({6}))) {}
    at::Tensor gain;
  };
  struct Model : torch::nn::Module {
    Model() {
      register_module("fc", torch::nn::Linear(6, 6));
      register_module("gated", std::make_shared<Gated>());
      register_module("rnn", torch::nn::LSTM(6, 6));
    }
  } model;
  const auto fc = LoraConfig().r(2).target_modules({"fc"});
  EXPECT_THAT(message_of([&] { lora::inject(model, LoraConfig(fc).modules_to_save({"gatd"})); }),
              AllOf(HasSubstr("found no module for \"gatd\" in modules_to_save"), HasSubstr("nearest: gated")));
  EXPECT_THAT(message_of([&] { lora::inject(model, LoraConfig(fc).modules_to_save({"gated"})); }),
              AllOf(HasSubstr("the parameter gated.gain"), HasSubstr("lora::register_parameter")));
  EXPECT_THAT(message_of([&] { lora::inject(model, LoraConfig(fc).modules_to_save({"rnn"})); }),
              HasSubstr("rnn.weight_ih_l0"));
  EXPECT_THAT(message_of([&] { lora::inject(model, LoraConfig().r(2).target_modules({"rnn"})); }),
              AllOf(HasSubstr("found torch::nn::LSTMImpl at rnn"), HasSubstr("a list of its own")));
  lora::register_parameter<Gated>(&Gated::gain);
  auto adapters = lora::inject(model, LoraConfig(fc).modules_to_save({"gated"}));
  EXPECT_EQ(adapters.named_parameters().back().first, "gated.lora_default.gain");
}

TEST(Copies, AnEmbeddingWithMaxNormIsRefusedByName) {
  torch::nn::Sequential model(torch::nn::Embedding(torch::nn::EmbeddingOptions(5, 4).max_norm(1)));
  EXPECT_THAT(message_of([&] { lora::inject(*model, LoraConfig().r(2).target_modules({"0"})); }),
              AllOf(HasSubstr("found 0"), HasSubstr("max_norm")));
}

TEST(Tokens, TrainTheirRowsAndThoseOfATiedHead) {
  torch::manual_seed(7);
  harness::Tied model;
  model->to(at::kDouble);
  const auto before = harness::base_bytes(*model);
  auto adapters = lora::inject(*model, LoraConfig().r(2).target_modules({"mix"}).trainable_token_indices({3, 14, 0}));
  EXPECT_THAT(adapters.report().notes, Contains(HasSubstr("head is tied to wte")));
  const auto tokens = at::arange(15).view({3, 5});
  const auto base = model->forward(tokens);
  harness::fill(adapters);
  const auto y = model->forward(tokens);

  const auto rows = adapters.named_tensors("default").front();
  ASSERT_EQ(rows.first, "wte.lora_default.trainable_tokens");
  const auto W0 = model->named_parameters()["wte.weight"].detach();
  EXPECT_TRUE(at::equal(model->wte->weight.clone(), W0.index_copy(0, at::tensor({3, 14, 0}, at::kLong), rows.second)));
  adapters.merge();
  EXPECT_LT(harness::largest(model->forward(tokens) - y), 1e-12);
  EXPECT_TRUE(at::equal(model->wte->weight, model->head->weight));
  EXPECT_TRUE(at::equal(model->wte->weight.index_select(0, at::tensor({3, 14, 0}, at::kLong)), rows.second));
  adapters.unmerge();

  torch::optim::SGD optimizer(adapters.parameters(), 0.1);
  model->forward(tokens).square().mean().backward();
  optimizer.step();
  EXPECT_EQ(harness::base_bytes(*model), before);
  adapters.set_active({});
  EXPECT_TRUE(at::equal(model->forward(tokens), base));
}

TEST(Tokens, AndCopiesAreClonedWithTheirModel) {
  torch::nn::Sequential model(torch::nn::Embedding(9, 4), torch::nn::Linear(4, 4),
                              torch::nn::LayerNorm(torch::nn::LayerNormOptions({4})));
  const auto options = LoraConfig().r(2).target_modules({"1"}).trainable_token_indices({5, 1}).modules_to_save({"2"});
  auto adapters = lora::inject(*model, LoraConfig(options).lora_bias(true).bias(lora::BiasCopies::kAll));
  harness::fill(adapters);
  const auto tokens = at::arange(9);
  const auto copy =
      std::dynamic_pointer_cast<torch::nn::SequentialImpl>(lora::clone(static_cast<torch::nn::Module&>(*model)));
  const auto y = model->forward(tokens);
  EXPECT_TRUE(at::equal(copy->forward(tokens), y));
  harness::fill(adapters, "default", 99);
  EXPECT_TRUE(at::equal(copy->forward(tokens), y)) << "with tensors of its own";
}

TEST(Tokens, AreRefusedWhereTheyCannotBe) {
  harness::Tied model;
  const auto tokens = [](lora::TokenIndices indices) {
    return LoraConfig().r(2).target_modules({"mix"}).trainable_token_indices(std::move(indices));
  };
  EXPECT_THAT(message_of([&] { lora::inject(*model, tokens({15})); }), HasSubstr("the token 15, expected one of 15"));
  EXPECT_THAT(message_of([&] { lora::inject(*model, tokens({{"wpe", {1}}})); }), HasSubstr("no Embedding"));
  EXPECT_THAT(message_of([&] { lora::inject(*model, tokens({1, 1})); }), HasSubstr("each token once"));
  EXPECT_THAT(message_of([&] { lora::inject(*model, tokens({1}).target_modules({"wte"})); }),
              HasSubstr("trainable_token_indices and target_modules"));
  EXPECT_THAT(message_of([&] { lora::inject(*model, tokens({1}).modules_to_save({"wte"})); }),
              HasSubstr("trainable_token_indices and modules_to_save"));
}

TEST(Embeddings, ATiedHeadStaysAsItIs) {
  torch::manual_seed(7);
  harness::Tied model;
  const auto head = model->head->weight;
  auto adapters = lora::inject(*model, LoraConfig().r(2).target_modules({"wte"}), "default",
                               lora::InjectOptions().accelerate(false));
  EXPECT_THAT(adapters.report().notes, Contains(HasSubstr("wte is tied to head.weight")));
  harness::fill(adapters);
  const auto tokens = at::arange(15).view({3, 5});
  const auto y = model->forward(tokens);
  adapters.merge();
  EXPECT_TRUE(model->head->weight.is_same(head));
  EXPECT_TRUE(at::allclose(model->forward(tokens), y, 1e-5, 1e-6));
  adapters.merge_and_unload();
  EXPECT_TRUE(at::equal(model->head->weight, head));
  EXPECT_FALSE(at::equal(model->wte->weight, head));
}

TEST(Embeddings, AHeadThatMultipliesWithTheirMemberStaysAsItIs) {
  torch::manual_seed(7);
  struct Functional : torch::nn::Module {
    Functional() : wte(register_module("wte", torch::nn::Embedding(15, 6))) {}
    at::Tensor forward(const at::Tensor& tokens) { return at::linear(at::tanh(wte(tokens)), wte->weight); }
    torch::nn::Embedding wte;
  } model;
  model.to(at::kDouble);
  const auto W0 = model.wte->weight.detach().clone();
  auto adapters = lora::inject(model, LoraConfig().r(2).lora_alpha(3).target_modules({"wte"}));
  harness::fill(adapters);
  const auto A = adapters.parameters()[0].detach(), B = adapters.parameters()[1].detach();
  const auto tokens = at::arange(15).view({3, 5});
  const auto expected = at::linear(at::tanh(at::embedding(W0 + 1.5 * A.t().mm(B.t()), tokens)), W0);
  EXPECT_LT(harness::largest(model.forward(tokens) - expected), 1e-12);
  adapters.merge();
  EXPECT_LT(harness::largest(model.forward(tokens) - expected), 1e-12) << "merged";
  EXPECT_THAT(message_of([&] { adapters.merge_and_unload(); }), HasSubstr("wte.weight looked up and multiplied with"));
  adapters.unmerge();
  adapters.unload();
  EXPECT_TRUE(at::equal(model.wte->weight, W0));
}

TEST(Embeddings, GradientsScaledByFrequencyAreTheDenseOnes) {
  torch::manual_seed(7);
  torch::nn::Sequential model(torch::nn::Embedding(torch::nn::EmbeddingOptions(6, 4).scale_grad_by_freq(true)));
  model->to(at::kDouble);
  auto adapters = lora::inject(*model, LoraConfig().r(2).lora_alpha(3).target_modules({"0"}));
  harness::fill(adapters);
  const auto tokens = at::tensor({1, 2, 1, 1, 5}, at::kLong);
  const auto g = harness::normal({5, 4}, 9);
  (model->forward(tokens) * g).sum().backward();
  const auto A = adapters.parameters()[0], B = adapters.parameters()[1];
  const auto dW = at::embedding_dense_backward(g, tokens, 6, -1, /*scale_grad_by_freq=*/true);
  EXPECT_LT(harness::largest(A.grad() - 1.5 * B.detach().t().mm(dW.t())), 1e-12);
  EXPECT_LT(harness::largest(B.grad() - 1.5 * dW.t().mm(A.detach().t())), 1e-12);
  EXPECT_EQ(adapters.fallbacks().count("aten::embedding"), 1U);
}

TEST(UpdateBias, OfALayerWithoutABiasMergesIntoOneOfItsOwn) {
  torch::manual_seed(5);
  Mlp mlp;  // down has no bias
  mlp->to(at::kDouble);
  auto adapters = lora::inject(*mlp, LoraConfig().r(2).lora_alpha(3).target_modules({"down"}).lora_bias(true));
  harness::fill(adapters);
  const auto x = harness::normal({5, 12}, 1);
  const auto hidden = at::tanh(at::linear(x, mlp->up->weight, mlp->up->bias));
  const auto tensors = adapters.named_tensors("default");
  ASSERT_EQ(tensors.size(), 3U);
  EXPECT_EQ(tensors[2].first, "down.lora_default.lora_B_bias");
  const auto W = mlp->named_parameters()["down.weight"] + 1.5 * tensors[1].second.mm(tensors[0].second);
  const auto expected = at::linear(hidden, W, 1.5 * tensors[2].second);
  EXPECT_LT(harness::largest(mlp->forward(x) - expected), 1e-12);
  mlp->to(at::kFloat);
  EXPECT_NO_THROW(mlp->forward(x.to(at::kFloat)));
  mlp->to(at::kDouble);
  adapters.merge();
  EXPECT_LT(harness::largest(mlp->forward(x) - expected), 1e-6);
  adapters.unmerge();
  adapters.merge_and_unload();
  EXPECT_LT(harness::largest(mlp->forward(x) - expected), 1e-6);
  EXPECT_TRUE(mlp->named_parameters()["down.bias"].requires_grad()) << "as the weight beside it";

  Mlp other;
  lora::inject(*other, LoraConfig().r(2).target_modules({"down"}).lora_bias(true)).unload();
  EXPECT_FALSE(other->down->bias.defined());
}

TEST(UpdateBias, NeedsALayerThatCanHaveOne) {
  auto reader = make_reader();
  EXPECT_THAT(message_of([&] { lora::inject(*reader, config().target_modules({"wte"}).lora_bias(true)); }),
              HasSubstr("found no bias at wte"));
}

TEST(Files, PeftsAdapterOfAConvolutionWithGroupsIsRefusedByName) {
  const auto grouped = [] {
    torch::nn::Sequential model(torch::nn::Conv1d(torch::nn::Conv1dOptions(4, 6, 3).groups(2)));
    return model;
  };
  auto model = grouped();
  const TempFolder folder;
  auto adapters = lora::inject(*model, LoraConfig().r(2).target_modules({"0"}));
  harness::fill(adapters);
  adapters.save(folder.path());
  auto again = grouped();
  const auto x = harness::normal({2, 4, 5}, 3, at::kFloat);
  {
    const at::NoGradGuard no_grad;
    for (auto& [name, tensor] : state_dict(*again)) tensor.copy_(state_dict(*model).at(name));
  }
  lora::load(*again, folder.path());
  EXPECT_TRUE(at::equal(model->forward(x), again->forward(x))) << "ours loads";

  auto tensors = lora::load_safetensors(folder / "adapter_model.safetensors");
  tensors["base_model.model.0.lora_A.weight"] = at::zeros({2, 4, 3});
  tensors["base_model.model.0.lora_B.weight"] = at::zeros({6, 1, 1});
  lora::save_safetensors(tensors, folder / "adapter_model.safetensors");
  auto third = grouped();
  EXPECT_THAT(message_of([&] { lora::load(*third, folder.path()); }),
              HasSubstr("PEFT's form for a convolution with 2 groups, whose update mixes the groups"));
}

TEST(Files, EmbeddingsThatPeftSavedWholeAreTakenOrPassedOver) {
  auto reader = make_reader();
  const TempFolder folder;
  auto adapters = lora::inject(*reader, config().target_modules({"wte"}));
  harness::fill(adapters);
  adapters.save(folder.path());
  auto tensors = lora::load_safetensors(folder / "adapter_model.safetensors");
  auto& saved = tensors["base_model.model.wte.base_layer.weight"];
  saved = reader->named_parameters()["wte.weight"].detach().clone();
  lora::save_safetensors(tensors, folder / "adapter_model.safetensors");
  auto equal = make_reader();
  auto loaded = lora::load(*equal, folder.path());
  EXPECT_THAT(loaded.report().notes, Contains(HasSubstr("wte is in the file as it is in the base")));
  EXPECT_TRUE(at::equal(equal->forward(ids()), reader->forward(ids())));

  saved.add_(0.5);
  lora::save_safetensors(tensors, folder / "adapter_model.safetensors");
  auto other = make_reader();
  loaded = lora::load(*other, folder.path());
  const auto y = other->forward(ids());
  const at::NoGradGuard no_grad;
  for (auto& parameter : reader->named_parameters()) {
    if (parameter.key() == "wte.weight") parameter.value().copy_(saved);
  }
  EXPECT_TRUE(at::equal(reader->forward(ids()), y));
  loaded.merge();
  EXPECT_TRUE(at::allclose(other->forward(ids()), y, 1e-5, 1e-6));
}

TEST(Files, AMappedAdapterKeepsTheRankAndAlphaOfItsOldNames) {
  auto reader = make_reader();
  const TempFolder folder;
  auto adapters = lora::inject(*reader, config().rank_pattern({{"h.1.mix", 5}}).alpha_pattern({{"h.0.mix", 11}}));
  harness::fill(adapters);
  adapters.save(folder.path());
  const auto y = reader->forward(ids());
  std::map<std::string, at::Tensor> renamed;
  for (const auto& [key, tensor] : lora::load_safetensors(folder / "adapter_model.safetensors")) {
    auto name = key;
    name.replace(name.find("model.h."), 8, "model.blocks.");
    renamed[name] = tensor;
  }
  auto written = nlohmann::json::parse(read_bytes(folder / "adapter_config.json"));
  for (const auto* key : {"rank_pattern", "alpha_pattern"}) {
    auto patterns = nlohmann::json::object();
    for (const auto& [pattern, value] : written[key].items()) patterns["blocks" + pattern.substr(1)] = value;
    written[key] = patterns;
  }
  lora::save_safetensors(renamed, folder / "adapter_model.safetensors");
  write_bytes(folder / "adapter_config.json", written.dump());
  auto mapped = make_reader();
  EXPECT_THROW(lora::load(*mapped, folder.path()), lora::FormatError);
  lora::load(*mapped, folder.path(), "default", lora::LoadOptions().key_mapping({{"^blocks", "h"}}));
  EXPECT_TRUE(at::equal(mapped->forward(ids()), y));
}

TEST(Files, AnUpdateThatTheFileMayLackIsANewOne) {
  auto reader = make_reader();
  const TempFolder folder;
  auto adapters = lora::inject(*reader, config());
  harness::fill(adapters);
  adapters.save(folder.path());
  auto tensors = lora::load_safetensors(folder / "adapter_model.safetensors");
  for (const auto* key : {"lora_A", "lora_B"})
    tensors.erase("base_model.model.h.0.mix." + std::string(key) + ".weight");
  lora::save_safetensors(tensors, folder / "adapter_model.safetensors");
  auto other = make_reader();
  auto loaded = lora::load(*other, folder.path(), "default", lora::LoadOptions().may_lack({"h.0.mix"}));
  loaded.set_trainable({"default"});
  other->forward(ids()).sum().backward();
  const auto first = loaded.named_parameters();
  EXPECT_GT(harness::largest(first[0].second), 0) << "A is drawn";
  EXPECT_EQ(harness::largest(first[1].second), 0) << "B is zero";
  EXPECT_GT(harness::largest(first[1].second.grad()), 0) << "and trains";
}

TEST(Files, LenienceIsByNameAndNamesCanBeMapped) {
  auto reader = make_reader();
  const TempFolder folder;
  auto adapters = lora::inject(*reader, config().modules_to_save({"classifier"}));
  harness::fill(adapters);
  adapters.save(folder.path());
  const auto y = reader->forward(ids());
  auto tensors = lora::load_safetensors(folder / "adapter_model.safetensors");
  tensors.erase("base_model.model.classifier.out.bias");
  tensors["base_model.model.lm_head.extra.weight"] = at::zeros({2});
  lora::save_safetensors(tensors, folder / "adapter_model.safetensors");
  auto strict = make_reader();
  EXPECT_THAT(message_of([&] { lora::load(*strict, folder.path()); }),
              AllOf(HasSubstr("2 problems"), HasSubstr("classifier.out.bias"), HasSubstr("lm_head.extra.weight")));
  lora::LoadOptions lenient;
  lenient.may_lack({"classifier.out"}).may_ignore({"lm_head"});
  EXPECT_NO_THROW(lora::load(*strict, folder.path(), "default", lenient));

  std::map<std::string, at::Tensor> renamed;
  for (const auto& [key, tensor] : lora::load_safetensors(folder / "adapter_model.safetensors")) {
    auto name = key;
    const auto layer = name.find("model.h.");
    if (layer != std::string::npos) name.replace(layer, 8, "model.decoder.blocks_");
    renamed[name] = tensor;
  }
  renamed.erase("base_model.model.lm_head.extra.weight");
  lora::save_safetensors(renamed, folder / "adapter_model.safetensors");
  auto mapped = make_reader();
  EXPECT_THROW(lora::load(*mapped, folder.path(), "default", lenient), lora::FormatError);
  lenient.key_mapping({{"decoder\\.blocks_(\\d)", "h.\\1"}});
  auto loaded = lora::load(*mapped, folder.path(), "default", lenient);
  EXPECT_EQ(loaded.report().entries.size(), 3U);  // h.0.mix, h.1.mix, the classifier
  const auto bias = reader->named_parameters()["classifier.out.lora_default.bias"].detach();
  EXPECT_TRUE(at::allclose(mapped->forward(ids()) - mapped->named_parameters()["classifier.out.bias"] + bias, y));
}

}  // namespace
}  // namespace copies_test
