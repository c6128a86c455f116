// Adapters merged into checkpoints without a model of C++: bitwise what a model gives that loads and merges them.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/lora.h>

#include <filesystem>
#include <functional>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <ostream>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "examples/models/gpt2.h"
#include "examples/models/gpt2_checkpoint.h"
#include "harness/temp_folder.h"
#include "harness/values.h"
#include "oracles/models.h"

namespace merge_checkpoint_test {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using ::testing::Contains;
using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using ::testing::SizeIs;
using Tensors = std::map<std::string, at::Tensor>;

const std::string kGolden = LORA_SOURCE_DIR "/tests/golden/";

struct GoldenCase {
  std::string model;  // "reader"
  std::string base;   // file or folder below tests/golden
  std::string adapter;
};
void PrintTo(const GoldenCase& golden, std::ostream* out) { *out << golden.adapter; }

/// A model of C++ with the checkpoint's values, after `change`, under the checkpoint's names and layouts.
template <class Holder>
Tensors changed_model(const Tensors& base, const std::function<void(torch::nn::Module&)>& change) {
  Holder model;
  {
    const at::NoGradGuard no_grad;
    for (auto& [name, tensor] : state_dict(*model)) tensor.copy_(base.at(name));
  }
  change(*model);
  return state_dict(*model);
}

Tensors changed_gpt2(const std::string& folder, const std::function<void(torch::nn::Module&)>& change) {
  auto model = load_gpt2(folder);
  change(*model);
  const TempFolder saved;
  save_gpt2(model, saved.path(), 0);
  return lora::load_safetensors(saved / "model.safetensors");
}

Tensors changed(const GoldenCase& golden, const std::function<void(torch::nn::Module&)>& change) {
  if (golden.model == "gpt2") return changed_gpt2(kGolden + golden.base, change);
  const auto base = lora::load_checkpoint(kGolden + golden.base);
  if (golden.model == "mlp") return changed_model<Mlp>(base, change);
  if (golden.model == "mha") return changed_model<MhaBlock>(base, change);
  if (golden.model == "reader") return changed_model<Reader>(base, change);
  return changed_model<Convs>(base, change);
}

class MergedGolden : public ::testing::TestWithParam<GoldenCase> {};

TEST_P(MergedGolden, IsBitwiseWhatAModelMerges) {
  const auto base = lora::load_checkpoint(kGolden + GetParam().base);
  std::map<std::string, std::string> before;
  for (const auto& [name, tensor] : base) before[name] = harness::bytes_of(tensor);
  const auto merged = lora::merge_checkpoint(base, kGolden + GetParam().adapter);
  const auto expected = changed(GetParam(), [&](torch::nn::Module& model) {
    lora::load(model, kGolden + GetParam().adapter).merge_and_unload();
  });
  ASSERT_EQ(merged.tensors.size(), base.size());
  size_t different = 0;
  for (const auto& [name, tensor] : merged.tensors) {
    EXPECT_EQ(tensor.sizes(), base.at(name).sizes()) << name;
    EXPECT_EQ(tensor.scalar_type(), base.at(name).scalar_type()) << name;
    EXPECT_EQ(harness::bytes_of(tensor), harness::bytes_of(expected.at(name))) << name;
    const bool listed = std::count(merged.changed.begin(), merged.changed.end(), name) != 0;
    EXPECT_EQ(tensor.is_same(base.at(name)), !listed) << name;
    different += harness::bytes_of(tensor) != before.at(name) ? 1 : 0;
  }
  EXPECT_GT(different, 0U);
  EXPECT_THAT(merged.added, IsEmpty());
  for (const auto& [name, tensor] : base) EXPECT_EQ(harness::bytes_of(tensor), before.at(name)) << name;
}

std::vector<GoldenCase> golden_cases() {
  std::vector<GoldenCase> cases{{"mha", "mha/base.safetensors", "mha/adapter"}, {"gpt2", "gpt2/model", "gpt2/adapter"}};
  for (const auto* name : {"plain", "rslora", "patterns", "one_target", "two_adapters", "two_adapters/other"}) {
    cases.push_back({"mlp", "mlp/base.safetensors", std::string("mlp/") + name});
  }
  for (const auto* name : {"embedding", "conv", "bias_all", "bias_lora_only", "lora_bias", "modules_to_save",
                           "bias_and_modules", "task_head", "tokens", "layers", "one_layer", "everything", "pickle"}) {
    cases.push_back({"reader", "options/reader/base.safetensors", std::string("options/reader/") + name});
  }
  cases.push_back({"convs", "options/convs/base.safetensors", "options/convs/conv2d_conv3d"});
  for (const auto* name : {"tokens", "embedding"}) {
    cases.push_back({"gpt2", "options/gpt2/base", std::string("options/gpt2/") + name});
  }
  return cases;
}

INSTANTIATE_TEST_SUITE_P(Golden, MergedGolden, ::testing::ValuesIn(golden_cases()), [](const auto& tested) {
  auto name = tested.param.adapter;
  std::replace(name.begin(), name.end(), '/', '_');
  return name;
});

TEST(MergedGolden, EveryAdapterOfTheOptionsIsTested) {
  std::set<std::string> tested, found;
  for (const auto& golden : golden_cases()) tested.insert(golden.adapter);
  for (const auto& entry : std::filesystem::recursive_directory_iterator(kGolden)) {
    if (entry.path().filename() != "adapter_config.json") continue;
    const auto folder = std::filesystem::relative(entry.path().parent_path(), kGolden).string();
    // Those of other methods are tested beside them.
    if (folder.rfind("configs/", 0) != 0 && folder.rfind("methods/", 0) != 0) found.insert(folder);
  }
  EXPECT_EQ(tested, found);
}

/// The Mlp's tensors and an adapter on them that each test damages or fits to its question.
class MergeCheckpoint : public ::testing::Test {
 protected:
  MergeCheckpoint() {
    const auto golden = kGolden + "mlp/patterns/";
    file_ = lora::load_safetensors(golden + "adapter_model.safetensors");
    config_ = json::parse(read_bytes(golden + "adapter_config.json"));
  }

