#pragma once

#include <c10/util/Exception.h>
#include <lora/config/prompt_learning_config.h>
#include <lora/version.h>
#include <torch/arg.h>

#include <cstdint>
#include <string>

LORA_NAMESPACE_BEGIN

/// How a new prefix begins.
enum class PrefixInit {
  kNormal,  ///< N(0, 1), PEFT's default; a projection's layers as torch::nn::Linear's.
  kZero,  ///< Keys and values of zero, PEFT's "zero": a tempered softmax at first, of which most of the prefix learns.
};

/// Options of prefix tuning (Li & Liang 2021, arXiv 2101.00190), with the names and defaults of PEFT's
/// PrefixTuningConfig; num_virtual_tokens, token_dim, num_layers and num_attention_heads have to be given.
///
/// Example:
/// ```
/// lora::PrefixTuning prefix(
///     lora::PrefixTuningConfig().num_virtual_tokens(20).num_layers(12).num_attention_heads(12).token_dim(768));
/// ```
class PrefixTuningConfig : public PromptLearningConfig<PrefixTuningConfig> {
 public:
  /// PEFT's name of the method.
  static constexpr const char* kPeftType = "PREFIX_TUNING";

  /// Whether keys and values are learned through a projection, Linear(token_dim, encoder_hidden_size), tanh,
  /// Linear(encoder_hidden_size, 2·num_layers·token_dim), of vectors of token_dim (section 4.3). Files have its result.
  TORCH_ARG(bool, prefix_projection) = false;
  /// Width of the projection's hidden layer; 0 stands for token_dim.
  TORCH_ARG(int64_t, encoder_hidden_size) = 0;
  /// How the prefix begins.
  TORCH_ARG(PrefixInit, init_weights) = PrefixInit::kNormal;

 public:
  /// Width of a virtual token: a key and a value for each layer.
  int64_t width() const { return 2 * num_layers() * token_dim(); }
  /// encoder_hidden_size with its default.
  int64_t hidden_size() const { return encoder_hidden_size() > 0 ? encoder_hidden_size() : token_dim(); }

  /// Calls `visit(key, value)` for each option that files hold, under PEFT's key; `config` is const or not.
  template <class Config, class Visitor>
  static void visit(Config& config, Visitor& visit) {
    visit_options(config, visit);
    visit("encoder_hidden_size", config.encoder_hidden_size());
    visit("prefix_projection", config.prefix_projection());
  }

  /// Throws c10::ValueError for a value outside its range.
  void validate() const {
    const auto* const type = "lora::PrefixTuningConfig";
    validate_options(type);
    check_size(type, "num_layers", num_layers());
    check_size(type, "num_attention_heads", num_attention_heads());
    if (encoder_hidden_size() != 0) check_size(type, "encoder_hidden_size", encoder_hidden_size());
    TORCH_CHECK_VALUE(token_dim() % num_attention_heads() == 0, "[", type, "] found token_dim = ", token_dim(),
                      ", expected a multiple of num_attention_heads = ", num_attention_heads());
  }
};

LORA_NAMESPACE_END
