// PEFT's directories of prefix and prompt tuning: what is written, what is read, and what is refused.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/io/torch_pickle.h>
#include <lora/prompt/prefix_tuning.h>
#include <lora/prompt/prompt_tuning.h>

#include <cmath>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "harness/damage.h"
#include "harness/message_of.h"
#include "harness/problems_of.h"
#include "harness/temp_folder.h"
#include "harness/values.h"

namespace prompt_files_test {
namespace {

using testing::Contains;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::UnorderedElementsAre;

const std::string kGolden = LORA_SOURCE_DIR "/tests/golden/methods/prompts/";

lora::PrefixTuning small_prefix(uint64_t seed = 1) {
  const auto config =
      lora::PrefixTuningConfig().num_virtual_tokens(5).num_layers(2).num_attention_heads(4).token_dim(32);
  return lora::PrefixTuning(config, harness::normal({5, 128}, seed, at::kFloat));
}

lora::PromptTuning small_prompt() {
  return lora::PromptTuning(lora::PromptTuningConfig().num_virtual_tokens(5).token_dim(32),
                            harness::normal({5, 32}, 2, at::kFloat));
}

nlohmann::json config_in(const std::string& directory) {
  return nlohmann::json::parse(read_bytes(directory + "/adapter_config.json"));
}

/// A folder with PEFT's prefix, to be changed.
struct Directory {
  Directory() { std::filesystem::copy(kGolden + "prefix", folder.path()); }

  std::string path() const { return folder.path().string(); }
  void set(const std::string& key, const nlohmann::json& value) const {
    auto json = config_in(path());
    json[key] = value;
    write_bytes(folder / "adapter_config.json", json.dump());
  }
  void erase(const std::string& key) const {
    auto json = config_in(path());
    json.erase(key);
    write_bytes(folder / "adapter_config.json", json.dump());
  }
  void save(const std::map<std::string, at::Tensor>& tensors) const {
    lora::save_safetensors(tensors, folder / "adapter_model.safetensors");
  }
  std::vector<std::string> problems() const {
    return harness::problems_of([this] { lora::load_prefix_tuning(path()); });
  }

