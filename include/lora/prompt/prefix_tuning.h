#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <lora/config/prefix_tuning_config.h>
#include <lora/prompt/prompt_files.h>
#include <lora/prompt/virtual_tokens.h>
#include <lora/version.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/init.h>
#include <torch/nn/module.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN

/// Keys and values of tokens in front of the input, a pair of [batch, heads, tokens, head size] for each layer.
using PastKeyValues = std::vector<std::pair<at::Tensor, at::Tensor>>;

/// The layers through which a prefix is learned: Linear(token_dim, hidden), tanh, Linear(hidden, width).
class PrefixProjectionImpl : public torch::nn::Cloneable<PrefixProjectionImpl> {
 public:
  /// New layers, as torch::nn::Linear's begin.
  PrefixProjectionImpl(int64_t token_dim, int64_t hidden, int64_t width)
      : token_dim_(token_dim), hidden_(hidden), width_(width) {
    reset();
  }

  /// Makes the layers anew, named as PEFT's torch.nn.Sequential names them.
  void reset() override {
    first = register_module("0", torch::nn::Linear(token_dim_, hidden_));
    second = register_module("2", torch::nn::Linear(hidden_, width_));
  }

  /// x: [n, token_dim] → [n, width].
  at::Tensor forward(const at::Tensor& x) const {
    const auto hidden = at::tanh(at::linear(x, first->weight, first->bias));
    return at::linear(hidden, second->weight, second->bias);
  }

  torch::nn::Linear first{nullptr};   ///< [hidden, token_dim]
  torch::nn::Linear second{nullptr};  ///< [width, hidden]

 private:
  int64_t token_dim_, hidden_, width_;
};

/// Holder of a PrefixProjectionImpl.
class PrefixProjection : public torch::nn::ModuleHolder<PrefixProjectionImpl> {
 public:
  using torch::nn::ModuleHolder<PrefixProjectionImpl>::ModuleHolder;
  /// The module that it holds.
  using Impl = PrefixProjectionImpl;
};

/// Prefix tuning (Li & Liang 2021, arXiv 2101.00190): n learned keys and values in front of those of the tokens, in
/// every layer of a frozen model that takes past keys and values.
///
/// Example:
/// ```
/// lora::PrefixTuning prefix(
///     lora::PrefixTuningConfig().num_virtual_tokens(20).num_layers(12).num_attention_heads(12).token_dim(768));
/// auto logits = model->forward({ids, {}, prefix->past_key_values(ids.size(0))});
/// ```
class PrefixTuningImpl : public VirtualTokens<PrefixTuningImpl, PrefixTuningConfig> {
 public:
  /// A new prefix by the configuration's start.
  explicit PrefixTuningImpl(const PrefixTuningConfig& config) : VirtualTokens("lora::PrefixTuning", config) { reset(); }
  /// A prefix of given prompt_embeddings [n, 2·num_layers·token_dim], which it takes for its own.
  PrefixTuningImpl(const PrefixTuningConfig& config, const at::Tensor& prompt_embeddings)
      : VirtualTokens("lora::PrefixTuning", config) {
    check_without_projection("PrefixTuning");
    check_values("PrefixTuning", prompt_embeddings);
    make_embedding(prompt_embeddings);
  }

  /// Makes the parameters anew.
  void reset() override {
    const auto n = config_.num_virtual_tokens();
    const bool projects = config_.prefix_projection(), zero = config_.init_weights() == PrefixInit::kZero;
    make_embedding(at::zeros({n, projects ? config_.token_dim() : config_.width()}));
    if (projects || !zero) torch::nn::init::normal_(embedding->weight);
    if (!projects) return;
    transform =
        register_module("transform", PrefixProjection(config_.token_dim(), config_.hidden_size(), config_.width()));
    if (!zero) return;
    torch::nn::init::zeros_(transform->second->weight);
    torch::nn::init::zeros_(transform->second->bias);
  }

  /// What the prefix is, through the projection where there is one: [n, 2·num_layers·token_dim], a row as (layer, key
  /// or value, head, head size).
  at::Tensor prompt_embeddings() const {
    return transform.is_empty() ? embedding->weight : transform->forward(embedding->weight);
  }

