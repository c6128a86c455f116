#pragma once

#include <lora/io/convert_adapter.h>  // defines: convert_adapter, AdapterFormat, ConvertAdapterOptions

#include <string>

#include "lora_tool/adapter_source.h"  // defines: AdapterSource, find_adapter
#include "lora_tool/options.h"         // defines: Options
#include "lora_tool/outcome.h"         // defines: Outcome, Json, judged, UsageError

/// Writes the adapter in another form.
inline Outcome convert(const Options& options) {
  const auto source = find_adapter(options);
  if (!source.config && options.fan_in_fan_out) {
    throw UsageError("--fan-in-fan-out: found a directory, which has a configuration of its own");
  }
  const auto to = options.to == "peft"       ? lora::AdapterFormat::kPeft
                  : options.to == "peft-bin" ? lora::AdapterFormat::kPeftPickle
                                             : lora::AdapterFormat::kLoralib;
  const auto reading = lora::ConvertAdapterOptions()
                           .load(lora::LoadOptions().key_mapping(options.key_mapping))
                           .embeddings(options.embeddings);
  const auto notes = judged([&] {
    return source.config ? lora::convert_adapter(source.path, *source.config, options.out, to, reading)
                         : lora::convert_adapter(source.path, options.out, to, reading);
  });
  auto text = source.path + " written to " + options.out + " (" + options.to + ")\n";
  for (const auto& note : notes) text += "  note: " + note + "\n";
  const Json json = {
      {"command", "convert"}, {"adapter", source.path}, {"out", options.out}, {"to", options.to}, {"notes", notes}};
  return {0, text, json};
}
