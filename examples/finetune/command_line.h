#pragma once

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <iostream>
#include <optional>
#include <string>
#include <thread>

#include "finetune/options.h"  // defines: Options, Method
#include "finetune/paths.h"    // defines: beside_program

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
  std::string method_text = method_name(options.method), schedule_text = lora::schedule_name(options.schedule);
  auto* const method =
      app.add_option("--method", method_text, "lora, lora+ (a higher lr for B than for A) or full (all weights)")
          ->check(CLI::IsMember({"lora", "lora+", "full"}))
          ->capture_default_str();
  app.add_option("--rank", options.rank, "rank r of each update")->check(whole)->capture_default_str();
  app.add_option("--alpha", options.alpha, "an update is scaled by alpha / r")->check(positive)->capture_default_str();
  app.add_option("--dropout", options.dropout, "probability of zeroing an input of the adapters in training, below 1")
      ->check(probability)
      ->capture_default_str();
  app.add_option(
         "--targets", options.targets,
         "modules to adapt: names (suffixes) with parts in brackets, such as c_attn[q,v] attn.c_proj, or all-linear")
      ->capture_default_str();
  auto* const lr =
      app.add_option("--lr", options.lr, "peak learning rate; default: 1e-2 for lora, 3e-3 for lora+, 1e-3 for full")
          ->check(positive);
  app.add_option("--lora-plus-ratio", options.lora_plus_ratio, "with lora+: lr of B = ratio x lr of A")
      ->check(positive)
      ->capture_default_str();
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
  app.add_flag("--compare", options.compare,
               "compare lora, lora+ and full from the same base: each one's lr from the same grid of five, three seeds")
      ->excludes(method)
      ->excludes(lr)
      ->excludes(checkpoint_every)
      ->excludes(resume);
  app.add_option("--json", options.json, "file to write the figures to; with --compare a list 'runs' of them");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == static_cast<int>(CLI::ExitCodes::Success)) return app.exit(error);  // --help
    std::cerr << "error: " << error.what() << " (--help lists the flags)\n";
    return 2;
  }
  options.method = method_text == "lora" ? Method::kLora : method_text == "lora+" ? Method::kLoraPlus : Method::kFull;
  options.schedule = schedule_text == "linear"   ? lora::ScheduleType::kLinear
                     : schedule_text == "cosine" ? lora::ScheduleType::kCosine
                                                 : lora::ScheduleType::kConstant;
  return std::nullopt;
}
