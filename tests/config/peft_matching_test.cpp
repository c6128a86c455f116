// tests/golden/matching.json: the modules, ranks and scalings that Python PEFT 0.21 chooses for 76 configurations.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <lora/lora.h>
#include <torch/nn/module.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/modules/normalization.h>

#include <fstream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>
#include <string>

namespace peft_matching_test {
namespace {

using Json = nlohmann::ordered_json;

const Json& golden() {
  static const auto json = Json::parse(std::ifstream(LORA_SOURCE_DIR "/tests/golden/matching.json"));
  return json;
}

/// The table's model, every Linear 4 x 4 with zero weights, in float64.
std::shared_ptr<torch::nn::Module> make_model() {
  auto root = std::make_shared<torch::nn::Module>("root");
  std::map<std::string, std::shared_ptr<torch::nn::Module>> modules{{"", root}};
  for (const auto& entry : golden()["modules"]) {
    const auto path = entry["name"].get<std::string>();
    const auto type = entry["type"].get<std::string>();
    std::shared_ptr<torch::nn::Module> module;
    if (type == "Linear") {
      module = std::make_shared<torch::nn::LinearImpl>(torch::nn::LinearOptions(4, 4).bias(false));
    } else if (type == "Embedding") {
      module = std::make_shared<torch::nn::EmbeddingImpl>(4, 4);
    } else if (type == "LayerNorm") {
      module = std::make_shared<torch::nn::LayerNormImpl>(torch::nn::LayerNormOptions({4}));
    } else {
      module = std::make_shared<torch::nn::Module>(type);
    }
    const auto dot = path.rfind('.');
    const auto parent = dot == std::string::npos ? "" : path.substr(0, dot);
    modules.at(parent)->register_module(path.substr(dot + 1), module);
    modules.emplace(path, module);
  }
  root->to(at::kDouble);
  const at::NoGradGuard no_grad;
  for (auto& parameter : root->parameters()) parameter.zero_();
  return root;
}

/// Throws the c10::ValueError that inject throws for a configuration out of range.
lora::LoraConfig make_config(Json json) {
  json["peft_type"] = "LORA";
  std::vector<std::string> problems;
  const auto config = lora::detail::read_config<lora::LoraConfig>(json, problems);
  TORCH_CHECK_VALUE(problems.empty(), problems.empty() ? "" : problems.front());
  return config;
}

/// Rank and scaling of each adapted module, read off the tensors and the merged weights.
std::map<std::string, std::pair<int64_t, double>> inject(const lora::LoraConfig& config) {
  const auto model = make_model();
  auto adapters = lora::inject(*model, config);
  const at::NoGradGuard no_grad;
  for (auto& tensor : adapters.parameters()) tensor.fill_(1);
  std::map<std::string, std::pair<int64_t, double>> result;
  const std::string suffix = ".lora_default.lora_A";
  for (const auto& [name, tensor] : adapters.named_parameters()) {
    if (name.size() < suffix.size() || name.substr(name.size() - suffix.size()) != suffix) continue;
    result[name.substr(0, name.size() - suffix.size())] = {tensor.size(0), 0};
  }
  adapters.merge_and_unload();
  const auto parameters = model->named_parameters();
  for (auto& [path, found] : result) {
    found.second = parameters[path + ".weight"][0][0].item<double>() / static_cast<double>(found.first);
  }
  return result;
}

/// Rows where PEFT goes on and this library stops, with the reason.
const std::map<std::string, std::string>& stricter() {
  static const std::map<std::string, std::string> rows{
      {"several entries, one of which matches nothing: PEFT says nothing", "found no module for the target \"fc3\""},
      {"a list entry is no regex: the others still match", "found no module for the target \".*\\.k_proj\""},
      {"regex: look-behind", "found (?<"},
      {"regex: a backreference", "found a back-reference"},
      {"regex: the flag for case", "found (?i"},
      {"regex: a named group", "found (?P"},
      {"exclude: a container excludes nothing below it", "found no module for \"self_attn\" in exclude_modules"},
      {"exclude: regex is fullmatch", "found no module for \"layers\\.0\" in exclude_modules"},
      {"exclude: ends at a dot as well", "found every module of the target \"q_proj\" in exclude_modules"},
      {"rank: a container's name never matches", "self_attn"},
      {"rank: PEFT's own prefix never matches", "base_model.model.head"}};
  return rows;
}

/// Rows where PEFT's rule has an accident: the modules that are adapted here besides.
const std::map<std::string, std::set<std::string>>& besides() {
  static const std::map<std::string, std::set<std::string>> rows{
      {"layers: two components must stand before the number", {"layers.0.proj"}}};
  return rows;
}

class PeftMatching : public ::testing::TestWithParam<size_t> {};

TEST_P(PeftMatching, AgreesWithPeft) {
  const auto& row = golden()["rows"][GetParam()];
  const auto description = row["description"].get<std::string>();
  SCOPED_TRACE(description);
  const auto reason = stricter().find(description);
  if (reason != stricter().end() || !row["error"].is_null()) {
    try {
      inject(make_config(row["config"]));
      ADD_FAILURE() << "expected an error";
    } catch (const c10::ValueError& error) {
      const auto expected = reason == stricter().end() ? std::string() : reason->second;
      EXPECT_NE(error.msg().find(expected), std::string::npos) << error.msg();
    }
    return;
  }
  auto found = inject(make_config(row["config"]));
  if (besides().count(description) != 0) {
    for (const auto& path : besides().at(description)) EXPECT_EQ(found.erase(path), 1U) << path;
  }
  EXPECT_EQ(found.size(), row["matched"].size());
  for (const auto& module : row["matched"]) {
    const auto match = found.find(module["name"].get<std::string>());
    ASSERT_NE(match, found.end()) << module["name"];
    EXPECT_EQ(match->second.first, module["r"].get<int64_t>()) << module["name"];
    EXPECT_NEAR(match->second.second, module["scaling"].get<double>(), 1e-12) << module["name"];
  }
}

INSTANTIATE_TEST_SUITE_P(Rows, PeftMatching, ::testing::Range<size_t>(0, golden()["rows"].size()));

TEST(PeftMatching, EveryRowThatDiffersIsInTheTable) {
  std::set<std::string> descriptions;
  for (const auto& row : golden()["rows"]) descriptions.insert(row["description"].get<std::string>());
  for (const auto& [description, reason] : stricter()) EXPECT_EQ(descriptions.count(description), 1U) << description;
  for (const auto& [description, paths] : besides()) EXPECT_EQ(descriptions.count(description), 1U) << description;
}

}  // namespace
}  // namespace peft_matching_test
