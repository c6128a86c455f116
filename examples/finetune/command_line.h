#pragma once

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <iostream>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "finetune/comparison.h"  // defines: Comparison, lora_comparison, methods_comparison
#include "finetune/method.h"      // defines: methods, method_of
#include "finetune/options.h"     // defines: Options, Method
#include "finetune/paths.h"       // defines: beside_program

namespace command_line_detail {

/// A number that `accept` takes; NaN and infinity are none.
inline CLI::Validator number(const std::string& what, const std::function<bool(double)>& accept) {
  return CLI::Validator(
      [what, accept](const std::string& text) {
        double value = 0.0;
        const bool right = CLI::detail::lexical_cast(text, value) && std::isfinite(value) && accept(value);
        return right ? std::string() : "found " + text + ", expected " + what;
      },
      "");
}

/// As "default: 8 for lora, mora; 16 for miss": of the methods that take the flag, of all of them without one.
template <class Value>
std::string defaults(const std::string& flag, const Value& value_of) {
  std::vector<std::pair<std::string, std::string>> names_by_value;
  for (const auto& method : methods()) {
    const bool takes = std::find(method.flags.begin(), method.flags.end(), flag) != method.flags.end();
    if (!takes && !flag.empty()) continue;
    const auto value = value_of(method);
    const auto known = std::find_if(names_by_value.begin(), names_by_value.end(),
                                    [&](const auto& entry) { return entry.first == value; });
    if (known == names_by_value.end()) {
      names_by_value.emplace_back(value, method.name);
    } else {
      known->second += ", " + method.name;
    }
  }
  std::string text = "default: ";
  for (const auto& [value, names] : names_by_value) {
    if (names_by_value.size() == 1) return text + value;
    text += (text.back() == ' ' ? "" : "; ") + value + " for " + names;
  }
  return text;
}

/// A flag that was given where nothing takes it, in one line; empty: none.
inline std::string refusal(const Options& options, const std::string& who, const std::set<std::string>& flags) {
  std::string taken;
  for (const auto& flag : flags) taken += (taken.empty() ? "" : ", ") + flag;
  for (const auto& [flag, words] : options.given) {
    if (flags.count(flag) > 0) continue;
    return "[finetune_gpt2] found " + flag + " for " + who + ", expected " +
           (taken.empty() ? "no flag of another method" : "of the methods' flags no other than " + taken);
  }
  return "";
}

}  // namespace command_line_detail

