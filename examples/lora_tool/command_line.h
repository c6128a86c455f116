#pragma once

#include <CLI/CLI.hpp>
#include <cmath>
#include <cstdint>
#include <functional>
#include <iostream>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "lora_tool/options.h"  // defines: Options, Command

namespace command_line_detail {

/// Bytes of a text such as "5GB", "300MB" or "4096", in Hugging Face's decimal units; nothing for another text.
inline std::optional<std::int64_t> parse_bytes(const std::string& text) {
  static const std::map<std::string, double> units{{"", 1}, {"B", 1}, {"KB", 1e3}, {"MB", 1e6}, {"GB", 1e9}};
  const auto end = text.find_first_not_of("0123456789");
  const auto unit = units.find(end == std::string::npos ? "" : text.substr(end));
  constexpr std::size_t kMostDigits = 9;
  if (end == 0 || text.empty() || unit == units.end() || std::min(end, text.size()) > kMostDigits) return std::nullopt;
  const auto bytes = static_cast<std::int64_t>(std::stod(text.substr(0, end)) * unit->second);
  return bytes > 0 ? std::optional(bytes) : std::nullopt;
}

inline CLI::Validator checked(const std::function<std::string(const std::string&)>& why_not) {
  return CLI::Validator([why_not](const std::string& text) { return why_not(text); }, "");
}

/// What several commands take.
inline void add_common(CLI::App& app, Options& options) {
  app.add_option("path", options.path, "PEFT directory, folder with sub-folders of adapters, or file of an adapter")
      ->required();
  app.add_option("--name", options.name, "the adapter in the sub-folder of that name; default: the folder's own");
  app.add_flag("--json", options.json, "one JSON object in place of text");
}

inline void add_mapping(CLI::App& app, Options& options, std::vector<std::string>& mapping) {
  app.add_option("--key-mapping", mapping,
                 "REGEX=REPLACEMENT, for modules that are called otherwise in the base: \"^transformer\\.=\" drops a "
                 "prefix; the first that is found in a name is applied")
      ->check(checked([](const std::string& text) {
        return text.find('=') == std::string::npos ? "found " + text + ", expected REGEX=REPLACEMENT" : "";
      }));
  app.add_option("--fan-in-fan-out", options.fan_in_fan_out,
                 "true or false: whether square matrices of the base are [in, out], in place of what the adapter says");
}

inline constexpr const char* kTensorFiles = "For files of tensors alone (loralib)";

inline void add_configuration(CLI::App& app, Options& options) {
  app.add_option("--r", options.rank, "rank; default: the factors' own")
      ->check(checked([](const std::string& text) {
        return text.empty() || text.find_first_not_of("0123456789") != std::string::npos || text.size() > 9 ||
                       std::stoll(text) < 1
                   ? "found " + text + ", expected a whole number from 1 on"
                   : "";
      }))
      ->group(kTensorFiles);
  app.add_option("--alpha", options.alpha, "an update is scaled by alpha / r; such files need it")
      ->check(checked([](const std::string& text) {
        double value = 0;
        const bool good = CLI::detail::lexical_cast(text, value) && std::isfinite(value) && value != 0;
        return good ? "" : "found " + text + ", expected a number other than 0";
      }))
      ->group(kTensorFiles);
  app.add_option("--targets", options.targets,
                 "modules with factors, parts of fused ones in brackets: c_attn[q,v]; default: all that have them")
      ->group(kTensorFiles);
  app.add_option("--modules-to-save", options.modules_to_save, "modules that the file has whole")->group(kTensorFiles);
  app.add_option("--bias", options.bias, "the biases that the file has: none, all or lora_only")
      ->check(CLI::IsMember({"none", "all", "lora_only"}))
      ->group(kTensorFiles);
}

}  // namespace command_line_detail

/// Fills `options`; an exit code where there is nothing left to do, 2 with one line on the error stream for a bad flag.
inline std::optional<int> parse_options(int argc, char** argv, Options& options) {
  using namespace command_line_detail;
  CLI::App app(
      "Looks at adapters, checks them against models, merges and converts them. Exit codes: 0 fine, 1 the answer is no "
      "(damaged, does not fit), 2 usage, or a file that cannot be read or written.",
      "lora");
  app.require_subcommand(1);
  std::vector<std::string> mapping;
  std::string shard_size;

  auto* const inspect = app.add_subcommand("inspect", "what an adapter is: method, ranks, modules, checksums");
  add_common(*inspect, options);
  add_configuration(*inspect, options);

  auto* const check = app.add_subcommand("check", "would the adapter load on a base model, and if not, why");
  auto* const merge = app.add_subcommand("merge", "write the base model with the adapter in its weights");
  for (auto* const app_of_base : {check, merge}) {
    add_common(*app_of_base, options);
    app_of_base
        ->add_option("--base", options.base,
                     "the model: .safetensors, .bin, .pt, an index of shards, or a Hugging Face folder")
        ->required();
    add_mapping(*app_of_base, options, mapping);
    add_configuration(*app_of_base, options);
  }
  merge->add_option("--out", options.out, "a .safetensors file, or a folder for model.safetensors or its shards")
      ->required();
  merge->add_option("--max-shard-size", shard_size, "of the files in a folder, as 300MB; default: 5GB")
      ->check(checked([](const std::string& text) {
        return parse_bytes(text) ? "" : "found " + text + ", expected bytes as 4096, 300MB or 5GB";
      }));

  auto* const convert = app.add_subcommand("convert", "write an adapter in another form, each tensor bit for bit");
  add_common(*convert, options);
  convert->add_option("--out", options.out, "the directory to write; for loralib the file")->required();
  convert
      ->add_option("--to", options.to,
                   "peft (adapter_model.safetensors), peft-bin (adapter_model.bin) or loralib (a .pt without "
                   "configuration)")
      ->check(CLI::IsMember({"peft", "peft-bin", "loralib"}))
      ->capture_default_str();
  add_mapping(*convert, options, mapping);
  add_configuration(*convert, options);
  convert
      ->add_option("--embeddings", options.embeddings,
                   "modules with factors that are embeddings: loralib's files do not say it")
      ->group(kTensorFiles);

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == static_cast<int>(CLI::ExitCodes::Success)) return app.exit(error);  // --help
    std::cerr << "error: " << error.what() << " (--help lists the commands and flags)\n";
    return 2;
  }
  options.command = inspect->parsed() ? Command::kInspect
                    : check->parsed() ? Command::kCheck
                    : merge->parsed() ? Command::kMerge
                                      : Command::kConvert;
  for (const auto& pair : mapping) {
    const auto equals = pair.rfind('=');
    options.key_mapping.emplace_back(pair.substr(0, equals), pair.substr(equals + 1));
  }
  if (!shard_size.empty()) options.max_shard_bytes = parse_bytes(shard_size);
  return std::nullopt;
}
