// Adapters that Python PEFT wrote by its other methods (tests/golden/README.md, methods/): they load, give PEFT's
// outputs and gradients, merged or not, and are saved to the same keys and values.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/lora.h>
#include <torch/csrc/jit/serialization/import.h>

#include <algorithm>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <ostream>
#include <string>
#include <vector>

#include "examples/models/gpt2.h"
#include "examples/models/gpt2_checkpoint.h"
#include "harness/dense_oracle.h"
#include "harness/expect_same_bits.h"
#include "harness/stored_model.h"
#include "harness/temp_folder.h"
#include "harness/values.h"
#include "oracles/models.h"

namespace methods_golden_test {
namespace {

using harness::relative_error;
using harness::stored_model;
using harness::StoredModel;
using Tensors = std::map<std::string, at::Tensor>;

constexpr double kTolerance = 1e-5;
const std::string kGolden = LORA_SOURCE_DIR "/tests/golden/";

StoredModel make(const std::string& model) {
  if (model == "mlp") return stored_model<Mlp>(kGolden + "mlp/base.safetensors");
  if (model == "reader") return stored_model<Reader>(kGolden + "options/reader/base.safetensors");
  if (model == "convs") return stored_model<Convs>(kGolden + "options/convs/base.safetensors");
  return stored_model(load_gpt2(kGolden + "gpt2/model"));
}

/// x or ids, and g.
Tensors data_of(const std::string& model) {
  static const std::map<std::string, std::string> files{{"mlp", "mlp/data.safetensors"},
                                                        {"reader", "options/reader/data.safetensors"},
                                                        {"convs", "options/convs/data.safetensors"},
                                                        {"gpt2", "gpt2/expected.safetensors"}};
  return lora::load_safetensors(kGolden + files.at(model));
}

struct GoldenCase {
  std::string path;   // below tests/golden/methods
  std::string model;  // as make() knows it
};
void PrintTo(const GoldenCase& golden, std::ostream* out) { *out << golden.path; }

class MethodsGolden : public ::testing::TestWithParam<GoldenCase> {
 protected:
  MethodsGolden()
      : directory_(kGolden + "methods/" + GetParam().path),
        expected_(lora::load_safetensors(directory_ + "/expected.safetensors")),
        model_(make(GetParam().model)) {
    const auto data = data_of(GetParam().model);
    x_ = data.count("ids") != 0 ? data.at("ids") : data.at("x");
    g_ = data.at("g");
  }

