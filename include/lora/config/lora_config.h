#pragma once

#include <lora/config/targets.h>
#include <lora/version.h>
#include <torch/arg.h>

#include <cmath>
#include <cstdint>
#include <set>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN

class LoRA;

/// How the factors of a new adapter begin; B is zero in both, so ΔW = 0.
enum class LoraInit {
  kKaiming,   ///< A ~ U(−1/√in, 1/√in): PEFT's default.
  kGaussian,  ///< A ~ N(0, 1/r²): PEFT's "gaussian" and the paper's (Hu et al. 2021, section 4.1).
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
class LoraConfig {
 public:
  using Method = LoRA;

  /// The rank of ΔW = s·B·A; at least 1.
  TORCH_ARG(int64_t, r) = 8;
  /// The numerator of the scaling s = lora_alpha / r.
  TORCH_ARG(double, lora_alpha) = 8;
  /// Scaling s = lora_alpha / √r (rsLoRA, Kalajdzievski 2023, arXiv 2312.03732).
  TORCH_ARG(bool, use_rslora) = false;
  /// Probability with which an element of the input is dropped before A, in training only; 0 ≤ p < 1.
  TORCH_ARG(double, lora_dropout) = 0.0;
  /// How A and B begin.
  TORCH_ARG(LoraInit, init_lora_weights) = LoraInit::kKaiming;
  /// Whether A and B are kept in float32 on a base of lower precision.
  TORCH_ARG(bool, autocast_adapter_dtype) = true;
  /// The modules to adapt.
  TORCH_ARG(TargetModules, target_modules);
  /// Modules that are left alone although target_modules or target_if choose them.
  TORCH_ARG(TargetModules, exclude_modules);
  /// Other ranks for the modules whose path, or its end behind a dot, matches the regular expression; the first wins.
  TORCH_ARG(Pattern<int64_t>, rank_pattern);
  /// Other alphas, matched as rank_pattern.
  TORCH_ARG(Pattern<double>, alpha_pattern);

 public:
  /// Adapts every host for which the predicate holds, beside what target_modules chooses.
  LoraConfig& target_if(Targeting::Predicate predicate) {
    target_if_ = std::move(predicate);
    return *this;
  }
  const Targeting::Predicate& target_if() const noexcept { return target_if_; }

  /// target_if for the modules of a TorchScript model.
  LoraConfig& target_script_if(Targeting::ScriptPredicate predicate) {
    target_script_if_ = std::move(predicate);
    return *this;
  }
  const Targeting::ScriptPredicate& target_script_if() const noexcept { return target_script_if_; }

  /// Declares the row ranges of a fused projection whose parts are not q, k and v in three equal thirds:
  /// `.fused_parts("c_attn", {{"q", 768}, {"k", 256}, {"v", 256}})`.
  LoraConfig& fused_parts(const std::string& name, std::vector<FusedPart> parts) {
    fused_parts_.emplace_back(name, std::move(parts));
    return *this;
  }
  const Targeting::FusedParts& fused_parts() const noexcept { return fused_parts_; }

  /// Throws c10::ValueError for a value outside its range.
  void validate() const {
    check_rank(r(), "r");
    check_alpha(lora_alpha(), "lora_alpha");
    TORCH_CHECK_VALUE(lora_dropout() >= 0 && lora_dropout() < 1,
                      "[lora::LoraConfig] found lora_dropout = ", lora_dropout(),
                      ", expected a probability p with 0 <= p < 1");
    for (const auto& [pattern, rank] : rank_pattern()) check_rank(rank, "rank_pattern[\"" + pattern + "\"]");
    for (const auto& [pattern, alpha] : alpha_pattern()) check_alpha(alpha, "alpha_pattern[\"" + pattern + "\"]");
    for (const auto& entry : exclude_modules().entries()) {
      TORCH_CHECK_VALUE(entry.parts.empty(), "[lora::LoraConfig] found parts in exclude_modules, \"", entry.text,
                        "\", expected modules; choose parts by target_modules");
    }
    for (const auto& [name, parts] : fused_parts()) {
      TORCH_CHECK_VALUE(!parts.empty(), "[lora::LoraConfig] found no parts in fused_parts(\"", name, "\")");
      std::set<std::string> known;
      for (const auto& part : parts) {
        TORCH_CHECK_VALUE(known.insert(part.name).second, "[lora::LoraConfig] found the part \"", part.name,
                          "\" twice in fused_parts(\"", name, "\"), expected a name for each range of rows");
        TORCH_CHECK_VALUE(!part.name.empty() && part.name.find('.') == std::string::npos && part.size > 0,
                          "[lora::LoraConfig] found the part {\"", part.name, "\", ", part.size, "} in fused_parts(\"",
                          name, "\"), expected a name without dots and a positive number of rows");
      }
    }
  }

 private:
  static void check_rank(int64_t rank, const std::string& name) {
    TORCH_CHECK_VALUE(rank > 0, "[lora::LoraConfig] found ", name, " = ", rank, ", expected a rank of at least 1");
  }
  static void check_alpha(double alpha, const std::string& name) {
    TORCH_CHECK_VALUE(std::isfinite(alpha) && alpha != 0, "[lora::LoraConfig] found ", name, " = ", alpha,
                      ", expected a finite number other than 0");
  }

  Targeting::Predicate target_if_;
  Targeting::ScriptPredicate target_script_if_;
  Targeting::FusedParts fused_parts_;
};

LORA_NAMESPACE_END
