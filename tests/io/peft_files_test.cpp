// PEFT directories that are wrong in some way: one error with every problem, the model as it was; and what is saved.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/adapters.h>
#include <lora/io/checksum.h>
#include <lora/io/describe_adapter.h>
#include <lora/io/safetensors.h>
#include <sys/resource.h>

#include <cmath>
#include <csignal>
#include <filesystem>
#include <functional>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "harness/temp_folder.h"
#include "harness/values.h"
#include "oracles/models.h"

namespace peft_files_test {
namespace {

using lora::LoraConfig;
using nlohmann::json;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using Tensors = std::map<std::string, at::Tensor>;

const std::string kPlain = LORA_SOURCE_DIR "/tests/golden/mlp/plain";
const std::string kUpA = "base_model.model.up.lora_A.weight";
const std::string kUpB = "base_model.model.up.lora_B.weight";
const std::string kDownA = "base_model.model.down.lora_A.weight";

/// A good PEFT directory to spoil.
class PeftFolder : public ::testing::Test {
 protected:
  PeftFolder() : directory_(folder_.path().string()) {
    for (const auto* name : {"adapter_config.json", "adapter_model.safetensors"}) {
      std::filesystem::copy(kPlain + "/" + name, folder_ / name);
    }
    before_ = harness::parameter_state(*model_);
  }

  void edit_config(const std::function<void(json&)>& edit) {
    auto config = json::parse(read_bytes(folder_ / "adapter_config.json"));
    edit(config);
    write_bytes(folder_ / "adapter_config.json", config.dump());
  }

  void edit_tensors(const std::function<void(Tensors&)>& edit) {
    auto tensors = lora::load_safetensors(folder_ / "adapter_model.safetensors");
    edit(tensors);
    lora::save_safetensors(tensors, folder_ / "adapter_model.safetensors");
  }

  /// The problems of loading the directory; the model stays as it was, and usable.
  std::vector<std::string> problems() {
    std::vector<std::string> result;
    try {
      lora::load(*model_, directory_);
      ADD_FAILURE() << "it was loaded";
    } catch (const lora::FormatError& error) {
      EXPECT_THAT(error.path(), ::testing::StartsWith(directory_));
      EXPECT_THAT(error.what(), HasSubstr(error.path()));
      result = error.problems();
    }
    EXPECT_EQ(harness::parameter_state(*model_), before_);
    auto adapters = lora::inject(*model_, LoraConfig().target_modules({"up"}), "usable");
    EXPECT_THROW(adapters.load(directory_, "other"), lora::FormatError);
    EXPECT_THAT(adapters.names(), ::testing::ElementsAre("usable"));
    adapters.unload();
    EXPECT_EQ(harness::parameter_state(*model_), before_);
    return result;
  }

