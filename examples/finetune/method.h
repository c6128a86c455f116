#pragma once

#include <lora/lora.h>  // defines: inject, LoraConfig, Adapters, LoraFa, PrefixTuning, PromptTuning, param_groups
#include <torch/optim/adamw.h>
#include <torch/types.h>
#include <torch/utils.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <iostream>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "finetune/base_model.h"  // defines: Base, save_base
#include "finetune/options.h"     // defines: Options, Method
#include "models/gpt2.h"          // defines: GPT2LMHeadModel, GPT2Inputs, GPT2Cache, GPT2Packed
#include "text/batches.h"         // defines: Sample
#include "training/loss.h"        // defines: Reading, read_tokens

/// What a method starts from.
struct Start {
  const Base& base;
  const Options& options;
  const std::vector<Sample>& samples;  // to train on
};

/// What a method trains, and how the model reads with it.
struct Trainable {
  std::unique_ptr<torch::optim::AdamW> optimizer;
  std::optional<lora::Adapters> adapters;     // in the model
  lora::TrainingState::NamedTensors tensors;  // what is trained beside them
  std::function<void(const std::string& directory)> save;
  Reading read = read_tokens;
  std::shared_ptr<const void> kept;  // lives as long as the training

  std::int64_t count() const {
    std::int64_t numbers = 0;
    for (const auto& group : optimizer->param_groups()) {
      for (const auto& parameter : group.params()) numbers += parameter.numel();
    }
    return numbers;
  }
};

