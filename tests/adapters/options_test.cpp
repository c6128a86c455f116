// Adapters that Python PEFT wrote with each option of LoraConfig (tests/golden/README.md, options/): they load, give
// PEFT's outputs and gradients, merged or not, and are saved to the same keys, values and configuration.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/lora.h>
#include <torch/csrc/jit/serialization/import.h>
#include <torch/optim/adamw.h>

#include <iterator>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <ostream>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "examples/models/gpt2.h"
#include "examples/models/gpt2_checkpoint.h"
#include "harness/dense_oracle.h"
#include "harness/stored_model.h"
#include "harness/temp_folder.h"
#include "harness/values.h"
#include "oracles/models.h"

namespace options_test {
namespace {

using harness::relative_error;
using harness::stored_model;
using harness::StoredModel;
using nlohmann::json;
using Tensors = std::map<std::string, at::Tensor>;

constexpr double kTolerance = 1e-5;
const std::string kOptions = LORA_SOURCE_DIR "/tests/golden/options/";

struct OptionCase {
  std::string model;  // the folder: "reader"
  std::string name;   // "bias_all"
  std::string path() const { return kOptions + model + "/" + name; }
};
void PrintTo(const OptionCase& option, std::ostream* out) { *out << option.model << "/" << option.name; }

const std::vector<OptionCase>& options() {
  static const std::vector<OptionCase> cases{
      {"reader", "embedding"},        {"reader", "conv"},      {"reader", "bias_all"},
      {"reader", "bias_lora_only"},   {"reader", "lora_bias"}, {"reader", "modules_to_save"},
      {"reader", "bias_and_modules"}, {"reader", "task_head"}, {"reader", "tokens"},
      {"reader", "layers"},           {"reader", "one_layer"}, {"reader", "everything"},
      {"convs", "conv2d_conv3d"},     {"gpt2", "tokens"},      {"gpt2", "embedding"}};
  return cases;
}

StoredModel make(const std::string& model) {
  if (model == "reader") return stored_model<Reader>(kOptions + "reader/base.safetensors");
  if (model == "convs") return stored_model<Convs>(kOptions + "convs/base.safetensors");
  return stored_model(load_gpt2(kOptions + "gpt2/base"));
}

class Option : public ::testing::TestWithParam<OptionCase> {
 protected:
  Option()
      : model_(make(GetParam().model)),
        data_(lora::load_safetensors(kOptions + GetParam().model + "/data.safetensors")),
        expected_(lora::load_safetensors(GetParam().path() + "/expected.safetensors")) {}

  at::Tensor output() const { return model_.forward(data_.at("x")); }

