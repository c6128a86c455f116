#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <lora/detail/error.h>
#include <lora/detail/finite.h>
#include <lora/detail/json.h>
#include <lora/io/adapter_files.h>
#include <lora/io/config_json.h>
#include <lora/io/peft_files.h>
#include <lora/io/peft_layout.h>
#include <lora/version.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <sstream>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// The only tensor of PEFT's file, without a prefix.
inline constexpr const char* kPromptEmbeddings = "prompt_embeddings";
/// What the meaning of its numbers depends on, kept beside it: a save that was interrupted between the files is found
/// by it.
inline constexpr const char* kPromptSizes[] = {"num_attention_heads", "num_layers", "num_virtual_tokens", "token_dim"};
/// How a start was made, which the tensor holds the result of, and text about a tokenizer.
inline constexpr const char* kPromptStarts[] = {"init_weights", "prompt_tuning_init", "prompt_tuning_init_text",
                                                "tokenizer_kwargs", "tokenizer_name_or_path"};

/// A configuration under all keys that PEFT has for it; a size that is not given is null.
template <class Config>
Json prompt_config_json(const Config& config, const std::map<std::string, Json>& starts) {
  auto written = config_json(config);
  written["modules_to_save"] = nullptr;
  for (const auto& [key, value] : starts) written[key] = value;
  std::map<std::string, Json> sorted;
  for (const auto& [key, value] : written.items()) sorted[key] = value == 0 ? Json() : value;
  Json json;
  for (const auto& [key, value] : sorted) json[key] = value;
  return json;
}

inline std::string sizes_text(at::IntArrayRef sizes) {
  std::ostringstream text;
  text << sizes;
  return text.str();
}

/// Writes a PEFT directory. Throws c10::ValueError for NaN and infinite values, and a FormatError; the older files stay
/// then.
inline void write_prompt(const char* type, Json config, const at::Tensor& embeddings, const std::string& directory) {
  TORCH_CHECK_VALUE(all_finite(embeddings), "[", type,
                    "::save] found NaN or infinite values, expected finite ones in prompt_embeddings; nothing was "
                    "written");
  PeftFiles files;
  for (const auto* key : kPromptSizes) files.own_config[key] = config.at(key);
  files.config = std::move(config);
  files.tensors.emplace(kPromptEmbeddings, embeddings);
  write_peft_directory(files, directory);
}

/// A PEFT directory of virtual tokens, read and checked.
template <class Config>
class PromptReader {
 public:
  explicit PromptReader(const std::string& directory) : directory_(directory) {}

  /// Throws a FormatError with every mismatch.
  void read() {
    const auto config_path = directory_ + "/" + kConfigFile;
    json_ = without_nulls(parse_object(read_text(config_path), config_path));
    const auto file = read_tensors(tensor_path());
    read_config();
    const bool sizes_are_known = problems_.empty();
    check_together(file.metadata);
    for (const auto& [key, tensor] : file.tensors) {
      if (key != kPromptEmbeddings) {
        problems_.push_back("found the tensor " + key + ", expected prompt_embeddings alone");
      } else {
        take(tensor, sizes_are_known);
      }
    }
    if (!embeddings.defined()) problems_.emplace_back("found no tensor prompt_embeddings, expected one");
    if (!problems_.empty()) throw FormatError(directory_, std::move(problems_));
  }

  Config config;
  at::Tensor embeddings;  // [num_virtual_tokens, *], float32 or float64, memory of its own

 private:
  static Json without_nulls(const Json& json) {
    Json result = Json::object();
    for (const auto& [key, value] : json.items()) {
      if (!value.is_null()) result[key] = value;
    }
    return result;
  }

  std::string tensor_path() const {
    std::error_code error;
    const auto path = directory_ + "/" + kTensorFile, pickle = directory_ + "/" + kPickleFile;
    return !std::filesystem::exists(path, error) && std::filesystem::exists(pickle, error) ? pickle : path;
  }

  void read_config() {
    auto read = json_;
    for (const auto* key : kPromptStarts) read.erase(key);
    config = detail::read_config<Config>(read, problems_);
    const auto type = json_.find("peft_type");
    if (type != json_.end() && *type == Config::kPeftType) return;
    throw FormatError(directory_, {problems_.front()});  // another method's files, whose every key would be wrong
  }

  /// Whether the two files were written together, where the tensor file says with what.
  void check_together(const std::map<std::string, std::string>& metadata) {
    const auto written = metadata.find(kOwnConfig);
    if (written == metadata.end()) return;
    const auto own = without_nulls(parse_object(written->second, tensor_path()));
    for (const auto* key : kPromptSizes) {
      const auto value = [key](const Json& in) { return in.contains(key) ? in.at(key) : Json(); };
      if (value(json_) == value(own)) continue;
      problems_.push_back("found " + std::string(key) + " = " + value(json_).dump() + " in " + kConfigFile +
                          ", expected " + value(own).dump() + " as when " + kTensorFile +
                          " was saved: the two files do not belong together; save the virtual tokens again");
    }
  }

  void take(const at::Tensor& tensor, bool sizes_are_known) {
    embeddings = tensor;
    if (!tensor.is_floating_point() || !is_adapter_type(tensor.scalar_type())) {
      problems_.push_back("found the type " + std::string(c10::toString(tensor.scalar_type())) +
                          ", expected F64, F32, F16 or BF16 in prompt_embeddings");
      return;
    }
    if (!all_finite(tensor)) {
      problems_.emplace_back("found NaN or infinite values, expected finite ones in prompt_embeddings");
    }
    const auto expected =
        sizes_are_known ? std::vector<int64_t>{config.num_virtual_tokens(), config.width()} : tensor.sizes().vec();
    if (tensor.sizes() != expected) {
      problems_.push_back("found prompt_embeddings of " + sizes_text(tensor.sizes()) + ", expected " +
                          sizes_text(expected) + " by " + kConfigFile);
    }
    if (!problems_.empty()) return;
    const auto dtype = tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    embeddings = tensor.to(dtype, /*non_blocking=*/false, /*copy=*/true, at::MemoryFormat::Contiguous);
  }

  std::string directory_;
  Json json_;
  std::vector<std::string> problems_;
};

}  // namespace detail
LORA_NAMESPACE_END
