#pragma once

#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <lora/config/lora_config.h>
#include <lora/detail/error.h>
#include <lora/inject/hosts/checkpoint_hosts.h>
#include <lora/inject/model_adapters.h>
#include <lora/inject/nearest_names.h>
#include <lora/inject/report.h>
#include <lora/io/adapter_files.h>
#include <lora/io/checkpoint_hints.h>
#include <lora/io/load_options.h>
#include <lora/io/peft_reader.h>
#include <lora/merge/merge_sites.h>
#include <lora/version.h>
#include <torch/arg.h>
#include <torch/types.h>

#include <algorithm>
#include <map>
#include <memory>
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
  std::map<std::string, torch::Tensor> tensors;  // of the whole checkpoint: those without an adapter as they were given
  std::vector<std::string> changed;              // names of what the adapter changes
  std::vector<std::string> added;                // names of what the adapter has whole and the checkpoint lacked
  InjectionReport report;
};

namespace detail {

/// An adapter on the tensors of a checkpoint, read and checked; the tensors are not touched.
class CheckpointAdapter {
 public:
  using Tensors = std::map<std::string, at::Tensor>;

  /// `config` is for files that have none.
  CheckpointAdapter(const Tensors& tensors, AdapterFiles files, std::vector<std::string> problems,
                    const std::optional<LoraConfig>& config, const MergeCheckpointOptions& options)
      : problems_(std::move(problems)) {
    hints_ = checkpoint_hints(files);
    if (config) hints_.fan_in_fan_out = config->fan_in_fan_out();
    if (options.fan_in_fan_out()) hints_.fan_in_fan_out = *options.fan_in_fan_out();
    auto sites = CheckpointWalk(tensors, hints_).walk();
    if (!options.fan_in_fan_out()) check_square(sites);
    take_unplaced(sites.unplaced, tensors, files);
    if (!sites.unplaced.empty() && hints_.factors.size() == sites.unplaced.size())
      throw FormatError(files.place, problems_);
    added_ = std::move(sites.added);
    adapters_ = std::make_shared<ModelAdapters>(std::move(sites.model), std::vector<at::Tensor>{}, nullptr);
    PeftReader reader(*adapters_, kName, options.load(), problems_);
    auto prepared = config ? reader.read(std::move(files), *config) : reader.read(std::move(files));
    add_notes(prepared, sites.square);
    adapters_->attach(std::move(prepared));
  }

  const ModelAdapters& adapters() const { return *adapters_; }
  const InjectionReport& report() const { return adapters_->adapter(kName).report; }
  static constexpr const char* name() { return kName; }

  /// `place` is the adapter's, for errors.
  MergedCheckpoint merge(const Tensors& tensors, const std::string& place) const {
    const Names names{kName};
    MergedCheckpoint merged{tensors, {}, added_, report()};
    std::vector<std::string> problems;
    for (auto& [index, weight] : merge_sites(adapters_->sites(), names, names)) {
      const auto& site = adapters_->sites()[index];
      const auto name = site.parameter_path();
      if (site.weight->absent()) {
        problems.push_back("found a bias of lora_B at " + site.module_path + ", expected " + name +
                           " in the checkpoint: merged it has no place there");
      }
      if (!contains(added_, name)) merged.changed.push_back(name);
      merged.tensors[name] = weight;
    }
    if (!problems.empty()) throw FormatError(place, std::move(problems));
    return merged;
  }

 private:
  static constexpr const char* kName = "default";

  /// Where the shapes of other matrices say the contrary, what fan_in_fan_out says of square ones is in doubt.
  void check_square(const CheckpointSites& sites) {
    const auto& contrary = hints_.fan_in_fan_out ? sites.rows : sites.columns;
    if (sites.square.empty() || contrary.empty()) return;
    problems_.push_back("found fan_in_fan_out = " + std::string(hints_.fan_in_fan_out ? "true" : "false") + " and " +
                        contrary + " stored as " + (hints_.fan_in_fan_out ? "[out, in]" : "[in, out]") +
                        ", expected them to agree: square matrices, as " + sites.square.front() +
                        ", can be either; say which by the option fan_in_fan_out");
  }

