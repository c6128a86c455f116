#pragma once

#include <lora/train/schedule.h>  // defines: ScheduleType, ScheduleOptions

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

enum class Method { kLora, kLoraPlus, kFull };

inline std::string method_name(Method method) {
  return method == Method::kLora ? "lora" : method == Method::kLoraPlus ? "lora+" : "full";
}

/// What the command line asks for.
struct Options {
  std::string model, data, dev, output, json;
  Method method = Method::kLora;
  std::int64_t rank = 8;
  double alpha = 16.0;
  double dropout = 0.0;
  std::vector<std::string> targets = {"c_attn[q,v]"};
  std::optional<double> lr;
  double lora_plus_ratio = 16.0;
  std::size_t warmup = 20;
  std::size_t steps = 300;
  std::optional<double> epochs;
  std::size_t batch_size = 8;
  std::uint64_t seed = 1;
  int threads = 1;
  std::string dtype = "float32", device = "cpu";
  bool compare = false;
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

  /// The lr that `--compare` finds best for the method in the run without arguments.
  double learning_rate() const {
    return lr.value_or(method == Method::kLora ? 1e-2 : method == Method::kLoraPlus ? 3e-3 : 1e-3);
  }
};
