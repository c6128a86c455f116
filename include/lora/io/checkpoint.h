#pragma once

#include <c10/util/Exception.h>
#include <lora/io/checkpoint_reader.h>
#include <lora/io/checkpoint_writer.h>
#include <lora/version.h>
#include <torch/arg.h>
#include <torch/types.h>

#include <cstdint>
#include <map>
#include <string>

LORA_NAMESPACE_BEGIN

/// Options of save_checkpoint: `SaveCheckpointOptions().max_shard_bytes(1'000'000'000)`.
class SaveCheckpointOptions {
 public:
  /// The most bytes of tensors in one file; a larger tensor gets a file of its own. Hugging Face's default.
  TORCH_ARG(int64_t, max_shard_bytes) = 5'000'000'000;

  /// Names of tensors with those of the equal ones that stand for them.
  using Tied = std::map<std::string, std::string>;
  /// Tensors that are left out, such as {"lm_head.weight", "transformer.wte.weight"}: where a model ties the two,
  /// transformers ties them again. Without it both are written, which transformers reads alike.
  TORCH_ARG(Tied, tied);
};

/// Reads the tensors of a model's checkpoint by name, on the CPU and mapped as by load_safetensors.
///
/// `path` is a .safetensors file, a .bin, .pt or .pth of torch.save, an index of either (.index.json), or a Hugging
/// Face folder: model.safetensors, model.safetensors.index.json, pytorch_model.bin, pytorch_model.bin.index.json, the
/// first that is there. The shards have to hold just the tensors that the index says. Throws FormatError with every
/// problem.
inline std::map<std::string, torch::Tensor> load_checkpoint(const std::string& path) {
  return detail::load_checkpoint(path);
}

/// Writes tensors into a folder as Hugging Face does, for from_pretrained: model.safetensors, or, where there are more
/// than max_shard_bytes, model-00001-of-0000N.safetensors, … and model.safetensors.index.json.
///
/// Files of an older save that are no part of this one are removed at the end. On an error before that the folder is as
/// it was. config.json is the caller's. Throws FormatError, and c10::ValueError for options that make no sense.
inline void save_checkpoint(const std::map<std::string, torch::Tensor>& tensors, const std::string& directory,
                            const SaveCheckpointOptions& options = {}) {
  TORCH_CHECK_VALUE(options.max_shard_bytes() > 0,
                    "[lora::save_checkpoint] found max_shard_bytes = ", options.max_shard_bytes(),
                    ", expected a positive number");
  detail::CheckpointWriter(directory, detail::without_tied(tensors, options.tied()), options.max_shard_bytes()).write();
}

LORA_NAMESPACE_END
