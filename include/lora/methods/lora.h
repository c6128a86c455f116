#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <lora/config/lora_config.h>
#include <lora/methods/method.h>
#include <lora/version.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN

/// ΔW = s·B·A with A [r, in], B [out, r] (Hu et al. 2021, arXiv 2106.09685, section 4.1); r·(in + out) parameters.
class LoraUpdate final : public Update {
 public:
  /// `embedding`: the tensors have PEFT's names for an embedding's, lora_embedding_A [r, entries] and _B [out, r].
  LoraUpdate(at::Tensor A, at::Tensor B, double scaling, bool embedding = false)
      : A_(std::move(A)), B_(std::move(B)), scaling_(scaling), embedding_(embedding) {}

  int64_t in_features() const override { return A_.size(1); }
  int64_t out_features() const override { return B_.size(0); }
  /// r.
  int64_t rank() const { return A_.size(0); }
  /// s.
  double scaling() const { return scaling_; }

  std::vector<UpdateTensor> tensors() const override {
    if (embedding_) {
      return {{"lora_embedding_A", A_, TensorRole::kEmbedding}, {"lora_embedding_B", B_, TensorRole::kEmbedding}};
    }
    return {{"lora_A", A_, TensorRole::kInput}, {"lora_B", B_, TensorRole::kOutput}};
  }

  LowRank low_rank() const override { return {A_, B_, scaling_}; }

  std::shared_ptr<Update> clone(at::Device device) const override {
    const auto copy = [&](const at::Tensor& tensor) {
      return tensor.detach().to(tensor.options().device(device), false, true);
    };
    return std::make_shared<LoraUpdate>(copy(A_), copy(B_), scaling_, embedding_);
  }

 private:
  at::Tensor A_;
  at::Tensor B_;
  double scaling_;
  bool embedding_;
};

/// The method LoRA with its configuration.
class LoRA final : public Method {
 public:
  /// Its configuration's type.
  using Config = LoraConfig;

  /// Throws c10::ValueError for a configuration out of range.
  explicit LoRA(LoraConfig config) : config_(std::move(config)) {
    config_.validate();
    targeting_ = config_.targeting();
    for (const auto& [pattern, rank] : config_.rank_pattern()) ranks_.emplace_back(path_regex(pattern), rank);
    for (const auto& [pattern, alpha] : config_.alpha_pattern()) alphas_.emplace_back(path_regex(pattern), alpha);
  }

  /// As it was given.
  const LoraConfig& config() const noexcept { return config_; }

  const char* peft_type() const override { return "LORA"; }
  const Targeting& targeting() const override { return targeting_; }
  double dropout() const override { return config_.lora_dropout(); }

  at::ScalarType tensor_dtype(at::ScalarType base) const override {
    return config_.autocast_adapter_dtype() ? accumulation_dtype(base) : base;
  }

  /// r of a weight by any of its paths.
  int64_t rank(const std::vector<std::string>& names) const { return first_match(ranks_, names, config_.r()); }
  /// lora_alpha of a weight by any of its paths.
  double alpha(const std::vector<std::string>& names) const {
    return first_match(alphas_, names, config_.lora_alpha());
  }
  /// s of a weight by any of its paths.
  double scaling(const std::vector<std::string>& names) const {
    const auto rank = static_cast<double>(this->rank(names));
    return alpha(names) / (config_.use_rslora() ? std::sqrt(rank) : rank);
  }

  std::vector<std::string> unmatched(const std::vector<std::vector<std::string>>& weights) const override {
    std::vector<std::string> entries;
    const auto collect = [&](const char* field, const auto& matchers, const auto& patterns) {
      for (size_t i = 0; i < matchers.size(); ++i) {
        const bool matched = std::any_of(weights.begin(), weights.end(),
                                         [&](const auto& names) { return matches(matchers[i].first, names); });
        if (!matched) entries.push_back(std::string(field) + "[\"" + patterns[i].first + "\"]");
      }
    };
    collect("rank_pattern", ranks_, config_.rank_pattern());
    collect("alpha_pattern", alphas_, config_.alpha_pattern());
    return entries;
  }

  std::shared_ptr<Update> create(const UpdateSpec& spec) const override {
    const auto r = rank(spec.names);
    auto A = at::empty({r, spec.in_features}, spec.options);
    auto B = at::zeros({spec.out_features, r}, spec.options);
    if (!spec.initialise) {
      A.zero_();
    } else if (spec.embedding) {  // as PEFT: A is as wide as the vocabulary, so B is the factor drawn at random
      A.zero_();
      B.normal_();
    } else if (config_.init_lora_weights() == LoraInit::kGaussian) {
      A.normal_(0, 1.0 / static_cast<double>(r));
    } else if (A.numel() > 0) {
      const auto bound = 1.0 / std::sqrt(static_cast<double>(spec.in_features));
      A.uniform_(-bound, bound);
    }
    return std::make_shared<LoraUpdate>(A, B, scaling(spec.names), spec.embedding);
  }

 private:
  template <class Value>
  using Matchers = std::vector<std::pair<detail::PythonRegex, Value>>;

  // PEFT: re.match(r"(.*\.)?(key)$", path).
  static detail::PythonRegex path_regex(const std::string& pattern) {
    return detail::PythonRegex("(.*\\.)?(" + pattern + ")");
  }

  static bool matches(const detail::PythonRegex& regex, const std::vector<std::string>& names) {
    return std::any_of(names.begin(), names.end(), [&](const std::string& name) { return regex.fullmatch(name); });
  }

  template <class Value>
  static Value first_match(const Matchers<Value>& matchers, const std::vector<std::string>& names, Value otherwise) {
    for (const auto& [regex, value] : matchers) {
      if (matches(regex, names)) return value;
    }
    return otherwise;
  }

  LoraConfig config_;
  Targeting targeting_;
  Matchers<int64_t> ranks_;
  Matchers<double> alphas_;
};

LORA_NAMESPACE_END
