#pragma once

#include <c10/util/Exception.h>
#include <lora/config/peft_notes.h>
#include <lora/version.h>

#include <cstdint>

LORA_NAMESPACE_BEGIN

/// What the configurations of virtual tokens have in common, by PEFT's names: learned vectors in front of a frozen
/// model's tokens.
class PromptLearningOptions : public PeftNotes {
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

 protected:
  /// PEFT chooses the class that puts virtual tokens in front by the task.
  PromptLearningOptions() { task_type() = "CAUSAL_LM"; }

  /// Calls `visit(key, value)` for each of these options, under PEFT's key; `config` is const or not.
  template <class Config, class Visitor>
  static void visit_options(Config& config, Visitor& visit) {
    visit_notes(config, visit);
    visit("num_attention_heads", config.num_attention_heads());
    visit("num_layers", config.num_layers());
    visit("num_transformer_submodules", config.num_transformer_submodules());
    visit("num_virtual_tokens", config.num_virtual_tokens());
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

/// The same with setters that return the configuration.
template <class Derived>
class PromptLearningConfig : public NotedOptions<Derived, PromptLearningOptions> {
 public:
  LORA_OPTION_SETTER(PromptLearningOptions, int64_t, num_virtual_tokens)
  LORA_OPTION_SETTER(PromptLearningOptions, int64_t, token_dim)
  LORA_OPTION_SETTER(PromptLearningOptions, int64_t, num_layers)
  LORA_OPTION_SETTER(PromptLearningOptions, int64_t, num_attention_heads)
  LORA_OPTION_SETTER(PromptLearningOptions, int64_t, num_transformer_submodules)
};

LORA_NAMESPACE_END