  TempFolder folder_;
  std::string directory_;
  Mlp model_;
  std::map<std::string, std::string> before_;
};

TEST_F(PeftFolder, IsNotReplacedByAnAdapterThatDiverged) {
  const auto config = read_bytes(folder_ / "adapter_config.json");
  const auto tensors = read_bytes(folder_ / "adapter_model.safetensors");
  auto adapters = lora::load(*model_, directory_);
  {
    const at::NoGradGuard no_grad;
    adapters.named_tensors("default")[1].second[0][0] = std::nan("");
    adapters.named_tensors("default")[2].second[0][0] = INFINITY;
  }
  EXPECT_THAT([&] { adapters.save(directory_); },
              ::testing::ThrowsMessage<c10::ValueError>(AllOf(HasSubstr("lora_B, expected finite ones at up"),
                                                              HasSubstr("lora_A, expected finite ones at down"),
                                                              HasSubstr("nothing was written"))));
  EXPECT_EQ(read_bytes(folder_ / "adapter_config.json"), config);
  EXPECT_EQ(read_bytes(folder_ / "adapter_model.safetensors"), tensors);
}

TEST_F(PeftFolder, OfSeveralAdaptersIsWrittenWhereAllCanBe) {
  auto adapters = lora::load(*model_, directory_);
  adapters.add(LoraConfig().r(2).target_modules({"up"}), "other");
  {
    const at::NoGradGuard no_grad;
    for (const auto& [name, tensor] : adapters.named_tensors("default")) tensor.fill_(1);
    adapters.named_tensors("other")[0].second.fill_(std::nan(""));
  }
  const auto tensors = read_bytes(folder_ / "adapter_model.safetensors");
  EXPECT_THROW(adapters.save(directory_), c10::ValueError);
  EXPECT_EQ(read_bytes(folder_ / "adapter_model.safetensors"), tensors) << "the first adapter's";
}

TEST_F(PeftFolder, KeepsItsTensorsWhereTheConfigurationCannotBeReplaced) {
  auto adapters = lora::load(*model_, directory_);
  harness::fill(adapters);
  const auto tensors = read_bytes(folder_ / "adapter_model.safetensors");
  std::filesystem::remove(folder_ / "adapter_config.json");
  std::filesystem::create_directory(folder_ / "adapter_config.json");
  EXPECT_THROW(adapters.save(directory_), lora::SystemError);
  EXPECT_EQ(read_bytes(folder_ / "adapter_model.safetensors"), tensors);
}

TEST_F(PeftFolder, WithTensorsOfOtherTypes) {
  edit_tensors([](Tensors& tensors) { tensors[kUpA] = tensors[kUpA].to(at::kDouble); });
  lora::load(*model_, directory_).unload();
  edit_tensors([](Tensors& tensors) { tensors[kUpA] = at::full_like(tensors[kUpA], 1e300); });
  EXPECT_THAT(problems(), ::testing::ElementsAre(AllOf(HasSubstr("beyond the range of Float"), HasSubstr(kUpA))));
  edit_tensors([](Tensors& tensors) {
    tensors[kUpA] = at::zeros(tensors[kUpA].sizes(), at::kFloat8_e4m3fn);
    tensors[kUpB] = tensors[kUpB].to(at::kInt);
  });
  EXPECT_THAT(problems(),
              ::testing::ElementsAre(HasSubstr("F64, F32, F16 or BF16 in " + kUpA), HasSubstr("found the type Int")));
}

TEST_F(PeftFolder, WithAKeyThatIsThereTwice) {
  const auto good = read_bytes(folder_ / "adapter_config.json");
  write_bytes(folder_ / "adapter_config.json", "{\"r\":1," + good.substr(1));
  EXPECT_THAT(problems(), ::testing::ElementsAre("key 'r' is there twice"));
  write_bytes(folder_ / "adapter_config.json", good + std::string(1, '\0') + "x");
  EXPECT_THAT(problems(), ::testing::ElementsAre(HasSubstr("no JSON object")));
}

TEST_F(PeftFolder, WithJsonOrPatternsNestedWithoutEnd) {
  const auto good = read_bytes(folder_ / "adapter_config.json");
  const size_t depth = 100'000;
  const auto nested = std::string(depth, '[') + std::string(depth, ']');
  write_bytes(folder_ / "adapter_config.json", R"({"peft_type":"LORA","x":)" + nested + "}");
  EXPECT_THAT(problems(), ::testing::ElementsAre(HasSubstr("nested more than 16 deep")));
  for (const auto* key : {"target_modules", "exclude_modules"}) {
    for (const auto& pattern : {std::string(depth, '(') + std::string(depth, ')'), std::string(depth, 'a'),
                                std::string(100, '(') + "up" + std::string(100, ')')}) {
      write_bytes(folder_ / "adapter_config.json", good);
      edit_config([&](json& config) { config[key] = pattern; });
      EXPECT_THAT(problems(), ::testing::ElementsAre(HasSubstr("found ")));
    }
  }
  write_bytes(folder_ / "adapter_config.json", good);
  auto file = lora::load_safetensors_with_metadata(folder_ / "adapter_model.safetensors");
  for (const auto* key : {"lora.config", "lora.scaling"}) {
    auto metadata = file.metadata;
    metadata[key] = "{\"r\":" + nested + "}";
    Tensors copies;
    for (const auto& [name, tensor] : file.tensors) copies[name] = tensor.clone();
    lora::add_checksums(copies, metadata);
    lora::save_safetensors(copies, folder_ / "adapter_model.safetensors", metadata);
    EXPECT_THAT(problems(), ::testing::ElementsAre(HasSubstr("nested more than 16 deep"))) << key;
  }
}

TEST_F(PeftFolder, WithAPatternThatIsNone) {
  edit_config([](json& config) { config["rank_pattern"] = {{"(up", 2}}; });
  EXPECT_THAT(problems(), ::testing::ElementsAre(HasSubstr("(up")));
}

TEST_F(PeftFolder, LoadsAsItIs) { EXPECT_EQ(lora::load(*model_, directory_).names().size(), 1U); }

TEST_F(PeftFolder, WithoutAFile) {
  std::filesystem::remove(folder_ / "adapter_model.safetensors");
  EXPECT_EQ(problems().size(), 1U);
  std::filesystem::remove(folder_ / "adapter_config.json");
  EXPECT_THAT(problems(), ::testing::ElementsAre(HasSubstr("No such file")));
}

TEST_F(PeftFolder, WithAConfigThatIsNoJsonObject) {
  for (const std::string text : {"", "{", "[]", "{\"r\": 1e999}", "\xff\xfe", "null"}) {
    write_bytes(folder_ / "adapter_config.json", text);
    EXPECT_THAT(problems(), ::testing::ElementsAre(HasSubstr("no JSON object"))) << text;
  }
}

TEST_F(PeftFolder, WithDamagedTensors) {
  const auto bytes = read_bytes(folder_ / "adapter_model.safetensors");
  for (const size_t size : {size_t{0}, size_t{7}, size_t{40}, bytes.size() / 2, bytes.size() - 1}) {
    write_bytes(folder_ / "adapter_model.safetensors", bytes.substr(0, size));
    EXPECT_FALSE(problems().empty()) << size;
  }
  auto damaged = bytes;
  damaged[9] = '\0';
  write_bytes(folder_ / "adapter_model.safetensors", damaged);
  EXPECT_FALSE(problems().empty());
}

TEST_F(PeftFolder, WithEveryKindOfWrongTensorAtOnce) {
  edit_tensors([](Tensors& tensors) {
    tensors[kUpA] = at::zeros({3, 13});
    tensors.erase(kUpB);
    tensors[kDownA][0][0] = std::numeric_limits<float>::quiet_NaN();
    tensors["base_model.model.side.lora_A.weight"] = at::zeros({3, 4});
    tensors["base_model.model.side.lora_B.weight"] = at::zeros({4, 3}, at::kInt);
    tensors["up.lora_A.weight"] = at::zeros({3, 12});
    tensors["base_model.model.up.lora_magnitude_vector"] = at::zeros({20});
  });
  EXPECT_THAT(problems(),
              ::testing::UnorderedElementsAre(
                  AllOf(HasSubstr("found [3, 13]"), HasSubstr("expected [3, 12]"), HasSubstr(kUpA)),
                  AllOf(HasSubstr("found no tensor " + kUpB), HasSubstr("expected [20, 3]")),
                  AllOf(HasSubstr("NaN"), HasSubstr(kDownA)), AllOf(HasSubstr("type Int"), HasSubstr("side.lora_B")),
                  AllOf(HasSubstr("side.lora_A.weight, expected none"), HasSubstr("the model has no such")),
                  AllOf(HasSubstr("side.lora_B.weight, expected none"), HasSubstr("the model has no such")),
                  HasSubstr("found the tensor up.lora_A.weight"), HasSubstr("up.lora_magnitude_vector")));
}

TEST_F(PeftFolder, WithTargetsThatTheTensorsDoNotKnow) {
  edit_tensors([](Tensors& tensors) {
    tensors.erase(kUpA);
    tensors.erase(kUpB);
  });
  EXPECT_THAT(problems(),
              ::testing::ElementsAre(HasSubstr("found no tensor " + kUpA), HasSubstr("found no tensor " + kUpB)));
}

TEST_F(PeftFolder, WithTensorsThatTheTargetsDoNotChoose) {
  edit_config([](json& config) { config["target_modules"] = {"down"}; });
  const auto unexpected = [](const std::string& key) {
    return AllOf(HasSubstr("found the tensor " + key), HasSubstr("target_modules do not"));
  };
  EXPECT_THAT(problems(), ::testing::ElementsAre(unexpected(kUpA), unexpected(kUpB)));
}

TEST_F(PeftFolder, WithATargetThatHasNeitherModuleNorTensorIsNoted) {
  edit_config([](json& config) { config["target_modules"] = {"up", "down", "lm_head"}; });
  EXPECT_THAT(lora::load(*model_, directory_).report().notes, ::testing::ElementsAre(HasSubstr("\"lm_head\"")));
}

TEST_F(PeftFolder, WithAnEditedRank) {
  edit_config([](json& config) { config["r"] = 4; });
  EXPECT_EQ(problems().size(), 4U);
  edit_config([](json& config) { config["r"] = 4000000000000; });  // no memory is asked for
  EXPECT_EQ(problems().size(), 4U);
}

TEST_F(PeftFolder, WithValuesOutOfRange) {
  const std::vector<std::pair<std::string, json>> wrong = {{"r", 0},
                                                           {"r", -3},
                                                           {"r", 2.5},
                                                           {"r", "three"},
                                                           {"lora_alpha", 0},
                                                           {"lora_alpha", nullptr},
                                                           {"lora_dropout", 1.5},
                                                           {"lora_dropout", "no"},
                                                           {"use_rslora", "yes"},
                                                           {"rank_pattern", 3},
                                                           {"rank_pattern", {{"up", 0}}},
                                                           {"alpha_pattern", {{"up", "x"}}},
                                                           {"target_modules", {1, 2}},
                                                           {"target_modules", "(up"},
                                                           {"target_modules", nullptr},
                                                           {"peft_type", "IA3"},
                                                           {"peft_type", nullptr}};
  const auto good = read_bytes(folder_ / "adapter_config.json");
  for (const auto& [key, value] : wrong) {
    write_bytes(folder_ / "adapter_config.json", good);
    edit_config([&, key = key, value = value](json& config) { config[key] = value; });
    EXPECT_FALSE(problems().empty()) << key << " = " << value;
  }
}

TEST_F(PeftFolder, WithAPatternThatOnlyPythonReadsGoesByItsTensors) {
  const auto x = harness::normal({3, 12}, 5, at::kFloat);
  lora::load(*model_, directory_);
  const auto expected = model_->forward(x);
  auto plain = lora::adapters_of(*model_);
  plain.unload();
  edit_config([](json& config) {
    config["target_modules"] = "(?i)(?P<name>.*)(?<=u)p|down";
    config["exclude_modules"] = "(?>none)";
  });
  auto adapters = lora::load(*model_, directory_);
  EXPECT_TRUE(at::equal(model_->forward(x), expected));
  EXPECT_THAT(adapters.report().notes,
              ::testing::UnorderedElementsAre(HasSubstr("target_modules is passed over, the tensors choose"),
                                              HasSubstr("exclude_modules is passed over, the tensors choose")));
  EXPECT_THAT(lora::describe_adapter(directory_).problems, IsEmpty());
}

TEST_F(PeftFolder, WithKeysThatChangeTheMeaning) {
  const std::vector<std::pair<std::string, json>> keys = {{"bias", "some"},
                                                          {"use_qalora", true},
                                                          {"layer_replication", {{0, 2}}},
                                                          {"target_parameters", {"up.weight"}},
                                                          {"layers_to_transform", "1"},
                                                          {"trainable_token_indices", {{"wte", 1}}},
                                                          {"alora_invocation_tokens", {3}},
                                                          {"init_lora_weights", "corda"},
                                                          {"a_key_of_tomorrow", 1},
                                                          {"another_of_tomorrow", "on"}};
  edit_config([&](json& config) {
    for (const auto& [key, value] : keys) config[key] = value;
  });
  std::vector<::testing::Matcher<std::string>> expected;
  for (const auto& [key, value] : keys) expected.push_back(HasSubstr("found " + key));
  EXPECT_THAT(problems(), ::testing::UnorderedElementsAreArray(expected));
}

TEST_F(PeftFolder, WithOptionsWhoseTensorsTheFileLacks) {
  const auto good = read_bytes(folder_ / "adapter_config.json");
  const std::vector<std::pair<std::string, json>> options = {
      {"bias", "all"},    {"bias", "lora_only"},       {"lora_bias", true},
      {"use_dora", true}, {"modules_to_save", {"up"}}, {"trainable_token_indices", {1, 2}}};
  for (const auto& [key, value] : options) {
    write_bytes(folder_ / "adapter_config.json", good);
    edit_config([&, key = key, value = value](json& config) { config[key] = value; });
    EXPECT_FALSE(problems().empty()) << key << " = " << value;
  }
}

TEST_F(PeftFolder, WithUnknownKeysThatAreEmptyLoads) {
  edit_config([](json& config) {
    config["a_key_of_tomorrow"] = nullptr;
    config["another_of_tomorrow"] = false;
    config["third"] = json::object();
    config["fourth"] = json::array();
    config.erase("lora_dropout");
  });
  EXPECT_NO_THROW(lora::load(*model_, directory_));
}

TEST_F(PeftFolder, UnderATakenOrImpossibleNameIsAnErrorOfTheCaller) {
  auto adapters = lora::load(*model_, directory_);
  EXPECT_THROW(adapters.load(directory_, "default"), c10::ValueError);
  EXPECT_THROW(adapters.load(directory_, "lora"), c10::ValueError);
  EXPECT_THROW(adapters.load(directory_, "a.b"), c10::ValueError);
}

// What is saved.

class PeftSave : public ::testing::Test {
 protected:
  lora::Adapters injected(const LoraConfig& config) {
    auto adapters = lora::inject(*model_, config);
    harness::fill(adapters);
    return adapters;
  }

