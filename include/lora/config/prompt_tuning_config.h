#pragma once

#include <lora/config/prompt_learning_config.h>
#include <lora/version.h>

#include <cstdint>

LORA_NAMESPACE_BEGIN

/// Options of prompt tuning (Lester et al. 2021, arXiv 2104.08691), with the names of PEFT's PromptTuningConfig;
/// num_virtual_tokens and token_dim have to be given. A new prompt is N(0, 1), PEFT's "RANDOM"; PromptTuning::start
/// begins with embeddings of the model, as PEFT's "TEXT" does.
///
/// Example:
/// ```
/// lora::PromptTuning prompt(lora::PromptTuningConfig().num_virtual_tokens(20).token_dim(768));
/// ```
class PromptTuningConfig : public PromptLearningConfig<PromptTuningConfig> {
 public:
  /// PEFT's name of the method.
  static constexpr const char* kPeftType = "PROMPT_TUNING";

  /// Width of a virtual token.
  int64_t width() const { return token_dim(); }

  /// Calls `visit(key, value)` for each option that files hold, under PEFT's key; `config` is const or not.
  template <class Config, class Visitor>
  static void visit(Config& config, Visitor& visit) {
    visit_options(config, visit);
  }

  /// Throws c10::ValueError for a value outside its range.
  void validate() const { validate_options("lora::PromptTuningConfig"); }
};

LORA_NAMESPACE_END
