#pragma once

#include <lora/config/targets.h>
#include <lora/methods/method.h>
#include <lora/methods/update.h>
#include <lora/version.h>

#include <utility>

LORA_NAMESPACE_BEGIN

/// What a method takes from its configuration, an AdapterConfig with kPeftType, kPrefix and validate().
template <class ConfigType>
class ConfiguredMethod : public Method {
 public:
  /// Its configuration's type.
  using Config = ConfigType;

  /// Throws c10::ValueError for a configuration out of range.
  explicit ConfiguredMethod(Config config) : config_(std::move(config)) {
    config_.validate();
    targeting_ = config_.targeting();
  }

  /// As it was given.
  const Config& config() const noexcept { return config_; }

  /// The configuration's kPeftType.
  const char* peft_type() const override { return Config::kPeftType; }
  /// The configuration's kPrefix.
  const char* prefix() const override { return Config::kPrefix; }
  /// What the configuration's targeting() says.
  const Targeting& targeting() const override { return targeting_; }
  /// None, for methods without an option of it.
  double dropout() const override { return 0; }
  /// At least float32, unless the configuration says the base's.
  at::ScalarType tensor_dtype(at::ScalarType base) const override {
    return config_.autocast_adapter_dtype() ? accumulation_dtype(base) : base;
  }

 private:
  Config config_;
  Targeting targeting_;
};

LORA_NAMESPACE_END
