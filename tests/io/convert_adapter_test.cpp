// Adapters described and converted without their base: golden files of Python PEFT, and loralib's form.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/lora.h>

#include <filesystem>
#include <iterator>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "harness/expect_same_bits.h"
#include "harness/problems_of.h"
#include "harness/temp_folder.h"
#include "harness/values.h"
#include "oracles/models.h"

namespace convert_adapter_test {
namespace {

using harness::expect_same_bits;
using harness::problems_of;
using lora::AdapterFormat;
using nlohmann::json;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;
using ::testing::UnorderedElementsAre;
using Tensors = std::map<std::string, at::Tensor>;

const std::string kGolden = LORA_SOURCE_DIR "/tests/golden/";

/// The tensors of a PEFT directory, without those that PEFT's bias "all" writes twice.
Tensors tensors_of(const std::string& directory) {
  const bool pickled = !std::filesystem::exists(directory + "/adapter_model.safetensors");
  auto tensors = pickled ? lora::load_torch_pickle(directory + "/adapter_model.bin")
                         : lora::load_safetensors(directory + "/adapter_model.safetensors");
  for (auto entry = tensors.begin(); entry != tensors.end();) {
    const bool twice = entry->first.find(".original_module.") != std::string::npos ||
                       entry->first.find(".modules_to_save.") != std::string::npos;
    entry = twice ? tensors.erase(entry) : std::next(entry);
  }
  return tensors;
}

json config_of(const std::string& directory) { return json::parse(read_bytes(directory + "/adapter_config.json")); }

class ConvertedGolden : public ::testing::TestWithParam<std::string> {};

TEST_P(ConvertedGolden, ComesBackBitForBitInBothFormsOfPeft) {
  const auto source = kGolden + GetParam();
  const TempFolder folder;
  EXPECT_THAT(lora::convert_adapter(source, folder / "bin", AdapterFormat::kPeftPickle), IsEmpty());
  EXPECT_THAT(lora::convert_adapter(folder / "bin", folder / "again", AdapterFormat::kPeft), IsEmpty());
  for (const auto* name : {"bin", "again"}) {
    expect_same_bits(tensors_of(folder / name), tensors_of(source));
    auto found = config_of(folder / name), expected = config_of(source);
    for (const auto* list : {"target_modules", "modules_to_save"}) {
      const auto set = [&](const json& config) {
        return config[list].is_array() ? std::set<json>(config[list].begin(), config[list].end())
                                       : std::set<json>{config[list]};
      };
      EXPECT_EQ(set(found), set(expected)) << list;
    }
    for (const auto* key : {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "lora_bias",
                            "fan_in_fan_out", "task_type", "layers_to_transform", "trainable_token_indices"}) {
      EXPECT_EQ(found[key], expected[key]) << key;
    }
  }
}

TEST_P(ConvertedGolden, IsDescribed) {
  const auto source = kGolden + GetParam();
  const auto found = lora::describe_adapter(source);
  EXPECT_THAT(found.problems, IsEmpty());
  EXPECT_EQ(found.method, config_of(source)["peft_type"]);
  EXPECT_EQ(json::parse(found.config), config_of(source));
  int64_t parameters = 0;
  for (const auto& [name, tensor] : tensors_of(source)) parameters += tensor.numel();
  EXPECT_GE(found.parameters, parameters);
  EXPECT_FALSE(found.has_checksums);
  for (const auto& module : found.modules) {
    EXPECT_GT(module.parameters, 0) << module.path;
    if (found.method != "LORA") continue;
    EXPECT_GT(module.rank, 0) << module.path;
    EXPECT_TRUE(module.scaling) << module.path;
  }
}

std::vector<std::string> golden_adapters() {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(kGolden)) {
    if (entry.path().filename() != "adapter_config.json") continue;
    const auto name = std::filesystem::relative(entry.path().parent_path(), kGolden).string();
    // Raw starts cannot be read without their base.
    const bool raw = name.size() > 4 && name.compare(name.size() - 4, 4, "/raw") == 0;
    if (name.rfind("configs/", 0) != 0 && name.rfind("methods/prompts/", 0) != 0 && !raw) names.push_back(name);
  }
  std::sort(names.begin(), names.end());
  return names;
}

INSTANTIATE_TEST_SUITE_P(Golden, ConvertedGolden, ::testing::ValuesIn(golden_adapters()), [](const auto& tested) {
  auto name = tested.param;
  std::replace(name.begin(), name.end(), '/', '_');
  return name;
});

TEST(ConvertAdapter, LoralibHasTheSameTensorsUnderItsOwnKeys) {
  const TempFolder folder;
  EXPECT_THAT(lora::convert_adapter(kGolden + "gpt2/adapter", folder / "lora.pt", AdapterFormat::kLoralib),
              ElementsAre(HasSubstr("r = 4, lora_alpha = 12, fan_in_fan_out")));
  const auto loralib = lora::load_torch_pickle(folder / "lora.pt");
  EXPECT_EQ(loralib.count("transformer.h.1.attn.c_attn.lora_A"), 1U);
  EXPECT_THAT(loralib, SizeIs(8));

  const auto config =
      lora::LoraConfig().r(4).lora_alpha(12).fan_in_fan_out(true).target_modules({"c_attn", "attn.c_proj"});
  lora::convert_adapter(folder / "lora.pt", config, folder / "peft", AdapterFormat::kPeft);
  expect_same_bits(tensors_of(folder / "peft"), tensors_of(kGolden + "gpt2/adapter"));
  EXPECT_EQ(config_of(folder / "peft")["fan_in_fan_out"], true);
  EXPECT_TRUE(lora::describe_adapter(folder / "peft").has_checksums);
}

TEST(ConvertAdapter, LoralibTakesCopiesBiasesAndEmbeddings) {
  const auto source = kGolden + "options/reader/";
  const TempFolder folder;
  lora::convert_adapter(source + "embedding", folder / "lora.pt", AdapterFormat::kLoralib);
  lora::convert_adapter(folder / "lora.pt", lora::LoraConfig().r(3).lora_alpha(7).target_modules({"wte", "mix"}),
                        folder / "peft", AdapterFormat::kPeft, lora::ConvertAdapterOptions().embeddings({"wte"}));
  expect_same_bits(tensors_of(folder / "peft"), tensors_of(source + "embedding"));

  Tensors linear;
  for (const auto& [name, tensor] : tensors_of(source + "bias_all")) linear[name] = tensor;
  lora::convert_adapter(source + "bias_all", folder / "bias.pt", AdapterFormat::kLoralib);
  EXPECT_EQ(lora::load_torch_pickle(folder / "bias.pt").count("h.0.mix.bias"), 1U);
  const auto config = lora::LoraConfig().r(3).lora_alpha(7).target_modules({"mix"}).bias(lora::BiasCopies::kAll);
  lora::convert_adapter(folder / "bias.pt", config, folder / "bias", AdapterFormat::kPeft);
  expect_same_bits(tensors_of(folder / "bias"), linear);

  lora::convert_adapter(source + "modules_to_save", folder / "saved.pt", AdapterFormat::kLoralib);
  const auto saving =
      lora::LoraConfig().r(3).lora_alpha(7).target_modules({"mix"}).modules_to_save({"classifier", "norm"});
  lora::convert_adapter(folder / "saved.pt", saving, folder / "saved", AdapterFormat::kPeft);
  expect_same_bits(tensors_of(folder / "saved"), tensors_of(source + "modules_to_save"));
}

/// Adapters of ours on a fused projection, in parts.
class ConvertedParts : public ::testing::Test {
 protected:
  struct FusedImpl : torch::nn::Module {
    FusedImpl() : c_attn(register_module("c_attn", torch::nn::Linear(8, 12))) {}
    torch::nn::Linear c_attn;
  };

