#pragma once

#include <lora/train/schedule.h>  // defines: ScheduleType, ScheduleOptions

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

struct Start;
struct Trainable;

/// A way to fine-tune; finetune/method.h lists them.
struct Method {
  std::string name;                // on the command line
  std::vector<std::string> flags;  // it takes these of the flags that not every method has
  double learning_rate;            // this and what follows where no flag says otherwise
  std::int64_t rank;
  std::vector<std::string> targets;
  std::int64_t virtual_tokens;
  Trainable (*make)(const Start& start);  // puts into the model what it trains
  bool whole_model = false;               // whether it trains and saves the model itself
};

/// What the command line asks for.
struct Options {
  std::string model, data, dev, output, json;
  const Method* method = nullptr;
  /// The flags that not every method has, where they were given, with their words.
  std::map<std::string, std::vector<std::string>> given;
  std::int64_t rank = 0;
  double alpha = 16.0;
  double dropout = 0.0;
  std::vector<std::string> targets;
  std::int64_t virtual_tokens = 0;
  std::optional<double> lr;
  double lora_plus_ratio = 16.0;
  std::size_t warmup = 20;
  std::size_t steps = 300;
  std::optional<double> epochs;
  std::size_t batch_size = 8;
  std::size_t evaluations = 10;
  std::size_t dev_pairs = 0;  // 0: all
  std::uint64_t seed = 1;
  int threads = 1;
  std::string dtype = "float32", device = "cpu";
  bool compare = false, compare_methods = false;
  std::vector<double> grid;  // learning rates of a comparison; empty: its own
  lora::ScheduleType schedule = lora::ScheduleType::kLinear;
  std::size_t checkpoint_every = 0;  // steps; 0: never
  bool resume = false;

  /// Turns --epochs and the warm-up's limit into steps, once the number of batches is known.
  void settle_steps(std::size_t batches_per_epoch) {
    if (epochs)
      steps = std::max<std::size_t>(1, static_cast<std::size_t>(*epochs * static_cast<double>(batches_per_epoch)));
    warmup = std::min(warmup, steps - 1);
  }

  lora::ScheduleOptions schedule_options() const {
    return lora::ScheduleOptions()
        .type(schedule)
        .warmup_steps(static_cast<std::int64_t>(warmup))
        .total_steps(static_cast<std::int64_t>(steps));
  }

  double learning_rate() const { return lr.value_or(method->learning_rate); }
};