  std::string directory() {
    write_bytes(folder_ / "adapter_config.json", config_.dump());
    lora::save_safetensors(file_, folder_ / "adapter_model.safetensors");
    return folder_.path();
  }

  std::vector<std::string> problems(const lora::MergeCheckpointOptions& options = {}) {
    try {
      lora::check_checkpoint(base_, directory(), options);
      return {};
    } catch (const lora::FormatError& error) {
      EXPECT_EQ(error.path(), folder_.path());
      EXPECT_THROW(lora::merge_checkpoint(base_, directory(), options), lora::FormatError);
      return error.problems();
    }
  }
  std::vector<std::string> notes() { return lora::check_checkpoint(base_, directory()).notes; }

  static std::string key(const std::string& name) { return "base_model.model." + name; }
  void rename(const std::string& from, const std::string& to) {
    for (const auto* end : {".lora_A.weight", ".lora_B.weight"}) {
      auto entry = file_.extract(key(from + end));
      entry.key() = key(to + end);
      file_.insert(std::move(entry));
    }
  }

  TempFolder folder_;
  Tensors base_ = lora::load_safetensors(kGolden + "mlp/base.safetensors"), file_;
  json config_;
};

TEST_F(MergeCheckpoint, SaysWhatItWouldDo) {
  const auto report = lora::check_checkpoint(base_, directory());
  ASSERT_THAT(report.entries, SizeIs(1));
  ASSERT_THAT(report.entries[0].modules, SizeIs(2));
  EXPECT_EQ(report.entries[0].modules[0].path, "down");
  EXPECT_EQ(report.entries[0].modules[0].parameters, 5 * (20 + 8));
  EXPECT_THAT(report.notes, IsEmpty());
}

TEST_F(MergeCheckpoint, NamesEveryProblemAtOnce) {
  rename("up", "side.up");
  file_[key("down.lora_A.weight")] = at::ones({4, 20});
  file_[key("down.lora_B.weight")].index_put_({0, 0}, std::numeric_limits<float>::quiet_NaN());
  file_[key("other.lora_A.weight")] = at::ones({3, 5});
  file_[key("up.bias")] = at::ones({20});
  EXPECT_THAT(
      problems(),
      ::testing::UnorderedElementsAre(
          HasSubstr("found factors for side.up, expected its weight, a matrix, in the checkpoint; nearest: "),
          HasSubstr("found factors for other"),
          AllOf(HasSubstr("found [4, 20], expected [5, 20]"), HasSubstr("down.lora_A.weight")),
          HasSubstr("found NaN or infinite values, expected finite ones in base_model.model.down.lora_B.weight"),
          HasSubstr("found the tensor base_model.model.up.bias, expected none")));
}

TEST_F(MergeCheckpoint, NamesTheHalfOfAPairThatIsMissing) {
  file_.erase(key("up.lora_B.weight"));
  EXPECT_THAT(problems(), ElementsAre(HasSubstr("found no tensor base_model.model.up.lora_B.weight")));
}

TEST_F(MergeCheckpoint, ABaseOfAnotherModelHasNoPlaceForAnyFactor) {
  for (auto name : {"up", "down"}) {
    auto entry = base_.extract(name + std::string(".weight"));
    entry.key() = "model." + entry.key();
    base_.insert(std::move(entry));
  }
  EXPECT_THAT(problems(), ElementsAre(AllOf(HasSubstr("factors for down"), HasSubstr("nearest: down")),
                                      AllOf(HasSubstr("factors for up"), HasSubstr("nearest: up"))));
  const auto options =
      lora::MergeCheckpointOptions().load(lora::LoadOptions().key_mapping({{"^(up|down)\\.", "model.\\1."}}));
  EXPECT_THAT(problems(options), IsEmpty());
  EXPECT_THAT(lora::merge_checkpoint(base_, directory(), options).changed,
              ElementsAre("model.down.weight", "model.up.weight"));
}

TEST_F(MergeCheckpoint, ATargetWithoutFactorsIsLeftAloneAndNoted) {
  config_["target_modules"] = {"up", "down"};
  base_["old.up.weight"] = at::ones({20, 12});
  base_["old.up.bias"] = at::ones({20});
  EXPECT_THAT(notes(), ElementsAre("old.up is a target without factors in the file: left as it is"));
  EXPECT_THAT(lora::merge_checkpoint(base_, directory()).changed, ElementsAre("down.weight", "up.weight"));
  config_["exclude_modules"] = "old.*";
  EXPECT_THAT(notes(), IsEmpty());
}

TEST_F(MergeCheckpoint, AllLinearIsWhatTheFileHasFactorsFor) {
  config_["target_modules"] = "all-linear";
  base_["other.weight"] = at::ones({5, 5});
  EXPECT_THAT(lora::merge_checkpoint(base_, directory()).changed, ElementsAre("down.weight", "up.weight"));
}

TEST_F(MergeCheckpoint, ShapesSayWhetherAMatrixIsTransposedAndFanInFanOutWhetherASquareOneIs) {
  const auto square = harness::normal({12, 12}, 3, at::kFloat);
  const auto A = harness::normal({3, 12}, 4, at::kFloat), B = harness::normal({12, 3}, 5, at::kFloat);
  base_["mix.weight"] = square;
  file_[key("mix.lora_A.weight")] = A;
  file_[key("mix.lora_B.weight")] = B;
  config_["target_modules"] = {"up", "down", "mix"};
  const auto update = at::matmul(B, A) * (7.0 / 3);
  const auto change = [&](const lora::MergeCheckpointOptions& options = {}) {
    return lora::merge_checkpoint(base_, directory(), options).tensors.at("mix.weight") - square;
  };
  EXPECT_TRUE(at::allclose(change(), update, 1e-4, 1e-5));

  config_["fan_in_fan_out"] = true;
  EXPECT_THAT(problems(), ElementsAre(AllOf(HasSubstr("fan_in_fan_out = true and up stored as [out, in]"),
                                            HasSubstr("mix, can be either"))));
  EXPECT_TRUE(at::allclose(change(lora::MergeCheckpointOptions().fan_in_fan_out(false)), update, 1e-4, 1e-5));
  EXPECT_TRUE(at::allclose(change(lora::MergeCheckpointOptions().fan_in_fan_out(true)), update.t(), 1e-4, 1e-5));

  const auto rows = lora::merge_checkpoint(base_, directory(), lora::MergeCheckpointOptions().fan_in_fan_out(true));
  for (const auto* name : {"up.weight", "down.weight"}) base_[name] = base_[name].t().contiguous();
  EXPECT_THAT(notes(), ElementsAre("mix read as [in, out]: square, and fan_in_fan_out is set"));
  const auto columns = lora::merge_checkpoint(base_, directory());
  for (const auto* name : {"up.weight", "down.weight"}) {
    EXPECT_TRUE(at::equal(columns.tensors.at(name), rows.tensors.at(name).t())) << name;
  }
  config_["fan_in_fan_out"] = false;
  EXPECT_THAT(problems(), ElementsAre(HasSubstr("fan_in_fan_out = false and up stored as [in, out]")));
}

TEST_F(MergeCheckpoint, AHeadThatTheCheckpointLacksIsAdded) {
  config_["modules_to_save"] = {"score"};
  config_["target_modules"] = {"up", "down"};
  file_[key("score.out.weight")] = at::ones({2, 8}, at::kHalf);
  file_[key("score.out.bias")] = at::ones({2});
  EXPECT_THAT(notes(), ElementsAre("score.out.bias is not in the checkpoint: the adapter's copy is added",
                                   "score.out.weight is not in the checkpoint: the adapter's copy is added"));
  const auto merged = lora::merge_checkpoint(base_, directory());
  EXPECT_THAT(merged.added, ElementsAre("score.out.bias", "score.out.weight"));
  EXPECT_THAT(merged.changed, ElementsAre("down.weight", "up.weight"));
  EXPECT_EQ(merged.tensors.at("score.out.weight").scalar_type(), at::kHalf);
  EXPECT_TRUE(at::equal(merged.tensors.at("score.out.bias"), at::ones({2})));

  file_.erase(key("score.out.weight"));  // a bias alone is of a layer that should be there
  EXPECT_THAT(problems(), ElementsAre(HasSubstr("found the tensor base_model.model.score.out.bias, expected none")));
}

TEST_F(MergeCheckpoint, AnEmbeddingThatIsSavedWholeReplacesTheBasesAndAMatrixOfALayerDoesNot) {
  config_["target_modules"] = {"up", "down"};
  base_["wte.weight"] = at::ones({4, 3});
  file_[key("wte.weight")] = at::ones({4, 3});
  EXPECT_THAT(notes(), ElementsAre("wte is in the file as it is in the base: passed over"));
  file_[key("wte.weight")] = at::full({4, 3}, 2.0F);
  const auto merged = lora::merge_checkpoint(base_, directory());
  EXPECT_THAT(merged.changed, ElementsAre("down.weight", "up.weight", "wte.weight"));
  EXPECT_TRUE(at::equal(merged.tensors.at("wte.weight"), at::full({4, 3}, 2.0F)));
  base_["wte.bias"] = at::ones({4});
  EXPECT_THAT(problems(), ElementsAre(HasSubstr("found the tensor base_model.model.wte.weight, expected none")));
}

TEST_F(MergeCheckpoint, ABiasOfBNeedsABiasInTheCheckpoint) {
  config_["lora_bias"] = true;
  file_[key("up.lora_B.bias")] = at::ones({20});
  file_[key("down.lora_B.bias")] = at::ones({8});
  EXPECT_NO_THROW(lora::check_checkpoint(base_, directory())) << "a model without that bias can compute it";
  try {
    lora::merge_checkpoint(base_, directory());
    FAIL() << "it was merged";
  } catch (const lora::FormatError& error) {
    EXPECT_THAT(error.problems(), ElementsAre(HasSubstr("found a bias of lora_B at down, expected down.bias")));
  }
  base_["down.bias"] = at::zeros({8});
  const auto merged = lora::merge_checkpoint(base_, directory());
  EXPECT_TRUE(at::equal(merged.tensors.at("down.bias"), at::full({8}, 2.0 / 5)));
}

TEST_F(MergeCheckpoint, HalfPrecisionIsRoundedOnce) {
  for (auto& [name, tensor] : base_) tensor = tensor.to(at::kBFloat16);
  const auto merged = lora::merge_checkpoint(base_, directory());
  Mlp model;
  model->to(at::kBFloat16);
  const at::NoGradGuard no_grad;
  for (auto& [name, tensor] : state_dict(*model)) tensor.copy_(base_.at(name));
  lora::load(*model, directory()).merge_and_unload();
  for (auto& [name, tensor] : state_dict(*model)) {
    EXPECT_EQ(harness::bytes_of(merged.tensors.at(name)), harness::bytes_of(tensor)) << name;
  }
}

TEST_F(MergeCheckpoint, NaNInTheResultIsAnError) {
  base_["up.weight"] = base_["up.weight"].clone();
  base_["up.weight"][3][3] = std::numeric_limits<float>::infinity();
  EXPECT_NO_THROW(lora::check_checkpoint(base_, directory()));
  EXPECT_THROW(lora::merge_checkpoint(base_, directory()), c10::ValueError);
}

TEST_F(MergeCheckpoint, AFileOfLoralibIsMergedByTheGivenConfiguration) {
  const TempFolder other;
  Tensors loralib;
  for (const auto& [name, tensor] : file_) {
    auto path = name.substr(key("").size());
    loralib[path.substr(0, path.rfind(".weight"))] = tensor;
  }
  lora::save_torch_pickle(loralib, other / "lora.pt");
  const auto config = lora::LoraConfig()
                          .r(3)
                          .lora_alpha(7)
                          .target_modules({"up", "down"})
                          .rank_pattern({{"down", 5}})
                          .alpha_pattern({{"^up", 11}, {"down", 2}});
  const auto found = lora::merge_checkpoint(base_, other / "lora.pt", config);
  const auto expected = lora::merge_checkpoint(base_, directory());
  for (const auto& [name, tensor] : expected.tensors) EXPECT_TRUE(at::equal(found.tensors.at(name), tensor)) << name;
  EXPECT_NO_THROW(lora::check_checkpoint(base_, other / "lora.pt", config));
}

/// GPT-2's embedding, with the head beside it as files of Python have it: on the same memory, or as an equal tensor.
class TiedHead : public ::testing::TestWithParam<bool> {
 protected:
  TiedHead() {
    const auto& table = base_.at("transformer.wte.weight");
    base_["lm_head.weight"] = GetParam() ? table : table.clone();
  }
  lora::MergedCheckpoint merged(const std::string& adapter) const {
    return lora::merge_checkpoint(base_, kGolden + "options/gpt2/" + adapter);
  }
  Tensors base_ = lora::load_checkpoint(kGolden + "options/gpt2/base");
};

TEST_P(TiedHead, GetsTheRowsOfTheTokensToo) {
  const auto found = merged("tokens");
  EXPECT_TRUE(at::equal(found.tensors.at("lm_head.weight"), found.tensors.at("transformer.wte.weight")));
  EXPECT_THAT(found.changed, AllOf(Contains("lm_head.weight"), Contains("transformer.wte.weight")));
  EXPECT_THAT(found.report.notes, Contains(HasSubstr("its rows of the tokens are trained too")));
}

TEST_P(TiedHead, StaysAsItIsUnderAnUpdateOfTheEmbedding) {
  const auto found = merged("embedding");
  EXPECT_TRUE(at::equal(found.tensors.at("lm_head.weight"), base_.at("lm_head.weight")));
  EXPECT_FALSE(at::equal(found.tensors.at("transformer.wte.weight"), base_.at("lm_head.weight")));
  EXPECT_THAT(found.report.notes, Contains(HasSubstr("a head that a model ties to it changes with it")));
}

INSTANTIATE_TEST_SUITE_P(Files, TiedHead, ::testing::Bool(), [](const auto& tested) {
  return std::string(tested.param ? "OnTheSameMemory" : "AsAnEqualTensor");
});

}  // namespace
}  // namespace merge_checkpoint_test
