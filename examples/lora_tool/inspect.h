#pragma once

#include <lora/inject/report.h>        // defines: without_numbers
#include <lora/io/describe_adapter.h>  // defines: AdapterDescription, describe_adapter
#include <lora/io/training_file.h>     // defines: read_training_file

#include <algorithm>
#include <filesystem>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "lora_tool/adapter_source.h"  // defines: configuration, find_folder
#include "lora_tool/options.h"         // defines: Options
#include "lora_tool/outcome.h"         // defines: Outcome, Json, judged

namespace inspect_detail {

inline std::string text_of(const std::vector<std::int64_t>& sizes) {
  std::string text;
  for (const auto size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

/// Equal lines once, each with its number, in the order of the first.
class FoldedLines {
 public:
  void add(const std::string& line) {
    auto known = std::find_if(lines_.begin(), lines_.end(), [&](const auto& other) { return other.first == line; });
    if (known == lines_.end()) known = lines_.insert(lines_.end(), {line, 0});
    ++known->second;
  }
  void print(std::ostream& out) const {
    for (const auto& [line, count] : lines_) out << "    " << count << " x " << line << "\n";
  }

 private:
  std::vector<std::pair<std::string, std::int64_t>> lines_;
};

inline std::string to_text(const lora::AdapterDescription& adapter) {
  std::ostringstream out;
  out << adapter.path << ": " << adapter.method << ", " << adapter.format << "\n";
  out << "  updates: " << adapter.modules.size() << "\n";
  FoldedLines updates, copies;
  for (const auto& module : adapter.modules) {
    std::ostringstream line;
    line << lora::detail::without_numbers(module.path) << "  " << module.kind << " [" << module.out_features << ", "
         << module.in_features << "]  r = " << module.rank;
    if (module.alpha) line << ", alpha = " << *module.alpha << ", scaling = " << *module.scaling;
    line << "  " << module.parameters << " parameters each";
    updates.add(line.str());
  }
  updates.print(out);
  if (!adapter.copies.empty()) out << "  whole tensors: " << adapter.copies.size() << "\n";
  for (const auto& copy : adapter.copies)
    copies.add(lora::detail::without_numbers(copy.name) + "  " + text_of(copy.sizes));
  copies.print(out);
  for (const auto& [path, rows] : adapter.rows) out << "  token rows: " << rows << " of " << path << "\n";
  out << "  " << adapter.tensors << " tensors (";
  const char* separator = "";
  for (const auto& [dtype, count] : adapter.dtypes) {
    out << separator << count << " " << dtype;
    separator = ", ";
  }
  out << "), " << adapter.parameters << " parameters, " << adapter.bytes << " bytes\n";
  out << "  checksums: " << (adapter.has_checksums ? "right" : "none, the file is of another program") << "\n";
  for (const auto& [key, value] : adapter.metadata) {
    if (key != lora::detail::kChecksums) out << "  metadata: " << key << " = " << value << "\n";
  }
  for (const auto& problem : adapter.problems) out << "  problem: " << problem << "\n";
  return out.str();
}

template <class Value>
Json or_null(const std::optional<Value>& value) {
  return value ? Json(*value) : Json();
}

inline Json to_json(const lora::AdapterDescription& adapter) {
  Json modules = Json::array(), copies = Json::array();
  for (const auto& module : adapter.modules) {
    modules.push_back({{"path", module.path},
                       {"kind", module.kind},
                       {"r", module.rank},
                       {"out_features", module.out_features},
                       {"in_features", module.in_features},
                       {"alpha", or_null(module.alpha)},
                       {"scaling", or_null(module.scaling)},
                       {"parameters", module.parameters}});
  }
  for (const auto& copy : adapter.copies) copies.push_back({{"name", copy.name}, {"sizes", copy.sizes}});
  return {{"path", adapter.path},         {"format", adapter.format},
          {"method", adapter.method},     {"config", adapter.config.empty() ? Json() : Json::parse(adapter.config)},
          {"modules", modules},           {"copies", copies},
          {"token_rows", adapter.rows},   {"dtypes", adapter.dtypes},
          {"tensors", adapter.tensors},   {"parameters", adapter.parameters},
          {"bytes", adapter.bytes},       {"checksums", adapter.has_checksums ? Json("right") : Json()},
          {"metadata", adapter.metadata}, {"problems", adapter.problems}};
}

/// The file of a lora::TrainingState; nothing for another file.
inline std::optional<Outcome> training_state(const std::string& path) {
  if (std::filesystem::path(path).extension() != ".safetensors") return std::nullopt;
  if (lora::load_safetensors_with_metadata(path).metadata.count(lora::detail::kTrainingVersionKey) == 0)
    return std::nullopt;
  const auto file = lora::detail::read_training_file(path);
  std::int64_t bytes = 0;
  for (const auto& [name, tensor] : file.tensors) bytes += static_cast<std::int64_t>(tensor.nbytes());
  std::ostringstream out;
  out << path << ": training state, undamaged\n  " << file.tensors.size() << " tensors, " << bytes << " bytes\n";
  for (const auto& [key, value] : file.run.items()) out << "  " << key << ": " << value.dump() << "\n";
  const Json json = {
      {"path", path},    {"format", "training-state"}, {"tensors", file.tensors.size()}, {"bytes", bytes},
      {"run", file.run}, {"problems", Json::array()}};
  return Outcome{0, out.str(), json};
}

/// The adapters that the command line means, all of a folder without --name.
inline std::vector<std::string> adapters_of(const Options& options) {
  if (!std::filesystem::is_directory(options.path)) return {options.path};
  if (!options.name.empty()) return {adapter_source_detail::find_folder(options.path, options.name)};
  std::vector<std::string> paths;
  for (const auto& [name, folder] : lora::detail::adapter_folders(options.path)) paths.push_back(folder);
  return paths;
}

}  // namespace inspect_detail

/// Says what lies at a path: an adapter, several, or the state of a training.
inline Outcome inspect(const Options& options) {
  using namespace inspect_detail;
  check_source(options);
  Outcome outcome{0, "", {{"command", "inspect"}, {"found", Json::array()}}};
  const auto paths = adapters_of(options);
  const auto add = [&](const std::string& path) {
    if (auto state = training_state(path)) {
      outcome.text += state->text;
      outcome.json["found"].push_back(state->json);
      return;
    }
    const auto config = options.alpha ? std::optional(adapter_source_detail::configuration(options)) : std::nullopt;
    const auto adapter = lora::describe_adapter(path, config);
    outcome.text += to_text(adapter);
    outcome.json["found"].push_back(to_json(adapter));
    if (!adapter.problems.empty()) outcome.exit_code = 1;
  };
  judged([&] {
    for (const auto& path : paths) add(path);
  });
  return outcome;
}
