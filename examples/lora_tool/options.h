#pragma once

#include <lora/config/lora_config.h>  // defines: BiasCopies
#include <lora/io/load_options.h>     // defines: LoadOptions

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

enum class Command { kInspect, kCheck, kMerge, kConvert };

/// What the command line asks for.
struct Options {
  Command command = Command::kInspect;
  std::string path, name, base, out, to = "peft";
  bool json = false;
  lora::LoadOptions::KeyMapping key_mapping;
  std::optional<std::int64_t> max_shard_bytes;
  std::optional<bool> fan_in_fan_out;

  // For files of tensors alone, which say nothing of their configuration.
  std::optional<std::int64_t> rank;
  std::optional<double> alpha;
  std::vector<std::string> targets, modules_to_save, embeddings;
  std::string bias;

  /// The first flag of those that was given, or empty.
  std::string configuration_flag() const {
    return rank                       ? "--r"
           : alpha                    ? "--alpha"
           : !targets.empty()         ? "--targets"
           : !modules_to_save.empty() ? "--modules-to-save"
           : !embeddings.empty()      ? "--embeddings"
           : !bias.empty()            ? "--bias"
                                      : "";
  }
};
