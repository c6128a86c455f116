// Configurations that Python PEFT wrote (tests/golden/configs), and what the library writes of its own.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/io/config_json.h>

#include <string>
#include <vector>

#include "harness/temp_folder.h"

namespace lora_config_json_test {
namespace {

using lora::LoraConfig;
using lora::detail::Json;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

struct Result {
  LoraConfig config;
  std::vector<std::string> problems;
};

Result read(const Json& json) {
  Result result;
  result.config = lora::detail::read_config<lora::LoraConfig>(json, result.problems);
  return result;
}

Json golden(const std::string& name) {
  return Json::parse(read_bytes(LORA_SOURCE_DIR "/tests/golden/configs/" + name + "/adapter_config.json"));
}

std::vector<std::string> texts(const lora::TargetModules& targets) {
  std::vector<std::string> result;
  for (const auto& entry : targets.entries()) result.push_back(entry.text);
  return result;
}

TEST(LoraConfigJson, MissingKeysHavePeftsDefaults) {
  const auto result = read(Json{{"peft_type", "LORA"}, {"target_modules", {"up"}}});
  EXPECT_THAT(result.problems, IsEmpty());
  EXPECT_EQ(result.config.r(), 8);
  EXPECT_EQ(result.config.lora_alpha(), 8);
  EXPECT_EQ(result.config.lora_dropout(), 0);
  EXPECT_FALSE(result.config.use_rslora());
  EXPECT_EQ(result.config.init_lora_weights(), lora::LoraInit::kKaiming);
}

TEST(LoraConfigJson, ReadsEveryKeyOfPefts) {
  for (const std::string name : {"all_linear", "causal_lm", "defaults", "layers", "patterns", "regex"}) {
    const auto json = golden(name);
    const auto result = read(json);
    EXPECT_THAT(result.problems, IsEmpty()) << name;
    EXPECT_EQ(result.config.r(), json.at("r")) << name;
    EXPECT_EQ(result.config.lora_alpha(), json.at("lora_alpha")) << name;
    EXPECT_EQ(result.config.lora_dropout(), json.at("lora_dropout")) << name;
    EXPECT_EQ(result.config.use_rslora(), json.at("use_rslora")) << name;
    EXPECT_EQ(result.config.rank_pattern().size(), json.at("rank_pattern").size()) << name;
    EXPECT_EQ(result.config.alpha_pattern().size(), json.at("alpha_pattern").size()) << name;
  }
}

TEST(LoraConfigJson, TakesWhatOtherProgramsWrite) {
  for (
      const char* const text :
      {R"({"peft_type": "LORA", "target_modules": ["q"], "fan_in_fan_out": null, "use_rslora": null})",
       R"({"peft_type": "LORA", "target_modules": ["q"], "init_lora_weights": "mica"})",
       R"({"peft_type": "LORA", "target_modules": ["q"], "init_lora_weights": true, "corda_config": {"cache_file": "x"},
            "lora_ga_config": {"scale": "stable"}})"}) {
    EXPECT_THAT(read(Json::parse(text)).problems, IsEmpty()) << text;
  }
}

TEST(LoraConfigJson, RefusesByNameWhatItDoesNotCompute) {
  auto beyond = golden("beyond_lora");
  EXPECT_THAT(read(beyond).problems, IsEmpty());
  EXPECT_TRUE(read(beyond).config.use_dora());
  beyond["use_bdlora"] = {{"nblocks", 2}};
  EXPECT_THAT(read(beyond).problems, ::testing::ElementsAre(HasSubstr("use_bdlora")));
  const auto replicated =
      Json{{"peft_type", "LORA"}, {"target_modules", {"up"}}, {"layer_replication", {{0, 2}, {1, 3}}}};
  EXPECT_THAT(read(replicated).problems,
              ::testing::ElementsAre(AllOf(HasSubstr("layer_replication"), HasSubstr("build the model"))));
  const auto with_parameters = Json{{"peft_type", "LORA"}, {"target_modules", {"up"}}, {"target_parameters", {"gate"}}};
  EXPECT_THAT(read(with_parameters).problems, ::testing::ElementsAre(HasSubstr("target_parameters")));
}

TEST(LoraConfigJson, WritesWhatItReads) {
  const auto config = LoraConfig()
                          .r(5)
                          .lora_alpha(2.5)
                          .use_rslora(true)
                          .lora_dropout(0.25)
                          .init_lora_weights(lora::LoraInit::kGaussian)
                          .target_modules({"c_attn[q,v]", "h.0.fc"})
                          .exclude_modules("h\\.1\\..*")
                          .rank_pattern({{"b", 3}, {"a", 4}})
                          .alpha_pattern({{"z", 1}, {"a", 0.5}})
                          .layers_to_transform({3, 1})
                          .layers_pattern("h")
                          .bias(lora::BiasCopies::kAdaptedOnly)
                          .modules_to_save({"score", "ln_f"})
                          .trainable_token_indices({{"wte", {4, 2}}})
                          .fan_in_fan_out(true)
                          .task_type("CAUSAL_LM")
                          .base_model_name_or_path("base")
                          .revision("main")
                          .auto_mapping("{\"base_model_class\":\"Net\"}")
                          .fused_parts("c_attn", {{"q", 8}, {"k", 2}, {"v", 2}});
  EXPECT_EQ(lora::detail::config_json(config),
            lora::detail::config_json(read(lora::detail::config_json(config)).config));
  const auto result = read(Json::parse(lora::detail::config_json(config).dump()));
  EXPECT_THAT(result.problems, IsEmpty());
  const auto& read_back = result.config;
  EXPECT_EQ(read_back.r(), 5);
  EXPECT_EQ(read_back.lora_alpha(), 2.5);
  EXPECT_TRUE(read_back.use_rslora());
  EXPECT_EQ(read_back.lora_dropout(), 0.25);
  EXPECT_EQ(read_back.init_lora_weights(), lora::LoraInit::kGaussian);
  EXPECT_EQ(texts(read_back.target_modules()), texts(config.target_modules()));
  EXPECT_EQ(texts(read_back.exclude_modules()), texts(config.exclude_modules()));
  EXPECT_EQ(read_back.rank_pattern(), config.rank_pattern());  // in their order: the first match wins
  EXPECT_EQ(read_back.alpha_pattern(), config.alpha_pattern());
  ASSERT_EQ(read_back.fused_parts().size(), 1U);
  EXPECT_EQ(read_back.fused_parts()[0].second[1].size, 2);
}

TEST(LoraConfigJson, AWholeAlphaIsWrittenWithoutAPoint) {
  EXPECT_EQ(lora::detail::config_json(LoraConfig().lora_alpha(16))["lora_alpha"].dump(), "16");
  EXPECT_EQ(lora::detail::config_json(LoraConfig().lora_alpha(0.5))["lora_alpha"].dump(), "0.5");
}

TEST(LoraConfigJson, EveryProblemIsTold) {
  const auto result = read(Json{{"peft_type", "VERA"},
                                {"r", "x"},
                                {"lora_alpha", true},
                                {"use_rslora", 1},
                                {"target_modules", {{"a", 1}}},
                                {"tomorrow", "on"}});
  EXPECT_EQ(result.problems.size(), 6U);
}

}  // namespace
}  // namespace lora_config_json_test
