// What the cases of the comparison start from: arguments, inputs, the adapted model.
#pragma once

#include <ATen/ATen.h>
#include <lora/lora.h>
#include <torch/optim/adamw.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "models/gpt2.h"             // defines: GPT2LMHeadModel
#include "models/gpt2_checkpoint.h"  // defines: load_gpt2

using Json = nlohmann::json;

struct Arguments {
  std::string inputs;
  std::string dtype = "float32";
  int threads = 1;
  int steps = 10;
  bool full_logits = false;  // the model's own logits and LibTorch's loss
  bool plain = false;        // without FastOperators and keep_freed_memory
  bool recompute = false;
  bool lines_apart = false;  // lines of E2E with the same prompt do not share it

  std::string path(const std::string& name) const { return (std::filesystem::path(inputs) / name).string(); }
  at::ScalarType scalar_type() const { return dtype == "bfloat16" ? at::kBFloat16 : at::kFloat; }
};

inline Json read_json(const std::string& path) {
  std::ifstream file(path);
  return Json::parse(file);
}

struct Adapted {
  GPT2LMHeadModel model;
  lora::Adapters adapters;
};

inline Adapted load_adapted(const Arguments& arguments) {
  auto model = load_gpt2(arguments.path("gpt2"));
  model->to(arguments.scalar_type());
  auto adapters = lora::load(*model, arguments.path("adapter"));
  adapters.set_trainable({"default"});
  return {model, adapters};
}

/// A GPT-2 of other sizes with random weights, r on c_attn and attn.c_proj.
inline Adapted make_adapted(const GPT2Config& config, std::int64_t rank) {
  GPT2LMHeadModel model(config);
  const auto adapters =
      lora::inject(*model, lora::LoraConfig().r(rank).lora_alpha(16).target_modules({"c_attn", "attn.c_proj"}));
  return {model, adapters};
}

inline torch::optim::AdamW make_optimizer(const lora::Adapters& adapters) {
  return torch::optim::AdamW(lora::param_groups(adapters, torch::optim::AdamWOptions(1e-3)));
}

/// [sequences, length]
inline at::Tensor batch_of(const Arguments& arguments) {
  const auto rows = read_json(arguments.path("batch.json")).get<std::vector<std::vector<std::int64_t>>>();
  std::vector<at::Tensor> tensors;
  for (const auto& row : rows) tensors.push_back(at::tensor(row, at::kLong));
  return at::stack(tensors);
}
