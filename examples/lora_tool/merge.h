#pragma once

#include <lora/io/checkpoint.h>     // defines: load_checkpoint, save_checkpoint, SaveCheckpointOptions
#include <lora/io/checksum.h>       // defines: add_checksums
#include <lora/io/safetensors.h>    // defines: save_safetensors
#include <lora/merge_checkpoint.h>  // defines: merge_checkpoint, MergedCheckpoint

#include <filesystem>
#include <map>
#include <string>

#include "lora_tool/adapter_source.h"  // defines: AdapterSource, find_adapter
#include "lora_tool/check.h"           // defines: reading_options, to_json, to_text
#include "lora_tool/options.h"         // defines: Options
#include "lora_tool/outcome.h"         // defines: Outcome, Json, judged, UsageError

/// Whether the merged model is to be one file, and not a folder.
inline bool is_one_file(const Options& options) {
  const auto extension = std::filesystem::path(options.out).extension();
  for (const auto* const other : {".bin", ".pt", ".pth", ".json"}) {
    if (extension == other)
      throw UsageError("--out: found " + options.out + ", expected a .safetensors file or a folder");
  }
  const bool one_file = extension == ".safetensors";
  if (one_file && options.max_shard_bytes) {
    throw UsageError("--max-shard-size: found a file as --out, expected a folder for shards");
  }
  return one_file;
}

/// Writes the base with the adapter merged into it.
inline Outcome merge(const Options& options) {
  const bool one_file = is_one_file(options);
  const auto source = find_adapter(options);
  const auto base = lora::load_checkpoint(options.base);
  const auto merged = judged([&] {
    return source.config ? lora::merge_checkpoint(base, source.path, *source.config, reading_options(options))
                         : lora::merge_checkpoint(base, source.path, reading_options(options));
  });
  if (one_file) {
    std::map<std::string, std::string> metadata{{"format", "pt"}};
    lora::add_checksums(merged.tensors, metadata);
    lora::save_safetensors(merged.tensors, options.out, metadata);
  } else {
    auto save = lora::SaveCheckpointOptions();
    if (options.max_shard_bytes) save.max_shard_bytes(*options.max_shard_bytes);
    lora::save_checkpoint(merged.tensors, options.out, save);
  }
  Json json = {{"command", "merge"},   {"adapter", source.path},           {"base", options.base},
               {"out", options.out},   {"tensors", merged.tensors.size()}, {"changed", merged.changed},
               {"added", merged.added}};
  json.update(to_json(merged.report));
  const auto text = source.path + " merged into " + options.base + ", written to " + options.out + ": " +
                    std::to_string(merged.changed.size()) + " of " + std::to_string(merged.tensors.size()) +
                    " tensors changed, " + std::to_string(merged.added.size()) + " added\n";
  return {0, text + to_text(merged.report), json};
}
