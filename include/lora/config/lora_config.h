#pragma once

#include <lora/config/adapter_config.h>
#include <lora/config/targets.h>
#include <lora/version.h>
#include <torch/arg.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <set>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN

class LoRA;

/// How the factors of a new adapter begin; ΔW = 0 in all of them. Of an embedding's default it is A that is zero, and
/// B ~ N(0, 1).
enum class LoraInit {
  kKaiming,     ///< A ~ U(−1/√in, 1/√in), B = 0: PEFT's default.
  kGaussian,    ///< A ~ N(0, 1/r²), B = 0: PEFT's "gaussian" and the paper's (Hu et al. 2021, section 4.1).
  kOrthogonal,  ///< A of rows and B of columns from two halves of one orthogonal basis: BA = 0; an even r.
  kPissa,  ///< The first r singular vectors of W0 (PiSSA, Meng et al. 2024, arXiv 2404.02948); see StartedLoraUpdate.
  kOlora,  ///< The first r vectors of W0's QR (OLoRA, Büyükakyüz 2024, arXiv 2406.01775); see StartedLoraUpdate.
  kEva,    ///< A by the user's data (EVA, Paischer et al. 2024, arXiv 2410.07170), B = 0; see EvaOptions.
};

/// PEFT's values for a LoraInit.
inline constexpr std::array<const char*, 6> peft_names(LoraInit) {
  return {"true", "gaussian", "orthogonal", "pissa", "olora", "eva"};
}

/// How the start kEva is made from data.
class EvaOptions {
 public:
  /// A layer's rank grows to no more than rho · r; at least 1. With 1 all ranks stay r.
  TORCH_ARG(double, rho) = 2.0;
  /// A layer has seen enough data when each of its components has at least this cosine with itself a batch before.
  TORCH_ARG(double, tau) = 0.99;
  /// Whether A's rows are divided by the roots of their singular values.
  TORCH_ARG(bool, whiten) = false;
  /// Whether alpha changes with a layer's rank, so that alpha / r stays.
  TORCH_ARG(bool, adjust_scaling_factors) = true;
  /// How many batches may be looked at, those that come again counted again, before the components have to stay.
  TORCH_ARG(int64_t, max_batches) = 10000;
};

/// A value for the modules that a name or a regular expression matches: one entry of rank_pattern or alpha_pattern.
template <class Value>
using Pattern = std::vector<std::pair<std::string, Value>>;

/// Options of a LoRA adapter (Hu et al. 2021, arXiv 2106.09685), with the names and defaults of PEFT's LoraConfig.
///
/// Example:
/// ```
/// auto adapters = lora::inject(*model, lora::LoraConfig().r(8).lora_alpha(16).target_modules({"q_proj", "v_proj"}));
/// ```
class LoraConfig : public AdapterConfig<LoraConfig> {
 public:
  /// The method that it configures.
  using Method = LoRA;
  /// PEFT's name of it.
  static constexpr const char* kPeftType = "LORA";
  /// How the names of its tensors in files begin.
  static constexpr const char* kPrefix = "lora_";

  /// The rank of ΔW = s·B·A; at least 1.
  TORCH_ARG(int64_t, r) = 8;
  /// The numerator of the scaling s = lora_alpha / r.
  TORCH_ARG(double, lora_alpha) = 8;
  /// Scaling s = lora_alpha / √r (rsLoRA, Kalajdzievski 2023, arXiv 2312.03732).
  TORCH_ARG(bool, use_rslora) = false;
  /// Magnitudes of W's rows learned apart from their directions (DoRA, Liu et al. 2024, arXiv 2402.09353); see
  /// DoraUpdate.
  TORCH_ARG(bool, use_dora) = false;
  /// Probability with which an element of the input is dropped before A, in training only; 0 ≤ p < 1.
  TORCH_ARG(double, lora_dropout) = 0.0;
  /// How A and B begin.
  TORCH_ARG(LoraInit, init_lora_weights) = LoraInit::kKaiming;
  /// The power iterations of kPissa's randomised SVD; 0: an exact SVD. PEFT's "pissa_niter_4" has 4.
  TORCH_ARG(int64_t, pissa_niter) = 0;
  /// How kEva is made.
  TORCH_ARG(EvaOptions, eva);
  /// Whether B has a bias [out], zero at the start: y += s · bias.
  TORCH_ARG(bool, lora_bias) = false;
  /// Rows of embeddings that the adapter has trainable copies of; where a head is tied to the embedding, of its rows.
  TORCH_ARG(TokenIndices, trainable_token_indices);
  /// Other ranks for the modules whose path, or its end behind a dot, matches the regular expression; the first wins.
  TORCH_ARG(Pattern<int64_t>, rank_pattern);
  /// Other alphas, matched as rank_pattern.
  TORCH_ARG(Pattern<double>, alpha_pattern);