  TempFolder folder;
};

/// What is written of virtual tokens that PEFT wrote says what PEFT's file says.
template <class Load>
void check_written_again(const std::string& name, const Load& load) {
  const TempFolder folder;
  load(kGolden + name)->save(folder.path().string());
  auto expected = config_in(kGolden + name);
  expected.erase("peft_version");
  if (expected.value("prefix_projection", false))
    expected["prefix_projection"] = false;  // what it made is all there is
  EXPECT_EQ(config_in(folder.path().string()), expected) << name;
  const auto before = lora::load_safetensors(kGolden + name + "/adapter_model.safetensors"),
             after = lora::load_safetensors(folder / "adapter_model.safetensors");
  ASSERT_EQ(after.size(), 1U);
  EXPECT_TRUE(at::equal(after.at("prompt_embeddings"), before.at("prompt_embeddings"))) << name;
}

TEST(PromptFiles, AreWrittenAsPeftWritesThem) {
  check_written_again("prefix", lora::load_prefix_tuning);
  check_written_again("prefix_projection", lora::load_prefix_tuning);
  check_written_again("prompt", lora::load_prompt_tuning);
}

TEST(PromptFiles, AreReadBitwiseAsTheyWereWritten) {
  const TempFolder folder;
  const auto prefix = small_prefix();
  prefix->save(folder / "prefix");
  const auto state = at::detail::getDefaultCPUGenerator().get_state();
  const auto again = lora::load_prefix_tuning(folder / "prefix");
  EXPECT_TRUE(at::equal(at::detail::getDefaultCPUGenerator().get_state(), state));
  EXPECT_TRUE(at::equal(again->embedding->weight, prefix->embedding->weight));
  EXPECT_TRUE(again->embedding->weight.requires_grad());
  EXPECT_EQ(again->config().num_attention_heads(), 4);
  auto prompt = small_prompt();
  prompt->save(folder / "prompt");
  EXPECT_TRUE(at::equal(lora::load_prompt_tuning(folder / "prompt")->embedding->weight, prompt->embedding->weight));
  prompt->to(at::kDouble);
  {
    const at::NoGradGuard no_grad;
    prompt->embedding->weight.div_(3);
  }
  prompt->save(folder / "prompt");
  EXPECT_TRUE(at::equal(lora::load_prompt_tuning(folder / "prompt")->embedding->weight, prompt->embedding->weight));
}

TEST(PromptFiles, HoldWhatAProjectionMakes) {
  const TempFolder folder;
  auto config = small_prefix()->config();
  const lora::PrefixTuning prefix(
      config.prefix_projection(true).encoder_hidden_size(6).init_weights(lora::PrefixInit::kNormal));
  prefix->save(folder.path().string());
  EXPECT_EQ(config_in(folder.path().string())["prefix_projection"], true);
  EXPECT_EQ(config_in(folder.path().string())["encoder_hidden_size"], 6);
  const auto again = lora::load_prefix_tuning(folder.path().string());
  EXPECT_TRUE(at::equal(again->embedding->weight, prefix->prompt_embeddings()));
  EXPECT_FALSE(again->config().prefix_projection());
  EXPECT_EQ(again->config().encoder_hidden_size(), 6);
}

TEST(PromptFiles, KeepPeftsNotes) {
  const TempFolder folder;
  auto config = small_prefix()->config();
  config.task_type("SEQ_CLS").base_model_name_or_path("gpt2").revision("main").auto_mapping(R"({"a": "b"})");
  const lora::PrefixTuning prefix(config.init_weights(lora::PrefixInit::kZero));
  prefix->save(folder.path().string());
  const auto json = config_in(folder.path().string());
  EXPECT_EQ(json["task_type"], "SEQ_CLS");
  EXPECT_EQ(json["base_model_name_or_path"], "gpt2");
  EXPECT_EQ(json["revision"], "main");
  EXPECT_EQ(json["auto_mapping"], nlohmann::json({{"a", "b"}}));
  EXPECT_EQ(json["init_weights"], "zero");
  const auto again = lora::load_prefix_tuning(folder.path().string());
  EXPECT_EQ(again->config().base_model_name_or_path(), "gpt2");
}

// How PEFT made the start is no matter: the tensor is there.
TEST(PromptFiles, AreReadWhateverTheirStart) {
  const TempFolder folder;
  std::filesystem::copy(kGolden + "prompt", folder.path());
  auto json = config_in(folder.path().string());
  json["prompt_tuning_init"] = "TEXT";
  json["prompt_tuning_init_text"] = "Classify: ";
  json["tokenizer_name_or_path"] = "gpt2";
  json["tokenizer_kwargs"] = {{"use_fast", true}};
  json["num_layers"] = nullptr;  // of no use to a prompt
  json["num_attention_heads"] = nullptr;
  write_bytes(folder / "adapter_config.json", json.dump());
  const auto prompt = lora::load_prompt_tuning(folder.path().string());
  prompt->save(folder.path().string());
  json = config_in(folder.path().string());
  EXPECT_EQ(json["prompt_tuning_init"], "RANDOM");
  EXPECT_TRUE(json["num_layers"].is_null());
  EXPECT_TRUE(json["tokenizer_kwargs"].is_null());
}

TEST(PromptFiles, AreReadFromPicklesAndInEveryPrecision) {
  const Directory directory;
  const auto stored =
      lora::load_safetensors(kGolden + "prefix/adapter_model.safetensors").at("prompt_embeddings").clone();
  for (const auto dtype : {at::kBFloat16, at::kHalf, at::kDouble}) {
    directory.save({{"prompt_embeddings", stored.to(dtype)}});
    const auto prefix = lora::load_prefix_tuning(directory.path());
    EXPECT_EQ(prefix->embedding->weight.scalar_type(), dtype == at::kDouble ? at::kDouble : at::kFloat);
    EXPECT_TRUE(at::equal(prefix->embedding->weight.to(dtype), stored.to(dtype)));
  }
  std::filesystem::remove(directory.folder / "adapter_model.safetensors");
  lora::save_torch_pickle({{"prompt_embeddings", stored}}, directory.folder / "adapter_model.bin");
  EXPECT_TRUE(at::equal(lora::load_prefix_tuning(directory.path())->embedding->weight, stored));
}

TEST(PromptFiles, ListEveryMismatch) {
  const Directory directory;
  directory.set("num_layers", "two");
  directory.set("num_attention_heads", 4.5);
  directory.set("prefix_projection", 1);
  directory.set("modules_to_save", {"score"});
  directory.set("layer_dropout", 0.1);
  directory.save({{"prompt_embeddings", at::full({5, 128}, std::nan(""))}, {"more", at::ones({2})}});
  EXPECT_THAT(directory.problems(),
              UnorderedElementsAre("found num_layers = \"two\", expected a whole number",
                                   "found num_attention_heads = 4.5, expected a whole number",
                                   "found prefix_projection = 1, expected true or false",
                                   HasSubstr("found modules_to_save = [\"score\"], expected a key that this version"),
                                   HasSubstr("found layer_dropout = 0.1, expected a key that this version"),
                                   "found the tensor more, expected prompt_embeddings alone",
                                   "found NaN or infinite values, expected finite ones in prompt_embeddings"));
}

TEST(PromptFiles, AreRefusedWithTensorsThatDoNotFit) {
  const Directory directory;
  directory.save({{"prompt_embeddings", at::zeros({5, 127})}});
  EXPECT_THAT(directory.problems(),
              ElementsAre("found prompt_embeddings of [5, 127], expected [5, 128] by adapter_config.json"));
  directory.save({{"prompt_embeddings", at::zeros({640})}});
  EXPECT_THAT(directory.problems(), ElementsAre(HasSubstr("found prompt_embeddings of [640]")));
  directory.save({{"prompt_embeddings", at::zeros({5, 128}, at::kLong)}});
  EXPECT_THAT(directory.problems(),
              ElementsAre("found the type Long, expected F64, F32, F16 or BF16 in prompt_embeddings"));
  directory.save({{"embedding.weight", at::zeros({5, 128})}});
  EXPECT_THAT(directory.problems(), ElementsAre("found the tensor embedding.weight, expected prompt_embeddings alone",
                                                "found no tensor prompt_embeddings, expected one"));
}

TEST(PromptFiles, AreRefusedWithSizesThatMakeNoSense) {
  const Directory directory;
  directory.set("num_transformer_submodules", 2);
  EXPECT_THAT(directory.problems(), ElementsAre(HasSubstr("found num_transformer_submodules = 2, expected 1")));
  directory.set("num_transformer_submodules", 1);
  directory.set("num_attention_heads", 5);
  EXPECT_THAT(directory.problems(),
              ElementsAre(HasSubstr("found token_dim = 32, expected a multiple of num_attention_heads = 5")));
  directory.set("num_attention_heads", 4);
  directory.set("token_dim", 4'000'000'000'000'000'000);
  EXPECT_THAT(directory.problems(), ElementsAre(HasSubstr("found token_dim = 4000000000000000000, expected 1 to")));
  directory.set("token_dim", nullptr);
  EXPECT_THAT(directory.problems(), ElementsAre(HasSubstr("found token_dim = 0, expected 1 to")));
}

TEST(PromptFiles, OfAnotherMethodAreRefusedByItsName) {
  EXPECT_THAT(harness::problems_of([] { lora::load_prompt_tuning(kGolden + "prefix"); }),
              ElementsAre("found peft_type = \"PREFIX_TUNING\", expected \"PROMPT_TUNING\""));
  EXPECT_THAT(harness::problems_of([] { lora::load_prefix_tuning(LORA_SOURCE_DIR "/tests/golden/gpt2/adapter"); }),
              ElementsAre("found peft_type = \"LORA\", expected \"PREFIX_TUNING\""));
  const Directory directory;
  directory.erase("peft_type");
  EXPECT_THAT(directory.problems(), ElementsAre("found no peft_type, expected \"PREFIX_TUNING\""));
}

TEST(PromptFiles, ThatAreMissingOrNoFilesAreRefused) {
  const Directory directory;
  write_bytes(directory.folder / "adapter_config.json", "[1]");
  EXPECT_THAT(directory.problems(), ElementsAre("found no JSON object, expected an adapter's configuration"));
  std::filesystem::remove(directory.folder / "adapter_config.json");
  EXPECT_THAT(harness::message_of([&] { lora::load_prefix_tuning(directory.path()); }),
              HasSubstr("adapter_config.json"));
  const Directory without_tensors;
  std::filesystem::remove(without_tensors.folder / "adapter_model.safetensors");
  EXPECT_THAT(harness::message_of([&] { lora::load_prefix_tuning(without_tensors.path()); }),
              HasSubstr("adapter_model.safetensors"));
}

// An interrupted save leaves a new tensor file beside an old configuration of the same shape.
TEST(PromptFiles, OfTwoSavesAreRefused) {
  const TempFolder folder;
  small_prefix()->save(folder / "one");
  auto config = small_prefix()->config();
  const lora::PrefixTuning other(config.num_attention_heads(8).num_layers(1).token_dim(64),
                                 harness::normal({5, 128}, 3, at::kFloat));
  other->save(folder / "other");
  std::filesystem::copy(folder / "one/adapter_config.json", folder / "other/adapter_config.json",
                        std::filesystem::copy_options::overwrite_existing);
  const auto problems = harness::problems_of([&] { lora::load_prefix_tuning(folder / "other"); });
  EXPECT_EQ(problems.size(), 3U);
  EXPECT_THAT(problems, Contains("found num_layers = 2 in adapter_config.json, expected 1 as when "
                                 "adapter_model.safetensors was saved: the two files do not belong together; save the "
                                 "virtual tokens again"));
}

TEST(PromptFiles, ThatAreDamagedAreNeverReadAsAnother) {
  const TempFolder folder;
  const auto directory = folder.path().string();
  const auto prefix = small_prefix();
  prefix->save(directory);
  const auto load = [&] {
    const auto found = lora::load_prefix_tuning(directory);
    EXPECT_TRUE(at::equal(found->embedding->weight, prefix->embedding->weight));
  };
  const auto tensors = harness::damage(folder / "adapter_model.safetensors", load);
  EXPECT_EQ(tensors.cut, 0);
  harness::damage(folder / "adapter_config.json", load);
}

TEST(PromptFiles, AreNotWrittenWithNaN) {
  const TempFolder folder;
  const auto prefix = small_prefix(), broken = small_prefix();
  prefix->save(folder.path().string());
  const auto tensors = read_bytes(folder / "adapter_model.safetensors");
  broken->embedding->weight.detach()[3][7] = std::nan("");
  EXPECT_THAT(harness::message_of<c10::ValueError>([&] { broken->save(folder.path().string()); }),
              HasSubstr("[lora::PrefixTuning::save] found NaN or infinite values, expected finite ones in "
                        "prompt_embeddings; nothing was written"));
  EXPECT_EQ(read_bytes(folder / "adapter_model.safetensors"), tensors);
  const auto prompt = small_prompt();
  prompt->embedding->weight.detach()[0][0] = HUGE_VALF;
  EXPECT_THAT(harness::message_of<c10::ValueError>([&] { prompt->save(folder / "prompt"); }),
              HasSubstr("[lora::PromptTuning::save]"));
  EXPECT_FALSE(std::filesystem::exists(folder / "prompt"));
}

}  // namespace
}  // namespace prompt_files_test
