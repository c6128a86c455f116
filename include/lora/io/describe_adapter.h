#pragma once

#include <ATen/core/Tensor.h>
#include <lora/config/lora_config.h>
#include <lora/detail/error.h>
#include <lora/detail/safetensors_dtypes.h>
#include <lora/io/adapter_files.h>
#include <lora/io/checkpoint_adapter.h>
#include <lora/io/checkpoint_hints.h>
#include <lora/io/checksum.h>
#include <lora/io/stand_in_base.h>
#include <lora/methods/lora.h>
#include <lora/version.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN

/// What an adapter on disk is, without its base.
struct AdapterDescription {
  /// The factors of one module.
  struct Module {
    std::string path;               ///< As in PEFT's files: "h.0.attn.c_attn".
    std::string kind;               ///< "linear", "embedding" or "convolution".
    int64_t rank = 0;               ///< Rows of A; 0: the method has no A.
    int64_t out_features = 0;       ///< Rows of B; 0: the file does not say them.
    int64_t in_features = 0;        ///< Columns of A as a matrix; 0: the file does not say them.
    std::optional<double> alpha;    ///< Of this module; nothing where the file has no configuration.
    std::optional<double> scaling;  ///< s in ΔW = s·B·A; nothing where the file has no configuration.
    int64_t parameters = 0;         ///< Of all its tensors.
  };
  /// A tensor that the adapter has whole.
  struct Copy {
    std::string name;            ///< In the model.
    std::vector<int64_t> sizes;  ///< Its shape.
  };

  std::string path;                             ///< Of the directory, or of the file.
  std::string format;                           ///< "peft", "peft-bin", "loralib", "peft-tensors": PEFT's keys alone.
  std::string method = "LORA";                  ///< PEFT's name of it.
  std::string config;                           ///< The configuration file's JSON; empty: there is none.
  std::vector<Module> modules;                  ///< By path.
  std::vector<Copy> copies;                     ///< Of modules_to_save, biases and embeddings that are saved whole.
  std::map<std::string, int64_t> rows;          ///< Rows of single tokens, by embedding.
  std::map<std::string, int64_t> dtypes;        ///< Tensors of each type, by safetensors' names: "F32".
  std::map<std::string, std::string> metadata;  ///< Of a safetensors file.
  bool has_checksums = false;                   ///< This library's, and right; files of other programs have none.
  int64_t tensors = 0;                          ///< How many there are.
  int64_t parameters = 0;                       ///< Their elements.
  int64_t bytes = 0;                            ///< Their bytes.
  std::vector<std::string> problems;            ///< Why no model could load it; empty: none is known.
};

namespace detail {

/// Describes what was read of an adapter.
class AdapterDescriber {
 public:
  AdapterDescriber(const AdapterFiles& files, const std::optional<LoraConfig>& config)
      : files_(files), hints_(checkpoint_hints(files)), config_(config) {
    if (config_) method_ = std::make_shared<const LoRA>(*config_);
  }

  AdapterDescription describe() const {
    AdapterDescription found;
    found.path = files_.place;
    found.metadata = files_.metadata;
    found.has_checksums = files_.metadata.count(kChecksums) != 0;
    for (const auto& [key, file] : files_.tensors) {
      ++found.tensors;
      const auto* dtype = safetensors_dtype_name(file.tensor.scalar_type());
      ++found.dtypes[dtype == nullptr ? c10::toString(file.tensor.scalar_type()) : dtype];
      found.parameters += file.tensor.numel();
      found.bytes += static_cast<int64_t>(file.tensor.nbytes());
    }
    for (const auto& [path, factors] : hints_.factors) found.modules.push_back(module(path, factors));
    for (const auto& [name, tensor] : hints_.copies) found.copies.push_back({name, tensor.sizes().vec()});
    for (const auto& path : hints_.tables) {
      const auto& values = files_.tensors.at(path + ".token_adapter.trainable_tokens_delta").tensor;
      found.rows[path] = values.dim() == 0 ? 1 : values.size(0);
    }
    return found;
  }