  std::string directory_;
  Tensors expected_;
  StoredModel model_;
  at::Tensor x_, g_;
};

TEST_P(MethodsGolden, GivesPeftsOutputsAndGradients) {
  auto adapters = lora::load(*model_.module, directory_);
  adapters.set_trainable({"default"});
  auto input = x_.clone();
  if (input.is_floating_point()) input.requires_grad_(true);
  const auto y = model_.forward(input);
  EXPECT_LT(relative_error(y, expected_.at("y")), kTolerance);
  (y * g_).sum().backward();
  if (input.is_floating_point()) {
    EXPECT_LT(relative_error(input.grad(), expected_.at("dx")), kTolerance);
  }
  size_t compared = 0;
  for (const auto& [name, tensor] : adapters.named_parameters()) {
    // "up.lora_default.lora_A" is PEFT's "up.lora_A.weight"
    auto key = name;
    key.erase(key.find("lora_default."), 13);
    for (const auto* end : {".grad", ".weight.grad"}) {
      const auto found = expected_.find(key + end);
      if (found == expected_.end()) continue;
      // PEFT's embedding gives its magnitudes a gradient through rows of padding, which take none.
      const bool through_padding = key == "wte.lora_magnitude_vector";
      const auto expected = found->second.reshape(tensor.sizes());
      if (!through_padding) {
        EXPECT_LT(relative_error(tensor.grad(), expected), kTolerance) << name;
      }
      ++compared;
    }
  }
  EXPECT_EQ(compared, adapters.named_parameters().size());
}

TEST_P(MethodsGolden, MergesToPeftsWeights) {
  auto adapters = lora::load(*model_.module, directory_);
  adapters.merge();
  EXPECT_LT(relative_error(model_.forward(x_), expected_.at("y_merged")), kTolerance);
  adapters.merge_and_unload();
  const auto parameters = model_.module->named_parameters();
  size_t compared = 0;
  for (const auto& [name, values] : expected_) {
    for (const auto& [end, parameter] : {std::pair{".merged", ".weight"}, {".merged_bias", ".bias"}}) {
      const auto at = name.rfind(end);
      if (at == std::string::npos || at + std::string(end).size() != name.size()) continue;
      const auto merged = parameters[name.substr(0, at) + parameter];
      const bool transposed =
          GetParam().model == "gpt2";  // as transformers' Conv1D has it, the example's Linear does not
      EXPECT_LT(relative_error(transposed ? merged.t() : merged, values), kTolerance) << name;
      ++compared;
    }
  }
  EXPECT_GT(compared, 0U);
}

TEST_P(MethodsGolden, WorksInTorchScript) {
  if (GetParam().model != "mlp") return;  // the models that are kept as TorchScript too
  for (const std::string file : {"mlp_scripted.pt", "mlp_traced.pt"}) {
    auto script = torch::jit::load(kGolden + "script/" + file);
    auto adapters = lora::load(script, directory_);
    adapters.set_trainable({"default"});
    for (int run = 0; run < 3; ++run) {
      auto input = x_.clone().requires_grad_(true);
      const auto y = script.forward({input}).toTensor();
      EXPECT_LT(relative_error(y, expected_.at("y")), kTolerance) << file;
      (y * g_).sum().backward();
      EXPECT_LT(relative_error(input.grad(), expected_.at("dx")), kTolerance) << file;
    }
    adapters.merge();
    EXPECT_LT(relative_error(script.forward({x_}).toTensor(), expected_.at("y")), kTolerance) << file << " merged";
  }
}

TEST_P(MethodsGolden, IsSavedToTheSameTensors) {
  const TempFolder folder;
  const auto adapters = lora::load(*model_.module, directory_);
  adapters.save(folder / "again");
  harness::expect_same_bits(lora::load_safetensors(folder / "again/adapter_model.safetensors"),
                            lora::load_safetensors(directory_ + "/adapter_model.safetensors"));
  const auto read = [](const std::string& path) {
    return nlohmann::json::parse(read_bytes(path + "/adapter_config.json"));
  };
  const auto found = read(folder / "again"), expected = read(directory_);
  for (const auto& [key, value] : found.items()) {
    const bool is_list = key == "target_modules" || key == "feedforward_modules";
    if (!expected.contains(key)) {
      ADD_FAILURE() << key << " is none of PEFT's keys";
    } else if (is_list && value.is_array()) {
      EXPECT_THAT(value, ::testing::UnorderedElementsAreArray(expected[key])) << key;
    } else if (key != "inference_mode" && key != "base_model_name_or_path" && key != "auto_mapping") {
      EXPECT_EQ(value, expected[key]) << key;
    }
  }
}

TEST_P(MethodsGolden, IsMergedIntoACheckpoint) {
  std::map<std::string, at::Tensor> tensors;
  for (const auto& [name, tensor] : state_dict(*model_.module)) tensors[name] = tensor.detach().clone();
  const auto merged = lora::merge_checkpoint(tensors, directory_, lora::MergeCheckpointOptions().fan_in_fan_out(false));
  auto adapters = lora::load(*model_.module, directory_);
  adapters.merge_and_unload();
  for (const auto& [name, tensor] : state_dict(*model_.module)) {
    EXPECT_TRUE(at::equal(merged.tensors.at(name), tensor)) << name;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Peft, MethodsGolden,
    ::testing::Values(GoldenCase{"dora/mlp", "mlp"}, GoldenCase{"dora/mlp_rslora", "mlp"},
                      GoldenCase{"dora/gpt2", "gpt2"}, GoldenCase{"dora/embedding_conv1d", "reader"},
                      GoldenCase{"dora/conv2d_conv3d", "convs"}, GoldenCase{"vera/mlp", "mlp"},
                      GoldenCase{"vera/mlp_no_projection", "mlp"}, GoldenCase{"vera/gpt2", "gpt2"},
                      GoldenCase{"ia3/mlp", "mlp"}, GoldenCase{"ia3/gpt2", "gpt2"}, GoldenCase{"ia3/conv", "convs"},
                      GoldenCase{"ia3/conv_feedforward", "convs"}, GoldenCase{"miss/balance", "mlp"},
                      GoldenCase{"miss/bat", "mlp"}, GoldenCase{"miss/mini", "mlp"},
                      GoldenCase{"eva/plain/adapter", "mlp"}, GoldenCase{"eva/whiten/adapter", "mlp"},
                      GoldenCase{"eva/excluded/adapter", "mlp"}, GoldenCase{"starts/pissa/converted", "mlp"},
                      GoldenCase{"starts/olora/converted", "mlp"}),
    [](const auto& tested) {
      auto name = tested.param.path;
      std::replace(name.begin(), name.end(), '/', '_');
      return name;
    });

/// Starts that PEFT takes out of the base, as it saves them: here the base stays.
class StartsGolden : public ::testing::TestWithParam<std::string> {
 protected:
  std::string folder() const { return kGolden + "methods/starts/" + GetParam(); }
  lora::LoraConfig config() const {
    return lora::LoraConfig()
        .r(3)
        .lora_alpha(7)
        .target_modules({"up", "down"})
        .init_lora_weights(GetParam() == "pissa" ? lora::LoraInit::kPissa : lora::LoraInit::kOlora);
  }
};

TEST_P(StartsGolden, BeginWithPeftsFactorsOverTheBaseAsItIs) {
  const auto model = make("mlp");
  const auto before = harness::base_bytes(*model.module);
  const auto adapters = lora::inject(*model.module, config());
  EXPECT_EQ(harness::base_bytes(*model.module), before);
  const auto start = lora::load_safetensors(folder() + "/start.safetensors");
  Tensors found;
  for (const auto& [name, tensor] : adapters.named_tensors("default")) found[name] = tensor.detach();
  const auto parameters = model.module->named_parameters();
  for (const std::string module : {"up", "down"}) {
    const auto A = found.at(module + ".lora_default.lora_A"), B = found.at(module + ".lora_default.lora_B");
    const auto &theirs_A = start.at(module + ".lora_A"), &theirs_B = start.at(module + ".lora_B");
    // The sign of a pair of vectors is free.
    const auto sign = (A * theirs_A).sum(1).sign();
    EXPECT_LT(relative_error(sign.unsqueeze(1) * A, theirs_A), 1e-4) << module;
    EXPECT_LT(relative_error(B * sign, theirs_B), 1e-4) << module;
    const auto residual = parameters[module + ".weight"].detach() - 7.0 / 3 * at::mm(B, A);
    EXPECT_LT(relative_error(residual, start.at(module + ".residual")), 1e-5) << module;
  }
  const auto data = data_of("mlp");
  EXPECT_LT(relative_error(model.forward(data.at("x")), data.at("y_base")), 1e-6);
}

TEST_P(StartsGolden, LoadWhatPeftHasTakenTheStartOutFor) {
  const auto model = make("mlp");
  const auto expected = lora::load_safetensors(folder() + "/raw/expected.safetensors");
  const auto data = data_of("mlp");
  const auto adapters = lora::load(*model.module, folder() + "/raw");
  EXPECT_LT(relative_error(model.forward(data.at("x")), expected.at("y")), kTolerance);

  // What is saved of it is PEFT's converted form, which is read as the start that it is.
  const TempFolder out;
  adapters.save(out / "adapter");
  const auto config = nlohmann::json::parse(read_bytes(out / "adapter/adapter_config.json"));
  EXPECT_EQ(config["r"], 6);
  EXPECT_EQ(config["lora_alpha"], 14);
  EXPECT_EQ(config["init_lora_weights"], true);
  const auto stored = lora::load_safetensors(out / "adapter/adapter_model.safetensors");
  const auto converted = lora::load_safetensors(folder() + "/converted/adapter_model.safetensors");
  for (const auto& [key, tensor] : converted) EXPECT_EQ(stored.at(key).sizes(), tensor.sizes()) << key;
  for (const std::string module : {"up", "down"}) {
    const auto delta = [&](const Tensors& tensors) {
      const auto path = "base_model.model." + module;
      return at::mm(tensors.at(path + ".lora_B.weight"), tensors.at(path + ".lora_A.weight"));
    };
    EXPECT_LT(relative_error(delta(stored), delta(converted)), kTolerance) << module;
  }
  const auto again = make("mlp");
  auto continued = lora::load(*again.module, out / "adapter");
  EXPECT_TRUE(at::equal(again.forward(data.at("x")), model.forward(data.at("x"))));
  continued.set_trainable({"default"});
  int64_t trained = 0;
  for (const auto& tensor : continued.parameters()) trained += tensor.numel();
  EXPECT_EQ(trained, 3 * (12 + 20) + 3 * (20 + 8)) << "the start itself is not trained";
}

INSTANTIATE_TEST_SUITE_P(Peft, StartsGolden, ::testing::Values("pissa", "olora"),
                         [](const auto& tested) { return tested.param; });

struct EvaCase {
  std::string name;
  lora::LoraConfig config;
};
void PrintTo(const EvaCase& eva, std::ostream* out) { *out << eva.name; }

class EvaGolden : public ::testing::TestWithParam<EvaCase> {};

TEST_P(EvaGolden, FindsPeftsRanksAndDirections) {
  const auto folder = kGolden + "methods/eva/" + GetParam().name;
  const auto x = lora::load_safetensors(kGolden + "methods/eva/data.safetensors").at("x");
  const auto model = make("mlp");
  const auto before = harness::base_bytes(*model.module);
  const auto plain = model.forward(x[0]).detach();
  auto config = GetParam().config;
  config.lora_alpha(7).target_modules({"up", "down"}).init_lora_weights(lora::LoraInit::kEva);
  const auto data = [&](int64_t batch) {
    if (batch < x.size(0)) model.forward(x[batch]);
    return batch < x.size(0);
  };
  const auto adapters = lora::inject(*model.module, config, "default", lora::InjectOptions().data(data));
  EXPECT_EQ(harness::base_bytes(*model.module), before);
  EXPECT_LT(relative_error(model.forward(x[0]), plain), 1e-6) << "B is zero";
  const auto expected = nlohmann::json::parse(read_bytes(folder + "/ranks.json"));
  const auto start = lora::load_safetensors(folder + "/start.safetensors");
  size_t modules = 0;
  for (const auto& [name, tensor] : adapters.named_tensors("default")) {
    if (name.find("lora_A") == std::string::npos) continue;
    const auto module = name.substr(0, name.find('.'));
    const auto& A = start.at(module + ".lora_A");
    ASSERT_EQ(tensor.sizes(), A.sizes()) << name;
    EXPECT_LT(relative_error(tensor, A), 2e-3) << name;
    ++modules;
  }
  EXPECT_EQ(modules, expected["modules"].size()) << expected;
  const TempFolder out;
  adapters.save(out / "adapter");
  const auto found = nlohmann::json::parse(read_bytes(out / "adapter/adapter_config.json"));
  EXPECT_EQ(found["init_lora_weights"], "eva");
  for (const auto& [module, of] : expected["modules"].items()) {
    const auto rank =
        found["rank_pattern"].value("^" + module, found["rank_pattern"].value(module, found["r"].get<int>()));
    const auto alpha = found["alpha_pattern"].value(
        "^" + module, found["alpha_pattern"].value(module, found["lora_alpha"].get<double>()));
    EXPECT_EQ(rank, of["rank"]) << module << found;
    EXPECT_NEAR(alpha / rank, of["scaling"].get<double>(), 1e-12) << module;
  }
}

INSTANTIATE_TEST_SUITE_P(Peft, EvaGolden,
                         ::testing::Values(EvaCase{"plain", lora::LoraConfig().r(3)},
                                           EvaCase{"whiten",
                                                   lora::LoraConfig().r(3).eva(
                                                       lora::EvaOptions().whiten(true).adjust_scaling_factors(false))},
                                           EvaCase{"excluded", lora::LoraConfig().r(1)}),
                         [](const auto& tested) { return tested.param.name; });

TEST(VeraProjection, IsDrawnAsPeftDrawsIt) {
  const auto tensors = lora::load_safetensors(kGolden + "methods/vera/vera_projection.safetensors");
  size_t compared = 0;
  for (const int64_t key : {0, 3}) {
    for (const auto& [r, in, out] : {std::tuple<int64_t, int64_t, int64_t>{4, 20, 20}, {4, 32, 96}, {3, 5, 7}}) {
      const auto name = "key_" + std::to_string(key) + ".r_" + std::to_string(r) + "_in_" + std::to_string(in) +
                        "_out_" + std::to_string(out);
      const auto projection = lora::VeraProjection::draw(r, in, out, key);
      EXPECT_TRUE(at::equal(projection.A, tensors.at(name + ".A"))) << name;
      EXPECT_TRUE(at::equal(projection.B, tensors.at(name + ".B"))) << name;
      compared += 2;
    }
  }
  EXPECT_EQ(compared, tensors.size());
}

}  // namespace
}  // namespace methods_golden_test
