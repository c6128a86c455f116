#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <lora/config/vera_config.h>
#include <lora/methods/cached.h>
#include <lora/methods/configured_method.h>
#include <lora/methods/method.h>
#include <lora/version.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN

/// The frozen A [r, in] and B [out, r] that all updates of a VeRA adapter share, as large as the largest needs.
struct VeraProjection {
  at::Tensor A;  ///< [r, in]
  at::Tensor B;  ///< [out, r]

  /// As PEFT draws them, on the CPU in float32 by a generator with the seed: first A ~ U(−a, a) with a = √6/√in, then B
  /// with √6/√r (Kaiming's bound with the fan of each).
  static VeraProjection draw(int64_t r, int64_t in, int64_t out, int64_t key) {
    const auto generator = at::detail::createCPUGenerator(static_cast<uint64_t>(key));
    const auto bound = [](int64_t fan) {
      return std::sqrt(3.0) * (std::sqrt(2.0) / std::sqrt(static_cast<double>(fan)));
    };
    const at::TensorOptions options(at::kFloat);
    auto A = at::empty({r, in}, options).uniform_(-bound(in), bound(in), generator);
    auto B = at::empty({out, r}, options).uniform_(-bound(r), bound(r), generator);
    return {std::move(A), std::move(B)};
  }
};

/// ΔW = diag(b)·B·diag(d)·A with frozen random A and B and trained d [r], b [out] (Kopiczko et al. 2024, arXiv
/// 2310.11454, equation 2); r + out parameters. The shared A and B are larger where another layer is; this one takes
/// their first columns and rows.
class VeraUpdate final : public Update {
 public:
  /// For a weight [out, in] with `in` columns.
  VeraUpdate(VeraProjection projection, at::Tensor d, at::Tensor b, int64_t in)
      : projection_(std::move(projection)), d_(std::move(d)), b_(std::move(b)), in_(in) {}

  int64_t in_features() const override { return in_; }
  int64_t out_features() const override { return b_.size(0); }
  /// A and B.
  const VeraProjection& projection() const { return projection_; }

  std::vector<UpdateTensor> tensors() const override {
    return {{"vera_A", projection_.A, TensorRole::kFrozen},
            {"vera_B", projection_.B, TensorRole::kFrozen},
            {"vera_lambda_d", d_, TensorRole::kScale},
            {"vera_lambda_b", b_, TensorRole::kOutput, {"", 0, 0}}};
  }

  /// b and d are in B.
  Factors factors(const BaseRows& /*base*/) const override {
    return factors_.get_or_record({&projection_.A, &projection_.B, &d_, &b_}, [&] {
      const auto rows = projection_.B.narrow(0, 0, out_features());
      return Factors{{LowRank{projection_.A.narrow(1, 0, in_), b_.unsqueeze(1) * d_ * rows, 1}}, {}, {}};
    });
  }

  std::optional<FrozenFactors> frozen_factors() const override {
    return FrozenFactors{projection_.A.narrow(1, 0, in_), d_, projection_.B.narrow(0, 0, out_features()), b_};
  }

  std::shared_ptr<Update> clone(const TensorCopier& copy) const override {
    return std::make_shared<VeraUpdate>(VeraProjection{copy(projection_.A), copy(projection_.B)}, copy(d_), copy(b_),
                                        in_);
  }

 private:
  VeraProjection projection_;
  at::Tensor d_;
  at::Tensor b_;
  int64_t in_;
  detail::Cached<Factors> factors_;
};

/// The method VeRA with its configuration.
class VeRA final : public ConfiguredMethod<VeraConfig> {
 public:
  using ConfiguredMethod::ConfiguredMethod;

  double dropout() const override { return config().vera_dropout(); }

  std::shared_ptr<Update> create(const UpdateSpec& spec) const override { return create_all({spec}).front(); }

  std::vector<std::shared_ptr<Update>> create_all(const std::vector<UpdateSpec>& specs) const override {
    int64_t in = 0, out = 0;
    for (const auto& spec : specs) {
      in = std::max(in, spec.in_features);
      out = std::max(out, spec.out_features);
    }
    const auto r = config().r();
    std::vector<std::pair<at::TensorOptions, VeraProjection>> drawn;  // of each device and dtype
    std::vector<std::shared_ptr<Update>> updates;
    for (const auto& spec : specs) {
      const auto& options = spec.options;
      auto known = std::find_if(drawn.begin(), drawn.end(), [&](const auto& other) {
        return other.first.device() == options.device() && other.first.dtype() == options.dtype();
      });
      if (known == drawn.end()) {
        const auto projection = options.device().is_meta()
                                    ? VeraProjection{at::empty({r, in}, options), at::empty({out, r}, options)}
                                    : VeraProjection::draw(r, in, out, config().projection_prng_key());
        drawn.push_back({options, {projection.A.to(options), projection.B.to(options)}});
        known = drawn.end() - 1;
      }
      updates.push_back(std::make_shared<VeraUpdate>(known->second, at::full({r}, config().d_initial(), options),
                                                     at::zeros({spec.out_features}, options), spec.in_features));
    }
    return updates;
  }

  std::vector<StoredTensor> store_shared(const Update& update) const override {
    if (!config().save_projection()) return {};
    const auto& projection = static_cast<const VeraUpdate&>(update).projection();
    return {{"base_model.vera_A", projection.A}, {"base_model.vera_B", projection.B}};
  }
  bool may_lack_shared() const override { return true; }
  std::vector<const char*> keys_unknown_to_peft() const override { return {"exclude_modules"}; }
};

LORA_NAMESPACE_END
