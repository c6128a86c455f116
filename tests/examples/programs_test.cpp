// The example programs as their users run them: exit codes, output and files.
#include <ATen/Context.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/lora.h>
#include <lora/methods/ia3.h>
#include <lora/methods/miss.h>
#include <lora/methods/mora.h>
#include <lora/methods/vera.h>

#include <filesystem>
#include <nlohmann/json.hpp>
#include <random>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "examples/models/gpt2_checkpoint.h"
#include "harness/child_process.h"
#include "harness/program_runs.h"
#include "harness/temp_folder.h"

namespace programs_test {
namespace {

using harness::ProgramRuns;
using testing::HasSubstr;
using testing::Not;
using testing::StartsWith;

const std::set<std::string> kFigures = {
    "trainable_parameters",  "total_parameters",  "dev_loss_before",   "dev_loss_after", "old_domain_loss_before",
    "old_domain_loss_after", "tokens_per_second", "peak_memory_bytes", "adapter_bytes",  "merged_max_abs_difference"};

/// The methods that put adapters into the model.
const std::set<std::string> kAdapterMethods = {"lora", "lora+",   "rslora", "dora", "pissa", "olora", "orthogonal",
                                               "eva",  "lora-fa", "vera",   "mora", "ia3",   "miss"};

/// A tiny untrained GPT-2 and a few pairs, so that a run takes a second.
class Programs : public ProgramRuns {
 protected:
  void SetUp() override {
    ProgramRuns::SetUp();
    const std::string vocabulary = LORA_SOURCE_DIR "/examples/text/small_vocab";
    torch::manual_seed(5);
    GPT2Config config;
    config.vocab_size = 1024;
    config.n_positions = 160;
    config.n_embd = 16;
    config.n_layer = 2;
    config.n_head = 2;
    save_gpt2(GPT2LMHeadModel(config), folder / "base", 0);
    for (const auto* const name : {"/vocab.json", "/merges.txt"})
      std::filesystem::copy_file(vocabulary + name, (folder / "base") + name);
    write_bytes(folder / "train.txt", run(GENERATE_PAIRS " --count 12 --seed 1").output);
    write_bytes(folder / "dev.txt", run(GENERATE_PAIRS " --count 6 --seed 2").output);
    finetune = FINETUNE_GPT2 " --threads 1 --batch-size 4 --data train.txt --dev dev.txt ";
    base = "--model base ";
    steps = "--steps 3 ";
    adapter = "--output adapter ";
    usual = finetune + base + steps + adapter;
  }

  /// The run ends with exit code 2 and one line that says `why`.
  void expect_error(const std::string& command, const std::string& why) const {
    const auto outcome = run(command);
    EXPECT_EQ(outcome.exit_code, 2) << command << "\n" << outcome.output;
    EXPECT_THAT(outcome.errors, StartsWith("error: ")) << command;
    EXPECT_THAT(outcome.errors, HasSubstr(why)) << command;
    EXPECT_EQ(outcome.errors.find('\n'), outcome.errors.size() - 1) << command;
  }

