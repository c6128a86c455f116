// The command-line tool `lora` as its users run it.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/io/checkpoint.h>
#include <lora/io/safetensors.h>
#include <lora/io/torch_pickle.h>
#include <lora/merge_checkpoint.h>
#include <lora/training_state.h>
#include <torch/optim/sgd.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "harness/dense_oracle.h"
#include "harness/expect_same_bits.h"
#include "harness/program_runs.h"
#include "harness/values.h"

namespace lora_tool_test {
namespace {

using harness::expect_same_bits;
using testing::AllOf;
using testing::ElementsAre;
using testing::EndsWith;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::StartsWith;
using Tensors = std::map<std::string, at::Tensor>;

const std::string kGolden = LORA_SOURCE_DIR "/tests/golden/";

class LoraTool : public harness::ProgramRuns {
 protected:
  /// The run ends with the exit code and one line on the error stream that says `why`.
  void expect_error(const std::string& arguments, int exit_code, const std::string& why) const {
    const auto outcome = run(LORA_TOOL " " + arguments);
    EXPECT_EQ(outcome.exit_code, exit_code) << arguments << "\n" << outcome.output;
    EXPECT_THAT(outcome.errors, AllOf(StartsWith("error: "), HasSubstr(why))) << arguments;
    EXPECT_EQ(outcome.errors.find('\n'), outcome.errors.size() - 1) << arguments;
  }
  harness::Outcome expect_success(const std::string& arguments) const {
    const auto outcome = run(LORA_TOOL " " + arguments);
    EXPECT_EQ(outcome.exit_code, 0) << arguments << "\n" << outcome.output << outcome.errors;
    EXPECT_THAT(outcome.errors, IsEmpty()) << arguments;
    return outcome;
  }
  nlohmann::json json_of(const std::string& arguments, int exit_code = 0) const {
    const auto outcome = run(LORA_TOOL " " + arguments + " --json");
    EXPECT_EQ(outcome.exit_code, exit_code) << arguments << "\n" << outcome.output << outcome.errors;
    return nlohmann::json::parse(outcome.output);
  }

  /// A copy of the golden Mlp's adapter, to be damaged.
  std::string copy_adapter() const {
    std::filesystem::copy(kGolden + "mlp/plain", folder / "adapter");
    return folder / "adapter/adapter_model.safetensors";
  }

  std::vector<std::string> files() const {
    std::vector<std::string> names;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(folder.path())) {
      const auto name = std::filesystem::relative(entry.path(), folder.path()).string();
      if (name != "output.txt" && name != "errors.txt") names.push_back(name);
    }
    std::sort(names.begin(), names.end());
    return names;
  }

