#pragma once

#include <lora/config/adapter_config.h>
#include <lora/config/lora_config.h>
#include <lora/config/miss_config.h>
#include <lora/detail/error.h>
#include <lora/detail/json.h>
#include <lora/version.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <set>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// A whole number is written without a point, as PEFT does.
inline Json number(double value) {
  if (value == std::floor(value) && std::abs(value) < 1e15) return static_cast<int64_t>(value);
  return value;
}

/// A value of an enumeration in JSON, where "true" is no text.
inline Json json_name(const std::string& name) { return name == "true" ? Json(true) : Json(name); }

/// Writes the options of a configuration into JSON, each by the form that PEFT gives its type.
class ConfigWriter {
 public:
  explicit ConfigWriter(Json& json) : json_(json) {}

  template <class Value>
  void operator()(const char* key, const Value& value) {
    // JSON text that is kept as it is.
    if (std::string(key) == "auto_mapping") {
      json_[key] = text_of(value).empty() ? Json() : parse_object(text_of(value), key, "one of PEFT's");
    } else {
      json_[key] = json_of(value);
    }
    // PEFT takes null for the modules that it knows of the model's type.
    if (std::string(key) == "feedforward_modules" && json_[key].is_null()) json_[key] = Json::array();
  }
  /// Ours alone, and only where it says something.
  void operator()(const char* key, const Targeting::FusedParts& fused) {
    for (const auto& [name, parts] : fused) {
      auto list = Json::array();
      for (const auto& part : parts) list.push_back(Json::array({part.name, part.size}));
      json_[key][name] = std::move(list);
    }
  }

 private:
  static std::string text_of(const std::string& text) { return text; }
  template <class Value>
  static std::string text_of(const Value&) {
    return {};
  }

  static Json json_of(bool value) { return value; }
  static Json json_of(int64_t value) { return value; }
  static Json json_of(double value) { return number(value); }
  static Json json_of(const std::string& text) { return text.empty() ? Json() : Json(text); }
  static Json json_of(const std::vector<std::string>& names) { return names.empty() ? Json() : Json(names); }
  template <class Enum, class = std::enable_if_t<std::is_enum_v<Enum>>>
  static Json json_of(Enum value) {
    return json_name(peft_names(value)[static_cast<size_t>(value)]);
  }

  template <class Value>
  static Json json_of(const OneOrMore<Value>& values) {
    if (values.empty()) return nullptr;
    return values.is_list() ? Json(values.values()) : Json(values.values().front());
  }

  template <class Value>
  static Json json_of(const Pattern<Value>& pattern) {
    auto json = Json::object();
    for (const auto& [name, value] : pattern) json[name] = json_of(value);
    return json;
  }

  static Json json_of(const TargetModules& targets) {
    if (targets.empty()) return nullptr;
    if (targets.kind() != TargetModules::Kind::kList) return targets.entries().front().text;
    auto list = Json::array();
    for (const auto& entry : targets.entries()) list.push_back(entry.text);
    return list;
  }

  static Json json_of(const TokenIndices& tokens) {
    if (tokens.empty()) return nullptr;
    if (tokens.is_list()) return tokens.embeddings().front().second;
    auto json = Json::object();
    for (const auto& [name, ids] : tokens.embeddings()) json[name] = ids;
    return json;
  }

  Json& json_;
};

/// A configuration under PEFT's keys, and `fused_parts` of ours where it is set.
template <class Config>
Json config_json(const Config& config) {
  Json unordered;
  ConfigWriter writer(unordered);
  Config::visit(config, writer);
  unordered["inference_mode"] = true;
  unordered["peft_type"] = Config::kPeftType;
  std::set<std::string> keys;
  for (const auto& [key, value] : unordered.items()) keys.insert(key);
  Json json;
  for (const auto& key : keys) json[key] = std::move(unordered[key]);
  return json;
}