  /// Names the factors without a matrix, and takes them out of what the reader sees.
  void take_unplaced(const std::vector<std::string>& paths, const Tensors& tensors, AdapterFiles& files) {
    std::vector<std::string> modules;
    for (const auto& [name, tensor] : tensors) {
      const auto module = path_before(name, "weight");
      if (!module.empty() && tensor.dim() >= 2) modules.push_back(module);
    }
    for (const auto& path : paths) {
      std::string nearest;
      for (const auto& near : nearest_names(without_base_layer(path), modules)) {
        nearest += (nearest.empty() ? "" : ", ") + near;
      }
      problems_.push_back(
          "found factors for " + path +
          ", expected its weight, a matrix, in the checkpoint; nearest: " + (nearest.empty() ? "none" : nearest));
      for (auto file = files.tensors.begin(); file != files.tensors.end();) {
        const bool here = file->first.compare(0, path.size() + 6, path + ".lora_") == 0;
        file = here ? files.tensors.erase(file) : std::next(file);
      }
    }
  }

  void add_notes(PreparedAdapter& prepared, const std::vector<std::string>& square) const {
    auto& notes = prepared.report.notes;
    if (hints_.fan_in_fan_out && !square.empty()) {
      notes.push_back(square.front() +
                      (square.size() == 1 ? "" : " and " + std::to_string(square.size() - 1) + " more") +
                      " read as [in, out]: square, and fan_in_fan_out is set");
    }
    for (const auto& name : added_) notes.push_back(name + " is not in the checkpoint: the adapter's copy is added");
    const auto targeting = prepared.method->targeting();
    for (const auto& site : adapters_->sites()) {
      const auto found = prepared.sites.find(site_index(site));
      if (found != prepared.sites.end()) {
        if (site.layout == WeightLayout::kTable && !found->second->parts.empty()) {
          notes.push_back(site.parameter_path() +
                          " is an embedding: a head that a model ties to it changes with it, as by PEFT's "
                          "merge_and_unload");
        }
      } else if (is_left_out(site, targeting)) {
        notes.push_back(site.module_path + " is a target without factors in the file: left as it is");
      }
    }
  }

  size_t site_index(const Site& site) const { return static_cast<size_t>(&site - adapters_->sites().data()); }

  /// Whether the names of target_modules mean a matrix that the file has no factors for.
  static bool is_left_out(const Site& site, const Targeting& targeting) {
    const auto matrix = site.parameter == "weight" && site.layout == WeightLayout::kPlain && site.base().dim() >= 2;
    const auto named = [&](const TargetModules& modules, const auto& accept) {
      return std::any_of(modules.entries().begin(), modules.entries().end(),
                         [&](const auto& entry) { return modules.matches(entry, site.module_path) && accept(entry); });
    };
    const auto& saved = targeting.modules_to_save;
    return matrix &&
           named(targeting.modules,
                 [&](const auto& entry) {
                   return targeting.layers.empty() || entry.name == site.module_path ||
                          targeting.layers.contains(site.module_path);
                 }) &&
           !named(targeting.exclude, [](const auto&) { return true; }) &&
           std::none_of(saved.begin(), saved.end(), [&](const auto& name) { return saves(name, site); });
  }

  std::vector<std::string> problems_;
  CheckpointHints hints_;
  std::vector<std::string> added_;
  std::shared_ptr<ModelAdapters> adapters_;
};

inline CheckpointAdapter read_for_checkpoint(const std::map<std::string, torch::Tensor>& tensors,
                                             const std::string& path, const std::optional<LoraConfig>& config,
                                             const MergeCheckpointOptions& options) {
  std::vector<std::string> problems;
  auto files =
      config ? read_adapter_file(path, options.load(), problems) : read_peft_directory(path, options.load(), problems);
  return CheckpointAdapter(tensors, std::move(files), std::move(problems), config, options);
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
  return detail::read_for_checkpoint(tensors, directory, std::nullopt, options).merge(tensors, directory);
}
/// The same for a file of tensors alone, as loralib's, by the given configuration.
inline MergedCheckpoint merge_checkpoint(const std::map<std::string, torch::Tensor>& tensors, const std::string& file,
                                         const LoraConfig& config, const MergeCheckpointOptions& options = {}) {
  return detail::read_for_checkpoint(tensors, file, config, options).merge(tensors, file);
}

LORA_NAMESPACE_END
