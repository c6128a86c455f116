#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/zeros.h>
#include <lora/config/miss_config.h>
#include <lora/methods/configured_method.h>
#include <lora/methods/folds.h>
#include <lora/methods/method.h>
#include <lora/version.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN

/// ΔW[o, i] = D[i mod r, o mod mini_r] with D [r, mini_r] (Kang and Yin 2024, arXiv 2409.15371, equation 4; mini_r =
/// out in its plain form): the inputs are summed in r groups, then multiplied by D. r·mini_r parameters.
class MissUpdate final : public Update {
 public:
  /// `D`: [r, out], or [r, mini_r] of a weight with `out` rows.
  MissUpdate(at::Tensor D, int64_t in, int64_t out) : D_(std::move(D)), in_(in), out_(out) {}

  int64_t in_features() const override { return in_; }
  int64_t out_features() const override { return out_; }

  std::vector<UpdateTensor> tensors() const override {
    return {{"miss_block", D_, TensorRole::kOutput, {"", D_.size(1) == out_ ? 1 : -1, 0}}};
  }

  /// A is the matrix that sums the groups.
  Factors factors(const BaseRows& /*base*/) const override {
    const auto A = detail::fold_matrix(in_, D_.size(0), /*cyclic=*/false, D_.options().requires_grad(false));
    return {{LowRank{A, detail::cycled(D_, out_).t(), 1}}, {}, {}};
  }

  bool has_product() const override { return true; }
  at::Tensor product(const at::Tensor& x) const override {
    const auto h = detail::folded(x, D_.size(0), /*cyclic=*/false);
    return detail::cycled(at::matmul(h, D_.to(h.scalar_type())), out_);
  }

  std::shared_ptr<Update> clone(const TensorCopier& copy) const override {
    return std::make_shared<MissUpdate>(copy(D_), in_, out_);
  }

 private:
  at::Tensor D_;
  int64_t in_;
  int64_t out_;
};

/// ΔW = W0ᴵᴶ·Dᴵ + Dᴵ for each r×r block of W0, with D [out / r, r, r] (the same paper's form "bat"). It depends on all
/// of W0: every use of the weight forms it, and the input is not dropped from.
class MissBatUpdate final : public Update {
 public:
  /// `D`: [out / r, r, r] of a weight with `in` columns.
  MissBatUpdate(at::Tensor D, int64_t in) : D_(std::move(D)), in_(in) {}

  int64_t in_features() const override { return in_; }
  int64_t out_features() const override { return D_.size(0) * D_.size(1); }

  std::vector<UpdateTensor> tensors() const override { return {{"miss_block", D_, TensorRole::kOutput}}; }

  Factors factors(const BaseRows& /*base*/) const override { return {}; }
  bool is_factored() const override { return false; }

  at::Tensor dense(const BaseRows& base) const override {
    const auto r = D_.size(1), blocks = in_ / r;
    // [out / r, in / r, r, r]
    const auto W0 = base.matrix().to(D_.scalar_type()).reshape({D_.size(0), r, blocks, r}).transpose(1, 2);
    const auto D = D_.unsqueeze(1);
    return (at::matmul(W0, D) + D).transpose(1, 2).reshape({out_features(), in_});
  }

  std::shared_ptr<Update> clone(const TensorCopier& copy) const override {
    return std::make_shared<MissBatUpdate>(copy(D_), in_);
  }

 private:
  at::Tensor D_;
  int64_t in_;
};

/// The method MiSS with its configuration.
class MiSS final : public ConfiguredMethod<MissConfig> {
 public:
  using ConfiguredMethod::ConfiguredMethod;

  double dropout() const override { return config().miss_dropout(); }

  std::shared_ptr<Update> create(const UpdateSpec& spec) const override {
    const auto r = config().r(), in = spec.in_features, out = spec.out_features;
    if (form() == MissForm::kBat) {
      return std::make_shared<MissBatUpdate>(at::zeros({out / r, r, r}, spec.options), in);
    }
    const auto columns = form() == MissForm::kMini ? config().mini_r() : out;
    return std::make_shared<MissUpdate>(at::zeros({r, columns}, spec.options), in, out);
  }

  std::string refusal(const UpdateSpec& spec, bool is_part) const override {
    const auto r = config().r(), in = spec.in_features, out = spec.out_features;
    if (r > in)
      return "r = " + std::to_string(r) + " and " + std::to_string(in) + " inputs, expected no more than those";
    if (form() == MissForm::kMini && out % config().mini_r() != 0) {
      return "mini_r = " + std::to_string(config().mini_r()) + " and " + std::to_string(out) +
             " outputs, expected a divisor of those";
    }
    if (form() != MissForm::kBat) return "";
    if (is_part || spec.embedding || spec.convolution) {
      return "MiSS's form \"bat\" for a part, an embedding or a convolution, expected a whole matrix of a product";
    }
    if (in % r == 0 && out % r == 0) return "";
    return "r = " + std::to_string(r) + " and a weight [" + std::to_string(out) + ", " + std::to_string(in) +
           "], expected a divisor of both for MiSS's form \"bat\"";
  }

  std::vector<const char*> keys_unknown_to_peft() const override { return {"fan_in_fan_out"}; }

 private:
  MissForm form() const { return config().init_weights(); }
};

LORA_NAMESPACE_END
