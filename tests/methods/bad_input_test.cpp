// What the methods refuse: one clear error, and the model is as before.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/lora.h>

#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "harness/message_of.h"
#include "harness/problems_of.h"
#include "harness/temp_folder.h"
#include "harness/values.h"
#include "oracles/models.h"

namespace bad_input_test {
namespace {

using lora::LoraConfig;
using lora::LoraInit;
using ::testing::AllOf;
using ::testing::Contains;
using ::testing::HasSubstr;

class BadInput : public ::testing::Test {
 protected:
  /// The error of an injection; the model has to be as before.
  template <class Config>
  std::string refusal(Config config, const lora::InjectOptions& options = {}) {
    const auto before = harness::parameter_state(*model_);
    const auto x = harness::normal({3, 12}, 3, at::kFloat);
    const auto y = model_->forward(x).detach();
    const auto message = harness::message_of([&] {
      lora::inject(*model_, config.target_modules({"up", "down"}), "default", options);
    });
    EXPECT_EQ(harness::parameter_state(*model_), before);
    EXPECT_TRUE(at::equal(model_->forward(x), y));
    EXPECT_THROW(lora::adapters_of(*model_), lora::StateError);
    return message;
  }

  Mlp model_;  // up [20, 12], down [8, 20]
};

TEST_F(BadInput, OfRanksThatTheStartHasNotVectorsFor) {
  const auto pissa = LoraConfig().r(9).init_lora_weights(LoraInit::kPissa);
  EXPECT_THAT(refusal(pissa), AllOf(HasSubstr("found r = 9"), HasSubstr("[8, 20]"),
                                    HasSubstr("expected no more than 8"), HasSubstr("at down")));
  EXPECT_THAT(refusal(LoraConfig().r(13).init_lora_weights(LoraInit::kOlora)),
              AllOf(HasSubstr("at up"), HasSubstr("at down")));
  EXPECT_THAT(refusal(LoraConfig().r(3).init_lora_weights(LoraInit::kOrthogonal)),
              HasSubstr("expected an even number"));
  EXPECT_THAT(refusal(lora::MissConfig().r(13)), HasSubstr("found r = 13 and 12 inputs"));
  EXPECT_THAT(refusal(lora::MissConfig().r(3).mini_r(3).init_weights(lora::MissForm::kMini)),
              HasSubstr("found mini_r = 3 and 20 outputs"));
  EXPECT_THAT(refusal(lora::MissConfig().r(3).init_weights(lora::MissForm::kBat)), HasSubstr("a divisor of both"));
}

TEST_F(BadInput, OfFilesWithVirtualTokens) {
  const TempFolder folder;
  lora::PromptTuning prompt(lora::PromptTuningConfig().num_virtual_tokens(2).token_dim(12));
  prompt->save(folder / "prompt");
  EXPECT_THAT(harness::problems_of([&] { lora::load(*model_, folder / "prompt"); }),
              Contains(AllOf(HasSubstr("found peft_type = \"PROMPT_TUNING\""), HasSubstr("lora::load_prompt_tuning"))));
}

TEST_F(BadInput, OfConfigurationsThatContradictThemselves) {
  EXPECT_THAT(refusal(LoraConfig().use_dora(true).lora_bias(true)), HasSubstr("lora_bias with use_dora"));
  EXPECT_THAT(refusal(LoraConfig().use_dora(true).init_lora_weights(LoraInit::kPissa)),
              HasSubstr("use_dora with a start from the base"));
  EXPECT_THAT(refusal(LoraConfig().pissa_niter(-1)), HasSubstr("pissa_niter = -1"));
  EXPECT_THAT(refusal(LoraConfig().eva(lora::EvaOptions().rho(0.5))), HasSubstr("rho = 0.5"));
  EXPECT_THAT(refusal(lora::VeraConfig().d_initial(0)), HasSubstr("d_initial = 0"));
  EXPECT_THAT(refusal(lora::VeraConfig().r(0)), HasSubstr("r = 0"));
  EXPECT_THAT(refusal(lora::MoraConfig().mora_type(3)), HasSubstr("mora_type = 3"));
  EXPECT_THAT(refusal(lora::IA3Config().feedforward_modules({"dwon"})),
              HasSubstr("no adapted module for feedforward_modules \"dwon\""));
}

TEST_F(BadInput, OfAStartWithoutTheDataThatItNeeds) {
  const auto eva = LoraConfig().r(2).init_lora_weights(LoraInit::kEva);
  EXPECT_THAT(refusal(eva), HasSubstr("the start EVA without data"));
  const auto with = [](lora::InjectOptions::RunBatch run) { return lora::InjectOptions().data(std::move(run)); };
  EXPECT_THAT(refusal(eva, with([](int64_t) { return false; })), HasSubstr("found no batch"));
  EXPECT_THAT(refusal(eva, with([](int64_t) { return true; })), HasSubstr("found no input of up"));
  const auto fails = [](int64_t) -> bool { throw std::runtime_error("the data's own error"); };
  EXPECT_THAT(refusal(eva, with(fails)), HasSubstr("the data's own error"));
  EXPECT_THAT(harness::message_of([&] { lora::LoRALinear<>(model_->up, eva); }), HasSubstr("without data"));
  auto impatient = eva;
  impatient.eva().max_batches(2);
  const auto noise = [&](int64_t) { return model_->forward(at::randn({16, 12})).defined(); };
  EXPECT_THAT(refusal(impatient, with(noise)), HasSubstr("still change after 2 batches"));
  const auto few_rows = [&](int64_t) { return model_->forward(at::randn({1, 12})).defined(); };
  EXPECT_THAT(refusal(impatient, with(few_rows)), HasSubstr("batches of more rows"));
}

TEST_F(BadInput, OfOptionsThatPeftHasNotGoesIntoOurOwnConfiguration) {
  const TempFolder folder;
  Mlp again;
  auto adapters = lora::inject(*model_, lora::IA3Config().target_modules({"up"}).bias(lora::BiasCopies::kAdaptedOnly));
  harness::fill(adapters);
  adapters.save(folder / "ia3");
  EXPECT_EQ(lora::load(*again, folder / "ia3").named_tensors("default").size(), 2U) << "the scale and the bias";
}

TEST_F(BadInput, OfVerasFiles) {
  const TempFolder folder;
  {
    auto adapters = lora::inject(*model_, lora::VeraConfig().r(4).target_modules({"up", "down"}));
    harness::fill(adapters);
    adapters.save(folder / "good");
    adapters.unload();
  }
  const auto tensors = lora::load_safetensors(folder / "good/adapter_model.safetensors");
  const auto problems = [&](const std::function<void(std::map<std::string, at::Tensor>&, nlohmann::json&)>& damage) {
    auto damaged = tensors;
    auto config = nlohmann::json::parse(read_bytes(folder / "good/adapter_config.json"));
    damage(damaged, config);
    std::filesystem::create_directories(folder / "bad");
    lora::save_safetensors(damaged, folder / "bad/adapter_model.safetensors");
    write_bytes(folder / "bad/adapter_config.json", config.dump());
    return harness::problems_of([&] { lora::load(*model_, folder / "bad"); });
  };
  EXPECT_THAT(problems([](auto& files, auto&) {
                files["base_model.vera_A"] = at::zeros({4, 12});
              }),
              Contains(HasSubstr("found [4, 12], expected [4, 20] for base_model.vera_A")));
  EXPECT_THAT(problems([](auto&, auto& config) { config["r"] = 5; }), ::testing::SizeIs(4)) << "A, B and two d";
  EXPECT_THAT(problems([](auto& files, auto&) { files.erase("base_model.model.up.vera_lambda_b"); }),
              Contains(HasSubstr("found no tensor base_model.model.up.vera_lambda_b")));
  EXPECT_THAT(problems([](auto&, auto& config) { config["target_modules"] = {"up"}; }),
              Contains(HasSubstr("target_modules do not choose the module")));
  EXPECT_THAT(problems([](auto& files, auto&) { files["base_model.model.up.vera_lambda_b"][3] = NAN; }),
              Contains(HasSubstr("NaN")));
  EXPECT_THAT(problems([](auto&, auto& config) { config["vera_tomorrow"] = 1; }), Contains(HasSubstr("vera_tomorrow")));
}

TEST_F(BadInput, OfFilesOfAnUnknownMethod) {
  const TempFolder folder;
  std::filesystem::create_directories(folder / "x");
  write_bytes(folder / "x/adapter_config.json", R"({"peft_type": "OFT", "target_modules": ["up"]})");
  lora::save_safetensors({{"base_model.model.up.oft_R.weight", at::zeros({2})}},
                         folder / "x/adapter_model.safetensors");
  EXPECT_THAT(harness::problems_of([&] { lora::load(*model_, folder / "x"); }),
              ::testing::ElementsAre(AllOf(HasSubstr("peft_type = \"OFT\""), HasSubstr("LORA"), HasSubstr("VERA"))));
}

}  // namespace
}  // namespace bad_input_test