/// Reads the options of a configuration from PEFT's JSON; every key that is wrong, or that asks for what is not
/// supported, is a problem, and its option stays as it is.
class ConfigReader {
 public:
  ConfigReader(const Json& json, std::vector<std::string>& problems) : json_(json), problems_(problems) {}

  template <class Value>
  void operator()(const char* key, Value& value) {
    read_.insert(key);
    if (json_.contains(key)) read(key, json_.at(key), value);
  }

  void check_type(const std::string& type) {
    if (!json_.contains("peft_type")) {
      problems_.push_back("found no peft_type, expected \"" + type + "\"");
    } else if (json_["peft_type"] != type) {
      wrong("peft_type", json_["peft_type"], "\"" + type + "\"");
    }
  }

  /// A key that is neither read nor known to change nothing has to be empty: it could change what the tensors mean.
  void check_unsupported() {
    static const std::set<std::string> harmless{
        "peft_type",
        // About the file or its making:
        "inference_mode", "peft_version", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying",
        // How a start is made, which the option of the start names:
        "init_ia3_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"};
    for (const auto& [key, value] : json_.items()) {
      const bool is_known = read_.count(key) != 0 || harmless.count(key) != 0;
      const bool empty =
          value.is_null() || value == false || value == "none" || (value.is_structured() && value.empty());
      if (is_known || empty) continue;
      wrong(key, value,
            key == "layer_replication"
                ? "none: build the model with its layers repeated as the list says, and load the tensors "
                  "by their names"
                : "a key that this version of lora supports");
    }
  }

 private:
  void wrong(const std::string& key, const Json& value, const std::string& expected) {
    problems_.push_back("found " + key + " = " + value.dump() + ", expected " + expected);
  }

  template <class Function>
  void check(const Function& function) {
    try {
      function();
    } catch (const c10::Error& error) {
      problems_.push_back(error.what_without_backtrace());
    }
  }

  void read(const std::string& key, const Json& json, int64_t& value) {
    if (!json.is_number_integer()) return wrong(key, json, "a whole number");
    value = json.get<int64_t>();
  }
  void read(const std::string& key, const Json& json, double& value) {
    if (!json.is_number()) return wrong(key, json, "a number");
    value = json.get<double>();
  }
  void read(const std::string& key, const Json& json, bool& value) {
    if (json.is_null()) return;
    if (!json.is_boolean()) return wrong(key, json, "true or false");
    value = json.get<bool>();
  }
  void read(const std::string& key, const Json& json, std::string& text) {
    if (json.is_null()) return;
    if (key == "auto_mapping") {
      if (!json.is_object()) return wrong(key, json, "an object");
      text = json.empty() ? "" : json.dump();
      return;
    }
    if (!json.is_string()) return wrong(key, json, "text");
    text = json.get<std::string>();
  }

  static bool holds(const Json& value, const std::string*) { return value.is_string(); }
  static bool holds(const Json& value, const int64_t*) { return value.is_number_integer(); }

  template <class Value>
  void read(const std::string& key, const Json& json, OneOrMore<Value>& result) {
    if (json.is_null()) return;
    const Value* kind = nullptr;
    if (holds(json, kind)) {
      result = json.template get<Value>();
      return;
    }
    std::vector<Value> values;
    bool good = json.is_array();
    for (const auto& one : json) {
      good = good && holds(one, kind);
      if (good) values.push_back(one.template get<Value>());
    }
    if (!good) return wrong(key, json, std::is_same_v<Value, std::string> ? "names" : "whole numbers");
    result = values;
  }
  void read(const std::string& key, const Json& json, std::vector<std::string>& names) {
    OneOrMore<std::string> values;
    read(key, json, values);
    if (!values.empty()) names = values.values();
  }

  template <class Enum, class = std::enable_if_t<std::is_enum_v<Enum>>>
  void read(const std::string& key, const Json& json, Enum& value) {
    const auto names = peft_names(value);
    std::string known;
    for (size_t i = 0; i < names.size(); ++i) {
      const auto name = json_name(names[i]);
      if (json == name) {
        value = static_cast<Enum>(i);
        return;
      }
      known += (i == 0 ? "" : i + 1 == names.size() ? " or " : ", ") + name.dump();
    }
    wrong(key, json, known);
  }

