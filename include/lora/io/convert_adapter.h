#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <c10/core/GradMode.h>
#include <lora/config/lora_config.h>
#include <lora/detail/error.h>
#include <lora/io/adapter_files.h>
#include <lora/io/checkpoint_adapter.h>
#include <lora/io/load_options.h>
#include <lora/io/peft_files.h>
#include <lora/io/peft_writer.h>
#include <lora/io/stand_in_base.h>
#include <lora/io/torch_pickle.h>
#include <lora/methods/lora.h>
#include <lora/version.h>
#include <torch/arg.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN

/// The forms of an adapter on disk.
enum class AdapterFormat {
  kPeft,        ///< A directory with adapter_config.json and adapter_model.safetensors.
  kPeftPickle,  ///< A directory with adapter_config.json and adapter_model.bin.
  kLoralib,     ///< A file of loralib's lora_state_dict, saved by torch.save; it holds no configuration.
};

/// How convert_adapter reads an adapter.
class ConvertAdapterOptions {
 public:
  /// Renamed modules, as of lora::load: the result has the new names.
  TORCH_ARG(LoadOptions, load);
  /// The modules of a loralib file, by path or its end behind a dot, that are embeddings: the file does not say it.
  TORCH_ARG(std::vector<std::string>, embeddings);
};

namespace detail {

/// An adapter read without its base, to be written in another form: the same tensors in the types of their file.
class AdapterConversion {
 public:
  AdapterConversion(AdapterFiles files, std::vector<std::string> problems, const std::optional<LoraConfig>& config,
                    const LoadOptions& options)
      : types_(types_of(files)), source_(read(std::move(files), std::move(problems), config, options)) {}

  void write_peft(const std::string& directory, PeftTensorFile form) const {
    auto files = PeftWriter(source_.adapters(), CheckpointAdapter::kName).files();
    if (form == PeftTensorFile::kPickle && !files.own_config.is_null()) {
      throw FormatError(directory, {std::string("found parts of fused projections, expected whole ones: ") +
                                    kPickleFile + " has no place for their row ranges; write " + kTensorFile});
    }
    const bool hidden = form == PeftTensorFile::kPickle && std::filesystem::exists(directory + "/" + kTensorFile);
    if (hidden) {
      throw FormatError(directory, {std::string("found ") + kTensorFile + ", which is read in place of " + kPickleFile +
                                    ", expected a directory without it; remove it or choose another"});
    }
    for (auto& [key, tensor] : files.tensors) tensor = typed(tensor, key.substr(std::string(kPeftPrefix).size()));
    write_peft_directory(files, directory, form);
  }

  /// Returns what the file cannot say: rank and alpha of its layers.
  std::vector<std::string> write_loralib(const std::string& path) const {
    std::map<std::string, at::Tensor> tensors;
    std::map<std::string, std::string> layers;  // by rank and alpha, the first of them
    std::vector<std::string> problems;
    const c10::NoGradGuard no_grad;
    for (const auto& site : source_.sites()) {
      const auto* adapter = site.find(CheckpointAdapter::kName);
      if (adapter == nullptr) continue;
      const auto why_not = why_not_loralib(site, *adapter);
      if (!why_not.empty()) {
        problems.push_back("found " + why_not + " at " + site.path + ", which loralib's files have no place for");
        continue;
      }
      if (adapter->copy.defined()) {
        tensors[site.parameter_path()] = typed(adapter->copy, site.parameter_path());
      }
      if (adapter->parts.empty()) continue;
      std::vector<at::Tensor> A, B;
      for (const auto& part : adapter->parts) {
        A.push_back(lora_update(part).low_rank().A);
        B.push_back(lora_update(part).low_rank().B);
      }
      tensors[site.path + ".lora_A"] = typed(at::cat(A), PeftKeys::A(site));
      tensors[site.path + ".lora_B"] = typed(at::cat(B), PeftKeys::B(site));
      const auto rank = A.front().size(0);
      std::ostringstream layer;
      layer << "r = " << rank
            << ", lora_alpha = " << adapter->parts.front().update->scaling() * static_cast<double>(rank);
      layers.emplace(layer.str(), site.path);
    }
    if (!problems.empty()) throw FormatError(path, std::move(problems));
    save_torch_pickle(tensors, path);
    std::vector<std::string> notes;
    const auto& method = static_cast<const LoRA&>(*source_.adapters().adapter(CheckpointAdapter::kName).method);
    const std::string transposed = method.config().fan_in_fan_out() ? ", fan_in_fan_out" : "";
    for (const auto& [layer, first] : layers) {
      notes.push_back("the file says neither rank nor alpha, build its layers with " + layer + transposed +
                      (layers.size() == 1 ? "" : ", as " + first));
    }
    return notes;
  }

 private:
  using Types = std::map<std::string, at::ScalarType>;