  /// The keys and values for a batch, a pair of [batch, heads, n, head size] for each layer in the dtype of the model:
  /// views of one matrix, which all rows of the batch share. Tokens behind them stand at the positions from n on.
  PastKeyValues past_key_values(int64_t batch, std::optional<at::ScalarType> dtype = std::nullopt) const {
    check_batch("past_key_values", batch);
    const auto n = config_.num_virtual_tokens(), heads = config_.num_attention_heads();
    const auto matrices = 2 * config_.num_layers(), size = config_.token_dim() / heads;
    auto rows = prompt_embeddings();
    if (dtype) rows = rows.to(*dtype);
    const auto all = rows.view({n, matrices, heads, size}).permute({1, 2, 0, 3}).unsqueeze(1);
    const auto of_layers = all.expand({matrices, batch, heads, n, size}).unbind(0);
    PastKeyValues result;
    for (size_t i = 0; i < of_layers.size(); i += 2) result.emplace_back(of_layers[i], of_layers[i + 1]);
    return result;
  }

  /// Begins with what the model has for n real tokens, a pair of [1, heads, n, head size] for each layer, which brings
  /// a prefix further with little data (section 7.4). Throws a c10::ValueError for other shapes, and where there is a
  /// projection, whose result cannot be chosen.
  void start(const PastKeyValues& past) {
    check_without_projection("start");
    const auto n = config_.num_virtual_tokens(), heads = config_.num_attention_heads();
    const std::vector<int64_t> sizes{1, heads, n, config_.token_dim() / heads};
    std::vector<at::Tensor> rows;
    for (const auto& [key, value] : past) {
      for (const auto* x : {&key, &value}) {
        TORCH_CHECK_VALUE(x->sizes() == sizes && x->is_floating_point(), "[lora::PrefixTuning::start] found ",
                          x->sizes(), " of ", x->dtype(), " in layer ", rows.size() / 2, ", expected numbers ",
                          at::IntArrayRef(sizes), "; read as many tokens of one sequence as the prefix has");
        rows.push_back(x->squeeze(0).transpose(0, 1));
      }
    }
    TORCH_CHECK_VALUE(past.size() == static_cast<size_t>(config_.num_layers()), "[lora::PrefixTuning::start] found ",
                      past.size(), " layers, expected ", config_.num_layers());
    const auto values = at::stack(rows, 1).reshape({n, config_.width()});
    check_values("start", values);
    fill_embedding(values);
  }

  using torch::nn::Module::save;
  /// Writes a PEFT directory with what the prefix is, without its projection. NaN and infinite values are a
  /// c10::ValueError, whatever the system refuses a FormatError; the older files stay then.
  void save(const std::string& directory) const {
    auto written = config_;
    written.encoder_hidden_size(config_.hidden_size());
    const auto start = config_.init_weights() == PrefixInit::kZero ? detail::Json("zero") : detail::Json();
    detail::write_prompt(type_, detail::prompt_config_json(written, {{"init_weights", start}}),
                         prompt_embeddings().detach(), directory);
  }

  PrefixProjection transform{nullptr};  ///< The projection; empty where there is none.

 private:
  void check_without_projection(const char* function) const {
    TORCH_CHECK_VALUE(!config_.prefix_projection(), "[", type_, "::", function,
                      "] found prefix_projection, expected none: what the projection makes cannot be chosen");
  }
};

/// Holder of a PrefixTuningImpl.
class PrefixTuning : public torch::nn::ModuleHolder<PrefixTuningImpl> {
 public:
  using torch::nn::ModuleHolder<PrefixTuningImpl>::ModuleHolder;
  /// The module that it holds.
  using Impl = PrefixTuningImpl;
};

/// Reads a PEFT directory of prefix tuning, trainable. One that was learned through a projection holds what the
/// projection made, and is read without it. Throws a FormatError with every mismatch.
inline PrefixTuning load_prefix_tuning(const std::string& directory) {
  detail::PromptReader<PrefixTuningConfig> reader(directory);
  reader.read();
  return PrefixTuning(reader.config.prefix_projection(false), reader.embeddings);
}

LORA_NAMESPACE_END
