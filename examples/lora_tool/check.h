#pragma once

#include <lora/inject/report.h>     // defines: InjectionReport
#include <lora/io/checkpoint.h>     // defines: load_checkpoint
#include <lora/merge_checkpoint.h>  // defines: check_checkpoint, MergeCheckpointOptions

#include <map>
#include <sstream>
#include <string>

#include "lora_tool/adapter_source.h"  // defines: AdapterSource, find_adapter
#include "lora_tool/options.h"         // defines: Options
#include "lora_tool/outcome.h"         // defines: Outcome, Json, problems_of

inline Json to_json(const lora::InjectionReport& report) {
  Json entries = Json::array();
  for (const auto& entry : report.entries) {
    Json modules = Json::array();
    for (const auto& module : entry.modules) {
      modules.push_back({{"path", module.path + module.parts},
                         {"out_features", module.out_features},
                         {"in_features", module.in_features},
                         {"parameters", module.parameters}});
    }
    entries.push_back({{"target", entry.target}, {"modules", modules}});
  }
  return {{"entries", entries}, {"notes", report.notes}};
}

inline std::string to_text(const lora::InjectionReport& report) {
  std::ostringstream text;
  lora::detail::print_adapter(text, report);
  return text.str().substr(text.str().find('\n') + 1);  // the first line holds a name that only models need
}

inline lora::MergeCheckpointOptions reading_options(const Options& options) {
  return lora::MergeCheckpointOptions()
      .load(lora::LoadOptions().key_mapping(options.key_mapping))
      .fan_in_fan_out(options.fan_in_fan_out);
}

/// Would the adapter load on the base?
inline Outcome check(const Options& options) {
  const auto source = find_adapter(options);
  const auto base = lora::load_checkpoint(options.base);
  Json json = {{"command", "check"}, {"adapter", source.path}, {"base", options.base}};
  try {
    const auto report = source.config
                            ? lora::check_checkpoint(base, source.path, *source.config, reading_options(options))
                            : lora::check_checkpoint(base, source.path, reading_options(options));
    json["loads"] = true;
    json["problems"] = Json::array();
    json.update(to_json(report));
    return {0, source.path + " loads on " + options.base + "\n" + to_text(report), json};
  } catch (const lora::SystemError&) {
    throw;
  } catch (const c10::Error& error) {
    const auto problems = problems_of(error);
    json["loads"] = false;
    json["problems"] = problems;
    auto text = source.path + " does not load on " + options.base + ": " + std::to_string(problems.size()) +
                (problems.size() == 1 ? " problem\n" : " problems\n");
    for (const auto& problem : problems) text += "  " + problem + "\n";
    return {1, text, json};
  }
}
