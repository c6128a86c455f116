#pragma once

#include <ATen/ops/count_nonzero.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_qr.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <lora/config/lora_config.h>
#include <lora/methods/configured_method.h>
#include <lora/methods/dora.h>
#include <lora/methods/lora_update.h>
#include <lora/methods/method.h>
#include <lora/methods/svd.h>
#include <lora/version.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN

/// The method LoRA, or DoRA by its flag, with its configuration.
class LoRA final : public ConfiguredMethod<LoraConfig> {
 public:
  /// Throws c10::ValueError for a configuration out of range.
  explicit LoRA(LoraConfig config) : ConfiguredMethod(std::move(config)) {
    for (const auto& [pattern, rank] : this->config().rank_pattern()) ranks_.emplace_back(path_regex(pattern), rank);
    for (const auto& [pattern, alpha] : this->config().alpha_pattern()) {
      alphas_.emplace_back(path_regex(pattern), alpha);
    }
  }

  double dropout() const override { return config().lora_dropout(); }

  /// r of a weight by any of its paths.
  int64_t rank(const std::vector<std::string>& names) const { return first_match(ranks_, names, config().r()); }
  /// lora_alpha of a weight by any of its paths.
  double alpha(const std::vector<std::string>& names) const {
    return first_match(alphas_, names, config().lora_alpha());
  }
  /// s of a weight by any of its paths.
  double scaling(const std::vector<std::string>& names) const {
    const auto rank = static_cast<double>(this->rank(names));
    return alpha(names) / (config().use_rslora() ? std::sqrt(rank) : rank);
  }

  std::string refusal(const UpdateSpec& spec, bool /*is_part*/) const override {
    if (config().use_dora() && spec.rows_are_inputs) {
      return "a transposed convolution for use_dora, expected a layer whose weight's rows are outputs";
    }
    const auto r = rank(spec.names), most = std::min(spec.in_features, spec.out_features);
    const auto init = config().init_lora_weights();
    const std::string of = "r = " + std::to_string(r) + " for a start by ";
    if (config().starts_from_base() && r > most) {
      return of + "vectors of a weight [" + std::to_string(spec.out_features) + ", " +
             std::to_string(spec.in_features) + "], expected no more than " + std::to_string(most);
    }
    if (init == LoraInit::kOrthogonal && (r % 2 != 0 || r > 2 * spec.in_features || r > 2 * spec.out_features)) {
      return of + "two orthogonal halves, expected an even number of no more than twice the inputs and the outputs";
    }
    if (init == LoraInit::kEva && (spec.embedding || spec.convolution)) {
      return "an embedding or a convolution for the start by EVA, expected a layer that multiplies its input";
    }
    return "";
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
    collect("rank_pattern", ranks_, config().rank_pattern());
    collect("alpha_pattern", alphas_, config().alpha_pattern());
    return entries;
  }

  std::shared_ptr<Update> create(const UpdateSpec& spec) const override {
    const auto r = rank(spec.names);
    if (config().starts_from_base()) return create_from_base(spec, r);
    auto A = at::empty({r, spec.in_features}, spec.options);
    auto B = at::zeros({spec.out_features, r}, spec.options);
    const auto init = config().init_lora_weights();
    if (!spec.initialise || init == LoraInit::kEva) {  // whose A comes from the data
      A.zero_();
    } else if (init == LoraInit::kOrthogonal) {
      start_orthogonal(A, B);
    } else if (spec.embedding) {  // as PEFT: A is as wide as the vocabulary, so B is the factor drawn at random
      A.zero_();
      B.normal_();
    } else if (init == LoraInit::kGaussian) {
      A.normal_(0, 1.0 / static_cast<double>(r));
    } else if (A.numel() > 0) {
      const auto bound = 1.0 / std::sqrt(static_cast<double>(spec.in_features));
      A.uniform_(-bound, bound);
    }
    if (!config().use_dora()) return std::make_shared<LoraUpdate>(A, B, scaling(spec.names), spec.embedding);
    const auto magnitude = spec.initialise ? DoraUpdate::row_norms(spec.base.matrix()).to(spec.options)
                                           : at::zeros({spec.out_features}, spec.options);
    return std::make_shared<DoraUpdate>(A, B, magnitude, scaling(spec.names), spec.embedding);
  }

  /// Parts as one pair: A stacked by rows, B with a block a part and zeros elsewhere, so that B·A is the same ΔW
  /// exactly; magnitudes of rows without a part are those of W0.
  std::vector<StoredTensor> store(const std::vector<UpdatePart>& parts, const StoredWeight& weight) const override {
    if (is_stored_as_it_is(parts, weight)) return Method::store(parts, weight);
    const auto form = detail::trained_tensors(*parts.front().update);
    const auto options = form.front().tensor.options().requires_grad(false);
    const auto rank = std::max(total_stored_rank(parts), weight.rank);
    std::vector<at::Tensor> joined{at::zeros({rank, form.front().tensor.size(1)}, options),
                                   at::zeros({weight.rows, rank}, options)};
    if (form.size() > 2) {
      joined.push_back(options.device().is_meta() ? at::zeros({weight.rows}, options)
                                                  : DoraUpdate::row_norms(weight.base.matrix()).to(options));
    }
    for_each_block(parts, joined, [](const at::Tensor& own, const at::Tensor& block, size_t, double sign) {
      block.copy_(own.detach() * sign);
    });
    std::vector<StoredTensor> stored;
    for (size_t i = 0; i < joined.size(); ++i) {
      const auto sizes = stored_sizes(form[i], joined[i].sizes().vec(), weight);
      stored.push_back({detail::stored_name(form[i]), joined[i].reshape(sizes)});
    }
    return stored;
  }

