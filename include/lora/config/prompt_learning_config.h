#pragma once

#include <c10/util/Exception.h>
#include <lora/version.h>

#include <cstdint>
#include <string>
#include <utility>

LORA_NAMESPACE_BEGIN

// An option with its getters and its setter, which returns the configuration.
#define LORA_OPTION(T, name)                               \
 public:                                                   \
  const T& name() const noexcept { return this->name##_; } \
  T& name() noexcept { return this->name##_; }             \
  Derived& name(T value) {                                 \
    this->name##_ = std::move(value);                      \
    return static_cast<Derived&>(*this);                   \
  }                                                        \
                                                           \
 private:                                                  \
  T name##_ /* NOLINT */

/// What the configurations of virtual tokens have in common, by PEFT's names: learned vectors in front of a frozen
/// model's tokens.
template <class Derived>
class PromptLearningConfig {
  /// How many virtual tokens stand in front of a sequence; at least 1.
  LORA_OPTION(int64_t, num_virtual_tokens) = 0;
  /// Width of a token in the model, GPT-2's n_embd; of a prefix that of its keys, which grouped queries make narrower.
  LORA_OPTION(int64_t, token_dim) = 0;
  /// Layers of the model.
  LORA_OPTION(int64_t, num_layers) = 0;
  /// Heads of a layer's keys and values; they divide token_dim.
  LORA_OPTION(int64_t, num_attention_heads) = 0;
  /// Stacks that get virtual tokens: 1, a decoder or an encoder alone. PEFT's 2, of both, is refused.
  LORA_OPTION(int64_t, num_transformer_submodules) = 1;
  /// PEFT's note of the task, by which it chooses the class that puts virtual tokens in front; it changes nothing here.
  LORA_OPTION(std::string, task_type) = "CAUSAL_LM";
  /// PEFT's note of the base model; it changes nothing here.
  LORA_OPTION(std::string, base_model_name_or_path);
  /// PEFT's note of the base model's revision; it changes nothing here.
  LORA_OPTION(std::string, revision);
  /// PEFT's note of the Python classes, JSON text that is kept as it is.
  LORA_OPTION(std::string, auto_mapping);

 protected:
  /// Calls `visit(key, value)` for each of these options, under PEFT's key; `config` is const or not.
  template <class Config, class Visitor>
  static void visit_options(Config& config, Visitor& visit) {
    visit("auto_mapping", config.auto_mapping());
    visit("base_model_name_or_path", config.base_model_name_or_path());
    visit("num_attention_heads", config.num_attention_heads());
    visit("num_layers", config.num_layers());
    visit("num_transformer_submodules", config.num_transformer_submodules());
    visit("num_virtual_tokens", config.num_virtual_tokens());
    visit("revision", config.revision());
    visit("task_type", config.task_type());
    visit("token_dim", config.token_dim());
  }

  /// Throws c10::ValueError for a value outside its range; `type` is the configuration's: "lora::PrefixTuningConfig".
  void validate_options(const char* type) const {
    check_size(type, "num_virtual_tokens", num_virtual_tokens());
    check_size(type, "token_dim", token_dim());
    TORCH_CHECK_VALUE(num_transformer_submodules() == 1, "[", type,
                      "] found num_transformer_submodules = ", num_transformer_submodules(),
                      ", expected 1: virtual tokens of one stack");
  }

  /// Throws c10::ValueError for a size below 1, or one so large that products of sizes would overflow.
  static void check_size(const char* type, const char* name, int64_t size) {
    constexpr int64_t kLargest = 1 << 20;
    TORCH_CHECK_VALUE(size > 0 && size <= kLargest, "[", type, "] found ", name, " = ", size, ", expected 1 to ",
                      kLargest);
  }
};

#undef LORA_OPTION

LORA_NAMESPACE_END
