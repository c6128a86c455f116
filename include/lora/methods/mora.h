#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/outer.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/zeros.h>
#include <lora/config/mora_config.h>
#include <lora/methods/cached.h>
#include <lora/methods/configured_method.h>
#include <lora/methods/folds.h>
#include <lora/methods/method.h>
#include <lora/version.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN

/// ΔW·x = decompress(M·compress(x)) with a square M [q, q] (Jiang et al. 2024, arXiv 2405.12130, section 3.2, its
/// equation 6): x, padded with its own first elements, is summed in groups of q, and the result is repeated along the
/// outputs. q² parameters, about r·(in + out) of a LoRA.
class MoraSharedUpdate final : public Update {
 public:
  /// `M`: [q, q], for a weight [out, in].
  MoraSharedUpdate(at::Tensor M, int64_t in, int64_t out) : M_(std::move(M)), in_(in), out_(out) {}

  int64_t in_features() const override { return in_; }
  int64_t out_features() const override { return out_; }
  std::vector<UpdateTensor> tensors() const override { return {{"mora_M", M_, TensorRole::kOutput}}; }

  /// A is the matrix that sums the groups.
  Factors factors(const BaseRows& /*base*/) const override {
    const auto A = detail::fold_matrix(in_, M_.size(0), /*cyclic=*/true, M_.options().requires_grad(false));
    return {{LowRank{A, detail::cycled(M_.t(), out_).t(), 1}}, {}, {}};
  }

  bool has_product() const override { return true; }
  at::Tensor product(const at::Tensor& x) const override {
    const auto z = detail::folded(x, M_.size(0), /*cyclic=*/true);
    return detail::cycled(at::matmul(z, M_.t().to(z.scalar_type())), out_);
  }

  std::shared_ptr<Update> clone(const TensorCopier& copy) const override {
    return std::make_shared<MoraSharedUpdate>(copy(M_), in_, out_);
  }

 private:
  at::Tensor M_;
  int64_t in_;
  int64_t out_;
};

/// The same with a rotation in place of the sum (the paper's equation 9): group g of x is rotated by the angles
/// g·10000^(−2k/q) and multiplied by M, and the groups' results follow each other along the outputs, cut or repeated to
/// `out`. Groups beyond the outputs are not used.
class MoraRotatedUpdate final : public Update {
 public:
  /// `M`: [q, q] with an even q, for a weight [out, in].
  MoraRotatedUpdate(at::Tensor M, int64_t in, int64_t out) : M_(std::move(M)), in_(in), out_(out) {}

  int64_t in_features() const override { return in_; }
  int64_t out_features() const override { return out_; }
  std::vector<UpdateTensor> tensors() const override { return {{"mora_M", M_, TensorRole::kOutput}}; }

  Factors factors(const BaseRows& /*base*/) const override { return {}; }
  bool is_factored() const override { return false; }

  bool has_product() const override { return true; }
  at::Tensor product(const at::Tensor& x) const override {
    const auto q = M_.size(0);
    auto groups = detail::grouped(x, q, /*cyclic=*/true);
    const auto used = std::min(groups.size(-2), (out_ + q - 1) / q);
    groups = groups.narrow(-2, 0, used);
    const auto [cosines, sines] = rotation(used, q, x.options().requires_grad(false));
    const auto halves = groups.chunk(2, -1);
    const auto rotated = groups * cosines + at::cat({-halves[1], halves[0]}, -1) * sines;
    auto sizes = x.sizes().vec();
    sizes.back() = used * q;
    return detail::cycled(at::matmul(rotated, M_.t().to(x.scalar_type())).reshape(sizes), out_);
  }

  at::Tensor dense(const BaseRows& /*base*/) const override {
    return product(at::eye(in_, M_.options().requires_grad(false))).t();
  }

  std::shared_ptr<Update> clone(const TensorCopier& copy) const override {
    return std::make_shared<MoraRotatedUpdate>(copy(M_), in_, out_);
  }

 private:
  /// Cosines and sines [groups, q] of the angles, those of both halves the same.
  static std::pair<at::Tensor, at::Tensor> rotation(int64_t groups, int64_t q, const at::TensorOptions& options) {
    const auto wide = options.dtype(accumulation_dtype(c10::typeMetaToScalarType(options.dtype())));
    const auto frequencies = at::pow(10000.0, at::arange(0, q, 2, wide) / static_cast<double>(-q));
    const auto half = at::outer(at::arange(groups, wide), frequencies);
    const auto angles = at::cat({half, half}, -1);
    return {angles.cos().to(options.dtype()), angles.sin().to(options.dtype())};
  }

  at::Tensor M_;
  int64_t in_;
  int64_t out_;
};

/// The method MoRA with its configuration.
class MoRA final : public ConfiguredMethod<MoraConfig> {
 public:
  using ConfiguredMethod::ConfiguredMethod;

  /// q for a weight [out, in]: √(r·(in + out)), rounded; of type 6 the even number below.
  int64_t size_of_matrix(int64_t in, int64_t out) const {
    const auto q = static_cast<int64_t>(std::sqrt(static_cast<double>((in + out) * config().r())) + 0.5);
    return config().mora_type() == 6 ? q / 2 * 2 : q;
  }

  double dropout() const override { return config().mora_dropout(); }

  std::shared_ptr<Update> create(const UpdateSpec& spec) const override {
    const auto in = spec.in_features, out = spec.out_features, q = size_of_matrix(in, out);
    const auto M = at::zeros({q, q}, spec.options);
    if (config().mora_type() == 1) return std::make_shared<MoraSharedUpdate>(M, in, out);
    return std::make_shared<MoraRotatedUpdate>(M, in, out);
  }

  std::string refusal(const UpdateSpec& spec, bool /*is_part*/) const override {
    if (config().mora_type() == 1) return "";
    if (spec.embedding || spec.convolution) {
      return "MoRA's type 6 for an embedding or a convolution, expected a matrix of a product; choose mora_type 1";
    }
    return "";
  }
};

LORA_NAMESPACE_END