 public:
  /// Where the adapter goes and what it has copies of.
  Targeting targeting() const {
    auto targeting = AdapterConfig::targeting();
    targeting.update_bias = lora_bias();
    targeting.tokens = trainable_token_indices();
    return targeting;
  }

  /// Calls `visit(key, value)` for each option that files hold, under PEFT's key; `config` is const or not.
  template <class Config, class Visitor>
  static void visit(Config& config, Visitor& visit) {
    visit_options(config, visit);
    visit("alpha_pattern", config.alpha_pattern());
    visit("init_lora_weights", config.init_lora_weights());
    visit("lora_alpha", config.lora_alpha());
    visit("lora_bias", config.lora_bias());
    visit("lora_dropout", config.lora_dropout());
    visit("r", config.r());
    visit("rank_pattern", config.rank_pattern());
    visit("trainable_token_indices", config.trainable_token_indices());
    visit("use_dora", config.use_dora());
    visit("use_rslora", config.use_rslora());
  }

  /// Throws c10::ValueError for a value outside its range.
  void validate() const {
    const std::string type = "lora::LoraConfig";
    validate_options(type);
    check_rank(r(), type, "r");
    check_alpha(lora_alpha(), "lora_alpha");
    check_dropout(lora_dropout(), type, "lora_dropout");
    for (const auto& [pattern, rank] : rank_pattern()) check_rank(rank, type, "rank_pattern[\"" + pattern + "\"]");
    for (const auto& [pattern, alpha] : alpha_pattern()) check_alpha(alpha, "alpha_pattern[\"" + pattern + "\"]");
    check_distinct(rank_pattern(), type, "rank_pattern");
    check_distinct(alpha_pattern(), type, "alpha_pattern");
    check_tokens();
    TORCH_CHECK_VALUE(!lora_bias() || init_lora_weights() == LoraInit::kKaiming,
                      "[lora::LoraConfig] found lora_bias with another start than the default, expected the default: "
                      "PEFT reads no other file");
    TORCH_CHECK_VALUE(!use_dora() || !starts_from_base(),
                      "[lora::LoraConfig] found use_dora with a start from the base's own vectors, expected another "
                      "start: magnitudes are those of W0 + s·B·A");
    TORCH_CHECK_VALUE(pissa_niter() >= 0, "[lora::LoraConfig] found pissa_niter = ", pissa_niter(),
                      ", expected a number of iterations, or 0 for an exact SVD");
    TORCH_CHECK_VALUE(eva().rho() >= 1 && eva().tau() > 0 && eva().tau() < 1 && eva().max_batches() > 0,
                      "[lora::LoraConfig] found rho = ", eva().rho(), ", tau = ", eva().tau(),
                      " and max_batches = ", eva().max_batches(),
                      " for EVA, expected 1 <= rho, 0 < tau < 1 and a positive number");
    TORCH_CHECK_VALUE(!lora_bias() || !use_dora(),
                      "[lora::LoraConfig] found lora_bias with use_dora, expected one of them: a row's magnitude is "
                      "that of its weights");
  }

  /// Whether ΔW = s·(B·A − B0·A0) with B0·A0 of the base.
  bool starts_from_base() const {
    return init_lora_weights() == LoraInit::kPissa || init_lora_weights() == LoraInit::kOlora;
  }

 private:
  void check_tokens() const {
    for (const auto& [name, tokens] : trainable_token_indices().embeddings()) {
      TORCH_CHECK_VALUE(!tokens.empty(), "[lora::LoraConfig] found no token in trainable_token_indices, expected some");
      std::set<int64_t> known;
      for (const auto token : tokens) {
        TORCH_CHECK_VALUE(token >= 0 && known.insert(token).second, "[lora::LoraConfig] found the token ", token,
                          " in trainable_token_indices, expected each token once, from 0 on");
      }
    }
  }

  static void check_alpha(double alpha, const std::string& name) {
    TORCH_CHECK_VALUE(std::isfinite(alpha) && alpha != 0, "[lora::LoraConfig] found ", name, " = ", alpha,
                      ", expected a finite number other than 0");
  }
};

LORA_NAMESPACE_END