  StoredModel model_;
  Tensors data_, expected_;
};

TEST_P(Option, GivesPeftsOutputsMergedOrNot) {
  EXPECT_LT(relative_error(output(), data_.at("y_base")), kTolerance) << "the base";
  const auto before = harness::base_bytes(*model_.module);
  const auto base = output();
  auto adapters = lora::load(*model_.module, GetParam().path());
  EXPECT_GT(relative_error(output(), base), 1e-2) << "the adapter is to matter";
  EXPECT_LT(relative_error(output(), expected_.at("y")), kTolerance);
  {
    const lora::DisableAdapters disabled(adapters);
    EXPECT_TRUE(at::equal(output(), base));
  }
  adapters.merge();
  EXPECT_LT(relative_error(output(), expected_.at("y")), kTolerance) << "merged";
  EXPECT_EQ(harness::base_bytes(*model_.module), before);
  adapters.unmerge();
  EXPECT_LT(relative_error(output(), expected_.at("y")), kTolerance) << "unmerged";
  adapters.set_active({});
  EXPECT_TRUE(at::equal(output(), base));
  adapters.unload();
  EXPECT_EQ(harness::base_bytes(*model_.module), before);

  lora::load(*model_.module, GetParam().path()).merge_and_unload();
  EXPECT_LT(relative_error(output(), expected_.at("y")), kTolerance) << "merged for good";
}

/// The gradients lie in the tensors that the file is written of, so that they are compared under PEFT's keys.
TEST_P(Option, GivesPeftsGradientsForTheSameTensors) {
  auto adapters = lora::load(*model_.module, GetParam().path());
  adapters.set_trainable({"default"});
  (output() * data_.at("g")).sum().backward();
  {
    const at::NoGradGuard no_grad;
    for (auto& [name, tensor] : adapters.named_parameters()) {
      ASSERT_TRUE(tensor.grad().defined()) << name;
      tensor.copy_(tensor.grad());
    }
  }
  const TempFolder folder;
  adapters.save(folder.path());
  const auto found = lora::load_safetensors(folder / "adapter_model.safetensors");
  size_t compared = 0;
  for (const auto& [key, gradient] : expected_) {
    const std::string end = ".grad";
    if (key.size() < end.size() || key.compare(key.size() - end.size(), end.size(), end) != 0) continue;
    const auto name = key.substr(0, key.size() - end.size());
    if (name.find(".modules_to_save.default.") != std::string::npos) continue;  // a second time, by PEFT's bias "all"
    ASSERT_EQ(found.count(name), 1U) << name;
    EXPECT_LT(relative_error(found.at(name), gradient), kTolerance) << name;
    ++compared;
  }
  EXPECT_EQ(compared, adapters.named_parameters().size());
}

TEST_P(Option, IsSavedToTheSameKeysValuesAndConfiguration) {
  const auto adapters = lora::load(*model_.module, GetParam().path());
  const TempFolder folder;
  adapters.save(folder.path());
  auto before = lora::load_safetensors(GetParam().path() + "/adapter_model.safetensors");
  const auto after = lora::load_safetensors(folder / "adapter_model.safetensors");
  for (auto entry = before.begin(); entry != before.end();) {
    const bool twice = entry->first.find(".original_module.") != std::string::npos ||
                       entry->first.find(".modules_to_save.") != std::string::npos;
    entry = twice ? before.erase(entry) : std::next(entry);
  }
  ASSERT_EQ(after.size(), before.size());
  for (const auto& [key, tensor] : before) {
    ASSERT_EQ(after.count(key), 1U) << key;
    EXPECT_EQ(after.at(key).sizes(), tensor.sizes()) << key;
    EXPECT_EQ(harness::bytes_of(after.at(key)), harness::bytes_of(tensor)) << key;
  }
  const auto old_config = json::parse(read_bytes(GetParam().path() + "/adapter_config.json"));
  const auto config = json::parse(read_bytes(folder / "adapter_config.json"));
  for (const auto& [key, value] : config.items()) {
    if (key == "target_modules" || key == "rank_pattern" || key == "alpha_pattern") continue;
    EXPECT_EQ(value, old_config.at(key)) << key;
  }
  const auto names = [](const json& list) { return std::set<std::string>(list.begin(), list.end()); };
  EXPECT_EQ(names(config.at("target_modules")), names(old_config.at("target_modules")));
  for (const auto& [key, value] : old_config.items()) {  // what we do not write is as PEFT has it anyway
    if (config.count(key) != 0 || key == "peft_version" || key == "megatron_core" || key == "qalora_group_size")
      continue;
    EXPECT_TRUE(value.empty() || value == false) << key << " = " << value;
  }

  const auto again = make(GetParam().model);
  lora::load(*again.module, folder.path());
  EXPECT_TRUE(at::equal(again.forward(data_.at("x")), output()));
}

TEST_P(Option, ClonesTrainsAndVerifies) {
  auto adapters = lora::load(*model_.module, GetParam().path());
  adapters.set_trainable({"default"});
  const auto report = adapters.verify([&] { return output(); });
  EXPECT_TRUE(report.ok()) << report;
  const auto before = harness::base_bytes(*model_.module);
  torch::optim::AdamW optimizer(lora::param_groups(adapters, torch::optim::AdamWOptions(1e-2)));
  const auto start = output().detach();
  for (int step = 0; step < 3; ++step) {
    optimizer.zero_grad();
    output().square().sum().backward();
    optimizer.step();
  }
  EXPECT_LT(output().square().sum().item<double>(), start.square().sum().item<double>());
  EXPECT_EQ(harness::base_bytes(*model_.module), before);
}

INSTANTIATE_TEST_SUITE_P(Golden, Option, ::testing::ValuesIn(options()),
                         [](const auto& tested) { return tested.param.model + "_" + tested.param.name; });

/// The same in TorchScript models of the same weights.
class ScriptOption : public ::testing::TestWithParam<std::tuple<OptionCase, std::string>> {
 protected:
  static std::string file() {
    const auto& [option, kind] = GetParam();
    return LORA_SOURCE_DIR "/tests/golden/script/" + (option.model == "gpt2" ? "tied" : option.model) + "_" + kind +
           ".pt";
  }
  const OptionCase& option() const { return std::get<0>(GetParam()); }
};

TEST_P(ScriptOption, GivesPeftsOutputsAndGradientsMergedOrNot) {
  auto model = torch::jit::load(file());
  model.eval();
  const auto data = lora::load_safetensors(kOptions + option().model + "/data.safetensors");
  const auto expected = lora::load_safetensors(option().path() + "/expected.safetensors");
  const auto output = [&] { return model.forward({data.at("x")}).toTensor(); };
  for (int run = 0; run < 3; ++run) EXPECT_LT(relative_error(output(), data.at("y_base")), kTolerance) << "the base";
  const auto base = output();
  auto adapters = lora::load(model, option().path());
  for (int run = 0; run < 3; ++run) EXPECT_LT(relative_error(output(), expected.at("y")), kTolerance) << run;
  EXPECT_THAT(adapters.fallbacks(), ::testing::IsEmpty());
  adapters.set_trainable({"default"});
  for (int run = 0; run < 3; ++run) {
    for (auto& tensor : adapters.parameters()) tensor.mutable_grad() = at::Tensor();
    (output() * data.at("g")).sum().backward();
  }
  size_t compared = 0;
  for (const auto& [name, tensor] : adapters.named_parameters()) ASSERT_TRUE(tensor.grad().defined()) << name;
  for (const auto& [key, gradient] : expected) compared += key.size() > 5 && key.substr(key.size() - 5) == ".grad";
  EXPECT_GE(compared, adapters.parameters().size());
  {
    const lora::DisableAdapters disabled(adapters);
    EXPECT_LT(relative_error(output(), base), kTolerance);
  }
  adapters.merge();
  for (int run = 0; run < 3; ++run) EXPECT_LT(relative_error(output(), expected.at("y")), kTolerance) << "merged";
  const TempFolder folder;
  if (option().model == "gpt2" && option().name == "embedding") {  // the trace multiplies with wte's slot for its head
    EXPECT_THROW(model.save(folder / "merged.pt"), c10::Error);
    return;
  }
  model.save(folder / "merged.pt");
  auto without_library = torch::jit::load(folder / "merged.pt");
  EXPECT_LT(relative_error(without_library.forward({data.at("x")}).toTensor(), expected.at("y")), kTolerance)
      << "saved";
  adapters.unmerge();
  adapters.unload();
  EXPECT_LT(relative_error(output(), base), kTolerance) << "unloaded";
}

/// A transformers model is traced only.
std::vector<std::tuple<OptionCase, std::string>> script_options() {
  std::vector<std::tuple<OptionCase, std::string>> cases;
  for (const auto& option : options()) {
    cases.emplace_back(option, "traced");
    if (option.model != "gpt2") cases.emplace_back(option, "scripted");
  }
  return cases;
}

INSTANTIATE_TEST_SUITE_P(Golden, ScriptOption, ::testing::ValuesIn(script_options()), [](const auto& tested) {
  const auto& option = std::get<0>(tested.param);
  return option.model + "_" + option.name + "_" + std::get<1>(tested.param);
});

}  // namespace
}  // namespace options_test
