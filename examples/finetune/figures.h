#pragma once

#include <cmath>
#include <cstdint>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "file_error.h"        // defines: FileError
#include "finetune/options.h"  // defines: Options, Method

/// What one run measures.
struct Figures {
  std::int64_t trainable_parameters = 0;
  std::int64_t total_parameters = 0;  // the base's own, tied weights once
  double dev_loss_before = 0.0, dev_loss_after = 0.0;
  double old_domain_loss_before = 0.0, old_domain_loss_after = 0.0;
  double tokens_per_second = 0.0;      // in training, without padding
  double seconds = 0.0;                // of training alone
  std::int64_t peak_memory_bytes = 0;  // resident, of this process, from the start of the training to its end
  std::int64_t adapter_bytes = 0;      // of the saved adapter; of the saved weights for full fine-tuning
  std::optional<double> merged_max_abs_difference;  // of the logits of one batch, merged against unmerged
};

inline nlohmann::ordered_json to_json(const Figures& figures, const Options& options) {
  return {{"method", options.method->name},
          {"learning_rate", options.learning_rate()},
          {"seed", options.seed},
          {"steps", options.steps},
          {"schedule", lora::schedule_name(options.schedule)},
          {"seconds", figures.seconds},
          {"trainable_parameters", figures.trainable_parameters},
          {"total_parameters", figures.total_parameters},
          {"dev_loss_before", figures.dev_loss_before},
          {"dev_loss_after", figures.dev_loss_after},
          {"old_domain_loss_before", figures.old_domain_loss_before},
          {"old_domain_loss_after", figures.old_domain_loss_after},
          {"tokens_per_second", figures.tokens_per_second},
          {"peak_memory_bytes", figures.peak_memory_bytes},
          {"adapter_bytes", figures.adapter_bytes},
          {"merged_max_abs_difference", figures.merged_max_abs_difference.value_or(0.0)}};
}

inline void write_json(const std::string& path, const nlohmann::ordered_json& json) {
  std::ofstream file(path);
  if (!(file << json.dump(2) << '\n' << std::flush)) throw FileError(path, {"can't be written"});
}
