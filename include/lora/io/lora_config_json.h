#pragma once

#include <lora/config/lora_config.h>
#include <lora/detail/error.h>
#include <lora/version.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

// Ordered, because the first matching entry of rank_pattern and alpha_pattern wins.
using Json = nlohmann::ordered_json;

/// Reads a JSON object. Throws a FormatError for anything else, and for nesting that is deeper than any
/// configuration's: writing it into an error message would use up the stack.
inline Json parse_object(const std::string& text, const std::string& path) {
  constexpr int kDeepest = 16;
  std::string problem = "found no JSON object, expected an adapter's configuration";
  const auto watch = [&](int depth, Json::parse_event_t, Json&) {
    if (depth <= kDeepest) return true;
    problem = "found JSON nested more than " + std::to_string(kDeepest) + " deep, expected an adapter's configuration";
    throw std::runtime_error(problem);
  };
  try {
    auto json = Json::parse(text, watch);
    if (json.is_object()) return json;
  } catch (const std::exception&) {
  }
  throw FormatError(path, {problem});
}

/// JSON as text. Throws a FormatError where a name is not UTF-8.
inline std::string dump(const Json& json, const std::string& path, int indent = -1) {
  try {
    return json.dump(indent);
  } catch (const Json::exception& error) {
    throw FormatError(path, {std::string("cannot be written: ") + error.what()});
  }
}

/// A whole number is written without a point, as PEFT does.
inline Json number(double value) {
  if (value == std::floor(value) && std::abs(value) < 1e15) return static_cast<int64_t>(value);
  return value;
}

inline Json targets_json(const TargetModules& targets) {
  if (targets.empty()) return nullptr;
  if (targets.kind() != TargetModules::Kind::kList) return targets.entries().front().text;
  auto list = Json::array();
  for (const auto& entry : targets.entries()) list.push_back(entry.text);
  return list;
}

/// A configuration under PEFT's keys, and `fused_parts` of ours where it is set.
inline Json lora_config_json(const LoraConfig& config) {
  Json json;
  json["alpha_pattern"] = Json::object();
  for (const auto& [pattern, alpha] : config.alpha_pattern()) json["alpha_pattern"][pattern] = number(alpha);
  json["auto_mapping"] = nullptr;
  json["base_model_name_or_path"] = nullptr;
  json["bias"] = "none";
  json["exclude_modules"] = targets_json(config.exclude_modules());
  json["fan_in_fan_out"] = false;
  for (const auto& [name, parts] : config.fused_parts()) {
    auto list = Json::array();
    for (const auto& part : parts) list.push_back(Json::array({part.name, part.size}));
    json["fused_parts"][name] = std::move(list);
  }
  json["inference_mode"] = true;
  if (config.init_lora_weights() == LoraInit::kGaussian) {
    json["init_lora_weights"] = "gaussian";
  } else {
    json["init_lora_weights"] = true;
  }
  json["layers_pattern"] = nullptr;
  json["layers_to_transform"] = nullptr;
  json["lora_alpha"] = number(config.lora_alpha());
  json["lora_bias"] = false;
  json["lora_dropout"] = config.lora_dropout();
  json["modules_to_save"] = nullptr;
  json["peft_type"] = "LORA";
  json["r"] = config.r();
  json["rank_pattern"] = Json::object();
  for (const auto& [pattern, rank] : config.rank_pattern()) json["rank_pattern"][pattern] = rank;
  json["revision"] = nullptr;
  json["target_modules"] = targets_json(config.target_modules());
  json["task_type"] = nullptr;
  json["use_dora"] = false;
  json["use_rslora"] = config.use_rslora();
  return json;
}

/// Reads a LoraConfig from PEFT's JSON; every key that is wrong, or that asks for what is not supported, is a problem.
class LoraConfigReader {
 public:
  LoraConfigReader(const Json& json, std::vector<std::string>& problems) : json_(json), problems_(problems) {}

  LoraConfig read() {
    LoraConfig config;
    check_type();
    config.r(integer("r", json_, config.r()));
    config.lora_alpha(real("lora_alpha", json_, config.lora_alpha()));
    config.lora_dropout(real("lora_dropout", json_, config.lora_dropout()));
    config.use_rslora(boolean("use_rslora"));
    config.init_lora_weights(init());
    config.target_modules(targets("target_modules"));
    config.exclude_modules(targets("exclude_modules"));
    for (const auto& [pattern, value] : object("rank_pattern").items()) {
      config.rank_pattern().emplace_back(pattern, integer(pattern, object("rank_pattern"), 1));
    }
    for (const auto& [pattern, value] : object("alpha_pattern").items()) {
      config.alpha_pattern().emplace_back(pattern, real(pattern, object("alpha_pattern"), 1));
    }
    for (const auto& [name, value] : object("fused_parts").items()) config.fused_parts(name, parts(name, value));
    check_unsupported();
    if (problems_.empty()) check([&] { config.validate(); });
    return config;
  }