  void read(const std::string& key, const Json& json, LoraInit& init) {
    // These start at dW = 0 or keep the base; the saved factors hold all there is to know.
    if (json == false || json == "mica") return;
    if (json.is_string() && json.get<std::string>().rfind("pissa_niter_", 0) == 0) {
      return wrong(key, json,
                   "\"pissa\": a start by random projections cannot be made again; save it in Python with "
                   "path_initial_model_for_weight_conversion");
    }
    read<LoraInit>(key, json, init);
  }
  void read(const std::string& key, const Json& json, MissForm& form) {
    if (json == false) return;  // its random start is in the tensors
    read<MissForm>(key, json, form);
  }

  void read(const std::string& key, const Json& json, TokenIndices& tokens) {
    if (json.is_null()) return;
    if (!json.is_object()) {
      OneOrMore<int64_t> ids;
      read(key, json, ids);
      if (!ids.empty()) tokens = ids.values();
      return;
    }
    std::vector<std::pair<std::string, TokenIndices::Tokens>> embeddings;
    for (const auto& [name, ids] : json.items()) {
      bool good = ids.is_array();
      for (const auto& id : ids) good = good && id.is_number_integer();
      if (good) embeddings.emplace_back(name, ids.get<TokenIndices::Tokens>());
      if (!good) wrong(key + "." + name, ids, "token numbers");
    }
    tokens = embeddings;
  }

  template <class Value>
  void read(const std::string& key, const Json& json, Pattern<Value>& pattern) {
    if (json.is_null()) return;
    if (!json.is_object()) return wrong(key, json, "an object");
    for (const auto& [name, value] : json.items()) {
      Value one{1};
      read(name, value, one);
      pattern.emplace_back(name, one);
    }
  }

  void read(const std::string& key, const Json& json, TargetModules& targets) {
    if (json.is_null()) return;
    if (json.is_string()) {
      check([&] { targets = TargetModules(json.get<std::string>()); });
      return;
    }
    std::vector<std::string> names;
    bool strings = json.is_array();
    for (const auto& name : json) {
      strings = strings && name.is_string();
      if (strings) names.push_back(name.get<std::string>());
    }
    if (!strings) return wrong(key, json, "a list of names or one regular expression");
    if (!names.empty()) check([&] { targets = TargetModules(names); });
  }

  void read(const std::string& key, const Json& json, Targeting::FusedParts& fused) {
    if (json.is_null()) return;
    if (!json.is_object()) return wrong(key, json, "an object");
    for (const auto& [name, parts] : json.items()) {
      std::vector<FusedPart> ranges;
      bool good = parts.is_array();
      for (const auto& part : parts) {
        good = good && part.is_array() && part.size() == 2 && part[0].is_string() && part[1].is_number_integer();
        if (good) ranges.push_back({part[0].get<std::string>(), part[1].get<int64_t>()});
      }
      if (!good) wrong(key + "." + name, parts, "a list of [name, rows]");
      fused.emplace_back(name, std::move(ranges));
    }
  }

  const Json& json_;
  std::vector<std::string>& problems_;
  std::set<std::string> read_;
};

/// Reads a configuration from PEFT's JSON; what is wrong with it is added to the problems.
template <class Config>
Config read_config(const Json& json, std::vector<std::string>& problems) {
  Config config;
  ConfigReader reader(json, problems);
  reader.check_type(Config::kPeftType);
  Config::visit(config, reader);
  reader.check_unsupported();
  if (!problems.empty()) return config;
  try {
    config.validate();
  } catch (const c10::ValueError& error) {
    problems.push_back(error.what_without_backtrace());
  }
  return config;
}

}  // namespace detail
LORA_NAMESPACE_END
