#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <lora/config/prompt_tuning_config.h>
#include <lora/prompt/prompt_files.h>
#include <lora/prompt/virtual_tokens.h>
#include <lora/version.h>
#include <torch/nn/init.h>
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <optional>
#include <string>

LORA_NAMESPACE_BEGIN

/// Prompt tuning (Lester et al. 2021, arXiv 2104.08691): n learned embeddings in front of those of the tokens, of a
/// frozen model that takes input embeddings.
///
/// Example:
/// ```
/// lora::PromptTuning prompt(lora::PromptTuningConfig().num_virtual_tokens(20).token_dim(768));
/// auto logits = model->forward({{}, prompt->prepend(wte(ids))});  // of the virtual tokens too
/// ```
class PromptTuningImpl : public VirtualTokens<PromptTuningImpl, PromptTuningConfig> {
 public:
  /// A new prompt, N(0, 1).
  explicit PromptTuningImpl(const PromptTuningConfig& config) : VirtualTokens("lora::PromptTuning", config) { reset(); }
  /// A prompt of given prompt_embeddings [n, token_dim], which it takes for its own.
  PromptTuningImpl(const PromptTuningConfig& config, const at::Tensor& prompt_embeddings)
      : VirtualTokens("lora::PromptTuning", config) {
    check_values("PromptTuning", prompt_embeddings);
    make_embedding(prompt_embeddings);
  }

  /// Makes the parameters anew.
  void reset() override {
    make_embedding(at::empty({config_.num_virtual_tokens(), config_.token_dim()}));
    torch::nn::init::normal_(embedding->weight);
  }

  /// [n, token_dim], what files have.
  const at::Tensor& prompt_embeddings() const { return embedding->weight; }

  /// [batch, n, token_dim] in the dtype of the model: a view, which all rows of the batch share.
  at::Tensor embeddings(int64_t batch, std::optional<at::ScalarType> dtype = std::nullopt) const {
    check_batch("embeddings", batch);
    auto rows = prompt_embeddings();
    if (dtype) rows = rows.to(*dtype);
    return rows.unsqueeze(0).expand({batch, -1, -1});
  }

  /// token_embeddings: [batch, length, token_dim], without positions, which count the virtual tokens from 0 on; returns
  /// [batch, n + length, token_dim] of the same dtype.
  at::Tensor prepend(const at::Tensor& token_embeddings) const {
    TORCH_CHECK_VALUE(token_embeddings.dim() == 3 && token_embeddings.size(2) == config_.token_dim(),
                      "[lora::PromptTuning::prepend] found embeddings ", token_embeddings.sizes(),
                      ", expected [batch, length, ", config_.token_dim(), "]");
    return at::cat({embeddings(token_embeddings.size(0), token_embeddings.scalar_type()), token_embeddings}, 1);
  }

  /// labels: [batch, length]; returns [batch, n + length] with no label for the virtual tokens. Shifted by one as
  /// usual, the last virtual token learns to predict the first token.
  at::Tensor pad_labels(const at::Tensor& labels, int64_t ignored = -100) const { return pad(labels, ignored); }

  /// Begins with given embeddings [n, token_dim], as rows of the model's own, better than at random (section 2.1). The
  /// values are copied. Throws a c10::ValueError for other shapes.
  void start(const at::Tensor& embeddings) {
    check_values("start", embeddings);
    fill_embedding(embeddings);
  }

  using torch::nn::Module::save;
  /// Writes a PEFT directory. NaN and infinite values are a c10::ValueError, whatever the system refuses a FormatError;
  /// the older files stay then.
  void save(const std::string& directory) const {
    const auto json = detail::prompt_config_json(config_, {{"prompt_tuning_init", "RANDOM"},
                                                           {"prompt_tuning_init_text", nullptr},
                                                           {"tokenizer_kwargs", nullptr},
                                                           {"tokenizer_name_or_path", nullptr}});
    detail::write_prompt(type_, json, prompt_embeddings().detach(), directory);
  }
};

/// Holder of a PromptTuningImpl.
class PromptTuning : public torch::nn::ModuleHolder<PromptTuningImpl> {
 public:
  using torch::nn::ModuleHolder<PromptTuningImpl>::ModuleHolder;
  /// The module that it holds.
  using Impl = PromptTuningImpl;
};

/// Reads a PEFT directory of prompt tuning, trainable. Throws a FormatError with every mismatch.
inline PromptTuning load_prompt_tuning(const std::string& directory) {
  detail::PromptReader<PromptTuningConfig> reader(directory);
  reader.read();
  return PromptTuning(reader.config, reader.embeddings);
}

LORA_NAMESPACE_END