  const std::string mlp = " --base " + kGolden + "mlp/base.safetensors ";
};

/// Bytes for bytes where nothing was merged; W' to the rounding that another optimisation of the compiler's may change.
void expect_merged(Tensors found, const lora::MergedCheckpoint& expected) {
  for (const auto& name : expected.changed) {
    ASSERT_EQ(found.count(name), 1U) << name;
    EXPECT_LT(harness::relative_error(found.at(name), expected.tensors.at(name)), 1e-6) << name;
    found[name] = expected.tensors.at(name);
  }
  expect_same_bits(found, expected.tensors);
}

TEST_F(LoraTool, HelpExplainsEveryFlag) {
  const auto help = expect_success("--help").output;
  for (const auto* const command : {"inspect", "check", "merge", "convert"}) {
    EXPECT_THAT(help, testing::ContainsRegex(std::string(command) + " +[a-z]"));
  }
  const auto merge = expect_success("merge --help").output;
  for (const auto* const flag : {"--base", "--out", "--name", "--json", "--key-mapping", "--max-shard-size",
                                 "--fan-in-fan-out", "--alpha", "--targets", "--modules-to-save"}) {
    EXPECT_THAT(merge, testing::ContainsRegex(std::string(flag) + " [^\n]*\n? +[a-zA-Z]")) << flag;
  }
}

TEST_F(LoraTool, ABadFlagIsOneLineAndExitCodeTwo) {
  expect_error("", 2, "subcommand");
  expect_error("bogus", 2, "--help");
  expect_error("check", 2, "path");
  expect_error("check " + kGolden + "mlp/plain", 2, "--base");
  expect_error("merge x --base y", 2, "--out");
  expect_error("merge x --base y --out z --bogus", 2, "--bogus");
  expect_error("merge x --base y --out z.bin", 2, "found z.bin, expected a .safetensors file or a folder");
  expect_error("merge x --base y --out z --max-shard-size 5PB", 2, "found 5PB");
  expect_error("merge x --base y --out z --max-shard-size 0", 2, "found 0");
  expect_error("merge x --base y --out z.safetensors --max-shard-size 5GB", 2, "--max-shard-size");
  expect_error("check x --base y --key-mapping ab", 2, "found ab, expected REGEX=REPLACEMENT");
  expect_error("check x --base y --fan-in-fan-out maybe", 2, "--fan-in-fan-out");
  expect_error("check x --base y --alpha 0", 2, "--alpha: found 0");
  expect_error("check x --base y --r 0", 2, "--r: found 0");
  expect_error("check " + kGolden + "mlp/plain --alpha 3" + mlp, 2, "--alpha: found a directory");
}

TEST_F(LoraTool, WhatCannotBeReadIsOneLineAndExitCodeTwo) {
  expect_error("check missing" + mlp, 2, "missing: cannot be read");
  expect_error("check " + kGolden + "mlp/plain --base missing.safetensors", 2, "missing.safetensors: cannot be opened");
  expect_error("check " + kGolden + "mlp --name nobody" + mlp, 2, "found no adapter \"nobody\"");
  expect_error("check " + kGolden + "mlp" + mlp, 2, "expected --name with one of one_target, patterns, plain");
  for (const std::string command : {"inspect ", "check --base x ", "convert --out x "}) {
    expect_error(command + kGolden + "gpt2/model", 2, "gpt2/model: found no adapter_config.json");
  }
  expect_error("convert " + kGolden + "mha/base.safetensors --out x", 2, "expected --alpha");
  expect_error("inspect " + kGolden + "mha/base.safetensors --name other", 2, "--name: found a file");
  const auto base = read_bytes(kGolden + "mlp/base.safetensors");
  write_bytes(folder / "short.safetensors", base.substr(0, base.size() / 2));
  expect_error("check " + kGolden + "mlp/plain --base short.safetensors", 2, "short.safetensors");
  expect_error("merge " + kGolden + "mlp/plain" + mlp + "--out none/merged.safetensors", 2,
               "none/merged.safetensors: cannot open the folder");
  expect_error("merge " + kGolden + "mlp/plain" + mlp + "--out short.safetensors/model", 2, "short.safetensors/model");
  EXPECT_THAT(files(), ElementsAre("short.safetensors"));
}

TEST_F(LoraTool, ChecksAnAdapter) {
  const auto outcome = expect_success("check " + kGolden + "gpt2/adapter --base " + kGolden + "gpt2/model");
  EXPECT_THAT(outcome.output, AllOf(HasSubstr("gpt2/adapter loads on "),
                                    HasSubstr("2 x transformer.h.*.attn.c_attn  [96, 32]  512 parameters each\n")));
  const auto json = json_of("check " + kGolden + "gpt2/adapter --base " + kGolden + "gpt2/model");
  EXPECT_EQ(json["loads"], true);
  EXPECT_THAT(json["problems"], IsEmpty());
  EXPECT_EQ(json["entries"][0]["modules"][1]["path"], "transformer.h.1.attn.c_attn");
}

TEST_F(LoraTool, NamesEveryProblemOfACheckAndAnswersNo) {
  const auto path = copy_adapter();
  auto tensors = lora::load_safetensors(path);
  tensors["base_model.model.up.lora_A.weight"] = at::ones({3, 13});
  tensors["base_model.model.side.lora_A.weight"] = at::ones({3, 13});
  tensors.erase("base_model.model.down.lora_B.weight");
  lora::save_safetensors(tensors, path);
  const auto outcome = run(LORA_TOOL " check adapter" + mlp);
  EXPECT_EQ(outcome.exit_code, 1);
  EXPECT_THAT(outcome.errors, IsEmpty());
  EXPECT_THAT(outcome.output,
              AllOf(StartsWith("adapter does not load on "), HasSubstr(": 3 problems\n"),
                    HasSubstr("\n  found [3, 13], expected [3, 12] for base_model.model.up.lora_A.weight\n"),
                    HasSubstr("\n  found factors for side, expected its weight"),
                    HasSubstr("\n  found no tensor base_model.model.down.lora_B.weight, expected [8, 3]\n")));
  const auto json = json_of("check adapter" + mlp, 1);
  EXPECT_EQ(json["loads"], false);
  EXPECT_EQ(json["problems"].size(), 3U);
}

TEST_F(LoraTool, MergesIntoAFileAndIntoShards) {
  const auto base = lora::load_checkpoint(kGolden + "gpt2/model");
  const auto expected = lora::merge_checkpoint(base, kGolden + "gpt2/adapter");
  const auto command = "merge " + kGolden + "gpt2/adapter --base " + kGolden + "gpt2/model ";
  const auto outcome = expect_success(command + "--out merged.safetensors");
  EXPECT_THAT(outcome.output, HasSubstr("written to merged.safetensors: 4 of 28 tensors changed, 0 added\n"));
  const auto merged = lora::load_safetensors(folder / "merged.safetensors");
  expect_merged(merged, expected);

  expect_success(command + "--out whole");
  EXPECT_TRUE(std::filesystem::exists(folder / "whole/model.safetensors"));
  expect_same_bits(lora::load_checkpoint(folder / "whole"), merged);
  const auto json = json_of(command + "--out sharded --max-shard-size 30KB");
  EXPECT_TRUE(std::filesystem::exists(folder / "sharded/model.safetensors.index.json"));
  expect_same_bits(lora::load_checkpoint(folder / "sharded"), merged);
  EXPECT_EQ(json["changed"], expected.changed);
  EXPECT_EQ(json["tensors"], 28);
}

TEST_F(LoraTool, MergesInPlaceOfTheBase) {
  std::filesystem::copy(kGolden + "mlp/base.safetensors", folder / "model.safetensors");
  const auto expected =
      lora::merge_checkpoint(lora::load_safetensors(folder / "model.safetensors"), kGolden + "mlp/plain");
  expect_success("merge " + kGolden + "mlp/plain --base model.safetensors --out model.safetensors");
  expect_merged(lora::load_safetensors(folder / "model.safetensors"), expected);
  EXPECT_THAT(files(), ElementsAre("model.safetensors"));
}

TEST_F(LoraTool, FindsTheAdapterOfAName) {
  const auto base = lora::load_safetensors(kGolden + "mlp/base.safetensors");
  for (const std::string name : {"default", "other"}) {
    expect_success("merge " + kGolden + "mlp/two_adapters --name " + name + mlp + "--out merged.safetensors");
    const auto directory = kGolden + "mlp/two_adapters" + (name == "default" ? "" : "/" + name);
    expect_merged(lora::load_safetensors(folder / "merged.safetensors"), lora::merge_checkpoint(base, directory));
  }
}

TEST_F(LoraTool, RenamesTheModulesOfABaseWithOtherNames) {
  Tensors renamed;
  for (const auto& [name, tensor] : lora::load_checkpoint(kGolden + "gpt2/model")) {
    renamed[name.substr(std::string("transformer.").size())] = tensor;
  }
  lora::save_safetensors(renamed, folder / "base.safetensors");
  EXPECT_EQ(run(LORA_TOOL " check " + kGolden + "gpt2/adapter --base base.safetensors").exit_code, 1);
  const auto json = json_of("merge " + kGolden +
                            "gpt2/adapter --base base.safetensors --out merged.safetensors "
                            "--key-mapping '^transformer\\.='");
  EXPECT_THAT(json["changed"], testing::Contains("h.0.attn.c_attn.weight"));
}

TEST_F(LoraTool, WhatTheSystemRefusesIsExitCodeTwo) {
  write_bytes(folder / "file", "no folder");
  for (const std::string form : {"peft", "peft-bin", "loralib"}) {
    expect_error("convert " + kGolden + "mlp/plain --out file/new --to " + form, 2, "Not a directory");
  }
  copy_adapter();
  std::filesystem::remove(folder / "adapter/adapter_model.safetensors");
  std::filesystem::create_symlink("nowhere", folder / "adapter/adapter_model.safetensors");
  for (const std::string& command :
       {"check adapter" + mlp, "merge adapter --out new.safetensors" + mlp,
        std::string("convert adapter --out new --to peft"), std::string("inspect adapter")}) {
    expect_error(command, 2, "No such file or directory");
  }
}

TEST_F(LoraTool, ADamagedAdapterIsRefusedAndNothingIsWritten) {
  const auto path = copy_adapter();
  const auto bytes = read_bytes(path), config = read_bytes(folder / "adapter/adapter_config.json");
  const auto before = files();
  const auto refused = [&](int exit_code, const std::string& why) {
    expect_error("merge adapter" + mlp + "--out merged.safetensors", exit_code, why);
    expect_error("merge adapter" + mlp + "--out merged", exit_code, why);
    EXPECT_EQ(run(LORA_TOOL " check adapter" + mlp).exit_code, exit_code);
    EXPECT_EQ(files(), before);
  };
  write_bytes(path, bytes.substr(0, bytes.size() - 1));
  refused(1, "adapter_model.safetensors");
  write_bytes(path, "");
  refused(1, "adapter_model.safetensors");
  write_bytes(path, bytes);
  write_bytes(folder / "adapter/adapter_config.json", config.substr(0, config.size() / 2));
  refused(1, "adapter_config.json: found no JSON object");
  write_bytes(folder / "adapter/adapter_config.json", "{}");
  refused(1, "found no peft_type");
  EXPECT_EQ(run(LORA_TOOL " convert adapter --out converted").exit_code, 1);
  EXPECT_EQ(files(), before);
}

TEST_F(LoraTool, InspectsAPeftDirectory) {
  const auto text = expect_success("inspect " + kGolden + "gpt2/adapter").output;
  EXPECT_THAT(text,
              AllOf(HasSubstr("gpt2/adapter: LORA, peft\n  updates: 4\n"),
                    HasSubstr("    2 x transformer.h.*.attn.c_attn  linear [96, 32]  r = 4, alpha = 12, scaling = 3"
                              "  512 parameters each\n"),
                    HasSubstr("  8 tensors (8 F32), 1536 parameters, 6144 bytes\n"),
                    HasSubstr("checksums: none, the file is of another program\n")));
  const auto json = json_of("inspect " + kGolden + "options/reader/everything");
  ASSERT_EQ(json["found"].size(), 1U);
  const auto& found = json["found"][0];
  EXPECT_EQ(found["format"], "peft");
  EXPECT_EQ(found["config"]["use_rslora"], true);
  EXPECT_EQ(found["modules"][0]["kind"], "convolution");
  EXPECT_EQ(found["copies"].size(), 9U);
  EXPECT_TRUE(found["checksums"].is_null());
  EXPECT_EQ(json_of("inspect " + kGolden + "options/reader/tokens")["found"][0]["token_rows"]["wte"], 3);
}

TEST_F(LoraTool, InspectsEveryAdapterOfAFolder) {
  EXPECT_EQ(json_of("inspect " + kGolden + "mlp")["found"].size(), 5U);
  EXPECT_EQ(json_of("inspect " + kGolden + "mlp/two_adapters")["found"].size(), 2U);
  EXPECT_EQ(json_of("inspect " + kGolden + "mlp/two_adapters --name other")["found"].size(), 1U);
}

TEST_F(LoraTool, InspectsWhatIsDamagedAndAnswersNo) {
  const auto path = copy_adapter();
  expect_success("convert adapter --out ours");
  EXPECT_EQ(json_of("inspect ours")["found"][0]["checksums"], "right");
  auto bytes = read_bytes(folder / "ours/adapter_model.safetensors");
  bytes[bytes.size() - 2] ^= 1;
  write_bytes(folder / "ours/adapter_model.safetensors", bytes);
  expect_error("inspect ours", 1, "damaged");
  auto tensors = lora::load_safetensors(path);
  tensors.erase("base_model.model.up.lora_A.weight");
  lora::save_safetensors(tensors, path);
  const auto outcome = run(LORA_TOOL " inspect adapter");
  EXPECT_EQ(outcome.exit_code, 1);
  EXPECT_THAT(outcome.output, HasSubstr("  problem: found no tensor base_model.model.up.lora_A.weight"));
}

TEST_F(LoraTool, InspectsFilesOfTensorsAlone) {
  expect_success("convert " + kGolden + "gpt2/adapter --to loralib --out lora.pt");
  auto found = json_of("inspect lora.pt")["found"][0];
  EXPECT_EQ(found["format"], "loralib");
  EXPECT_EQ(found["modules"].size(), 4U);
  EXPECT_TRUE(found["modules"][0]["scaling"].is_null());
  found = json_of("inspect lora.pt --alpha 12")["found"][0];
  EXPECT_EQ(found["modules"][0]["scaling"], 3.0);
  EXPECT_THAT(found["problems"], IsEmpty());
  found = json_of("inspect " + kGolden + "gpt2/adapter/adapter_model.safetensors")["found"][0];
  EXPECT_EQ(found["format"], "peft-tensors");
  EXPECT_EQ(json_of("inspect " + kGolden + "options/reader/pickle")["found"][0]["format"], "peft-bin");
  const auto base = run(LORA_TOOL " inspect " + kGolden + "mlp/base.safetensors");
  EXPECT_EQ(base.exit_code, 1);
  EXPECT_THAT(base.output, HasSubstr("problem: found no factors"));
}

TEST_F(LoraTool, InspectsAStateOfATraining) {
  const auto tensor = at::ones({3});
  torch::optim::SGD optimizer({tensor}, torch::optim::SGDOptions(0.1));
  lora::TrainingState().tensors({{"weight", tensor}}).optimizer(optimizer).save(folder / "run.safetensors");
  const auto json = json_of("inspect run.safetensors");
  EXPECT_EQ(json["found"][0]["format"], "training-state");
  EXPECT_TRUE(json["found"][0]["run"].contains("optimizer"));
  EXPECT_THAT(expect_success("inspect run.safetensors").output,
              HasSubstr("run.safetensors: training state, undamaged\n"));
  auto bytes = read_bytes(folder / "run.safetensors");
  bytes.back() ^= 1;
  write_bytes(folder / "run.safetensors", bytes);
  expect_error("inspect run.safetensors", 1, ": damaged");
}

TEST_F(LoraTool, ReadsThePapersAdapter) {
  const std::string path = LORA_SOURCE_DIR "/../shared/data/roberta_mnli_lora/roberta_base_lora_mnli.bin";
  if (!std::filesystem::exists(path)) GTEST_SKIP() << "no ../shared/data/roberta_mnli_lora";
  EXPECT_THAT(expect_success("inspect " + path).output,
              AllOf(HasSubstr("12 x roberta.encoder.layer.*.attention.self.query  linear [768, 768]  r = 8"),
                    HasSubstr("52 tensors (52 F32), 887811 parameters")));
  expect_error("convert " + path + " --alpha 16 --out peft", 1, "classifier.out_proj.weight, expected none");
  expect_success("convert " + path + " --alpha 16 --modules-to-save classifier --out peft");
  EXPECT_EQ(json_of("inspect peft")["found"][0]["modules"][0]["scaling"], 2.0);
  expect_success("convert peft --to loralib --out again.pt");
  expect_same_bits(lora::load_torch_pickle(folder / "again.pt"), lora::load_torch_pickle(path));
}

TEST_F(LoraTool, ConvertsThereAndBack) {
  const auto source = kGolden + "gpt2/adapter";
  expect_success("convert " + source + " --to peft-bin --out bin");
  EXPECT_THAT(files(), ElementsAre("bin", "bin/adapter_config.json", "bin/adapter_model.bin"));
  expect_success("convert bin --out peft");
  const auto expected = lora::load_safetensors(source + "/adapter_model.safetensors");
  expect_same_bits(lora::load_safetensors(folder / "peft/adapter_model.safetensors"), expected);
  const auto notes = json_of("convert peft --to loralib --out lora.pt")["notes"];
  EXPECT_EQ(notes[0],
            "the file says neither rank nor alpha, build its layers with r = 4, lora_alpha = 12, fan_in_fan_out");
  expect_success("convert lora.pt --alpha 12 --fan-in-fan-out true --out again");
  expect_same_bits(lora::load_safetensors(folder / "again/adapter_model.safetensors"), expected);
  for (const std::string adapter : {"bin", "again", "lora.pt --alpha 12 --fan-in-fan-out true"}) {
    expect_success("merge " + adapter + " --base " + kGolden + "gpt2/model --out merged.safetensors");
    expect_merged(lora::load_safetensors(folder / "merged.safetensors"),
                  lora::merge_checkpoint(lora::load_checkpoint(kGolden + "gpt2/model"), source));
  }
  expect_error("convert lora.pt --alpha 12 --r 3 --out wrong", 1, "found [4, 32], expected [3, 32]");
  expect_error("convert " + kGolden + "options/reader/conv --to loralib --out wrong.pt", 1,
               "found factors of a convolution at conv");
  expect_error("convert bin --fan-in-fan-out true --out wrong", 2, "--fan-in-fan-out: found a directory");
  EXPECT_FALSE(std::filesystem::exists(folder / "wrong") || std::filesystem::exists(folder / "wrong.pt"));
}

TEST_F(LoraTool, TheDocsShowWhatItPrints) {
  std::filesystem::copy(kGolden + "gpt2/model", folder / "gpt2");
  std::filesystem::copy(kGolden + "gpt2/adapter", folder / "adapter");
  std::filesystem::copy(kGolden + "mlp/base.safetensors", folder / "other.safetensors");
  std::istringstream docs(read_bytes(LORA_SOURCE_DIR "/docs/lora_tool.md"));
  std::string shown, printed;
  bool inside = false;
  for (std::string line; std::getline(docs, line);) {
    if (line.rfind("```", 0) == 0) {
      inside = line == "```console";
    } else if (inside) {
      shown += line + "\n";
      if (line.rfind("$ lora ", 0) != 0) continue;
      const auto outcome = run(LORA_TOOL + line.substr(std::string("$ lora").size()));
      printed += line + "\n" + outcome.output + outcome.errors;
    }
  }
  EXPECT_THAT(shown, HasSubstr("$ lora merge "));
  EXPECT_EQ(shown, printed);
}

}  // namespace
}  // namespace lora_tool_test
