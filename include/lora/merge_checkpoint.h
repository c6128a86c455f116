#pragma once

#include <lora/config/lora_config.h>
#include <lora/detail/error.h>
#include <lora/inject/report.h>
#include <lora/io/adapter_files.h>
#include <lora/io/checkpoint_adapter.h>
#include <lora/io/load_options.h>
#include <lora/merge/merge_sites.h>
#include <lora/version.h>
#include <torch/arg.h>
#include <torch/types.h>

#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN

/// How check_checkpoint and merge_checkpoint read an adapter.
class MergeCheckpointOptions {
 public:
  /// Strictness and renamed modules, as of lora::load.
  TORCH_ARG(LoadOptions, load);
  /// Whether square matrices are [in, out], as in Hugging Face's Conv1D, in place of what the adapter's configuration
  /// says. Of other matrices the shapes say it.
  TORCH_ARG(std::optional<bool>, fan_in_fan_out);
};

/// A checkpoint with an adapter merged into it.
struct MergedCheckpoint {
  std::map<std::string, torch::Tensor> tensors;  ///< Of the whole checkpoint; unchanged ones as they were given.
  std::vector<std::string> changed;              ///< Names of what the adapter changes.
  std::vector<std::string> added;                ///< Names of what the adapter has whole and the checkpoint lacked.
  InjectionReport report;                        ///< What went where; without a trainable share.
};

namespace detail {

inline CheckpointAdapter read_for_checkpoint(const std::map<std::string, torch::Tensor>& tensors,
                                             const std::string& path, const std::optional<LoraConfig>& config,
                                             const MergeCheckpointOptions& options) {
  std::vector<std::string> problems;
  auto files =
      config ? read_adapter_file(path, options.load(), problems) : read_peft_directory(path, options.load(), problems);
  return CheckpointAdapter(tensors, std::move(files), std::move(problems), config, options.load(),
                           options.fan_in_fan_out());
}

inline MergedCheckpoint merge_into(const std::map<std::string, torch::Tensor>& tensors, const std::string& path,
                                   const std::optional<LoraConfig>& config, const MergeCheckpointOptions& options) {
  const auto adapter = read_for_checkpoint(tensors, path, config, options);
  const Names names{CheckpointAdapter::kName};
  MergedCheckpoint merged{tensors, {}, adapter.added(), adapter.report()};
  std::vector<std::string> problems;
  for (auto& [index, weight] : merge_sites(adapter.sites(), names, names)) {
    const auto& site = adapter.sites()[index];
    const auto name = site.parameter_path();
    if (site.weight->absent()) {
      problems.push_back("found a bias of lora_B at " + site.module_path + ", expected " + name +
                         " in the checkpoint: merged it has no place there");
    }
    if (!contains(merged.added, name)) merged.changed.push_back(name);
    merged.tensors[name] = weight;
  }
  if (!problems.empty()) throw FormatError(path, std::move(problems));
  return merged;
}

}  // namespace detail

/// Whether the adapter in a PEFT directory fits the tensors of a checkpoint, see load_checkpoint: without a model of
/// C++, by the names and shapes alone. Returns what it would do, the trainable share aside.
///
/// In a file the tensors decide: matrices without factors are left alone, whatever target_modules says, and a note
/// names them. Throws a FormatError with every problem.
inline InjectionReport check_checkpoint(const std::map<std::string, torch::Tensor>& tensors,
                                        const std::string& directory, const MergeCheckpointOptions& options = {}) {
  return detail::read_for_checkpoint(tensors, directory, std::nullopt, options).report();
}
/// The same for a file of tensors alone, as loralib's, by the given configuration.
inline InjectionReport check_checkpoint(const std::map<std::string, torch::Tensor>& tensors, const std::string& file,
                                        const LoraConfig& config, const MergeCheckpointOptions& options = {}) {
  return detail::read_for_checkpoint(tensors, file, config, options).report();
}

/// Merges the adapter in a PEFT directory into a checkpoint: the W′ that Adapters::merge computes, in the checkpoint's
/// layouts and types, and the adapter's copies and token rows; the given tensors are not touched.
///
/// Throws a FormatError with every problem, and a c10::ValueError for NaN or infinite values in W′.
inline MergedCheckpoint merge_checkpoint(const std::map<std::string, torch::Tensor>& tensors,
                                         const std::string& directory, const MergeCheckpointOptions& options = {}) {
  return detail::merge_into(tensors, directory, std::nullopt, options);
}
/// The same for a file of tensors alone, as loralib's, by the given configuration.
inline MergedCheckpoint merge_checkpoint(const std::map<std::string, torch::Tensor>& tensors, const std::string& file,
                                         const LoraConfig& config, const MergeCheckpointOptions& options = {}) {
  return detail::merge_into(tensors, file, config, options);
}

LORA_NAMESPACE_END