namespace method_detail {

inline lora::TargetModules targets_of(const Options& options) {
  // As in PEFT a word of its own, not a name in a list.
  const bool all_linear = options.targets == std::vector<std::string>{"all-linear"};
  return all_linear ? lora::TargetModules("all-linear") : lora::TargetModules(options.targets);
}

inline lora::LoraConfig lora_config(const Options& options) {
  return lora::LoraConfig()
      .r(options.rank)
      .lora_alpha(options.alpha)
      .lora_dropout(options.dropout)
      .target_modules(targets_of(options));
}

template <class Config>
lora::Adapters inject(const Start& start, const Config& config, const lora::InjectOptions& inject_options = {}) {
  auto model = start.base.model;
  auto adapters = lora::inject(*model, config, "default", inject_options);
  std::cout << adapters.report() << '\n';
  return adapters;
}

inline Trainable trainable_of(const lora::Adapters& adapters, const Options& options, double lr_ratio = 1.0) {
  const auto adamw = torch::optim::AdamWOptions(options.learning_rate());
  Trainable trainable;
  trainable.adapters = adapters;
  trainable.optimizer = std::make_unique<torch::optim::AdamW>(
      lora::param_groups(adapters, adamw, lora::LoraPlusOptions().lr_ratio(lr_ratio)));
  trainable.save = [adapters](const std::string& directory) { adapters.save(directory); };
  return trainable;
}

template <class Config>
Trainable adapted(const Start& start, const Config& config, const lora::InjectOptions& inject_options = {}) {
  return trainable_of(inject(start, config, inject_options), start.options);
}

/// Samples `begin` to `end` one after the other, so that no padding is among the rows that a layer sees.
inline GPT2Packed pack(const std::vector<Sample>& samples, std::size_t begin, std::size_t end) {
  GPT2Packed packed;
  std::vector<std::int64_t> tokens;
  for (auto i = begin; i < end; ++i) {
    tokens.insert(tokens.end(), samples[i].tokens.begin(), samples[i].tokens.end());
    packed.sequences.push_back({packed.lengths.size()});
    packed.lengths.push_back(static_cast<std::int64_t>(samples[i].tokens.size()));
  }
  packed.ids = torch::tensor(tokens, torch::kInt64);
  return packed;
}

/// EVA's start looks at the training data.
inline Trainable eva(const Start& start) {
  constexpr std::size_t kPairs = 64;
  auto model = start.base.model;
  const auto& samples = start.samples;
  const auto run_batch = [&](std::int64_t batch) {
    const auto begin = static_cast<std::size_t>(batch) * kPairs;
    if (begin >= samples.size()) return false;
    auto packed = pack(samples, begin, std::min(begin + kPairs, samples.size()));
    packed.ids = packed.ids.to(model->lm_head->weight.device());
    model->transformer->forward_packed(packed);
    return true;
  };
  const auto config = lora_config(start.options).init_lora_weights(lora::LoraInit::kEva);
  return adapted(start, config, lora::InjectOptions().data(run_batch));
}

inline Trainable lora_fa(const Start& start) {
  const auto adapters = inject(start, lora_config(start.options));
  const auto only_B =
      std::make_shared<const lora::LoraFa>(adapters);  // before the optimizer: A is not among its groups
  auto trainable = trainable_of(adapters, start.options);
  trainable.kept = only_B;
  return trainable;
}

inline Trainable ia3(const Start& start) {
  const auto config = lora::IA3Config().target_modules(targets_of(start.options)).feedforward_modules({"mlp.c_proj"});
  return adapted(start, config);
}

/// As many of the training data's tokens as there are virtual ones, [1, n]: a better start than noise.
inline torch::Tensor first_tokens(const Start& start) {
  const auto count = static_cast<std::size_t>(start.options.virtual_tokens);
  std::vector<std::int64_t> tokens;
  for (std::size_t i = 0; tokens.size() < count; i = (i + 1) % start.samples.size()) {
    const auto& more = start.samples[i].tokens;
    tokens.insert(tokens.end(), more.begin(), more.end());
  }
  tokens.resize(count);
  return torch::tensor(tokens, torch::kInt64).to(start.base.model->lm_head->weight.device()).unsqueeze(0);
}

/// Virtual tokens, which a frozen model reads as `read` says.
template <class VirtualTokens>
Trainable in_front(const Start& start, const VirtualTokens& tokens, Reading read) {
  for (auto& parameter : start.base.model->parameters()) parameter.set_requires_grad(false);
  const auto adamw = torch::optim::AdamWOptions(start.options.learning_rate()).weight_decay(0);
  Trainable trainable;
  trainable.tensors = tokens->named_parameters().pairs();
  trainable.optimizer = std::make_unique<torch::optim::AdamW>(lora::param_groups(tokens->trainable_tensors(), adamw));
  trainable.save = [tokens](const std::string& directory) { tokens->save(directory); };
  trainable.read = std::move(read);
  return trainable;
}

inline Trainable prefix(const Start& start) {
  auto model = start.base.model;
  const auto& sizes = model->config;
  lora::PrefixTuning prefix(lora::PrefixTuningConfig()
                                .num_virtual_tokens(start.options.virtual_tokens)
                                .num_layers(sizes.n_layer)
                                .num_attention_heads(sizes.n_head)
                                .token_dim(sizes.n_embd));
  prefix->to(model->lm_head->weight.device());
  {
    torch::NoGradGuard no_grad;
    GPT2Cache cache;
    model->transformer->forward(first_tokens(start), &cache);
    prefix->start(cache.layers);
  }
  const auto dtype = model->lm_head->weight.scalar_type();
  return in_front(start, prefix, [prefix, dtype](const torch::Tensor& ids) {
    return GPT2Inputs{ids, {}, prefix->past_key_values(ids.size(0), dtype)};
  });
}

inline Trainable prompt(const Start& start) {
  const auto wte = start.base.model->transformer->wte.ptr();
  lora::PromptTuning prompt(lora::PromptTuningConfig()
                                .num_virtual_tokens(start.options.virtual_tokens)
                                .token_dim(start.base.model->config.n_embd));
  prompt->to(wte->weight.device());
  prompt->start(wte->forward(first_tokens(start)).squeeze(0));
  return in_front(start, prompt, [prompt, wte](const torch::Tensor& ids) {
    return GPT2Inputs{{}, prompt->prepend(wte->forward(ids)), {}};
  });
}

inline Trainable full(const Start& start) {
  // lm_head's weight is wte's: the parameters of the transformer are all.
  const auto& transformer = start.base.model->transformer;
  Trainable trainable;
  trainable.tensors = transformer->named_parameters().pairs();
  trainable.optimizer = std::make_unique<torch::optim::AdamW>(
      transformer->parameters(), torch::optim::AdamWOptions(start.options.learning_rate()));
  trainable.save = [&base = start.base](const std::string& directory) { save_base(base, directory); };
  return trainable;
}

}  // namespace method_detail

