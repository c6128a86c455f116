#pragma once

#include <lora/config/lora_config.h>
#include <lora/detail/error.h>
#include <lora/detail/json.h>
#include <lora/version.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

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

/// PEFT's names of BiasCopies, in its order.
inline constexpr std::array<const char*, 3> kBiasNames{"none", "all", "lora_only"};

inline Json text_or_null(const std::string& text) { return text.empty() ? Json() : Json(text); }

template <class Value>
Json one_or_more_json(const OneOrMore<Value>& values) {
  if (values.empty()) return nullptr;
  return values.is_list() ? Json(values.values()) : Json(values.values().front());
}

inline Json token_indices_json(const TokenIndices& tokens) {
  if (tokens.empty()) return nullptr;
  if (tokens.is_list()) return tokens.embeddings().front().second;
  auto json = Json::object();
  for (const auto& [name, ids] : tokens.embeddings()) json[name] = ids;
  return json;
}

/// A configuration under PEFT's keys, and `fused_parts` of ours where it is set.
inline Json lora_config_json(const LoraConfig& config) {
  Json json;
  json["alpha_pattern"] = Json::object();
  for (const auto& [pattern, alpha] : config.alpha_pattern()) json["alpha_pattern"][pattern] = number(alpha);
  json["auto_mapping"] =
      config.auto_mapping().empty() ? Json() : parse_object(config.auto_mapping(), "auto_mapping", "one of PEFT's");
  json["base_model_name_or_path"] = text_or_null(config.base_model_name_or_path());
  json["bias"] = kBiasNames[static_cast<size_t>(config.bias())];
  json["exclude_modules"] = targets_json(config.exclude_modules());
  json["fan_in_fan_out"] = config.fan_in_fan_out();
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
  json["layers_pattern"] = one_or_more_json(config.layers_pattern());
  json["layers_to_transform"] = one_or_more_json(config.layers_to_transform());
  json["lora_alpha"] = number(config.lora_alpha());
  json["lora_bias"] = config.lora_bias();
  json["lora_dropout"] = config.lora_dropout();
  json["modules_to_save"] = config.modules_to_save().empty() ? Json() : Json(config.modules_to_save());
  json["peft_type"] = "LORA";
  json["r"] = config.r();
  json["rank_pattern"] = Json::object();
  for (const auto& [pattern, rank] : config.rank_pattern()) json["rank_pattern"][pattern] = rank;
  json["revision"] = text_or_null(config.revision());
  json["target_modules"] = targets_json(config.target_modules());
  json["task_type"] = text_or_null(config.task_type());
  json["trainable_token_indices"] = token_indices_json(config.trainable_token_indices());
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
    config.fan_in_fan_out(boolean("fan_in_fan_out"));
    config.lora_bias(boolean("lora_bias"));
    config.bias(bias());
    config.layers_to_transform(one_or_more<int64_t>("layers_to_transform", "layer indices"));
    config.layers_pattern(one_or_more<std::string>("layers_pattern", "names"));
    config.modules_to_save(one_or_more<std::string>("modules_to_save", "names").values());
    config.trainable_token_indices(token_indices());
    config.task_type(text("task_type"));
    config.base_model_name_or_path(text("base_model_name_or_path"));
    config.revision(text("revision"));
    if (!object("auto_mapping").empty()) config.auto_mapping(object("auto_mapping").dump());
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
    if (!json_.contains(key) || json_[key].is_null()) return false;
    if (json_[key].is_boolean()) return json_[key].get<bool>();
    wrong(key, json_[key], "true or false");
    return false;
  }

  std::string text(const std::string& key) {
    if (!json_.contains(key) || json_[key].is_null()) return "";
    if (json_[key].is_string()) return json_[key].get<std::string>();
    wrong(key, json_[key], "text");
    return "";
  }

  static bool holds(const Json& value, const std::string*) { return value.is_string(); }
  static bool holds(const Json& value, const int64_t*) { return value.is_number_integer(); }

  template <class Value>
  OneOrMore<Value> one_or_more(const std::string& key, const std::string& what) {
    if (!json_.contains(key) || json_[key].is_null()) return {};
    const auto& value = json_[key];
    const Value* kind = nullptr;
    if (holds(value, kind)) return value.template get<Value>();
    std::vector<Value> values;
    bool good = value.is_array();
    for (const auto& one : value) {
      good = good && holds(one, kind);
      if (good) values.push_back(one.template get<Value>());
    }
    if (!good) wrong(key, value, what);
    return values;
  }

  BiasCopies bias() {
    if (!json_.contains("bias")) return BiasCopies::kNone;
    for (size_t i = 0; i < kBiasNames.size(); ++i) {
      if (json_["bias"] == kBiasNames[i]) return static_cast<BiasCopies>(i);
    }
    wrong("bias", json_["bias"], "\"none\", \"all\" or \"lora_only\"");
    return BiasCopies::kNone;
  }

  TokenIndices token_indices() {
    const std::string key = "trainable_token_indices";
    if (!json_.contains(key) || json_[key].is_null()) return {};
    if (!json_[key].is_object()) return one_or_more<int64_t>(key, "token numbers").values();
    std::vector<std::pair<std::string, TokenIndices::Tokens>> embeddings;
    for (const auto& [name, ids] : json_[key].items()) {
      bool good = ids.is_array();
      for (const auto& id : ids) good = good && id.is_number_integer();
      if (good) embeddings.emplace_back(name, ids.get<TokenIndices::Tokens>());
      if (!good) wrong(key + "." + name, ids, "token numbers");
    }
    return embeddings;
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
    if (value.is_boolean() || value == "eva" || value == "orthogonal" || value == "mica") {
      return LoraInit::kKaiming;
    }
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
        "exclude_modules", "rank_pattern", "alpha_pattern", "fused_parts", "fan_in_fan_out", "lora_bias", "bias",
        "layers_to_transform", "layers_pattern", "modules_to_save", "trainable_token_indices", "task_type",
        "base_model_name_or_path", "revision", "auto_mapping",
        // About the file or its making:
        "inference_mode", "peft_version", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying",
        // How a start is made, which init_lora_weights names:
        "loftq_config", "eva_config", "corda_config", "lora_ga_config"};
    for (const auto& [key, value] : json_.items()) {
      const bool is_known = std::find(known.begin(), known.end(), key) != known.end();
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

  const Json& json_;
  std::vector<std::string>& problems_;
};

}  // namespace detail
LORA_NAMESPACE_END