  json config() const { return json::parse(read_bytes(folder_ / "adapter_config.json")); }

  TempFolder folder_;
  Mlp model_;
};

TEST_F(PeftSave, AConfigOfAnotherSaveIsFound) {
  // A save that is interrupted between its two files leaves the tensors of the one beside the configuration of the
  // other.
  injected(LoraConfig().r(3).lora_alpha(7).target_modules({"up"})).save(folder_.path());
  const auto old_config = read_bytes(folder_ / "adapter_config.json");
  lora::adapters_of(*model_).unload();
  injected(LoraConfig().r(3).lora_alpha(14).target_modules({"up"})).save(folder_.path());
  write_bytes(folder_ / "adapter_config.json", old_config);
  Mlp other;
  try {
    lora::load(*other, folder_.path());
    FAIL() << "it was loaded";
  } catch (const lora::FormatError& error) {
    EXPECT_THAT(error.problems(), ::testing::ElementsAre(AllOf(HasSubstr("lora_alpha = 7"), HasSubstr("expected 14"),
                                                               HasSubstr("do not belong together"))));
  }
}

TEST_F(PeftSave, AConfigWhoseKeysWereSortedLoads) {
  injected(LoraConfig().r(3).target_modules({"up", "down"}).rank_pattern({{"up", 2}, {"down", 4}}))
      .save(folder_.path());
  write_bytes(folder_ / "adapter_config.json", config().dump());
  ASSERT_EQ(nlohmann::ordered_json::parse(read_bytes(folder_ / "adapter_config.json"))["rank_pattern"].size(), 2U);
  Mlp other;
  EXPECT_NO_THROW(lora::load(*other, folder_.path()));
}

TEST_F(PeftSave, AFullDiskLeavesBothOldFiles) {
  const auto adapters = injected(LoraConfig().r(3).target_modules({"up"}));
  adapters.save(folder_.path());
  const auto tensors = read_bytes(folder_ / "adapter_model.safetensors");
  const auto text = read_bytes(folder_ / "adapter_config.json");
  harness::fill(adapters, "default", 77);

  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  for (const size_t size : {size_t{100}, text.size() - 1, tensors.size() - 1}) {
    rlimit limit = before;
    limit.rlim_cur = size;
    ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &limit), 0);
    EXPECT_THROW(adapters.save(folder_.path()), lora::FormatError) << size;
    ::setrlimit(RLIMIT_FSIZE, &before);
    EXPECT_EQ(read_bytes(folder_ / "adapter_model.safetensors"), tensors);
    EXPECT_EQ(read_bytes(folder_ / "adapter_config.json"), text);
  }
  std::signal(SIGXFSZ, handler);
  const auto left = std::distance(std::filesystem::directory_iterator(folder_.path()), {});
  EXPECT_EQ(left, 2);
}

