// The C++ blocks of README.md and docs/: each stands here, or is a program of examples/, and runs. Those with "…" are
// sketches. Other things that the docs say of the code are compared too.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/lora.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/optim/adamw.h>

#include <cctype>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <iostream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "examples/models/gpt2.h"
#include "harness/temp_folder.h"
#include "harness/values.h"
#include "oracles/models.h"

namespace snippets_test {
namespace {

const std::string kRoot = LORA_SOURCE_DIR "/";

GPT2LMHeadModel gpt2() {
  torch::manual_seed(1);
  GPT2Config config;
  config.vocab_size = 24;
  config.n_positions = 16;
  config.n_embd = 12;
  config.n_layer = 2;
  config.n_head = 2;
  return GPT2LMHeadModel(config);
}

Reader reader() {
  torch::manual_seed(1);
  Reader model;
  model->eval();
  return model;
}

/// Two projections as a Llama has them, behind an embedding.
struct ProjectionsImpl : torch::nn::Module {
  torch::nn::Embedding wte = register_module("wte", torch::nn::Embedding(9, 6));
  torch::nn::Linear q_proj = register_module("q_proj", torch::nn::Linear(6, 4));
  torch::nn::Linear v_proj = register_module("v_proj", torch::nn::Linear(6, 4));
};
TORCH_MODULE(Projections);

struct MyNorm : torch::nn::Module {
  torch::Tensor gain = register_parameter("gain", torch::ones({6}));
};

/// Runs in a folder of its own, as the paths of the docs are relative, and keeps what is printed to itself.
class Snippet : public ::testing::Test {
 protected:
  Snippet() : before_(std::filesystem::current_path()) {
    std::filesystem::current_path(folder_.path());
    std::filesystem::create_directory("out");
    ::testing::internal::CaptureStdout();
  }
  ~Snippet() override {
    ::testing::internal::GetCapturedStdout();
    std::filesystem::current_path(before_);
  }

