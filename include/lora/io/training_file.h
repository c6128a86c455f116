#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>
#include <lora/detail/error.h>
#include <lora/detail/finite.h>
#include <lora/detail/json.h>
#include <lora/detail/random_state.h>
#include <lora/io/checksum.h>
#include <lora/io/safetensors.h>
#include <lora/version.h>

#include <exception>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

// The file of a TrainingState is a safetensors file with checksums. Its metadata holds the layout's version and, as
// JSON, everything that is no tensor.
inline constexpr const char* kTrainingVersionKey = "lora.training_state";
inline constexpr const char* kTrainingVersion = "1";
inline constexpr const char* kTrainingRunKey = "lora.training_state.run";

inline constexpr const char* kTensorPrefix = "tensors/";
inline constexpr const char* kRandomPrefix = "random/";
inline constexpr const char* kValuePrefix = "values/";

using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

struct TrainingFile {
  Json run;
  std::map<std::string, torch::Tensor> tensors;
};

/// Writes the file whole or not at all: whatever ends the program on the way, the name stands for the old file or for
/// the new one. Throws a FormatError.
inline void write_training_file(const std::string& path, const TrainingFile& file) {
  std::map<std::string, std::string> metadata{
      {"format", "pt"}, {kTrainingVersionKey, kTrainingVersion}, {kTrainingRunKey, dump(file.run, path)}};
  add_checksums(file.tensors, metadata);
  save_safetensors(file.tensors, path, metadata);
}

/// Reads such a file. Throws a FormatError where it is none, or damaged.
inline TrainingFile read_training_file(const std::string& path) {
  auto file = load_safetensors_with_metadata(path);
  check_checksums(file, path);
  const auto version = file.metadata[kTrainingVersionKey];
  if (version != kTrainingVersion) {
    throw FormatError(path, {version.empty() ? "found no training state, expected a file of lora::TrainingState::save"
                                             : "found a training state of version " + version + ", expected version " +
                                                   kTrainingVersion});
  }
  return {parse_object(file.metadata[kTrainingRunKey], path, "a training state"), std::move(file.tensors)};
}

/// Puts a run's tensors and the random states of its devices into the file. Throws c10::ValueError for NaN and infinite
/// values in a trained tensor: a run that diverged must not replace a good file.
inline void put_tensors(TrainingFile& file, const NamedTensors& tensors, const std::vector<at::Device>& devices) {
  for (const auto& [name, tensor] : tensors) {
    TORCH_CHECK_VALUE(!tensor.requires_grad() || all_finite(tensor),
                      "[lora::TrainingState::save] found NaN or infinite values in ", name,
                      ", expected finite ones; nothing was written");
    file.tensors[kTensorPrefix + name] = tensor;
  }
  for (const auto device : devices) file.tensors[kRandomPrefix + device.str()] = random_state(device);
}

/// Copies into the tensors and the devices' generators what compare_tensors has found in order.
inline void take_tensors(const TrainingFile& file, const NamedTensors& tensors,
                         const std::vector<at::Device>& devices) {
  for (const auto& [name, tensor] : tensors) tensor.copy_(file.tensors.at(kTensorPrefix + name));
  for (const auto device : devices) set_random_state(device, file.tensors.at(kRandomPrefix + device.str()));
}

/// Reports where the file's tensors and random states are not those of a run with these tensors on these devices.
inline void compare_tensors(const TrainingFile& file, const NamedTensors& tensors,
                            const std::vector<at::Device>& devices, std::vector<std::string>& problems) {
  std::set<std::string> known;
  const auto find = [&](const std::string& name) -> const at::Tensor* {
    known.insert(name);
    const auto found = file.tensors.find(name);
    if (found != file.tensors.end()) return &found->second;
    problems.push_back("found no " + name + ", expected it in the file");
    return nullptr;
  };
  const auto kind = [](const at::Tensor& tensor) { return c10::str(tensor.scalar_type(), " ", tensor.sizes()); };
  for (const auto& [name, tensor] : tensors) {
    const auto* found = find(kTensorPrefix + name);
    if (found == nullptr || kind(*found) == kind(tensor)) continue;
    problems.push_back("found " + kind(*found) + ", expected " + kind(tensor) + " for " + kTensorPrefix + name);
  }
  for (const auto device : devices) {
    const auto* found = find(kRandomPrefix + device.str());
    try {
      if (found != nullptr) check_random_state(device, *found);
    } catch (const std::exception&) {
      problems.push_back("found no random state, expected one of this LibTorch as " + (kRandomPrefix + device.str()));
    }
  }
  for (const auto& [name, tensor] : file.tensors) {
    const bool ours = name.rfind(kTensorPrefix, 0) == 0 || name.rfind(kRandomPrefix, 0) == 0;
    if (ours && known.count(name) == 0) problems.push_back("found " + name + ", expected no such part of the run");
  }
}

}  // namespace detail
LORA_NAMESPACE_END
