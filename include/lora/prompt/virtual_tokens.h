#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>
#include <lora/detail/finite.h>
#include <lora/methods/update.h>
#include <lora/version.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/options/embedding.h>

#include <cstdint>
#include <vector>

LORA_NAMESPACE_BEGIN

/// What prefix and prompt tuning have in common: a module apart from the model, whose matrix prompt_embeddings() stands
/// for virtual tokens in front of every sequence.
template <class Derived, class Config>
class VirtualTokens : public torch::nn::Cloneable<Derived> {
 public:
  /// The options, as given or as a file says.
  const Config& config() const noexcept { return config_; }

  /// The tensors that an optimizer is to train, beside an adapter's in param_groups. They are float32 unless to() made
  /// them another.
  std::vector<UpdateTensor> trainable_tensors() const {
    std::vector<UpdateTensor> result;
    for (const auto& named : this->named_parameters()) {
      if (named.value().requires_grad()) result.push_back({named.key(), named.value(), TensorRole::kInput});
    }
    return result;
  }

  /// mask: [*, length], whose ones or true say which tokens count; returns [*, num_virtual_tokens + length] with the
  /// virtual tokens' ones in front.
  at::Tensor pad_mask(const at::Tensor& mask) const { return pad(mask, 1); }

 protected:
  /// Throws a c10::ValueError for options that make no sense.
  VirtualTokens(const char* type, const Config& config) : type_(type), config_(config) { config_.validate(); }

  /// x: [*, length] with num_virtual_tokens times the value in front.
  at::Tensor pad(const at::Tensor& x, int64_t value) const {
    return at::constant_pad_nd(x, {config_.num_virtual_tokens(), 0}, value);
  }

  /// Takes a matrix [num_virtual_tokens, *] as the embedding's.
  void make_embedding(const at::Tensor& weight) {
    const auto options = torch::nn::EmbeddingOptions(weight.size(0), weight.size(1));
    embedding = this->register_module(
        "embedding", torch::nn::Embedding(torch::nn::EmbeddingOptions(options)._weight(weight.detach())));
    embedding->options = options;  // a clone would take the given weight for its own
  }

  /// Throws a c10::ValueError for what is no matrix of finite numbers [num_virtual_tokens, width].
  void check_values(const char* function, const at::Tensor& values) const {
    const std::vector<int64_t> sizes{config_.num_virtual_tokens(), config_.width()};
    TORCH_CHECK_VALUE(values.defined() && values.sizes() == sizes && values.is_floating_point(), "[", type_,
                      "::", function, "] found values ", values.sizes(), " of ", values.dtype(), ", expected numbers ",
                      at::IntArrayRef(sizes), "; repeat or leave out virtual tokens");
    TORCH_CHECK_VALUE(detail::all_finite(values), "[", type_, "::", function,
                      "] found NaN or infinite values, expected finite ones");
  }

  /// Copies values into the embedding.
  void fill_embedding(const at::Tensor& values) {
    const c10::NoGradGuard no_grad;
    embedding->weight.copy_(values);
  }

  /// Throws a c10::ValueError for a batch of no sequence.
  void check_batch(const char* function, int64_t batch) const {
    TORCH_CHECK_VALUE(batch > 0, "[", type_, "::", function, "] found a batch of ", batch,
                      ", expected one sequence or more");
  }

  const char* type_;  ///< Named in errors: "lora::PrefixTuning".
  Config config_;     ///< The options.

 public:
  torch::nn::Embedding embedding{nullptr};  ///< The vectors that are trained, in `embedding->weight`.
};

LORA_NAMESPACE_END
