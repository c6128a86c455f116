#pragma once

#include <lora/io/safetensors.h>  // defines: load_safetensors, save_safetensors
#include <torch/types.h>
#include <torch/utils.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "file_error.h"   // defines: FileError, read_file
#include "models/gpt2.h"  // defines: GPT2Config, GPT2LMHeadModel, GPT2Start

namespace gpt2_detail {

/// Hugging Face keeps these weights as Conv1D does: [in, out], the transpose of torch::nn::Linear's.
inline bool is_transposed(const std::string& name) {
  for (const auto* const suffix : {"c_attn.weight", "c_proj.weight", "c_fc.weight"}) {
    const auto at = name.rfind(suffix);
    if (at != std::string::npos && at + std::string(suffix).size() == name.size()) return true;
  }
  return false;
}

/// Causal masks that older files hold as buffers: `h.N.attn.bias` and `h.N.attn.masked_bias`.
inline bool is_mask(const std::string& name) {
  const auto ends_with = [&](const std::string& suffix) {
    return name.size() >= suffix.size() && name.compare(name.size() - suffix.size(), suffix.size(), suffix) == 0;
  };
  return ends_with(".attn.bias") || ends_with(".attn.masked_bias");
}

inline std::string shape_text(const torch::IntArrayRef& shape) {
  std::ostringstream text;
  text << shape;
  return text.str();
}

/// One field of config.json that this GPT-2 computes in one way only.
template <class Value>
void expect(const nlohmann::json& json, const char* field, const Value& only, std::vector<std::string>& problems) {
  if (json.contains(field) && json[field] != nlohmann::json(only)) {
    problems.push_back("found " + std::string(field) + " = " + json[field].dump() + ", expected " +
                       nlohmann::json(only).dump());
  }
}

inline void read_size(const nlohmann::json& json, const char* field, std::int64_t& size,
                      std::vector<std::string>& problems) {
  constexpr std::int64_t kLargest = 1 << 24;
  if (!json.contains(field)) {
    problems.push_back("found no " + std::string(field));
  } else if (!json[field].is_number_integer() || json[field] < 1 || json[field] > kLargest) {
    problems.push_back("found " + std::string(field) + " = " + json[field].dump() + ", expected 1 to " +
                       std::to_string(kLargest));
  } else {
    size = json[field].get<std::int64_t>();
  }
}

}  // namespace gpt2_detail

/// Reads Hugging Face's config.json of a GPT-2; what this model would compute otherwise is a FileError.
inline GPT2Config load_gpt2_config(const std::string& path) {
  using namespace gpt2_detail;
  const auto json = nlohmann::json::parse(read_file(path), nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) throw FileError(path, {"found no JSON object"});
  std::vector<std::string> problems;
  expect(json, "model_type", "gpt2", problems);
  expect(json, "activation_function", "gelu_new", problems);
  expect(json, "scale_attn_weights", true, problems);
  expect(json, "scale_attn_by_inverse_layer_idx", false, problems);
  expect(json, "add_cross_attention", false, problems);
  expect(json, "tie_word_embeddings", true, problems);
  GPT2Config config;
  read_size(json, "vocab_size", config.vocab_size, problems);
  read_size(json, "n_positions", config.n_positions, problems);
  read_size(json, "n_embd", config.n_embd, problems);
  read_size(json, "n_layer", config.n_layer, problems);
  read_size(json, "n_head", config.n_head, problems);
  if (json.contains("n_inner") && !json["n_inner"].is_null()) read_size(json, "n_inner", config.n_inner, problems);
  if (config.n_embd % config.n_head != 0) {
    problems.push_back("found n_embd = " + std::to_string(config.n_embd) +
                       ", expected a multiple of n_head = " + std::to_string(config.n_head));
  }
  if (json.contains("layer_norm_epsilon")) {
    const auto& epsilon = json["layer_norm_epsilon"];
    if (epsilon.is_number() && epsilon > 0) {
      config.layer_norm_epsilon = epsilon.get<double>();
    } else {
      problems.push_back("found layer_norm_epsilon = " + epsilon.dump() + ", expected a number above 0");
    }
  }
  if (!problems.empty()) throw FileError(path, problems);
  return config;
}