  std::vector<std::string> restore(const std::vector<UpdatePart>& parts, const StoredWeight& weight,
                                   const std::map<std::string, at::Tensor>& stored) const override {
    if (is_stored_as_it_is(parts, weight)) return Method::restore(parts, weight, stored);
    const auto form = detail::trained_tensors(*parts.front().update);
    std::vector<at::Tensor> joined;
    for (const auto& tensor : form) {
      const auto& values = stored.at(detail::stored_name(tensor));
      joined.push_back((tensor.role == TensorRole::kScale ? values.flatten() : values.flatten(1)).clone());
    }
    std::vector<std::string> problems;
    for_each_block(parts, joined, [&](const at::Tensor& own, const at::Tensor& block, size_t i, double sign) {
      detail::copy_finite(own, block * sign, weight.path + detail::stored_name(form[i]), problems);
      block.zero_();
    });
    if (at::count_nonzero(joined[1]).item<int64_t>() != 0) {
      problems.push_back("found values outside of the parts' blocks, expected zeros in " + weight.path +
                         detail::stored_name(form[1]));
    }
    return problems;
  }

  std::vector<int64_t> stored_sizes(const UpdateTensor& tensor, std::vector<int64_t> sizes,
                                    const StoredWeight& weight) const override {
    if (weight.kernel.empty()) return sizes;
    if (tensor.name == "lora_A") {
      auto kernel = weight.kernel;
      kernel[0] = sizes[0];
      return kernel;
    }
    if (tensor.role == TensorRole::kScale) sizes.insert(sizes.begin(), 1);
    sizes.resize(weight.kernel.size(), 1);
    return sizes;
  }

 private:
  template <class Value>
  using Matchers = std::vector<std::pair<detail::PythonRegex, Value>>;

  /// B0·A0 of W0's first r singular vectors, or of its QR.
  std::shared_ptr<Update> create_from_base(const UpdateSpec& spec, int64_t r) const {
    const auto s = scaling(spec.names);
    auto A = at::zeros({r, spec.in_features}, spec.options), B = at::zeros({spec.out_features, r}, spec.options);
    if (spec.initialise) {
      const auto base = spec.base.matrix();
      const auto W0 = base.to(accumulation_dtype(base.scalar_type()));
      if (config().init_lora_weights() == LoraInit::kOlora) {
        const auto [Q, R] = at::linalg_qr(W0);
        A.copy_(R.narrow(0, 0, r));
        B.copy_(Q.narrow(1, 0, r));
      } else {
        const auto iterations = config().pissa_niter();
        const auto svd = iterations == 0 ? detail::exact_svd(W0, r) : detail::randomised_svd(W0, r, iterations);
        const auto start = svd.factors(s, r);
        A.copy_(start.A);
        B.copy_(start.B);
      }
    }
    return std::make_shared<StartedLoraUpdate>(A, B, s, spec.embedding);
  }

  /// As PEFT: Q [r, r] orthogonal, A = (X·Q's even rows)ᵀ / 10 and B = Y·Q's odd rows / 10 with normal X [in, r/2] and
  /// Y [out, r/2], so that B·A = 0.
  static void start_orthogonal(const at::Tensor& A, const at::Tensor& B) {
    const auto r = A.size(0);
    const auto options = A.options().dtype(accumulation_dtype(A.scalar_type()));
    const auto Q = std::get<0>(at::linalg_qr(at::randn({r, r}, options)));
    const auto even = Q.slice(0, 0, r, 2), odd = Q.slice(0, 1, r, 2);
    A.copy_(at::matmul(at::randn({A.size(1), r / 2}, options), even).t() / 10);
    B.copy_(at::matmul(at::randn({B.size(0), r / 2}, options), odd) / 10);
  }

  static int64_t total_stored_rank(const std::vector<UpdatePart>& parts) {
    int64_t rank = 0;
    for (const auto& part : parts) rank += detail::lora_update(part).stored_rank();
    return rank;
  }

  static bool is_stored_as_it_is(const std::vector<UpdatePart>& parts, const StoredWeight& weight) {
    const auto& update = detail::lora_update(parts.front());
    return detail::is_whole(parts) && weight.rank == 0 && update.stored_rank() == update.rank();
  }

  /// `use(own, block, index, sign)` for each tensor of each part and its block of the joined ones.
  template <class Use>
  static void for_each_block(const std::vector<UpdatePart>& parts, const std::vector<at::Tensor>& joined,
                             const Use& use) {
    int64_t done = 0;
    for (const auto& part : parts) {
      const auto& update = detail::lora_update(part);
      const auto rows = update.out_features(), r = update.rank();
      update.for_each_stored([&](const at::Tensor& own, bool is_A, int64_t first, double sign) {
        const auto block = is_A ? joined[0].narrow(0, done + first, r)
                                : joined[1].narrow(0, part.begin, rows).narrow(1, done + first, r);
        use(own, block, is_A ? 0 : 1, sign);
      });
      if (joined.size() > 2) {
        use(static_cast<const DoraUpdate&>(update).magnitude(), joined[2].narrow(0, part.begin, rows), 2, 1);
      }
      done += update.stored_rank();
    }
  }

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

  Matchers<int64_t> ranks_;
  Matchers<double> alphas_;
};

LORA_NAMESPACE_END