  static Types types_of(const AdapterFiles& files) {
    Types types;
    for (const auto& [key, file] : files.tensors) {
      types[without_base_layer(key)] = file.tensor.scalar_type();
      for (const auto* factor : {"lora_A", "lora_B"}) {  // an embedding's have another name in PEFT's files
        const auto path = path_before(key, std::string(factor) + ".weight");
        if (!path.empty()) types[path + ".lora_embedding_" + std::string(factor).back()] = file.tensor.scalar_type();
      }
    }
    return types;
  }

  static CheckpointAdapter read(AdapterFiles files, std::vector<std::string> problems,
                                const std::optional<LoraConfig>& config, const LoadOptions& options) {
    const auto base = StandInBase(files, config ? config->targeting() : Targeting()).tensors();
    return CheckpointAdapter(base, std::move(files), std::move(problems), config, options, /*fan_in_fan_out=*/false);
  }

  at::Tensor typed(const at::Tensor& tensor, const std::string& key) const {
    return tensor.to(types_.at(without_base_layer(key)));
  }

  static std::string why_not_loralib(const Site& site, const WeightAdapter& adapter) {
    if (site.layout == WeightLayout::kKernel && !adapter.parts.empty()) return "factors of a convolution";
    const bool attention = site.parameter != "weight" || site.module_file_path != site.module_path;
    if (attention && !adapter.parts.empty()) return "factors of a MultiheadAttention";
    if (!adapter.offsets.empty()) return "the bias of lora_B";
    if (adapter.rows.defined()) return "rows of single tokens";
    for (const auto& part : adapter.parts) {
      const auto &first = lora_update(adapter.parts.front()), &other = lora_update(part);
      if (other.rank() != first.rank() || !same(other.scaling(), first.scaling())) return "parts of different ranks";
    }
    return "";
  }

  Types types_;
  CheckpointAdapter source_;
};

/// Writes the files of a method whose tensors say no weight's shape, or mean nothing without the base: as they are.
inline void rewrite_adapter(const AdapterFiles& files, std::vector<std::string> problems, const std::string& out,
                            AdapterFormat to) {
  read_any_config(files.config, problems);
  if (to == AdapterFormat::kLoralib) {
    problems.push_back("found the method " + files.config.value("peft_type", Json()).dump() +
                       " or a start from the base, expected LoRA: loralib's files have no place for another");
  }
  PeftFiles copy{files.config, Json(), {}};
  const auto own = files.metadata.find(kOwnConfig);
  if (own != files.metadata.end()) copy.own_config = parse_object(own->second, files.tensor_path);
  for (const auto& [key, file] : files.tensors) {
    copy.tensors[key.compare(0, std::string(kModelPrefix).size(), kModelPrefix) == 0 ? key : kPeftPrefix + key] =
        file.tensor;
  }
  if (to == AdapterFormat::kPeftPickle && !copy.own_config.is_null()) {
    problems.push_back(std::string("found parts of fused projections, expected whole ones: ") + kPickleFile +
                       " has no place for their row ranges; write " + kTensorFile);
  }
  if (!problems.empty()) throw FormatError(files.place, std::move(problems));
  write_peft_directory(copy, out, to == AdapterFormat::kPeft ? PeftTensorFile::kSafetensors : PeftTensorFile::kPickle);
}

inline std::vector<std::string> convert_adapter(const std::string& path, const std::optional<LoraConfig>& config,
                                                const std::string& out, AdapterFormat to,
                                                const ConvertAdapterOptions& options) {
  std::vector<std::string> problems;
  auto files =
      config ? read_adapter_file(path, options.load(), problems) : read_peft_directory(path, options.load(), problems);
  files.embeddings = options.embeddings();
  const bool is_lora = config || files.config.value("peft_type", Json()) == LoraConfig::kPeftType;
  if (!is_lora || starts_from_base(files.config)) {
    rewrite_adapter(files, std::move(problems), out, to);
    return {};
  }
  const AdapterConversion conversion(std::move(files), std::move(problems), config, options.load());
  if (to == AdapterFormat::kLoralib) return conversion.write_loralib(out);
  conversion.write_peft(out, to == AdapterFormat::kPeft ? PeftTensorFile::kSafetensors : PeftTensorFile::kPickle);
  return {};
}

}  // namespace detail

/// Writes the adapter in a PEFT directory in another form, each tensor bit for bit; returns what the caller has to know
/// where the form cannot say it. Throws a FormatError with every problem of the adapter, and with everything that the
/// form has no place for; then nothing is written.
inline std::vector<std::string> convert_adapter(const std::string& directory, const std::string& out, AdapterFormat to,
                                                const ConvertAdapterOptions& options = {}) {
  return detail::convert_adapter(directory, std::nullopt, out, to, options);
}
/// The same for a file of tensors alone, as loralib's, by the given configuration.
inline std::vector<std::string> convert_adapter(const std::string& file, const LoraConfig& config,
                                                const std::string& out, AdapterFormat to,
                                                const ConvertAdapterOptions& options = {}) {
  return detail::convert_adapter(file, config, out, to, options);
}

LORA_NAMESPACE_END
