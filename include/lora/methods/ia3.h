#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/ones.h>
#include <c10/util/Exception.h>
#include <lora/config/ia3_config.h>
#include <lora/methods/configured_method.h>
#include <lora/methods/method.h>
#include <lora/version.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN

/// y = (x·W0ᵀ + b) ⊙ l with l [out], or of a feed-forward layer y = (x ⊙ l)·W0ᵀ + b with l [in], of a convolution one
/// number a channel (Liu et al. 2022, arXiv 2205.05638, section 3.3): W′ = diag(l)·W0 with b′ = l ⊙ b, or W0·diag(l).
/// out or in parameters; l starts at ones.
class IA3Update final : public Update {
 public:
  /// `feedforward`: l scales the columns.
  IA3Update(at::Tensor l, bool feedforward, int64_t in, int64_t out)
      : l_(std::move(l)), feedforward_(feedforward), in_(in), out_(out) {}

  int64_t in_features() const override { return in_; }
  int64_t out_features() const override { return out_; }

  std::vector<UpdateTensor> tensors() const override {
    return {{"ia3_l", l_, TensorRole::kScale, {"", feedforward_ ? -1 : 0, 1}}};
  }
  Factors factors(const BaseRows& /*base*/) const override {
    return feedforward_ ? Factors{{}, {}, l_} : Factors{{}, l_, {}};
  }
  at::Tensor bias_scale() const override { return feedforward_ ? at::Tensor() : l_; }

  std::shared_ptr<Update> clone(const TensorCopier& copy) const override {
    return std::make_shared<IA3Update>(copy(l_), feedforward_, in_, out_);
  }

 private:
  at::Tensor l_;
  bool feedforward_;
  int64_t in_;
  int64_t out_;
};

/// The method (IA)³ with its configuration.
class IA3 final : public ConfiguredMethod<IA3Config> {
 public:
  using ConfiguredMethod::ConfiguredMethod;

  std::shared_ptr<Update> create(const UpdateSpec& spec) const override {
    const bool feedforward = is_feedforward(spec.names);
    const auto size = feedforward ? spec.in_features / spec.kernel : spec.out_features;
    return std::make_shared<IA3Update>(at::ones({size}, spec.options), feedforward, spec.in_features,
                                       spec.out_features);
  }

  std::string refusal(const UpdateSpec& spec, bool is_part) const override {
    if (spec.rows_are_inputs) return "a transposed convolution, expected a layer whose weight's rows are outputs";
    if (!is_feedforward(spec.names)) return "";
    if (is_part) return "parts of a feed-forward module, expected the whole: all parts of a weight have one input";
    return spec.embedding ? "an embedding as a feed-forward module, expected a layer with an input to scale" : "";
  }

  std::vector<std::string> unmatched(const std::vector<std::vector<std::string>>& weights) const override {
    std::vector<std::string> entries;
    for (const auto& entry : config().feedforward_modules().entries()) {
      const bool matched =
          std::any_of(weights.begin(), weights.end(), [&](const auto& names) { return matches(entry, names); });
      if (!matched) entries.push_back("feedforward_modules \"" + entry.text + "\"");
    }
    return entries;
  }

  /// [out, 1] or [1, in], of a convolution [1, channels, 1, …].
  std::vector<int64_t> stored_sizes(const UpdateTensor& tensor, std::vector<int64_t> sizes,
                                    const StoredWeight& weight) const override {
    const bool feedforward = tensor.stored.rows < 0;
    if (weight.kernel.empty()) {
      sizes.insert(feedforward ? sizes.begin() : sizes.end(), 1);
    } else {
      sizes.insert(sizes.begin(), 1);
      sizes.resize(weight.kernel.size(), 1);
    }
    return sizes;
  }
  std::vector<const char*> keys_unknown_to_peft() const override {
    return {"layers_to_transform", "layers_pattern", "bias"};
  }

 private:
  bool is_feedforward(const std::vector<std::string>& names) const {
    const auto& entries = config().feedforward_modules().entries();
    return std::any_of(entries.begin(), entries.end(), [&](const auto& entry) { return matches(entry, names); });
  }

  bool matches(const TargetModules::Entry& entry, const std::vector<std::string>& names) const {
    return std::any_of(names.begin(), names.end(),
                       [&](const auto& name) { return config().feedforward_modules().matches(entry, name); });
  }
};

LORA_NAMESPACE_END