  std::string finetune, base, steps, adapter, usual;
};

TEST_F(Programs, HelpExplainsEveryFlag) {
  const auto outcome = run(FINETUNE_GPT2 " --help");
  EXPECT_EQ(outcome.exit_code, 0);
  for (const auto* const flag : {"--model",
                                 "--data",
                                 "--dev",
                                 "--output",
                                 "--method",
                                 "--rank",
                                 "--alpha",
                                 "--dropout",
                                 "--targets",
                                 "--lr",
                                 "--lora-plus-ratio",
                                 "--warmup",
                                 "--steps",
                                 "--epochs",
                                 "--batch-size",
                                 "--seed",
                                 "--threads",
                                 "--dtype",
                                 "--device",
                                 "--compare",
                                 "--json",
                                 "--schedule",
                                 "--checkpoint-every",
                                 "--resume",
                                 "--grid",
                                 "--compare-methods",
                                 "--virtual-tokens",
                                 "--evaluations",
                                 "--dev-pairs"}) {
    EXPECT_THAT(outcome.output, testing::ContainsRegex(std::string(flag) + "[ ,][^\n]*\n? +[a-zA-Z]")) << flag;
  }
}

TEST_F(Programs, ABadFlagIsOneLineAndExitCodeTwo) {
  expect_error(FINETUNE_GPT2 " --bogus", "--bogus");
  expect_error(FINETUNE_GPT2 " stray", "stray");
  expect_error(FINETUNE_GPT2 " --rank 0", "--rank: found 0");
  expect_error(FINETUNE_GPT2 " --rank", "--rank");
  expect_error(FINETUNE_GPT2 " --dropout 1.5", "--dropout: found 1.5");
  expect_error(FINETUNE_GPT2 " --lr nan", "--lr: found nan");
  expect_error(FINETUNE_GPT2 " --seed -1", "--seed: found -1");
  expect_error(FINETUNE_GPT2 " --steps 10 --epochs 1", "--epochs");
  expect_error(FINETUNE_GPT2 " --compare --lr 1e-3", "--compare");
  expect_error(FINETUNE_GPT2 " --compare --resume", "--compare");
  expect_error(FINETUNE_GPT2 " --compare --checkpoint-every 5", "--compare");
  expect_error(FINETUNE_GPT2 " --checkpoint-every 0", "--checkpoint-every: found 0");
  expect_error(FINETUNE_GPT2 " --schedule step", "--schedule");
  expect_error(FINETUNE_GPT2 " --method lorax", "--method");
  expect_error(FINETUNE_GPT2 " --dtype float8", "--dtype");
  expect_error(FINETUNE_GPT2 " --data train.txt", "--dev");
  expect_error(FINETUNE_GPT2 " --compare --compare-methods", "--compare");
  expect_error(FINETUNE_GPT2 " --compare-methods --method lora", "--compare-methods");
  expect_error(FINETUNE_GPT2 " --grid 1e-3", "--grid");
  expect_error(GENERATE_PAIRS " --domains none", "--domains");
}

TEST_F(Programs, AFlagOfAnotherMethodIsOneLineAndExitCodeTwo) {
  expect_error(FINETUNE_GPT2 " --method ia3 --rank 8",
               "[finetune_gpt2] found --rank for ia3, expected of the methods' flags no other than --targets");
  expect_error(FINETUNE_GPT2 " --method vera --alpha 8", "found --alpha for vera");
  expect_error(FINETUNE_GPT2 " --method prefix --targets c_attn", "found --targets for prefix");
  expect_error(FINETUNE_GPT2 " --method prompt --dropout 0.1", "found --dropout for prompt");
  expect_error(FINETUNE_GPT2 " --lora-plus-ratio 4", "found --lora-plus-ratio for lora,");
  expect_error(FINETUNE_GPT2 " --virtual-tokens 4", "found --virtual-tokens for lora,");
  expect_error(FINETUNE_GPT2 " --method full --rank 4", "found --rank for full");
  expect_error(FINETUNE_GPT2 " --compare --virtual-tokens 4", "found --virtual-tokens for --compare");
  expect_error(usual + "--method prefix --virtual-tokens 160", "fewer than the model's 160 positions");
}

TEST_F(Programs, AMissingOrBrokenFileIsOneLineAndExitCodeTwo) {
  expect_error(FINETUNE_GPT2 " --model missing", "missing/vocab.json: can't be read");
  expect_error(FINETUNE_GPT2 " --model base --data train.txt --dev missing.txt", "missing.txt");
  expect_error(usual + "--json none/figures.json", "none/figures.json: can't be written");
  expect_error(finetune + base + "--output train.txt/adapter", "train.txt/adapter: can't be written");
  expect_error(finetune + base + "--method full --output ./base/", "is the folder of --model");
  write_bytes(folder / "broken.txt", "name : A||fine\nno bars\n");
  expect_error(FINETUNE_GPT2 " --model base --dev dev.txt --data broken.txt", "broken.txt: line 2: found no '||'");
  const auto weights = read_bytes(folder / "base/model.safetensors");
  write_bytes(folder / "base/model.safetensors", weights.substr(0, weights.size() / 2));
  expect_error(usual, "model.safetensors");
  write_bytes(folder / "base/model.safetensors", weights);
  write_bytes(folder / "base/config.json", "{\"model_type\": \"gpt2\"");
  expect_error(usual, "config.json");
}

TEST_F(Programs, ATargetThatMatchesNothingIsAnError) { expect_error(usual + "--targets c_atn", "c_atn"); }

TEST_F(Programs, NoCudaIsAnError) {
  if (!at::globalContext().hasCUDA())
    expect_error(usual + "--device cuda", "--device cuda: this LibTorch finds no CUDA device");
}

TEST_F(Programs, ARunWritesItsFiguresTextsAndAdapter) {
  const auto outcome = run(usual + "--json figures.json --dropout 0.1");
  ASSERT_EQ(outcome.exit_code, 0) << outcome.errors;
  for (const auto* const part : {"transformer.h.*.attn.c_attn[q,v]", "dev loss, new domain", "perplexity", "tokens/s",
                                 "s left", "before", "after", "merged", "loss curve"}) {
    EXPECT_THAT(outcome.output, HasSubstr(part));
  }
  const auto figures = json("figures.json");
  for (const auto& key : kFigures) EXPECT_TRUE(figures.contains(key) && figures[key].is_number()) << key;
  EXPECT_EQ(figures["trainable_parameters"], 2 * 4 * 8 * 16);
  EXPECT_LT(figures["dev_loss_after"], figures["dev_loss_before"]);
  EXPECT_LT(figures["merged_max_abs_difference"], 1e-4);
  EXPECT_EQ(figures["adapter_bytes"], std::filesystem::file_size(folder / "adapter/adapter_model.safetensors"));
  EXPECT_TRUE(std::filesystem::exists(folder / "adapter/adapter_config.json"));
  EXPECT_TRUE(std::filesystem::exists(folder / "adapter/loss_curve.svg"));
}

TEST_F(Programs, TheSameSeedAndThreadsGiveTheSameFigures) {
  const auto figures = [&](const std::string& flags, const std::string& threads) {
    auto command = usual;
    command.replace(command.find("--threads 1"), 11, "--threads " + threads);
    const auto outcome = run(command + "--dropout 0.1 --json figures.json " + flags);
    EXPECT_EQ(outcome.exit_code, 0) << outcome.errors;
    auto numbers = json("figures.json");
    for (const auto* const measured : {"tokens_per_second", "seconds", "peak_memory_bytes"}) numbers.erase(measured);
    return numbers;
  };
  for (const std::string threads : {"1", "2"}) {
    const auto first = figures("--seed 4", threads);
    EXPECT_EQ(figures("--seed 4", threads), first) << threads << " threads";
    EXPECT_NE(figures("--seed 5", threads)["dev_loss_after"], first["dev_loss_after"]);
  }
}

TEST_F(Programs, EveryMethodAndDtypeRuns) {
  for (const auto& flags :
       {steps + adapter + "--method lora+ --lora-plus-ratio 4", steps + "--method full --output full",
        steps + adapter + "--dtype bfloat16", steps + adapter + "--targets all-linear",
        steps + adapter + "--schedule cosine --warmup 1", steps + adapter + "--schedule constant",
        adapter + "--epochs 2 --targets c_attn c_proj --rank 2 --alpha 5 --warmup 1"}) {
    const auto outcome = run(finetune + base + flags);
    EXPECT_EQ(outcome.exit_code, 0) << flags << "\n" << outcome.errors;
  }
  for (const auto& method : kAdapterMethods) {
    const auto outcome = run(usual + "--method " + method + " --json figures.json");
    ASSERT_EQ(outcome.exit_code, 0) << method << "\n" << outcome.errors;
    auto model = load_gpt2(folder / "base");
    const auto adapters = lora::load(*model, folder / "adapter");
    const auto figures = json("figures.json");
    EXPECT_GT(figures["trainable_parameters"], 0) << method;
    EXPECT_LT(figures["merged_max_abs_difference"], 1e-4) << method;
    EXPECT_EQ(adapters.names(), std::vector<std::string>{"default"}) << method;
  }
  // What full fine-tuning saved is a base of its own.
  EXPECT_EQ(run(finetune + steps + adapter + "--model full").exit_code, 0);
}

TEST_F(Programs, VirtualTokensAreTrainedAndSaved) {
  const auto figures_of = [&](const std::string& method) {
    const auto outcome =
        run(finetune + base + adapter + "--steps 30 --virtual-tokens 4 --json figures.json --method " + method);
    EXPECT_EQ(outcome.exit_code, 0) << outcome.errors;
    EXPECT_THAT(outcome.output, Not(HasSubstr("\nmerged"))) << method;
    return json("figures.json");
  };
  const auto of_prefix = figures_of("prefix");
  EXPECT_EQ(of_prefix["trainable_parameters"], 4 * 2 * 2 * 16);
  EXPECT_LT(of_prefix["dev_loss_after"], of_prefix["dev_loss_before"]);
  EXPECT_EQ(lora::load_prefix_tuning(folder / "adapter")->config().num_virtual_tokens(), 4);
  const auto of_prompt = figures_of("prompt");
  EXPECT_EQ(of_prompt["trainable_parameters"], 4 * 16);
  EXPECT_LT(of_prompt["dev_loss_after"], of_prompt["dev_loss_before"]);
  EXPECT_EQ(lora::load_prompt_tuning(folder / "adapter")->config().num_virtual_tokens(), 4);
  EXPECT_EQ(run(usual + "--method prefix --dtype bfloat16").exit_code, 0);
  EXPECT_EQ(run(usual + "--method prompt --dtype bfloat16").exit_code, 0);
}

/// A run is killed at random moments, also while it saves, and continued: the same weights, curve and figures.
TEST_F(Programs, AKilledRunIsContinuedToTheSameEnd) {
  std::mt19937 random(11);
  const auto without_measured = [&](const std::string& name) {
    auto numbers = json(name);
    for (const auto* const measured : {"tokens_per_second", "seconds", "peak_memory_bytes"}) numbers.erase(measured);
    return numbers;
  };
  for (const auto& [flags, weights, kills] :
       {std::tuple{"--method lora+ --dropout 0.2 --schedule cosine", "adapter_model.safetensors", 6},
        std::tuple{"--method full --lr 1e-3", "model.safetensors", 2},
        std::tuple{"--method eva --dropout 0.2", "adapter_model.safetensors", 1},
        std::tuple{"--method lora-fa", "adapter_model.safetensors", 1},
        std::tuple{"--method prefix", "adapter_model.safetensors", 1}}) {
    const auto command = finetune + base + "--steps 60 --warmup 5 " + flags;
    ASSERT_EQ(run(command + " --output whole --json whole.json").exit_code, 0);
    const auto with_checkpoints = command + " --output killed --json killed.json --checkpoint-every 1 --resume";
    for (int kill = 0; kill < kills; ++kill) {
      harness::ChildProcess child(
          {"/bin/sh", "-c", "cd " + folder.path().string() + " && exec " + with_checkpoints + " >killed.txt 2>&1"});
      ASSERT_TRUE(child.kill_after_saves(folder / "killed/checkpoint.safetensors", random, 6)) << kill;
    }
    const auto last = run(with_checkpoints);
    ASSERT_EQ(last.exit_code, 0) << last.errors;
    EXPECT_THAT(last.output, HasSubstr("Continuing after step "));
    EXPECT_EQ(read_bytes(folder / "killed/" + weights), read_bytes(folder / "whole/" + weights));
    EXPECT_EQ(read_bytes(folder / "killed/loss_curve.svg"), read_bytes(folder / "whole/loss_curve.svg"));
    EXPECT_EQ(without_measured("killed.json"), without_measured("whole.json"));
    std::filesystem::remove_all(folder / "killed");
  }
}

TEST_F(Programs, ResumingSaysWhereItBegins) {
  const auto first = run(usual + "--checkpoint-every 2 --resume");
  EXPECT_EQ(first.exit_code, 0) << first.errors;
  EXPECT_THAT(first.output, HasSubstr("No checkpoint in adapter: starting at step 0"));
  const auto weights = read_bytes(folder / "adapter/adapter_model.safetensors");
  const auto again = run(usual + "--resume");
  EXPECT_EQ(again.exit_code, 0) << again.errors;
  EXPECT_THAT(again.output, HasSubstr("This run is finished: its result lies in adapter"));
  EXPECT_THAT(again.output, Not(HasSubstr("dev loss")));
  std::filesystem::remove(folder / "adapter/adapter_model.safetensors");
  const auto lost = run(usual + "--resume");
  EXPECT_EQ(lost.exit_code, 0) << lost.errors;
  EXPECT_THAT(lost.output, HasSubstr("Continuing after step 3 of 3"));
  EXPECT_EQ(read_bytes(folder / "adapter/adapter_model.safetensors"), weights);
}

TEST_F(Programs, ACheckpointOfAnotherRunIsRefusedByName) {
  ASSERT_EQ(run(usual + "--checkpoint-every 2").exit_code, 0);
  const auto refused = [&](const std::string& flags, const std::string& why) { expect_error(usual + flags, why); };
  refused("--resume --rank 4 --seed 9", "found 8, expected 4 for settings.rank");
  refused("--resume --seed 9", "found 1, expected 9 for settings.seed");
  refused("--resume --lr 1e-3", "found 0.01, expected 0.001 for settings.lr");
  refused("--resume --schedule cosine", "for schedule.type");
  refused("--resume --method full", "found \"lora\", expected \"full\" for settings.method");
  refused("--resume --method dora", "found \"lora\", expected \"dora\" for settings.method");
  refused("--resume --method prefix", "found \"lora\", expected \"prefix\" for settings.method");
  expect_error(finetune + base + adapter + "--steps 4 --resume", "found 3, expected 4 for settings.steps");
  write_bytes(folder / "train.txt", run(GENERATE_PAIRS " --count 12 --seed 3").output);
  refused("--resume", "for settings.data; give the flags of that run, or start anew without --resume");
}

TEST_F(Programs, ABrokenCheckpointIsOneLineAndExitCodeTwo) {
  ASSERT_EQ(run(usual + "--checkpoint-every 2").exit_code, 0);
  const auto path = folder / "adapter/checkpoint.safetensors";
  auto bytes = read_bytes(path);
  write_bytes(path, bytes.substr(0, bytes.size() / 2));
  expect_error(usual + "--resume", "adapter/checkpoint.safetensors: ");
  bytes[bytes.size() - 20] ^= 1;
  write_bytes(path, bytes);
  expect_error(usual + "--resume", ": damaged; ");
  std::filesystem::remove(path);
  std::filesystem::create_directories(path + "/inside");
  expect_error(usual + "--resume", "adapter/checkpoint.safetensors: is no regular file");
  expect_error(usual + "--checkpoint-every 2", "adapter/checkpoint.safetensors: cannot be replaced");
}

TEST_F(Programs, ADivergedRunHasAnExitCodeOfItsOwn) {
  const auto outcome = run(finetune + base + adapter + "--method full --lr 1e30 --steps 8 --warmup 0");
  EXPECT_EQ(outcome.exit_code, 3) << outcome.output;
  EXPECT_THAT(outcome.errors, StartsWith("error: the loss is not finite at step "));
}

TEST_F(Programs, ACompareTableComesFromTheSameGridForAll) {
  const auto outcome = run(finetune + base + "--steps 2 --grid 1e-3 1e-2 --compare --json compare.json");
  ASSERT_EQ(outcome.exit_code, 0) << outcome.errors;
  EXPECT_THAT(outcome.output, HasSubstr("100.0 %"));
  const auto runs = json("compare.json")["runs"];
  ASSERT_EQ(runs.size(), 3U * 2U * 3U);
  std::set<double> rates;
  std::set<std::string> methods;
  std::set<int> seeds;
  for (const auto& one : runs) {
    for (const auto& key : kFigures) EXPECT_TRUE(one.contains(key) && one[key].is_number()) << key;
    rates.insert(one["learning_rate"].get<double>());
    methods.insert(one["method"].get<std::string>());
    seeds.insert(one["seed"].get<int>());
  }
  EXPECT_EQ(rates, (std::set<double>{1e-3, 1e-2}));
  EXPECT_EQ(methods, (std::set<std::string>{"lora", "lora+", "full"}));
  EXPECT_EQ(seeds, (std::set<int>{1, 2, 3}));
}

TEST_F(Programs, AComparisonOfTheMethodsHasARowForEach) {
  const auto outcome =
      run(finetune + base + "--steps 2 --dev-pairs 2 --rank 4 --grid 1e-3 --compare-methods --json methods.json");
  ASSERT_EQ(outcome.exit_code, 0) << outcome.errors;
  EXPECT_THAT(outcome.output, HasSubstr("\n| method | lr | trained parameters | saved | a step | peak memory | dev "));
  EXPECT_THAT(outcome.output, HasSubstr("16/16 runs, 0 s left\n"));
  auto methods = kAdapterMethods;
  methods.insert({"prefix", "prompt", "full"});
  EXPECT_EQ(json("methods.json")["runs"].size(), methods.size());
  for (const auto& method : methods) EXPECT_THAT(outcome.output, HasSubstr("\n| " + method + " | 0.001 | ")) << method;
}

TEST_F(Programs, QuickstartLearnsMergesAndSaves) {
  const auto outcome = run(QUICKSTART);
  ASSERT_EQ(outcome.exit_code, 0) << outcome.errors;
  const auto number_after = [&](const std::string& label) {
    const auto at = outcome.output.find(label);
    EXPECT_NE(at, std::string::npos) << label;
    return std::stod(outcome.output.substr(at + label.size()));
  };
  EXPECT_LT(number_after("adapted, sin(x + 1): "), 0.01);
  EXPECT_NEAR(number_after("merged, sin(0.5 + 1): "), 0.9975, 0.1);
  EXPECT_TRUE(std::filesystem::exists(folder / "quickstart_adapter/adapter_model.safetensors"));
}

TEST_F(Programs, TheReadmeHoldsTheQuickstart) {
  const auto program = read_bytes(LORA_SOURCE_DIR "/examples/quickstart.cpp");
  EXPECT_THAT(read_bytes(LORA_SOURCE_DIR "/README.md"), HasSubstr("```cpp\n" + program + "```\n"));
  EXPECT_LE(std::count(program.begin(), program.end(), '\n'), 40);
}

using DefaultRun = ProgramRuns;

/// Without a flag for model or data: the base is pre-trained where no run of this build has done it yet.
TEST_F(DefaultRun, ReachesMostOfFullFineTuningsGainWithFewParameters) {
  const auto lora = run(FINETUNE_GPT2 " --threads 1 --output lora --json lora.json");
  ASSERT_EQ(lora.exit_code, 0) << lora.errors;
  ASSERT_EQ(run(FINETUNE_GPT2 " --threads 1 --method full --output full --json full.json").exit_code, 0);
  const auto gain = [&](const std::string& name) {
    const auto figures = json(name);
    return figures["dev_loss_before"].get<double>() - figures["dev_loss_after"].get<double>();
  };
  EXPECT_GT(gain("full.json"), 2.0);
  EXPECT_GT(gain("lora.json"), 0.9 * gain("full.json"));
  const auto figures = json("lora.json");
  EXPECT_LT(figures["trainable_parameters"].get<double>(), 0.03 * figures["total_parameters"].get<double>());
  EXPECT_EQ(json("full.json")["trainable_parameters"], figures["total_parameters"]);
  EXPECT_LT(figures["merged_max_abs_difference"].get<double>(), 1e-3);
  for (const auto* const shown : {"c_attn[q,v]", "\nbefore ", "\nafter ", "\nmerged ", "perplexity"}) {
    EXPECT_THAT(lora.output, HasSubstr(shown));
  }
}

}  // namespace
}  // namespace programs_test