TEST_F(PeftSave, PartsOfOtherRanksAreStackedExactlyAndComeBackBitForBit) {
  const auto config = LoraConfig()
                          .r(3)
                          .lora_alpha(7)
                          .target_modules({"up[a,c]", "down"})
                          .fused_parts("up", {{"a", 6}, {"b", 10}, {"c", 4}})
                          .rank_pattern({{"down", 5}})
                          .alpha_pattern({{"down", 2}});
  const auto adapters = injected(config);
  adapters.save(folder_.path());
  const auto tensors = lora::load_safetensors(folder_ / "adapter_model.safetensors");
  EXPECT_EQ(tensors.at(kUpA).sizes(), (std::vector<int64_t>{6, 12}));
  EXPECT_EQ(tensors.at(kUpB).sizes(), (std::vector<int64_t>{20, 6}));
  EXPECT_EQ(config.r() * 2, this->config().at("r"));
  EXPECT_EQ(this->config().at("lora_alpha"), 14);
  EXPECT_EQ(this->config().at("rank_pattern"), (json{{"down", 5}}));
  EXPECT_EQ(this->config().at("alpha_pattern"), (json{{"down", 2}}));
  EXPECT_THAT(this->config().at("target_modules"), ::testing::UnorderedElementsAre("up", "down"));

  Mlp twin;
  const auto loaded = lora::load(*twin, folder_.path());
  const auto before = adapters.named_tensors("default"), after = loaded.named_tensors("default");
  ASSERT_EQ(after.size(), 6U);
  for (size_t i = 0; i < after.size(); ++i) {
    EXPECT_EQ(after[i].first, before[i].first);
    EXPECT_TRUE(at::equal(after[i].second, before[i].second)) << after[i].first;
  }
}