 private:
  TempFolder folder_;
  std::filesystem::path before_;
};

TEST_F(Snippet, OfTheGuideAdaptTrainAndContinue) {
  auto model = gpt2();
  const auto x = at::arange(16).view({2, 8});
  auto adapters =
      lora::inject(*model, lora::LoraConfig().r(8).lora_alpha(16).target_modules({"c_attn", "attn.c_proj"}));
  std::cout << adapters.report();

  torch::optim::AdamW optimizer(
      lora::param_groups(adapters, torch::optim::AdamWOptions(2e-4), lora::LoraPlusOptions().lr_ratio(16)));

  lora::Schedule schedule(optimizer,
                          lora::ScheduleOptions().type(lora::ScheduleType::kCosine).warmup_steps(20).total_steps(300));
  optimizer.step();
  schedule.step();  // after every step of the optimizer

  int batches = 0;
  const auto train_one_batch = [&] { ++batches; };
  {
    lora::TrainingState state;
    state.adapters(adapters).optimizer(optimizer).schedule(schedule).setting("seed", 4);
    int64_t step = state.load("out/run.safetensors") ? state.get<int64_t>("step") : 0;
    while (step < 300) {
      train_one_batch();  // forward, backward, optimizer.step(), schedule.step()
      state.set("step", ++step).save("out/run.safetensors");
    }
  }
  EXPECT_EQ(batches, 300);
}

TEST_F(Snippet, OfTheGuideSwitchAndSaveSeveralAdapters) {
  auto model = gpt2();
  const auto x = at::arange(16).view({2, 8});
  lora::inject(*model, lora::LoraConfig().r(2).target_modules({"c_attn"})).save("out/other");
  lora::adapters_of(*model).unload();
  auto adapters = lora::inject(*model, lora::LoraConfig().r(2).target_modules({"c_fc"}));
  {
    adapters.load("out/other", "other");  // from PEFT or from here; neither active nor trainable
    adapters.add(lora::LoraConfig().r(4).target_modules({"c_attn[q,v]"}), "third");
    adapters.set_active({"other"});     // {}: the base model; several: the sum of their updates
    adapters.set_trainable({"third"});  // apart from what is active
    {
      lora::DisableAdapters off(adapters);  // this thread, nestable
      std::cout << "the base: " << model->forward(x).mean() << '\n';
    }
    adapters.remove("third");                // deactivates it first; removing the last one is unload()
    auto again = lora::adapters_of(*model);  // the handle again
    EXPECT_TRUE(again == adapters);
  }
  {
    adapters.save("out/all");           // "default" into the folder, every other into a sub-folder of its name
    adapters.save("out/one", "other");  // one adapter into the folder itself
    adapters.unload();
    adapters = lora::load(*model, "out/one", "other");  // a model without adapters: injects and loads in one call
    adapters.unload();
    adapters = lora::load_all(*model, "out/all");  // every adapter of the folder; the first is active, none trainable
  }
  EXPECT_THAT(adapters.names(), ::testing::ElementsAre("default", "other"));
  EXPECT_THAT(adapters.active(), ::testing::ElementsAre("default"));
  EXPECT_THAT(adapters.trainable(), ::testing::IsEmpty());
}

TEST_F(Snippet, OfTheGuideCopyModulesBiasesAndRows) {
  auto model = reader();
  auto adapters = lora::inject(*model, lora::LoraConfig()
                                           .r(8)
                                           .target_modules({"mix"})
                                           .layers_to_transform({0, 1})
                                           .modules_to_save({"classifier", "norm"})
                                           .bias(lora::BiasCopies::kAdaptedOnly)
                                           .trainable_token_indices({{"wte", {7, 2, 5}}}));
  lora::register_parameter<MyNorm>(&MyNorm::gain);
  EXPECT_EQ(adapters.report().entries.size(), 5U);
}

TEST_F(Snippet, OfTheGuideReadFilesThatFitByHalf) {
  auto model = reader();
  lora::inject(*model, lora::LoraConfig().r(8).target_modules({"mix"}).modules_to_save({"classifier"}))
      .save("out/given");
  lora::adapters_of(*model).unload();
  std::map<std::string, torch::Tensor> renamed{{"base_model.model.lm_head.weight", at::zeros({2})}};
  for (const auto& [key, tensor] : lora::load_safetensors("out/given/adapter_model.safetensors")) {
    auto name = key;
    if (name.find("classifier.out") != std::string::npos) continue;
    const auto layer = name.find("model.h.");
    if (layer != std::string::npos) name.replace(layer, 8, "model.decoder.blocks.");
    renamed[name] = tensor.clone();
  }
  std::filesystem::rename("out/given", "out/renamed");
  lora::save_safetensors(renamed, "out/renamed/adapter_model.safetensors");
  auto options = lora::LoadOptions()
                     .key_mapping({{"^decoder\\.blocks\\.", "h."}})  // the file's names in this model
                     .may_lack({"classifier"})
                     .may_ignore({"lm_head"});
  auto adapters = lora::load(*model, "out/renamed", "default", options);
  EXPECT_EQ(adapters.names().size(), 1U);
}

TEST_F(Snippet, OfTheGuideReadTensorsAlone) {
  auto model = gpt2();
  std::map<std::string, torch::Tensor> tensors;
  for (const std::string layer : {"0", "1"}) {  // as loralib's MergedLinear has them
    tensors["transformer.h." + layer + ".attn.c_attn.lora_A"] = at::ones({16, 12});
    tensors["transformer.h." + layer + ".attn.c_attn.lora_B"] = at::ones({24, 8});
  }
  lora::save_torch_pickle(tensors, "out/lora.bin");
  auto adapters =
      lora::load(*model, "out/lora.bin", lora::LoraConfig().r(8).lora_alpha(16).target_modules({"c_attn[q,v]"}));
  EXPECT_EQ(adapters.named_tensors("default").size(), 8U);
}

TEST_F(Snippet, OfTheGuideMergeForGood) {
  for (const bool unloads : {false, true}) {
    auto model = gpt2();
    const auto x = at::arange(16).view({2, 8});
    auto adapters = lora::inject(*model, lora::LoraConfig().r(2).target_modules({"c_attn", "wte"}));
    harness::fill(adapters);
    const auto y = model->forward(x);
    if (unloads) {
      adapters.merge_and_unload();
      std::map<std::string, torch::Tensor> tensors;
      for (const auto& parameter : model->named_parameters()) tensors[parameter.key()] = parameter.value();
      for (const auto& buffer : model->named_buffers()) tensors[buffer.key()] = buffer.value();
      lora::save_checkpoint(tensors, "out/merged");
      EXPECT_EQ(lora::load_checkpoint("out/merged").size(), tensors.size());
    } else {
      const auto options = lora::MergeOptions().keep_base(false);
      std::cout << adapters.merge_cost().bytes << " with W0 kept, " << adapters.merge_cost(options).bytes
                << " without\n";
      adapters.merge(options);
    }
    EXPECT_TRUE(at::allclose(model->forward(x), y, 1e-4, 1e-5));
    EXPECT_THROW(adapters.unmerge(), lora::StateError);
  }
}

TEST_F(Snippet, OfTheGuideAccelerate) {
  auto model = gpt2();
  auto adapters = lora::inject(*model, lora::LoraConfig().r(8).target_modules({"c_attn"}));
  const auto plan = lora::acceleration_of(*model);
  std::cout << *plan;              // a line for each shape: which kernel, by which times
  lora::end_acceleration(*model);  // LibTorch's products again; the adapters stay
  lora::accelerate(*model);        // as inject does, but for good: models without adapters, too
  auto pinned = std::make_shared<lora::ProductPlan>();
  pinned->pin(plan->choices());
  lora::accelerate(*model, pinned);
  EXPECT_EQ(lora::acceleration_of(*model), pinned);
}

TEST_F(Snippet, OfTheGuideHeadLossAndMemory) {
  auto model = gpt2();
  const auto adapters = lora::inject(*model, lora::LoraConfig().r(8).target_modules({"c_attn"}));
  const auto ids = torch::tensor({1, 2, 3}).unsqueeze(0), labels = torch::tensor({2, 3, -100}).unsqueeze(0);
  model->transformer->run_layer = [](const GPT2ModelImpl::Layer& layer, const torch::Tensor& x) {
    return lora::recompute(layer, x);
  };
  const auto hidden = model->transformer->forward(ids);  // [batch, tokens, d]
  const auto loss = lora::linear_cross_entropy(hidden, model->lm_head->weight, labels);
  loss.backward();
  for (const auto& parameter : adapters.parameters()) EXPECT_TRUE(parameter.grad().defined());
  auto* const before = c10::GetCPUAllocator();
  lora::keep_freed_memory();
  EXPECT_NE(c10::GetCPUAllocator(), before);
  c10::SetCPUAllocator(before);
  lora::limit_kernel_caches();
  const lora::FastOperators fast;
  const auto logits = model->forward(ids);
  EXPECT_NEAR(loss.item<double>(), at::cross_entropy_loss(logits.flatten(0, 1), labels.flatten()).item<double>(), 1e-5);
}

TEST_F(Snippet, OfTheGuideWriteAModelWithAdapters) {
  struct Block : torch::nn::Module {
    lora::LoRALinear<> fc =
        register_module("fc", lora::LoRALinear<>(torch::nn::Linear(768, 768), lora::LoraConfig().r(8)));
    torch::Tensor forward(const torch::Tensor& x) { return fc(x); }
  };
  Block model;
  auto adapters = lora::adapters_of(model);  // one handle of all such layers
  EXPECT_EQ(model.forward(at::zeros({2, 768})).size(1), 768);
}

TEST_F(Snippet, OfMigratingFromPeft) {
  Projections model;
  {
    auto adapters = lora::inject(
        *model, lora::LoraConfig().r(8).lora_alpha(16).target_modules({"q_proj", "v_proj"}).lora_dropout(0.1));
    std::cout << adapters.report();
    torch::optim::AdamW optimizer(adapters.parameters(), torch::optim::AdamWOptions(2e-4));
    // an ordinary training loop
    adapters.save("out");
    adapters.unload();
  }
  auto adapters = lora::inject(*model, lora::LoraConfig().r(2).target_modules({"wte", "q_proj"}));
  torch::optim::AdamW optimizer(lora::param_groups(adapters, torch::optim::AdamWOptions(2e-4).weight_decay(0),
                                                   lora::LoraPlusOptions().lr_ratio(16).lr_embedding(1e-6)));
  EXPECT_EQ(optimizer.param_groups().size(), 3U);
}

TEST_F(Snippet, OfPrefixTuning) {
  auto model = gpt2();
  const auto ids = at::arange(16).view({2, 8});
  lora::PrefixTuning prefix(
      lora::PrefixTuningConfig().num_virtual_tokens(5).num_layers(2).num_attention_heads(2).token_dim(12));
  torch::optim::AdamW optimizer(
      lora::param_groups(prefix->trainable_tensors(), torch::optim::AdamWOptions(5e-3).weight_decay(0)));
  auto logits = model->forward(GPT2Inputs{ids, {}, prefix->past_key_values(ids.size(0))});
  EXPECT_EQ(logits.size(1), 8);

  const auto past = prefix->past_key_values(2)[0];
  const auto query = harness::normal({2, 2, 8, 6}, 1, at::kFloat);
  auto key = harness::normal({2, 2, 8, 6}, 2, at::kFloat), value = harness::normal({2, 2, 8, 6}, 3, at::kFloat);
  {
    const auto n = past.first.size(2);
    key = torch::cat({past.first, key}, /*dim=*/2);
    value = torch::cat({past.second, value}, /*dim=*/2);
    auto mixed = lora::attention(query, key, value, /*is_causal=*/true, /*scale=*/std::nullopt, /*past=*/n);
    const auto mask = torch::ones({8, n + 8}, torch::kBool).tril(n);
    EXPECT_TRUE(at::allclose(mixed, at::scaled_dot_product_attention(query, key, value, mask), 1e-4, 1e-5));
  }
  GPT2Cache cache{prefix->past_key_values(1)};
  model->forward(ids.narrow(0, 0, 1).narrow(1, 0, 5), &cache);
  cache.layers.clear();
  model->forward(ids.narrow(0, 0, 1).narrow(1, 0, 5), &cache);
  prefix->start(cache.layers);

  auto adapters = lora::inject(*model, lora::LoraConfig().r(4).target_modules({"c_attn"}));
  auto tensors = adapters.trainable_tensors();
  for (const auto& tensor : prefix->trainable_tensors()) tensors.push_back(tensor);
  torch::optim::AdamW both(lora::param_groups(tensors, torch::optim::AdamWOptions(2e-4),
                                              lora::LoraPlusOptions().lr("embedding.weight", 5e-3)));
  lora::TrainingState().adapters(adapters).tensors(prefix->named_parameters().pairs()).optimizer(both).save("out/run");
  {
    prefix->save("out/prefix");
    auto loaded = lora::load_prefix_tuning("out/prefix");
    EXPECT_TRUE(at::equal(loaded->prompt_embeddings(), prefix->prompt_embeddings()));
  }
}

TEST_F(Snippet, OfPromptTuning) {
  auto model = gpt2();
  auto& wte = model->transformer->wte;
  const auto ids = at::arange(16).view({2, 8});
  lora::PromptTuning prompt(lora::PromptTuningConfig().num_virtual_tokens(5).token_dim(12));
  prompt->start(wte->weight.slice(/*dim=*/0, 0, 5));
  auto logits = model->forward(GPT2Inputs{{}, prompt->prepend(wte(ids)), {}});
  auto labels = prompt->pad_labels(ids);
  auto loss = torch::cross_entropy_loss(logits.slice(1, 0, -1).flatten(0, 1), labels.slice(1, 1).flatten());
  loss.backward();
  EXPECT_TRUE(prompt->embedding->weight.grad().defined());
  {
    prompt->save("out/prompt");
    auto loaded = lora::load_prompt_tuning("out/prompt");
    EXPECT_TRUE(at::equal(loaded->prompt_embeddings(), prompt->prompt_embeddings()));
  }
}

TEST_F(Snippet, OfDora) {
  auto model = gpt2();
  auto adapters =
      lora::inject(*model, lora::LoraConfig().r(8).lora_alpha(16).use_dora(true).target_modules({"c_attn", "c_fc"}));
  EXPECT_EQ(adapters.report().trainable_parameters, 2 * (8 * (12 + 36) + 36 + 8 * (12 + 48) + 48));
}

TEST_F(Snippet, OfVera) {
  auto model = gpt2();
  auto adapters = lora::inject(*model, lora::VeraConfig().r(256).projection_prng_key(3).target_modules({"c_attn"}));
  torch::optim::AdamW optimizer(lora::param_groups(adapters, torch::optim::AdamWOptions(4e-3)));
  EXPECT_EQ(adapters.report().trainable_parameters, 2 * (256 + 36));
}

TEST_F(Snippet, OfIA3) {
  auto model = gpt2();
  auto adapters = lora::inject(
      *model, lora::IA3Config().target_modules({"c_attn", "mlp.c_proj"}).feedforward_modules({"mlp.c_proj"}));
  EXPECT_EQ(adapters.report().trainable_parameters, 2 * (36 + 48));
}

TEST_F(Snippet, OfMiss) {
  auto model = gpt2();
  auto adapters = lora::inject(*model, lora::MissConfig().r(8).target_modules({"c_attn", "c_fc"}));
  EXPECT_EQ(adapters.report().trainable_parameters, 2 * 8 * (36 + 48));
}

TEST_F(Snippet, OfMora) {
  auto model = gpt2();
  auto adapters = lora::inject(*model, lora::MoraConfig().r(8).mora_type(6).target_modules({"c_attn"}));
  EXPECT_EQ(adapters.report().trainable_parameters, 2 * 20 * 20);  // √(8·48) = 19.6
}

TEST_F(Snippet, OfStarts) {
  {
    auto model = gpt2();
    auto adapters = lora::inject(
        *model, lora::LoraConfig().r(8).init_lora_weights(lora::LoraInit::kPissa).target_modules({"c_attn", "c_fc"}));
    EXPECT_EQ(adapters.report().trainable_parameters, 2 * 8 * (12 + 36 + 12 + 48));
  }
  auto model = gpt2();
  const std::vector<torch::Tensor> batches{at::arange(24).view({2, 12}), at::arange(23, -1, -1).view({2, 12})};
  const auto run = [&](int64_t batch) {
    if (batch == static_cast<int64_t>(batches.size())) return false;
    model->forward(batches[static_cast<size_t>(batch)]);
    return true;
  };
  auto adapters = lora::inject(
      *model, lora::LoraConfig().r(2).init_lora_weights(lora::LoraInit::kEva).target_modules({"c_attn", "c_fc"}),
      "default", lora::InjectOptions().data(run));
  EXPECT_FALSE(adapters.parameters().empty());
}

TEST_F(Snippet, OfLoraFaAndTruncate) {
  auto model = gpt2();
  auto adapters = lora::inject(*model, lora::LoraConfig().r(8).target_modules({"c_attn"}));
  {
    const lora::LoraFa only_B(adapters);
    torch::optim::AdamW optimizer(lora::param_groups(adapters, torch::optim::AdamWOptions(2e-4)));
    model->forward(at::arange(16).view({2, 8})).sum().backward();
    optimizer.step();
  }
  harness::fill(adapters);
  {
    const auto report = adapters.truncate("default", lora::Truncation::energy(0.9));
    std::cout << report;
    adapters.save("out/small");
    EXPECT_LT(report.error, std::sqrt(0.1) + 1e-6);
  }
}

TEST_F(Snippet, OfTheGuideOtherMethods) {
  auto model = gpt2();
  auto adapters = lora::inject(*model, lora::IA3Config().target_modules({"c_attn"}));
  adapters.add(lora::LoraConfig().r(4).use_dora(true).target_modules({"c_fc"}), "dora");
  adapters.set_active({"default", "dora"});
  EXPECT_EQ(adapters.active().size(), 2U);
}

// What the docs say.

std::string without_space(const std::string& text) {
  std::string result;
  for (const char c : text) {
    if (std::isspace(static_cast<unsigned char>(c)) == 0) result += c;
  }
  return result;
}

std::vector<std::string> pages() {
  std::vector<std::string> found{kRoot + "README.md"};
  for (const auto& entry : std::filesystem::recursive_directory_iterator(kRoot + "docs")) {
    if (entry.path().extension() == ".md") found.push_back(entry.path().string());
  }
  return found;
}

TEST(Docs, HoldNoSnippetThatIsNotRunHere) {
  auto programs = read_bytes(kRoot + "tests/docs/snippets_test.cpp");
  for (const auto& entry : std::filesystem::directory_iterator(kRoot + "examples")) {
    if (entry.path().extension() == ".cpp") programs += read_bytes(entry.path().string());
  }
  programs = without_space(programs);
  int snippets = 0;
  for (const auto& page : pages()) {
    const auto text = read_bytes(page);
    const std::string open = "```cpp\n", close = "```";
    for (auto begin = text.find(open); begin != std::string::npos; begin = text.find(open, begin)) {
      begin += open.size();
      const auto snippet = text.substr(begin, text.find(close, begin) - begin);
      if (snippet.find("…") != std::string::npos) continue;
      EXPECT_NE(programs.find(without_space(snippet)), std::string::npos) << page << ":\n" << snippet;
      ++snippets;
    }
  }
  EXPECT_GE(snippets, 10);
}

TEST(Docs, NameEveryKeyOfPeftsConfiguration) {
  const auto keys =
      nlohmann::json::parse(read_bytes(kRoot + "tests/golden/options/reader/everything/adapter_config.json"));
  const auto formats = read_bytes(kRoot + "docs/formats.md"),
             migrating = read_bytes(kRoot + "docs/migrating-from-peft.md");
  const std::set<std::string> of_the_file{"inference_mode", "megatron_core", "peft_type", "peft_version",
                                          "qalora_group_size"};
  for (const auto& [key, value] : keys.items()) {
    EXPECT_NE(formats.find("`" + key + "`"), std::string::npos) << "formats.md has no " << key;
    if (of_the_file.count(key) != 0) continue;
    const bool named =
        migrating.find("`" + key + "`") != std::string::npos || migrating.find("`" + key + "=") != std::string::npos;
    EXPECT_TRUE(named) << "migrating-from-peft.md has no " << key;
  }
}

TEST(Docs, LinkToFilesThatAreThere) {
  for (const auto& page : pages()) {
    const auto text = read_bytes(page);
    for (auto begin = text.find("]("); begin != std::string::npos; begin = text.find("](", begin)) {
      begin += 2;
      const auto target = text.substr(begin, text.find_first_of("#)", begin) - begin);
      if (target.empty() || target.find_first_of(": ") != std::string::npos) continue;  // of the web, or a lambda
      EXPECT_TRUE(std::filesystem::exists(std::filesystem::path(page).parent_path() / target))
          << page << ": " << target;
    }
  }
}

}  // namespace
}  // namespace snippets_test