/// All methods, by the names that --method takes.
inline const std::vector<Method>& methods() {
  using namespace method_detail;
  using lora::LoraInit;
  using Words = std::vector<std::string>;
  static const Words none, query_value = {"c_attn[q,v]"}, key_value_mlp = {"c_attn[k,v]", "mlp.c_proj"};
  static const Words of_lora = {"--rank", "--alpha", "--dropout", "--targets"};
  static const Words of_lora_plus = {"--rank", "--alpha", "--dropout", "--targets", "--lora-plus-ratio"};
  static const Words of_rank = {"--rank", "--dropout", "--targets"};
  static const Words of_targets = {"--targets"}, of_tokens = {"--virtual-tokens"};
  static const auto started = [](const Start& start, LoraInit init) {
    return adapted(start, lora_config(start.options).init_lora_weights(init));
  };
  static const std::vector<Method> all = {
      {"lora", of_lora, 1e-2, 8, query_value, 0,
       [](const Start& start) { return adapted(start, lora_config(start.options)); }},
      {"lora+", of_lora_plus, 3e-3, 8, query_value, 0,
       [](const Start& start) {
         return trainable_of(inject(start, lora_config(start.options)), start.options, start.options.lora_plus_ratio);
       }},
      {"rslora", of_lora, 1e-2, 8, query_value, 0,
       [](const Start& start) { return adapted(start, lora_config(start.options).use_rslora(true)); }},
      {"dora", of_lora, 1e-2, 8, query_value, 0,
       [](const Start& start) { return adapted(start, lora_config(start.options).use_dora(true)); }},
      {"pissa", of_lora, 1e-2, 8, query_value, 0, [](const Start& start) { return started(start, LoraInit::kPissa); }},
      {"olora", of_lora, 1e-2, 8, query_value, 0, [](const Start& start) { return started(start, LoraInit::kOlora); }},
      {"orthogonal", of_lora, 1e-2, 8, query_value, 0,
       [](const Start& start) { return started(start, LoraInit::kOrthogonal); }},
      {"eva", of_lora, 1e-2, 8, query_value, 0, eva},
      {"lora-fa", of_lora, 1e-2, 8, query_value, 0, lora_fa},
      // VeRA trains a vector of r and one of the outputs a weight; PEFT's r.
      {"vera", of_rank, 1e-1, 256, query_value, 0,
       [](const Start& start) {
         const auto& options = start.options;
         return adapted(
             start,
             lora::VeraConfig().r(options.rank).vera_dropout(options.dropout).target_modules(targets_of(options)));
       }},
      {"mora", of_rank, 1e-2, 8, query_value, 0,
       [](const Start& start) {
         const auto& options = start.options;
         return adapted(
             start,
             lora::MoraConfig().r(options.rank).mora_dropout(options.dropout).target_modules(targets_of(options)));
       }},
      {"ia3", of_targets, 1e-1, 0, key_value_mlp, 0, ia3},
      // As many parameters as a LoRA of half the rank on a square weight.
      {"miss", of_rank, 1e-2, 16, query_value, 0,
       [](const Start& start) {
         const auto& options = start.options;
         return adapted(
             start,
             lora::MissConfig().r(options.rank).miss_dropout(options.dropout).target_modules(targets_of(options)));
       }},
      {"prefix", of_tokens, 1e-1, 0, none, 10, prefix},
      {"prompt", of_tokens, 1e-1, 0, none, 10, prompt},
      {"full", none, 1e-3, 0, none, 0, full, /*whole_model=*/true},
  };
  return all;
}

/// The method of that name, which has to be one of the list.
inline const Method& method_of(const std::string& name) {
  return *std::find_if(methods().begin(), methods().end(), [&](const Method& method) { return method.name == name; });
}
