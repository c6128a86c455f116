#pragma once

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <lora/train/schedule.h>  // defines: Schedule, ScheduleOptions
#include <torch/optim/adamw.h>
#include <torch/utils.h>
#include <unistd.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <string>
#include <system_error>
#include <utility>

#include "finetune/data.h"           // defines: old_domain_pairs, encode_or_report
#include "finetune/error_line.h"     // defines: error_line
#include "finetune/fingerprint.h"    // defines: Fingerprint
#include "finetune/options.h"        // defines: Options
#include "finetune/paths.h"          // defines: beside_program
#include "models/gpt2_checkpoint.h"  // defines: load_gpt2, save_gpt2
#include "training/trainer.h"        // defines: train

/// A pre-trained model and the directory that holds it.
struct Base {
  std::string directory;
  ByteBpe tokenizer;
  GPT2LMHeadModel model;
};

namespace base_detail {

/// The small GPT-2 of the run without arguments: about 2 million weights.
inline GPT2Config small_config(std::int64_t vocab_size) {
  GPT2Config config;
  config.vocab_size = vocab_size;
  config.n_positions = 256;
  config.n_embd = 192;
  config.n_layer = 4;
  config.n_head = 3;
  return config;
}

inline ByteBpe load_tokenizer(const std::string& directory) {
  return ByteBpe(directory + "/vocab.json", directory + "/merges.txt");
}

inline void copy_tokenizer(const std::string& from, const std::string& to) {
  for (const auto* const name : {"/vocab.json", "/merges.txt"}) {
    std::filesystem::copy_file(from + name, to + name, std::filesystem::copy_options::overwrite_existing);
  }
}

struct Recipe {
  std::size_t steps = 1000, warmup = 100, batch_size = 16, pairs_of_a_domain = 1600;
  double learning_rate = 2e-3;
};

/// The whole recipe's schedule: warm-up, then a linear decay to zero.
inline lora::ScheduleOptions schedule_of(const Recipe& recipe) {
  return lora::ScheduleOptions()
      .type(lora::ScheduleType::kLinear)
      .warmup_steps(static_cast<std::int64_t>(recipe.warmup))
      .total_steps(static_cast<std::int64_t>(recipe.steps));
}

/// Tells bases apart whose recipe, vocabulary or pairs differ.
inline std::string fingerprint_of(const Recipe& recipe, const std::string& vocabulary) {
  Fingerprint fingerprint;
  for (const auto number : {recipe.steps, recipe.warmup, recipe.batch_size, recipe.pairs_of_a_domain}) {
    fingerprint.add(std::to_string(number) + ' ');
  }
  // The learning rates of the first and the second step tell how the warm-up begins.
  for (const auto step : {0, 1}) {
    fingerprint.add(std::to_string(recipe.learning_rate * lora::schedule_factor(schedule_of(recipe), step)) + ' ');
  }
  fingerprint.add(read_file(vocabulary + "/vocab.json"));
  for (const auto& pair : old_domain_pairs(0).dev) fingerprint.add(pair.input + pair.text);
  return fingerprint.text();
}

/// Pre-trains the small GPT-2 on the old domains into `directory`, which appears whole or not at all.
inline void pretrain(const Recipe& recipe, const std::string& vocabulary, const std::string& directory) {
  TrainOptions options;
  options.steps = recipe.steps;
  options.evaluations = 1;
  std::cout << "Pre-training a small GPT-2 once, two to three minutes; it is kept in " << directory << std::endl;
  // The base is everybody's: neither --seed nor --threads changes it.
  at::manual_seed(1);
  const int threads = at::get_num_threads();
  at::set_num_threads(2);
  const auto tokenizer = load_tokenizer(vocabulary);
  const auto pairs = old_domain_pairs(recipe.pairs_of_a_domain);
  GPT2LMHeadModel model(small_config(tokenizer.vocab_size()));
  const auto positions = model->config.n_positions;
  BatchStream stream(encode_or_report(tokenizer, pairs.train, positions, "pre-training pairs"), recipe.batch_size, 1);
  const auto dev = evaluation_batches(encode_or_report(tokenizer, pairs.dev, positions, "old domains"), at::kCPU);
  torch::optim::AdamW optimizer(model->transformer->parameters(), torch::optim::AdamWOptions(recipe.learning_rate));
  lora::Schedule schedule(optimizer, schedule_of(recipe));
  Progress progress("pre-training", options.steps);
  const auto report = train(model, optimizer, schedule, stream, dev, options, progress);
  at::set_num_threads(threads);
  std::cout << "Pre-trained in " << static_cast<int>(report.seconds) << " s on " << report.tokens
            << " tokens: dev loss of the old domains " << report.dev.back().loss << "\n\n";

  const auto unfinished = directory + ".unfinished-" + std::to_string(getpid());
  save_gpt2(model, unfinished, tokenizer.end_of_text());
  copy_tokenizer(vocabulary, unfinished);
  std::error_code taken;
  std::filesystem::rename(unfinished, directory, taken);
  if (taken) std::filesystem::remove_all(unfinished);  // another process was faster, with the same weights
}

}  // namespace base_detail

/// Writes the model with its tokenizer as a Hugging Face directory, which --model takes.
inline void save_base(const Base& base, const std::string& directory) {
  save_gpt2(base.model, directory, base.tokenizer.end_of_text());
  base_detail::copy_tokenizer(base.directory, directory);
}

/// The directory of the base: --model, or the small GPT-2, which is pre-trained where it is not there yet.
inline std::string ensure_base(const Options& options) {
  if (!options.model.empty()) return options.model;
  const base_detail::Recipe recipe;
  const auto vocabulary = beside_program("small_vocab");
  auto directory = beside_program("finetune_gpt2_base-" + base_detail::fingerprint_of(recipe, vocabulary));
  if (!std::filesystem::exists(directory)) base_detail::pretrain(recipe, vocabulary, directory);
  return directory;
}

/// The base on its device in its dtype, with its tokenizer.
inline Base open_base(const Options& options) {
  if (options.device == "cuda" && !at::globalContext().hasCUDA()) {
    throw std::runtime_error("--device cuda: this LibTorch finds no CUDA device; use --device cpu");
  }
  const auto directory = ensure_base(options);
  const auto dtype = options.dtype == "bfloat16" ? torch::kBFloat16 : torch::kFloat32;
  try {
    Base base{directory, base_detail::load_tokenizer(directory), load_gpt2(directory)};
    const auto tokens = base.tokenizer.vocab_size(), rows = base.model->config.vocab_size;
    if (tokens > rows) {
      throw FileError(directory, {"vocab.json holds " + std::to_string(tokens) +
                                  " tokens, expected at most vocab_size = " + std::to_string(rows) + " (config.json)"});
    }
    base.model->to(torch::Device(options.device), dtype);
    base.model->eval();
    return base;
  } catch (const std::exception& error) {
    if (!options.model.empty()) throw;
    throw std::runtime_error(error_line(error) + "; delete " + directory + " to pre-train it again");
  }
}
