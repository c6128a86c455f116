#pragma once

#include <lora/config/adapter_config.h>
#include <lora/config/lora_config.h>
#include <lora/config/prefix_tuning_config.h>
#include <lora/config/prompt_tuning_config.h>
#include <lora/detail/json.h>
#include <lora/io/config_json.h>
#include <lora/methods/ia3.h>
#include <lora/methods/lora.h>
#include <lora/methods/method.h>
#include <lora/methods/miss.h>
#include <lora/methods/mora.h>
#include <lora/methods/vera.h>
#include <lora/version.h>

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// A configuration of any method.
class AnyConfig {
 public:
  virtual ~AnyConfig() = default;
  virtual AdapterOptions& options() = 0;
  const AdapterOptions& options() const { return const_cast<AnyConfig*>(this)->options(); }
  /// Throws c10::ValueError for a value out of range.
  virtual std::shared_ptr<const Method> method() const = 0;
  virtual Json json() const = 0;
  virtual std::shared_ptr<AnyConfig> copy() const = 0;
};

template <class Config>
class TypedConfig final : public AnyConfig {
 public:
  explicit TypedConfig(Config value) : config(std::move(value)) {}
  using AnyConfig::options;
  AdapterOptions& options() override { return config; }
  std::shared_ptr<const Method> method() const override {
    return std::make_shared<const typename Config::Method>(config);
  }
  Json json() const override { return config_json(config); }
  std::shared_ptr<AnyConfig> copy() const override { return std::make_shared<TypedConfig>(config); }

  Config config;
};

/// How the files of one method are read and written.
struct MethodEntry {
  std::string prefix;  // of its tensors' names
  std::shared_ptr<AnyConfig> (*read)(const Json& json, std::vector<std::string>& problems);
  std::shared_ptr<AnyConfig> (*config_of)(const Method& method);
};

template <class Config>
MethodEntry method_entry() {
  return {Config::kPrefix,
          [](const Json& json, std::vector<std::string>& problems) -> std::shared_ptr<AnyConfig> {
            return std::make_shared<TypedConfig<Config>>(read_config<Config>(json, problems));
          },
          [](const Method& method) -> std::shared_ptr<AnyConfig> {
            using Own = typename Config::Method;
            return std::make_shared<TypedConfig<Config>>(static_cast<const Own&>(method).config());
          }};
}

/// The methods whose files can be read and written, by peft_type.
class MethodRegistry {
 public:
  static MethodRegistry& instance() {
    static MethodRegistry registry;
    return registry;
  }

  template <class Config>
  void add() {
    const std::lock_guard<std::mutex> lock(mutex_);
    entries_[Config::kPeftType] = method_entry<Config>();
  }

  /// Null for a method that is not known.
  const MethodEntry* find(const std::string& peft_type) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = entries_.find(peft_type);
    return found == entries_.end() ? nullptr : &found->second;
  }

  std::string known() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::string known;
    for (const auto& [type, entry] : entries_) known += (known.empty() ? "" : ", ") + type;
    return known;
  }

 private:
  MethodRegistry() {
    add<IA3Config>();
    add<LoraConfig>();
    add<MissConfig>();
    add<MoraConfig>();
    add<VeraConfig>();
  }

  mutable std::mutex mutex_;
  std::map<std::string, MethodEntry> entries_;
};

/// The configuration in PEFT's JSON, whatever its method; null with a problem where there is none.
inline std::shared_ptr<AnyConfig> read_any_config(const Json& json, std::vector<std::string>& problems) {
  const auto type = json.find("peft_type");
  const auto& registry = MethodRegistry::instance();
  const auto* entry = type != json.end() && type->is_string() ? registry.find(type->get<std::string>()) : nullptr;
  if (entry != nullptr) return entry->read(json, problems);
  auto problem = "found " + (type == json.end() ? "no peft_type" : "peft_type = " + type->dump()) +
                 ", expected one of " + registry.known();
  if (type != json.end() && *type == PrefixTuningConfig::kPeftType) problem += "; call lora::load_prefix_tuning";
  if (type != json.end() && *type == PromptTuningConfig::kPeftType) problem += "; call lora::load_prompt_tuning";
  problems.push_back(problem);
  return nullptr;
}

/// Whether the tensors of a file mean nothing without the base: PEFT has taken their start out of it.
inline bool starts_from_base(const Json& config) {
  std::vector<std::string> problems;
  const auto any = read_any_config(config, problems);
  const auto* lora = dynamic_cast<const TypedConfig<LoraConfig>*>(any.get());
  return lora != nullptr && lora->config.starts_from_base();
}

}  // namespace detail

/// Makes a method's files known to lora::load and Adapters::save by its configuration's type: kPeftType, visit() and
/// Method::config() say how.
template <class Config>
void register_method() {
  detail::MethodRegistry::instance().add<Config>();
}

LORA_NAMESPACE_END