TEST_F(PeftSave, PartsWhoseFileWasEditedAreRefused) {
  injected(LoraConfig().r(3).target_modules({"up[a]"}).fused_parts("up", {{"a", 8}, {"b", 12}})).save(folder_.path());
  auto file = lora::load_safetensors_with_metadata(folder_ / "adapter_model.safetensors");
  file.tensors.at(kUpB)[19][0] = 1;  // outside of the part
  file.metadata.erase("lora.crc32");
  lora::add_checksums(file.tensors, file.metadata);
  lora::save_safetensors(file.tensors, folder_ / "adapter_model.safetensors", file.metadata);
  Mlp twin;
  try {
    lora::load(*twin, folder_.path());
    FAIL() << "it was loaded";
  } catch (const lora::FormatError& error) {
    EXPECT_THAT(error.what(), HasSubstr("outside of the parts' blocks"));
  }
}

TEST_F(PeftSave, AnAttentionHasOneScalingInAFile) {
  MhaBlock model;
  auto adapters = lora::inject(
      *model,
      LoraConfig().r(3).lora_alpha(6).target_modules({"in_proj[q,v]", "out_proj"}).rank_pattern({{"out_proj", 2}}));
  EXPECT_THROW(adapters.save(folder_.path()), c10::ValueError);
  adapters.unload();
  adapters = lora::inject(*model, LoraConfig()
                                      .r(3)
                                      .lora_alpha(6)
                                      .target_modules({"in_proj[q,v]", "out_proj"})
                                      .rank_pattern({{"attn.out_proj", 2}})
                                      .alpha_pattern({{"attn.out_proj", 4}}));
  harness::fill(adapters);
  adapters.save(folder_.path());
  EXPECT_EQ(config().at("r"), 6);
  EXPECT_EQ(config().at("lora_alpha"), 12);
  MhaBlock twin;
  const auto loaded = lora::load(*twin, folder_.path());
  const auto before = adapters.named_tensors("default"), after = loaded.named_tensors("default");
  ASSERT_EQ(after.size(), before.size());
  for (size_t i = 0; i < after.size(); ++i) EXPECT_TRUE(at::equal(after[i].second, before[i].second)) << after[i].first;
}

