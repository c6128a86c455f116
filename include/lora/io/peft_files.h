#pragma once

#include <ATen/core/Tensor.h>
#include <lora/detail/atomic_file.h>
#include <lora/detail/error.h>
#include <lora/detail/json.h>
#include <lora/detail/torch_pickle_writer.h>
#include <lora/io/checksum.h>
#include <lora/io/peft_layout.h>
#include <lora/io/safetensors.h>
#include <lora/version.h>

#include <filesystem>
#include <map>
#include <string>
#include <system_error>

LORA_NAMESPACE_BEGIN
namespace detail {

/// What lies in a PEFT directory, or is to.
struct PeftFiles {
  Json config;
  Json own_config;  // null where PEFT's configuration says all
  std::map<std::string, at::Tensor> tensors;
};

enum class PeftTensorFile { kSafetensors, kPickle };

/// Writes both files of a PEFT directory; an error before the end leaves the old ones.
inline void write_peft_directory(const PeftFiles& files, const std::string& directory,
                                 PeftTensorFile form = PeftTensorFile::kSafetensors) {
  std::error_code error;
  std::filesystem::create_directories(directory, error);
  if (error) throw SystemError(directory, "cannot make the directory", error);

  const bool pickled = form == PeftTensorFile::kPickle;
  AtomicFile tensor_file(directory + "/" + (pickled ? kPickleFile : kTensorFile));
  AtomicFile config_file(directory + "/" + kConfigFile);
  if (pickled) {
    TorchPickleWriter(tensor_file).write(files.tensors);
  } else {
    std::map<std::string, std::string> metadata{{"format", "pt"}};
    if (!files.own_config.is_null()) metadata[kOwnConfig] = dump(files.own_config, directory);
    auto scaling = Json::object();
    for (const auto* key : kScalingKeys) {
      if (files.config.contains(key)) scaling[key] = files.config.at(key);
    }
    metadata[kScalingConfig] = dump(scaling, directory);
    add_checksums(files.tensors, metadata);
    write_safetensors(tensor_file, files.tensors, metadata);
  }
  config_file.write(dump(files.config, directory, 2) + "\n");
  tensor_file.sync();
  config_file.sync();
  tensor_file.commit();
  config_file.commit();
}

}  // namespace detail
LORA_NAMESPACE_END