  /// The factors that are there once only, which needs no configuration to be wrong.
  std::vector<std::string> unpaired() const {
    std::vector<std::string> problems;
    if (hints_.factors.empty())
      problems.push_back("found no factors, expected lora_A and lora_B of at least one layer");
    for (const auto& [path, factors] : hints_.factors) {
      if (factors.A.empty() || factors.B.empty()) {
        problems.push_back(std::string("found no ") + (factors.A.empty() ? "lora_A" : "lora_B") + " for " + path +
                           ", expected both factors");
      }
    }
    return problems;
  }

 private:
  AdapterDescription::Module module(const std::string& path, const CheckpointHints::Factors& factors) const {
    AdapterDescription::Module module;
    module.path = path;
    module.kind = factors.embedding ? "embedding" : factors.A.size() > 2 ? "convolution" : "linear";
    if (!factors.A.empty()) module.rank = factors.A[0];
    if (!factors.B.empty()) module.out_features = factors.B[0];
    module.in_features = factors.A.size() < 2 ? 0 : 1;
    for (size_t i = 1; i < factors.A.size(); ++i) module.in_features *= factors.A[i];
    module.parameters = factors.parameters;
    if (method_ != nullptr) {
      const auto base_layer = path.rfind(".base_layer.");
      const std::vector<std::string> names{base_layer == std::string::npos ? path : path.substr(0, base_layer)};
      module.alpha = method_->alpha(names);
      module.scaling = method_->scaling(names);
    }
    return module;
  }

  const AdapterFiles& files_;
  CheckpointHints hints_;
  std::optional<LoraConfig> config_;
  std::shared_ptr<const LoRA> method_;
};

/// Why no base could take the adapter.
inline std::vector<std::string> problems_without_base(const AdapterFiles& files, std::vector<std::string> problems,
                                                      const std::optional<LoraConfig>& config) {
  try {
    const auto base = StandInBase(files, config ? config->targeting() : Targeting()).tensors();
    CheckpointAdapter(base, files, std::move(problems), config, {}, /*fan_in_fan_out=*/false);
    return {};
  } catch (const FormatError& error) {
    return error.problems();
  }
}

inline AdapterDescription describe_file(const std::string& path, const std::optional<LoraConfig>& config) {
  std::vector<std::string> problems;
  const auto files = read_adapter_file(path, {}, problems);
  const AdapterDescriber describer(files, config);
  auto found = describer.describe();
  found.format = files.is_loralib ? "loralib" : "peft-tensors";
  for (auto& problem : describer.unpaired()) problems.push_back(std::move(problem));
  found.problems = config && problems.empty() ? problems_without_base(files, problems, config) : problems;
  return found;
}

inline AdapterDescription describe_directory(const std::string& path) {
  std::vector<std::string> problems, of_config;
  const auto files = read_peft_directory(path, {}, problems);
  const auto any = read_any_config(files.config, of_config);
  const auto* lora = dynamic_cast<const TypedConfig<LoraConfig>*>(any.get());
  std::optional<LoraConfig> config;
  if (lora != nullptr && of_config.empty()) config = lora->config;
  AdapterDescription found;
  if (any != nullptr) {
    found = AdapterDescriber(files, config).describe();
  } else {
    found.path = path;
  }
  found.format = ends_with_name(files.tensor_path, "bin") ? "peft-bin" : "peft";
  found.config = dump(files.config, path);
  const auto method = files.config.find("peft_type");
  if (method != files.config.end() && method->is_string()) found.method = method->get<std::string>();
  // A configuration that cannot be read is an error before the tensors are looked at.
  const bool needs_base = starts_from_base(files.config);
  found.problems = config && !needs_base ? problems_without_base(files, problems, std::nullopt) : problems;
  for (auto& problem : of_config) found.problems.push_back(std::move(problem));
  return found;
}

}  // namespace detail

/// Describes the adapter in a PEFT directory, or in a file of tensors alone, which says less; `config` is the file's.
/// Throws a FormatError where there is nothing to describe: no such files, or damaged ones.
inline AdapterDescription describe_adapter(const std::string& path, const std::optional<LoraConfig>& config = {}) {
  std::error_code error;
  return std::filesystem::is_directory(path, error) ? detail::describe_directory(path)
                                                    : detail::describe_file(path, config);
}

LORA_NAMESPACE_END