/// Loads a Hugging Face GPT-2 directory (config.json, model.safetensors), its names with or without `transformer.`.
/// A FileError lists every missing, unexpected and mis-shaped tensor.
inline GPT2LMHeadModel load_gpt2(const std::string& directory) {
  using namespace gpt2_detail;
  const auto config = load_gpt2_config(directory + "/config.json");
  const auto path = directory + "/model.safetensors";
  const auto stored = lora::load_safetensors(path);
  std::map<std::string, torch::Tensor> left;
  for (const auto& [name, tensor] : stored) {
    const bool prefixed = name.rfind("transformer.", 0) == 0 || name.rfind("lm_head.", 0) == 0;
    if (!is_mask(name)) left.emplace(prefixed ? name : "transformer." + name, tensor);
  }
  // A config.json with more layers than the file must not make a model that fills the memory first.
  std::vector<std::string> problems;
  const auto last_layer = "transformer.h." + std::to_string(config.n_layer - 1) + ".ln_1.weight";
  if (left.count(last_layer) == 0) {
    throw FileError(path, {"found no " + last_layer + ", expected n_layer = " + std::to_string(config.n_layer) +
                           " layers (config.json)"});
  }
  GPT2LMHeadModel model(config, GPT2Start::kToBeLoaded);
  torch::NoGradGuard no_grad;
  for (auto& parameter : model->transformer->named_parameters()) {
    const auto name = "transformer." + parameter.key();
    const auto found = left.find(name);
    if (found == left.end()) {
      problems.push_back("found no " + name);
      continue;
    }
    const auto tensor = is_transposed(name) && found->second.dim() == 2 ? found->second.t() : found->second;
    if (tensor.sizes() != parameter.value().sizes() || !tensor.is_floating_point()) {
      const auto expected = is_transposed(name) ? parameter.value().t() : parameter.value();
      problems.push_back("found " + name + " of " + std::string(found->second.dtype().name()) + " " +
                         shape_text(found->second.sizes()) + ", expected numbers of shape " +
                         shape_text(expected.sizes()));
    } else {
      parameter.value().copy_(tensor);
    }
    left.erase(found);
  }
  const auto head = left.find("lm_head.weight");
  if (head != left.end()) {
    const auto& embedding = model->transformer->wte->weight;
    if (head->second.sizes() != embedding.sizes() || !torch::equal(head->second.to(embedding.dtype()), embedding)) {
      problems.emplace_back("found an lm_head.weight that is not transformer.wte.weight, expected a tied head");
    }
    left.erase(head);
  }
  for (const auto& [name, tensor] : left) problems.push_back("found an unexpected " + name);
  if (!problems.empty()) throw FileError(path, problems);
  return model;
}

/// Writes the model as a Hugging Face GPT-2 directory; `end_of_text` is its first and last token.
inline void save_gpt2(const GPT2LMHeadModel& model, const std::string& directory, std::int64_t end_of_text) {
  std::filesystem::create_directories(directory);
  const auto& config = model->config;
  const auto* const dtype = model->lm_head->weight.scalar_type() == torch::kBFloat16 ? "bfloat16" : "float32";
  const nlohmann::ordered_json json = {{"architectures", {"GPT2LMHeadModel"}},
                                       {"model_type", "gpt2"},
                                       {"vocab_size", config.vocab_size},
                                       {"n_positions", config.n_positions},
                                       {"n_embd", config.n_embd},
                                       {"n_layer", config.n_layer},
                                       {"n_head", config.n_head},
                                       {"n_inner", config.inner_size()},
                                       {"activation_function", "gelu_new"},
                                       {"layer_norm_epsilon", config.layer_norm_epsilon},
                                       {"initializer_range", config.initializer_range},
                                       {"embd_pdrop", 0.0},
                                       {"attn_pdrop", 0.0},
                                       {"resid_pdrop", 0.0},
                                       {"bos_token_id", end_of_text},
                                       {"eos_token_id", end_of_text},
                                       {"tie_word_embeddings", true},
                                       {"torch_dtype", dtype}};
  std::map<std::string, torch::Tensor> tensors;
  for (const auto& parameter : model->transformer->named_parameters()) {
    const auto name = "transformer." + parameter.key();
    tensors.emplace(name, gpt2_detail::is_transposed(name) ? parameter.value().t() : parameter.value());
  }
  lora::save_safetensors(tensors, directory + "/model.safetensors");
  const auto path = directory + "/config.json";
  std::ofstream file(path);
  if (!(file << json.dump(2) << '\n' << std::flush)) throw FileError(path, {"can't be written"});
}
