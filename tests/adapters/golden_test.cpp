// Adapters that Python PEFT wrote, in C++ and in TorchScript models, against the values that Python computed
// (tests/golden/README.md); and the files that the library writes of them.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/adapters.h>
#include <lora/io/safetensors.h>
#include <torch/csrc/jit/serialization/import.h>

#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "examples/models/gpt2.h"
#include "harness/dense_oracle.h"
#include "harness/temp_folder.h"
#include "oracles/models.h"

namespace golden_test {
namespace {

using harness::relative_error;
using Tensors = std::map<std::string, at::Tensor>;

constexpr double kTolerance = 1e-5;
const std::string kGolden = LORA_SOURCE_DIR "/tests/golden/";

Tensors golden(const std::string& file) { return lora::load_safetensors(kGolden + file); }

/// A model of either kind with what the tests do to it.
struct Model {
  std::function<at::Tensor(const at::Tensor&)> forward;
  std::function<lora::Adapters(const std::string& directory, const std::string& name)> load;
  std::function<at::Tensor(const std::string& module, const std::string& parameter)> weight;
};

template <class Holder>
Model cpp_model(Holder model, std::function<at::Tensor(const at::Tensor&)> forward) {
  return {std::move(forward),
          [model](const std::string& directory, const std::string& name) mutable {
            return lora::load(*model, directory, name);
          },
          [model](const std::string& module, const std::string& parameter) {
            return model->named_parameters()[module.empty() ? parameter : module + "." + parameter].detach();
          }};
}

template <class Holder>
void copy_in(Holder& model, const std::string& file) {
  const at::NoGradGuard no_grad;
  const auto tensors = golden(file);
  for (auto& named : model->named_parameters()) named.value().copy_(tensors.at(named.key()));
}

Model script_model(const std::string& file) {
  const auto model = std::make_shared<torch::jit::Module>(torch::jit::load(kGolden + "script/" + file));
  model->eval();
  return {
      [model](const at::Tensor& x) { return model->forward({x}).toTensor(); },
      [model](const std::string& directory, const std::string& name) { return lora::load(*model, directory, name); },
      [model](const std::string& module, const std::string& parameter) {
        auto owner = *model;
        for (size_t begin = 0; begin < module.size();) {
          const auto dot = std::min(module.find('.', begin), module.size());
          owner = owner.attr(module.substr(begin, dot - begin)).toModule();
          begin = dot + 1;
        }
        return owner.attr(parameter).toTensor().detach();
      }};
}

Model mlp() {
  Mlp model;
  copy_in(model, "mlp/base.safetensors");
  return cpp_model(model, [model](const at::Tensor& x) mutable { return model->forward(x); });
}

Model mha() {
  MhaBlock model;
  copy_in(model, "mha/base.safetensors");
  return cpp_model(model, [model](const at::Tensor& x) mutable { return model->forward(x); });
}

/// Runs it often enough for TorchScript's executor to have optimised.
void warm_up(const Model& model, const at::Tensor& x) {
  for (int i = 0; i < 4; ++i) {
    const auto y = model.forward(x);
    if (y.requires_grad()) y.sum().backward();
  }
}

/// The trainable tensors by PEFT's name of their module, "up.lora_A"; the library's is "up.lora_default.lora_A".
Tensors by_module(const lora::Adapters& adapters) {
  Tensors tensors;
  for (auto [name, tensor] : adapters.named_tensors("default")) {
    const auto node = name.find("lora_default.");
    auto path = name.substr(0, node) + name.substr(node + 13);
    tensors.emplace(path, tensor);
  }
  return tensors;
}

void check_gradients(const Model& model, const lora::Adapters& adapters, const Tensors& expected, const at::Tensor& x,
                     const at::Tensor& g) {
  auto tensors = by_module(adapters);
  auto input = x.detach().clone();
  if (x.is_floating_point()) input.requires_grad_(true);
  for (int run = 0; run < 3; ++run) {
    for (auto& [name, tensor] : tensors) tensor.mutable_grad() = at::Tensor();
    input.mutable_grad() = at::Tensor();
    (model.forward(input) * g).sum().backward();
    size_t compared = 0;
    for (const auto& [name, gradient] : expected) {
      if (name.size() < 5 || name.substr(name.size() - 5) != ".grad") continue;
      const auto& tensor = tensors.at(name.substr(0, name.size() - 5));
      ASSERT_TRUE(tensor.grad().defined()) << name;
      EXPECT_LT(relative_error(tensor.grad(), gradient), kTolerance) << name << ", run " << run;
      ++compared;
    }
    EXPECT_EQ(compared, tensors.size());
    if (expected.count("dx") != 0) {
      EXPECT_LT(relative_error(input.grad(), expected.at("dx")), kTolerance);
    }
  }
}

/// What the library writes of an adapter that it read: the same keys and bytes, and a configuration of equal meaning.
void check_saved_again(const lora::Adapters& adapters, const std::string& directory) {
  const TempFolder folder;
  adapters.save(folder.path(), adapters.names().front());
  const auto before = lora::load_safetensors(directory + "/adapter_model.safetensors");
  const auto after = lora::load_safetensors(folder / "adapter_model.safetensors");
  ASSERT_EQ(after.size(), before.size());
  for (const auto& [key, tensor] : before) {
    ASSERT_EQ(after.count(key), 1U) << key;
    EXPECT_TRUE(at::equal(after.at(key), tensor)) << key;
  }
  const auto old_config = nlohmann::json::parse(read_bytes(directory + "/adapter_config.json"));
  const auto config = nlohmann::json::parse(read_bytes(folder / "adapter_config.json"));
  for (const auto* key :
       {"peft_type", "lora_dropout", "use_rslora", "bias", "modules_to_save", "inference_mode", "init_lora_weights"}) {
    EXPECT_EQ(config.at(key), old_config.at(key)) << key;
  }
  if (!old_config.at("alpha_pattern").empty()) return;  // the same ranks and alphas may be said in another way
  for (const auto* key : {"r", "lora_alpha", "rank_pattern", "alpha_pattern"}) {
    EXPECT_EQ(config.at(key), old_config.at(key)) << key;
  }
}

/// The same adapter out of a directory that the library wrote, in a new model: the same output, bit for bit.
void check_read_again(const Model& fresh, const lora::Adapters& adapters, const at::Tensor& x, const at::Tensor& y) {
  const TempFolder folder;
  adapters.save(folder.path(), adapters.names().front());
  const auto loaded = fresh.load(folder.path(), "default");
  EXPECT_TRUE(at::equal(fresh.forward(x), y));
}

using MlpVariant = std::tuple<std::string, std::string>;  // where the model comes from, the adapter's folder

class GoldenMlpAdapters : public ::testing::TestWithParam<MlpVariant> {
 protected:
  static Model make() {
    const auto& source = std::get<0>(GetParam());
    return source == "cpp" ? mlp() : script_model("mlp_" + source + ".pt");
  }
};

TEST_P(GoldenMlpAdapters, ComputeWhatPythonComputed) {
  const auto directory = "mlp/" + std::get<1>(GetParam());
  const auto data = golden("mlp/data.safetensors");
  const auto expected = golden(directory + "/expected.safetensors");
  const auto model = make();
  warm_up(model, data.at("x"));
  EXPECT_LT(relative_error(model.forward(data.at("x")), data.at("y_base")), kTolerance);

  auto adapters = model.load(kGolden + directory, "default");
  EXPECT_LT(relative_error(model.forward(data.at("x")), expected.at("y")), kTolerance);
  EXPECT_THAT(adapters.trainable(), ::testing::IsEmpty());
  adapters.set_trainable({"default"});
  check_gradients(model, adapters, expected, data.at("x"), data.at("g"));
  check_saved_again(adapters, kGolden + directory);
  check_read_again(make(), adapters, data.at("x"), model.forward(data.at("x")));

  adapters.merge();
  EXPECT_LT(relative_error(model.forward(data.at("x")), expected.at("y_merged")), kTolerance);
  adapters.merge_and_unload();
  EXPECT_LT(relative_error(model.forward(data.at("x")), expected.at("y_merged")), kTolerance);
  for (const std::string module : {"up", "down"}) {
    const auto merged = expected.find(module + ".merged");
    if (merged == expected.end()) continue;
    EXPECT_LT(relative_error(model.weight(module, "weight"), merged->second), kTolerance);
  }
}

INSTANTIATE_TEST_SUITE_P(, GoldenMlpAdapters,
                         ::testing::Combine(::testing::Values("cpp", "scripted", "traced"),
                                            ::testing::Values("plain", "rslora", "patterns", "one_target")),
                         [](const auto& test) { return std::get<0>(test.param) + "_" + std::get<1>(test.param); });

class GoldenTwoAdapters : public ::testing::TestWithParam<std::string> {};

TEST_P(GoldenTwoAdapters, SwitchAndAddUp) {
  const std::string directory = kGolden + "mlp/two_adapters";
  const auto x = golden("mlp/data.safetensors").at("x");
  const auto expected = golden("mlp/two_adapters/expected.safetensors");
  const auto model = GetParam() == "cpp" ? mlp() : script_model("mlp_" + GetParam() + ".pt");
  auto adapters = model.load(directory, "default");
  adapters.load(directory + "/other", "other");
  EXPECT_LT(relative_error(model.forward(x), expected.at("y_default")), kTolerance);
  adapters.set_active({"other"});
  EXPECT_LT(relative_error(model.forward(x), expected.at("y_other")), kTolerance);
  adapters.set_active({"default", "other"});
  EXPECT_LT(relative_error(model.forward(x), expected.at("y_default_and_other")), kTolerance);
  adapters.merge();
  EXPECT_LT(relative_error(model.forward(x), expected.at("y_default_and_other")), kTolerance);

  const TempFolder folder;
  adapters.save(folder.path());
  for (const std::string place : {"", "/other"}) {
    const auto before = lora::load_safetensors(directory + place + "/adapter_model.safetensors");
    const auto after = lora::load_safetensors(folder.path().string() + place + "/adapter_model.safetensors");
    ASSERT_EQ(after.size(), before.size());
    for (const auto& [key, tensor] : before) EXPECT_TRUE(at::equal(after.at(key), tensor)) << key;
  }
}

INSTANTIATE_TEST_SUITE_P(, GoldenTwoAdapters, ::testing::Values("cpp", "scripted", "traced"),
                         [](const auto& test) { return test.param; });

class GoldenAttention : public ::testing::TestWithParam<std::string> {};

TEST_P(GoldenAttention, CountsOutProjOnce) {
  const auto expected = golden("mha/expected.safetensors");
  const auto model = GetParam() == "cpp" ? mha() : script_model("mha_scripted.pt");
  const auto& x = expected.at("x");
  EXPECT_LT(relative_error(model.forward(x), expected.at("y_base")), kTolerance);
  auto adapters = model.load(kGolden + "mha/adapter", "default");
  EXPECT_LT(relative_error(model.forward(x), expected.at("y")), kTolerance);
  EXPECT_GT(relative_error(model.forward(x), expected.at("y_peft")), kTolerance);
  adapters.set_trainable({"default"});
  check_gradients(model, adapters, expected, x, expected.at("g"));
  check_saved_again(adapters, kGolden + "mha/adapter");
  adapters.merge();
  EXPECT_LT(relative_error(model.forward(x), expected.at("y")), kTolerance);
  adapters.merge_and_unload();
  EXPECT_LT(relative_error(model.weight("attn", "in_proj_weight"), expected.at("attn.in_proj.merged")), kTolerance);
  EXPECT_LT(relative_error(model.weight("attn.out_proj", "weight"), expected.at("attn.out_proj.merged")), kTolerance);
}

INSTANTIATE_TEST_SUITE_P(, GoldenAttention, ::testing::Values("cpp", "scripted"),
                         [](const auto& test) { return test.param; });

class GoldenGpt2 : public ::testing::TestWithParam<std::string> {
 protected:
  static Model make() {
    if (GetParam() == "traced") return script_model("gpt2_traced.pt");  // Conv1D: weights [in, out]
    GPT2Config config;
    config.vocab_size = 96;
    config.n_positions = 64;
    config.n_embd = 32;
    config.n_layer = 2;
    config.n_head = 4;
    GPT2LMHeadModel model(config);
    const at::NoGradGuard no_grad;
    const auto tensors = golden("gpt2/model/model.safetensors");
    for (auto& named : model->named_parameters()) {
      const auto stored = tensors.find(named.key());
      if (stored == tensors.end()) continue;  // the tied head
      const bool conv1d = named.key().find(".c_") != std::string::npos && named.value().dim() == 2;
      named.value().copy_(conv1d ? stored->second.t() : stored->second);
    }
    model->eval();
    return cpp_model(model, [model](const at::Tensor& ids) mutable { return model->forward(ids); });
  }
};

TEST_P(GoldenGpt2, ComputesWhatPythonComputed) {
  const auto expected = golden("gpt2/expected.safetensors");
  const auto model = make();
  const auto& ids = expected.at("ids");
  warm_up(model, ids);
  EXPECT_LT(relative_error(model.forward(ids), expected.at("logits_base")), kTolerance);
  auto adapters = model.load(kGolden + "gpt2/adapter", "default");
  EXPECT_LT(relative_error(model.forward(ids), expected.at("logits_adapted")), kTolerance);
  adapters.set_trainable({"default"});
  check_gradients(model, adapters, expected, ids, expected.at("g"));
  EXPECT_THAT(adapters.fallbacks(), ::testing::IsEmpty());
  check_saved_again(adapters, kGolden + "gpt2/adapter");
  adapters.merge();
  EXPECT_LT(relative_error(model.forward(ids), expected.at("logits_merged")), kTolerance);
  adapters.merge_and_unload();
  for (const std::string layer : {"transformer.h.0.attn.", "transformer.h.1.attn."}) {
    for (const std::string name : {"c_attn", "c_proj"}) {
      const auto& merged = expected.at(layer + name + ".merged");  // [in, out]
      const auto weight = model.weight(layer + name, "weight");
      EXPECT_LT(relative_error(GetParam() == "traced" ? weight : weight.t(), merged), kTolerance) << layer << name;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(, GoldenGpt2, ::testing::Values("cpp", "traced"), [](const auto& test) { return test.param; });

}  // namespace
}  // namespace golden_test
