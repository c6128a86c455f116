#pragma once

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
#include <lora/version.h>

#include <algorithm>
#include <iterator>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// An adapter on the tensors of a checkpoint, read and checked; the tensors are not touched.
class CheckpointAdapter {
 public:
  using Tensors = std::map<std::string, at::Tensor>;

  /// `config` is for files that have none.
  CheckpointAdapter(const Tensors& tensors, AdapterFiles files, std::vector<std::string> problems,
                    const std::optional<LoraConfig>& config, const LoadOptions& options,
                    std::optional<bool> fan_in_fan_out = std::nullopt)
      : problems_(std::move(problems)) {
    hints_ = checkpoint_hints(files);
    if (config) hints_.fan_in_fan_out = config->fan_in_fan_out();
    if (fan_in_fan_out) hints_.fan_in_fan_out = *fan_in_fan_out;
    auto sites = CheckpointWalk(tensors, hints_).walk();
    if (!fan_in_fan_out) check_square(sites);
    take_unplaced(sites.unplaced, tensors, files);
    if (!sites.unplaced.empty() && hints_.factors.size() == sites.unplaced.size())
      throw FormatError(files.place, problems_);
    added_ = std::move(sites.added);
    adapters_ = std::make_shared<ModelAdapters>(std::move(sites.model), std::vector<at::Tensor>{}, nullptr);
    PeftReader reader(*adapters_, kName, options, problems_);
    auto prepared = config ? reader.read(std::move(files), *config) : reader.read(std::move(files));
    add_notes(prepared, sites.square);
    adapters_->attach(std::move(prepared));
  }

  const ModelAdapters& adapters() const { return *adapters_; }
  const std::vector<Site>& sites() const { return adapters_->sites(); }
  /// Names of tensors that the adapter has whole and the checkpoint lacks.
  const std::vector<std::string>& added() const { return added_; }
  const InjectionReport& report() const { return adapters_->adapter(kName).report; }

  static constexpr const char* kName = "default";

 private:
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

}  // namespace detail
LORA_NAMESPACE_END