 private:
  template <class Function>
  void check(const Function& function) {
    try {
      function();
    } catch (const c10::Error& error) {
      problems_.push_back(error.what_without_backtrace());
    }
  }

  void wrong(const std::string& key, const Json& value, const std::string& expected) {
    problems_.push_back("found " + key + " = " + value.dump() + ", expected " + expected);
  }

  void check_type() {
    if (!json_.contains("peft_type")) {
      problems_.push_back("found no peft_type, expected \"LORA\"");
    } else if (json_["peft_type"] != "LORA") {
      wrong("peft_type", json_["peft_type"], "\"LORA\"");
    }
  }

  int64_t integer(const std::string& key, const Json& in, int64_t otherwise) {
    if (!in.contains(key)) return otherwise;
    if (in[key].is_number_integer()) return in[key].get<int64_t>();
    wrong(key, in[key], "a whole number");
    return otherwise;
  }

  double real(const std::string& key, const Json& in, double otherwise) {
    if (!in.contains(key)) return otherwise;
    if (in[key].is_number()) return in[key].get<double>();
    wrong(key, in[key], "a number");
    return otherwise;
  }

  bool boolean(const std::string& key) {
    if (!json_.contains(key)) return false;
    if (json_[key].is_boolean()) return json_[key].get<bool>();
    wrong(key, json_[key], "true or false");
    return false;
  }

  const Json& object(const std::string& key) {
    static const Json empty = Json::object();
    if (!json_.contains(key) || json_[key].is_null()) return empty;
    if (json_[key].is_object()) return json_[key];
    wrong(key, json_[key], "an object");
    return empty;
  }

  LoraInit init() {
    if (!json_.contains("init_lora_weights")) return LoraInit::kKaiming;
    const auto& value = json_["init_lora_weights"];
    if (value == "gaussian") return LoraInit::kGaussian;
    // These start at dW = 0 or keep the base; the saved factors hold all there is to know.
    if (value.is_boolean() || value == "eva" || value == "orthogonal") return LoraInit::kKaiming;
    wrong("init_lora_weights", value, "a start that leaves the base weights as they were");
    return LoraInit::kKaiming;
  }

  TargetModules targets(const std::string& key) {
    TargetModules result;
    if (!json_.contains(key) || json_[key].is_null()) return result;
    const auto& value = json_[key];
    if (value.is_string()) {
      check([&] { result = TargetModules(value.get<std::string>()); });
      return result;
    }
    std::vector<std::string> names;
    bool strings = value.is_array();
    for (const auto& name : value) {
      strings = strings && name.is_string();
      if (strings) names.push_back(name.get<std::string>());
    }
    if (!strings) {
      wrong(key, value, "a list of names or one regular expression");
    } else if (!names.empty()) {
      check([&] { result = TargetModules(names); });
    }
    return result;
  }

  std::vector<FusedPart> parts(const std::string& name, const Json& value) {
    std::vector<FusedPart> result;
    bool good = value.is_array();
    for (const auto& part : value) {
      good = good && part.is_array() && part.size() == 2 && part[0].is_string() && part[1].is_number_integer();
      if (good) result.push_back({part[0].get<std::string>(), part[1].get<int64_t>()});
    }
    if (!good) wrong("fused_parts." + name, value, "a list of [name, rows]");
    return result;
  }

  /// A key that is neither read nor known to change nothing has to be empty: it could change what the tensors mean.
  void check_unsupported() {
    static const std::vector<std::string> known{
        "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "target_modules",
        "exclude_modules", "rank_pattern", "alpha_pattern", "fused_parts",
        // About the file or its making, or about the layout of a base weight that the factors do not depend on:
        "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version",
        "fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config", "loftq_config", "eva_config",
        "ensure_weight_tying"};
    for (const auto& [key, value] : json_.items()) {
      bool is_known = false;
      for (const auto& name : known) is_known = is_known || name == key;
      const bool empty =
          value.is_null() || value == false || value == "none" || (value.is_structured() && value.empty());
      if (!is_known && !empty) wrong(key, value, "a key that this version of lora supports");
    }
  }

  const Json& json_;
  std::vector<std::string>& problems_;
};

}  // namespace detail
LORA_NAMESPACE_END