  lora::Adapters inject(const lora::LoraConfig& config) {
    auto adapters = lora::inject(*model_, config);
    harness::fill(adapters);
    adapters.save(folder_ / "parts");
    return adapters;
  }

  std::shared_ptr<FusedImpl> model_ = std::make_shared<FusedImpl>();
  TempFolder folder_;
};

TEST_F(ConvertedParts, AreLoralibsMergedLinear) {
  const auto config = lora::LoraConfig().r(2).lora_alpha(5).target_modules({"c_attn[q,v]"});
  const auto adapters = inject(config);
  lora::convert_adapter(folder_ / "parts", folder_ / "merged.pt", AdapterFormat::kLoralib);
  const auto loralib = lora::load_torch_pickle(folder_ / "merged.pt");
  EXPECT_EQ(loralib.at("c_attn.lora_A").sizes(), (std::vector<int64_t>{4, 8}));
  EXPECT_EQ(loralib.at("c_attn.lora_B").sizes(), (std::vector<int64_t>{8, 2}));

  lora::convert_adapter(folder_ / "merged.pt", config, folder_ / "again", AdapterFormat::kPeft);
  expect_same_bits(tensors_of(folder_ / "again"), tensors_of(folder_ / "parts"));
  const auto twin = std::make_shared<FusedImpl>();
  const auto before = adapters.named_tensors("default"),
             after = lora::load(*twin, folder_ / "again").named_tensors("default");
  ASSERT_EQ(after.size(), before.size());
  for (size_t i = 0; i < after.size(); ++i) {
    EXPECT_EQ(after[i].first, before[i].first);
    EXPECT_TRUE(at::equal(after[i].second, before[i].second)) << after[i].first;
  }
}

TEST_F(ConvertedParts, OfDifferentRanksOrInABinFileHaveNoPlace) {
  inject(lora::LoraConfig().r(2).lora_alpha(5).target_modules({"c_attn[q,v]"}));
  EXPECT_THAT(
      problems_of([&] { lora::convert_adapter(folder_ / "parts", folder_ / "bin", AdapterFormat::kPeftPickle); }),
      ElementsAre(HasSubstr("adapter_model.bin has no place for their row ranges")));
  EXPECT_FALSE(std::filesystem::exists(folder_ / "bin"));
}

TEST(ConvertAdapter, WhatAFormHasNoPlaceForIsNamedAndNothingIsWritten) {
  const TempFolder folder;
  const auto source = kGolden + "options/reader/";
  const auto refused = [&](const std::string& adapter) {
    const auto problems =
        problems_of([&] { lora::convert_adapter(adapter, folder / "lora.pt", AdapterFormat::kLoralib); });
    EXPECT_FALSE(std::filesystem::exists(folder / "lora.pt"));
    return problems;
  };
  EXPECT_THAT(refused(source + "conv"), ElementsAre(HasSubstr("found factors of a convolution at conv")));
  EXPECT_THAT(refused(source + "tokens"), ElementsAre(HasSubstr("found rows of single tokens at wte")));
  EXPECT_THAT(refused(source + "lora_bias"),
              UnorderedElementsAre(HasSubstr("a convolution at conv"), HasSubstr("the bias of lora_B at conv.bias"),
                                   HasSubstr("the bias of lora_B at h.0.mix.bias"),
                                   HasSubstr("the bias of lora_B at h.1.mix.bias")));
  EXPECT_THAT(refused(kGolden + "mha/adapter"), ElementsAre(HasSubstr("found factors of a MultiheadAttention"),
                                                            HasSubstr("found factors of a MultiheadAttention")));

  std::filesystem::create_directory(folder / "both");
  write_bytes(folder / "both/adapter_model.safetensors", "of another adapter");
  EXPECT_THAT(
      problems_of([&] { lora::convert_adapter(source + "embedding", folder / "both", AdapterFormat::kPeftPickle); }),
      ElementsAre(HasSubstr("found adapter_model.safetensors, which is read in place of adapter_model.bin")));
}

TEST(ConvertAdapter, ModulesAreRenamedAndTypesKept) {
  const TempFolder folder;
  std::filesystem::create_directory(folder / "half");
  auto tensors = tensors_of(kGolden + "gpt2/adapter");
  for (auto& [name, tensor] : tensors)
    tensor = tensor.to(name.find("lora_A") == std::string::npos ? at::kHalf : at::kBFloat16);
  lora::save_safetensors(tensors, folder / "half/adapter_model.safetensors");
  write_bytes(folder / "half/adapter_config.json", read_bytes(kGolden + "gpt2/adapter/adapter_config.json"));
  const auto options = lora::ConvertAdapterOptions().load(lora::LoadOptions().key_mapping({{"^transformer\\.", ""}}));
  lora::convert_adapter(folder / "half", folder / "renamed", AdapterFormat::kPeft, options);
  Tensors expected;
  for (const auto& [name, tensor] : tensors) {
    auto renamed = name;
    expected[renamed.erase(renamed.find("transformer."), std::string("transformer.").size())] = tensor;
  }
  expect_same_bits(tensors_of(folder / "renamed"), expected);
  EXPECT_THAT(config_of(folder / "renamed")["target_modules"], ::testing::Contains("h.1.attn.c_attn"));
}

TEST(DescribeAdapter, SaysWhatAFileHolds) {
  const auto found = lora::describe_adapter(kGolden + "options/reader/everything");
  ASSERT_THAT(found.modules, SizeIs(3));
  EXPECT_EQ(found.modules[0].path, "conv");
  EXPECT_EQ(found.modules[0].kind, "convolution");
  EXPECT_EQ(found.modules[0].in_features, 18);
  EXPECT_EQ(found.modules[0].rank, 2);
  EXPECT_EQ(found.modules[2].kind, "embedding");
  EXPECT_DOUBLE_EQ(*found.modules[2].alpha, 3);
  EXPECT_THAT(found.copies, SizeIs(9));
  EXPECT_EQ(found.dtypes, (std::map<std::string, int64_t>{{"F32", 14}, {"I64", 1}}));
  EXPECT_EQ(lora::describe_adapter(kGolden + "options/reader/tokens").rows.at("wte"), 3);
}

TEST(DescribeAdapter, ListsEveryProblem) {
  const TempFolder folder;
  auto tensors = tensors_of(kGolden + "mlp/plain");
  tensors.erase("base_model.model.up.lora_A.weight");
  tensors["base_model.model.down.lora_B.weight"] = at::full({8, 4}, std::numeric_limits<float>::infinity());
  lora::save_safetensors(tensors, folder / "adapter_model.safetensors");
  write_bytes(folder / "adapter_config.json", read_bytes(kGolden + "mlp/plain/adapter_config.json"));
  EXPECT_THAT(lora::describe_adapter(folder.path()).problems,
              UnorderedElementsAre(HasSubstr("found no tensor base_model.model.up.lora_A.weight"),
                                   HasSubstr("found [8, 4], expected [8, 3]"), HasSubstr("NaN or infinite")));
  EXPECT_THAT(lora::describe_adapter(folder / "adapter_model.safetensors").problems,
              UnorderedElementsAre(HasSubstr("found no lora_A for up"), HasSubstr("NaN or infinite")));

  auto config = config_of(folder.path());
  config["peft_type"] = "TOMORROW";
  write_bytes(folder / "adapter_config.json", config.dump());
  const auto other = lora::describe_adapter(folder.path());
  EXPECT_EQ(other.method, "TOMORROW");
  EXPECT_THAT(other.problems, ::testing::Contains(HasSubstr("found peft_type = \"TOMORROW\"")));
}

}  // namespace
}  // namespace convert_adapter_test
