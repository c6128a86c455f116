#pragma once

#include <c10/util/Exception.h>
#include <lora/config/targets.h>
#include <lora/detail/error.h>
#include <lora/detail/finite.h>
#include <lora/detail/json.h>
#include <lora/detail/mmap.h>
#include <lora/detail/python_regex.h>
#include <lora/io/checkpoint_reader.h>
#include <lora/io/load_options.h>
#include <lora/io/peft_layout.h>
#include <lora/io/safetensors.h>
#include <lora/version.h>

#include <algorithm>
#include <cstddef>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// The text of a configuration.
inline std::string read_text(const std::string& path) {
  constexpr size_t kLongest = 10'000'000;
  const auto file = MappedFile::open(path);
  if (file->size() > kLongest) {
    throw FormatError(path, {"has " + std::to_string(file->size()) + " bytes, expected " + std::to_string(kLongest) +
                             " at most in a configuration"});
  }
  if (file->size() == 0) return "";
  return {reinterpret_cast<const char*>(file->data()), file->size()};
}

/// A tensor of an adapter's file, and whether something was found for it to be.
struct FileTensor {
  at::Tensor tensor;
  std::string key;  // in the file
  bool used = false;
};

/// An adapter as it lies on disk: tensors by PEFT's keys without their prefix, and what says how to read them.
struct AdapterFiles {
  std::string place;  // for errors
  std::string config_path;
  std::string tensor_path;
  bool is_loralib = false;                   // parts of a fused projection lie as loralib's MergedLinear has them
  std::vector<std::string> embeddings = {};  // names of modules in loralib's file, whose keys do not say it
  Json config;
  bool tensors_choose = false;     // which modules are adapted, in place of the configuration
  std::vector<std::string> notes;  // what a user has to know
  std::map<std::string, std::string> metadata;
  std::map<std::string, FileTensor> tensors;
};

/// Whether numbers of the type can be an adapter's: counters of buffers are whole.
inline bool is_adapter_type(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16 || type == at::kLong;
}

inline bool ends_with_name(const std::string& key, const std::string& name) {
  return TargetModules::is_path_or_suffix(name, key);
}

/// PEFT's key without its prefix for a key of either library: loralib's "h.0.fc.lora_A" is "h.0.fc.lora_A.weight".
/// Empty where it is neither's.
inline std::string peft_key(const std::string& key, bool is_loralib) {
  const std::string prefix = kPeftPrefix;
  if (is_loralib) return ends_with_name(key, "lora_A") || ends_with_name(key, "lora_B") ? key + ".weight" : key;
  if (key.compare(0, prefix.size(), prefix) == 0) return key.substr(prefix.size());
  const std::string shared = kModelPrefix;
  return key.compare(0, shared.size(), shared) == 0 ? key : "";
}

/// Puts the tensors of a file under their keys, renamed; every tensor that cannot be an adapter's is a problem.
inline void add_tensors(AdapterFiles& files, const std::map<std::string, at::Tensor>& tensors,
                        const LoadOptions& options, std::vector<std::string>& problems) {
  std::vector<PythonSubstitution> renames;
  for (const auto& [pattern, replacement] : options.key_mapping()) renames.emplace_back(pattern, replacement);
  for (const auto& [key, tensor] : tensors) {
    auto name = peft_key(key, files.is_loralib);
    if (name.empty()) {
      problems.push_back("found the tensor " + key + ", expected names that begin with " + kPeftPrefix);
      continue;
    }
    for (const auto& rename : renames) {
      if (const auto renamed = rename(name)) {
        name = *renamed;
        break;
      }
    }
    if (!is_adapter_type(tensor.scalar_type())) {
      problems.push_back("found the type " + std::string(c10::toString(tensor.scalar_type())) +
                         ", expected F64, F32, F16 or BF16 in " + key);
    } else if (!all_finite(tensor)) {
      problems.push_back("found NaN or infinite values, expected finite ones in " + key);
    }
    if (!files.tensors.emplace(name, FileTensor{tensor, key}).second) {
      problems.push_back("found two tensors for " + name + ", expected one; change key_mapping");
    }
  }
}

/// The tensors of one file, whose name has to say its kind.
inline SafetensorsFile read_tensors(const std::string& path) {
  if (!has_tensor_file_name(path)) {
    throw FormatError(path, {"found a name that says no format, expected .safetensors, .bin, .pt or .pth"});
  }
  return read_tensor_file(path);
}

/// Takes patterns that std::regex does not read like Python out of the configuration: a file of PEFT has tensors for
/// exactly the modules that they chose.
inline void leave_out_unsupported_patterns(AdapterFiles& files) {
  for (const auto* key : {"target_modules", "exclude_modules"}) {
    const auto entry = files.config.find(key);
    if (entry == files.config.end() || !entry->is_string()) continue;
    try {
      TargetModules(entry->get<std::string>());
    } catch (const UnsupportedPattern& unsupported) {
      files.notes.push_back(std::string(key) +
                            " is passed over, the tensors choose the modules: " + unsupported.what_without_backtrace());
      files.tensors_choose = true;
      *entry = Json();
    } catch (const c10::ValueError&) {  // a problem that the configuration's reader finds
    }
  }
}

/// A PEFT directory, with its tensors in adapter_model.safetensors or adapter_model.bin.
inline AdapterFiles read_peft_directory(const std::string& directory, const LoadOptions& options,
                                        std::vector<std::string>& problems) {
  AdapterFiles files;
  files.place = directory;
  files.config_path = directory + "/" + kConfigFile;
  files.config = parse_object(read_text(files.config_path), files.config_path);
  leave_out_unsupported_patterns(files);
  files.tensor_path = directory + "/" + kTensorFile;
  std::error_code error;
  const bool pickled = !std::filesystem::exists(files.tensor_path, error) &&
                       std::filesystem::exists(directory + "/" + kPickleFile, error);
  if (pickled) files.tensor_path = directory + "/" + kPickleFile;
  auto file = read_tensors(files.tensor_path);
  files.metadata = std::move(file.metadata);
  add_tensors(files, file.tensors, options, problems);
  return files;
}

/// The adapters of a directory by name, as Adapters::save lays them out: "default" first, the others in order.
inline std::vector<std::pair<std::string, std::string>> adapter_folders(const std::string& directory) {
  std::vector<std::pair<std::string, std::string>> folders;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(directory, error)) {
    if (std::filesystem::exists(entry.path() / kConfigFile, error)) {
      folders.emplace_back(entry.path().filename().string(), entry.path().string());
    }
  }
  std::sort(folders.begin(), folders.end());
  if (std::filesystem::exists(directory + "/" + kConfigFile, error))
    folders.insert(folders.begin(), {"default", directory});
  if (folders.empty())
    throw FormatError(directory, {std::string("found no ") + kConfigFile + " in it or its sub-folders"});
  return folders;
}

/// A file of tensors alone, under PEFT's keys or loralib's, which says nothing of its configuration.
inline AdapterFiles read_adapter_file(const std::string& path, const LoadOptions& options,
                                      std::vector<std::string>& problems) {
  AdapterFiles files;
  files.place = files.config_path = files.tensor_path = path;
  const auto file = read_tensors(path);
  files.is_loralib = std::none_of(file.tensors.begin(), file.tensors.end(), [](const auto& tensor) {
    return tensor.first.compare(0, std::string(kPeftPrefix).size(), kPeftPrefix) == 0;
  });
  add_tensors(files, file.tensors, options, problems);
  return files;
}

}  // namespace detail
LORA_NAMESPACE_END