/// Fills `options`; an exit code where there is nothing left to do, 2 with one line on the error stream for a bad flag.
inline std::optional<int> parse_options(int argc, char** argv, Options& options) {
  const auto cores = static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
  options.threads = std::min(cores, 4);  // more do not speed up so small a model
  options.output = beside_program("finetune_gpt2_adapter");

  constexpr double kLargest = 1e9;
  const auto is_whole = [](double value) { return value == std::floor(value) && value <= kLargest; };
  const auto whole = command_line_detail::number("a whole number from 1 on",
                                                 [=](double value) { return is_whole(value) && value >= 1; });
  const auto whole_or_zero = command_line_detail::number("a whole number from 0 on",
                                                         [=](double value) { return is_whole(value) && value >= 0; });
  const auto positive = command_line_detail::number("a number above 0", [](double value) { return value > 0; });
  using command_line_detail::defaults;
  const auto probability =
      command_line_detail::number("a number from 0 to below 1", [](double value) { return value >= 0 && value < 1; });

  CLI::App app(
      "Fine-tunes a GPT-2 with LoRA to write sentences from fields. Without arguments it pre-trains a small GPT-2 on "
      "made-up "
      "text once, keeps it beside the program, and adapts it to a domain that it has not seen.",
      "finetune_gpt2");
  app.add_option("--model", options.model,
                 "Hugging Face GPT-2 directory (config.json, model.safetensors, vocab.json, merges.txt); "
                 "default: the small GPT-2 of this program");
  auto* const data = app.add_option("--data", options.data,
                                    "training pairs in E2E's format, a line 'slot : value | slot : value||text'; "
                                    "default: a made-up domain");
  auto* const dev = app.add_option("--dev", options.dev, "pairs that the loss is measured on, in the same format");
  data->needs(dev);
  dev->needs(data);
  app.add_option("--output", options.output, "PEFT directory to write (with --method full: a Hugging Face directory)")
      ->capture_default_str();
  std::string method_text = "lora", schedule_text = lora::schedule_name(options.schedule);
  std::vector<std::string> names;
  for (const auto& method : methods()) names.push_back(method.name);
  auto* const method = app.add_option("--method", method_text,
                                      "what is trained: lora+ has a higher lr for B than for A, full trains all "
                                      "weights, the others are methods of the library")
                           ->check(CLI::IsMember(names))
                           ->capture_default_str();
  app.add_option(
         "--rank", options.rank,
         "rank r of each update; " + defaults("--rank", [](const Method& which) { return std::to_string(which.rank); }))
      ->check(whole);
  app.add_option("--alpha", options.alpha, "an update is scaled by alpha / r (rslora: by alpha / sqrt r)")
      ->check(positive)
      ->capture_default_str();
  app.add_option("--dropout", options.dropout, "probability of zeroing an input of the adapters in training, below 1")
      ->check(probability)
      ->capture_default_str();
  app.add_option("--targets", options.targets,
                 "modules to adapt: names (suffixes) with parts in brackets, such as c_attn[q,v] attn.c_proj, or "
                 "all-linear; " +
                     defaults("--targets", [](const Method& which) { return CLI::detail::join(which.targets, " "); }));
  auto* const lr =
      app.add_option("--lr", options.lr,
                     "peak learning rate; " +
                         defaults("", [](const Method& which) { return CLI::detail::to_string(which.learning_rate); }))
          ->check(positive);
  app.add_option("--lora-plus-ratio", options.lora_plus_ratio, "with lora+: lr of B = ratio x lr of A")
      ->check(positive)
      ->capture_default_str();
  app.add_option(
         "--virtual-tokens", options.virtual_tokens,
         "learned vectors in front of every text; " +
             defaults("--virtual-tokens", [](const Method& which) { return std::to_string(which.virtual_tokens); }))
      ->check(whole);
  app.add_option("--schedule", schedule_text,
                 "after the warm-up: linear (to zero), cosine (to zero) or constant learning rate")
      ->check(CLI::IsMember({"linear", "cosine", "constant"}))
      ->capture_default_str();
  app.add_option("--warmup", options.warmup, "steps of linear warm-up")->check(whole_or_zero)->capture_default_str();
  auto* const steps = app.add_option("--steps", options.steps, "optimizer steps")->check(whole)->capture_default_str();
  app.add_option("--epochs", options.epochs, "passes over the training pairs, in place of --steps")
      ->check(positive)
      ->excludes(steps);
  app.add_option("--batch-size", options.batch_size, "pairs a step")->check(whole)->capture_default_str();
  app.add_option("--seed", options.seed, "of the adapters' start, the dropout and the order of the pairs")
      ->check(whole_or_zero)
      ->capture_default_str();
  app.add_option("--threads", options.threads, "of LibTorch; the same seed and threads give the same figures")
      ->check(command_line_detail::number("1 to 1024",
                                          [=](double value) { return is_whole(value) && value >= 1 && value <= 1024; }))
      ->capture_default_str();
  app.add_option("--dtype", options.dtype, "of the base: float32 or bfloat16 (the adapters stay float32)")
      ->check(CLI::IsMember({"float32", "bfloat16"}))
      ->capture_default_str();
  app.add_option("--device", options.device, "cpu or cuda")
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->capture_default_str();
  auto* const checkpoint_every =
      app.add_option("--checkpoint-every", options.checkpoint_every,
                     "steps from one checkpoint to the next, checkpoint.safetensors in --output; default: none")
          ->check(whole);
  auto* const resume =
      app.add_flag("--resume", options.resume,
                   "continue at the checkpoint in --output, to the end that the uninterrupted run has; without one "
                   "start at step 0");
  auto* const evaluations =
      app.add_option("--evaluations", options.evaluations, "dev losses on the way, evenly spaced, in the loss curve")
          ->check(whole)
          ->capture_default_str();
  app.add_option("--dev-pairs", options.dev_pairs, "take the first pairs of the dev set alone; default: all")
      ->check(whole);
  auto* const compare = app.add_flag("--compare", options.compare,
                                     "compare lora, lora+ and full from the same base: each one's lr from the same "
                                     "grid of five, three seeds");
  auto* const compare_methods = app.add_flag("--compare-methods", options.compare_methods,
                                             "compare all methods from the same base: each one's lr from the same "
                                             "grid of five, one seed, 100 steps where --steps is not given");
  compare->excludes(compare_methods);
  auto* const grid =
      app.add_option("--grid", options.grid, "learning rates that a comparison tries in place of its own")
          ->check(positive);
  for (auto* const comparison : {compare, compare_methods}) {
    for (auto* const other : {method, lr, checkpoint_every, resume}) {
      comparison->excludes(other);
    }
  }
  app.add_option("--json", options.json, "file to write the figures to; of a comparison a list 'runs' of them");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == static_cast<int>(CLI::ExitCodes::Success)) return app.exit(error);  // --help
    std::cerr << "error: " << error.what() << " (--help lists the flags)\n";
    return 2;
  }
  if (grid->count() > 0 && !options.compare && !options.compare_methods) {
    std::cerr << "error: [finetune_gpt2] found --grid for one run, expected it with a comparison\n";
    return 2;
  }
  options.method = &method_of(method_text);
  for (const auto& flag : all_flags()) {
    if (app.count(flag) > 0) options.given[flag] = app.get_option(flag)->results();
  }
  std::string refusal;
  if (const auto comparison = comparison_of(options)) {
    refusal = command_line_detail::refusal(options, comparison->flag, comparison->flags());
    if (steps->count() == 0) options.steps = comparison->steps;
    if (evaluations->count() == 0) options.evaluations = comparison->evaluations;
  } else {
    const auto& chosen = *options.method;
    refusal = command_line_detail::refusal(options, chosen.name, {chosen.flags.begin(), chosen.flags.end()});
    if (options.given.count("--rank") == 0) options.rank = chosen.rank;
    if (options.given.count("--targets") == 0) options.targets = chosen.targets;
    if (options.given.count("--virtual-tokens") == 0) options.virtual_tokens = chosen.virtual_tokens;
  }
  if (!refusal.empty()) {
    std::cerr << "error: " << refusal << '\n';
    return 2;
  }
  options.schedule = schedule_text == "linear"   ? lora::ScheduleType::kLinear
                     : schedule_text == "cosine" ? lora::ScheduleType::kCosine
                                                 : lora::ScheduleType::kConstant;
  return std::nullopt;
}