TEST_F(PeftSave, ThePatternsOfAnAttentionReachItsWeightsByEveryName) {
  const auto ranks = [](const std::string& pattern) {
    MhaBlock model;
    const auto adapters = lora::inject(*model, LoraConfig().r(3).target_modules({"attn"}).rank_pattern({{pattern, 5}}));
    std::vector<int64_t> found;
    for (const auto& [name, tensor] : adapters.named_parameters()) {
      if (name.find("lora_A") != std::string::npos) found.push_back(tensor.size(0));
    }
    return found;
  };
  EXPECT_THAT(ranks("attn"), ::testing::ElementsAre(5, 5));
  EXPECT_THAT(ranks("in_proj"), ::testing::ElementsAre(5, 3));
  EXPECT_THAT(ranks("attn.out_proj"), ::testing::ElementsAre(3, 5));
}

TEST_F(PeftSave, APatternThatMatchesNothingIsAnErrorInInjectAndANoteOnLoad) {
  const auto before = harness::parameter_state(*model_);
  try {
    lora::inject(
        *model_,
        LoraConfig().target_modules({"up"}).rank_pattern({{"up", 4}, {"donw", 5}}).alpha_pattern({{"upp", 3}}));
    FAIL() << "it was injected";
  } catch (const c10::ValueError& error) {
    EXPECT_THAT(error.what(), AllOf(HasSubstr("rank_pattern[\"donw\"]"), HasSubstr("alpha_pattern[\"upp\"]")));
  }
  EXPECT_EQ(harness::parameter_state(*model_), before);

  injected(LoraConfig().r(3).target_modules({"up"})).save(folder_.path());
  auto config = this->config();
  config["rank_pattern"] = {{"side", 5}};
  write_bytes(folder_ / "adapter_config.json", config.dump());
  const auto file = lora::load_safetensors(folder_ / "adapter_model.safetensors");
  lora::save_safetensors(file, folder_ / "adapter_model.safetensors");
  Mlp twin;
  EXPECT_THAT(lora::load(*twin, folder_.path()).report().notes,
              ::testing::ElementsAre(HasSubstr("rank_pattern[\"side\"]")));
}

TEST_F(PeftSave, SeveralAdaptersGoIntoSubFolders) {
  auto adapters = injected(LoraConfig().r(3).target_modules({"up"}));
  adapters.add(LoraConfig().r(2).target_modules({"down"}), "other");
  harness::fill(adapters, "other", 5);
  adapters.save(folder_.path());
  Mlp twin;
  auto loaded = lora::load(*twin, folder_.path());
  loaded.load(folder_ / "other", "other");
  for (const std::string name : {"default", "other"}) {
    const auto before = adapters.named_tensors(name), after = loaded.named_tensors(name);
    ASSERT_EQ(after.size(), before.size());
    for (size_t i = 0; i < after.size(); ++i) EXPECT_TRUE(at::equal(after[i].second, before[i].second));
  }
}

}  // namespace
}  // namespace peft_files_test
