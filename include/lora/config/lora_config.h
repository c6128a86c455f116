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

/// How the factors of a new adapter begin; B is zero in both, so ΔW = 0. Of an embedding it is A, and B ~ N(0, 1).
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
  /// The method that it configures.
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
  /// Confines the names of target_modules to layers with these indices: in h.3.attn.c_attn the index is 3. A whole path
  /// in target_modules is not confined.
  TORCH_ARG(OneOrMore<int64_t>, layers_to_transform);
  /// The lists of layers that layers_to_transform counts in, as "h": regular expressions; none: any list.
  TORCH_ARG(OneOrMore<std::string>, layers_pattern);
  /// Modules that the adapter has trainable copies of, whole: names as in target_modules. The base keeps its own.
  TORCH_ARG(std::vector<std::string>, modules_to_save);
  /// The biases that the adapter has trainable copies of; the base keeps its own.
  TORCH_ARG(BiasCopies, bias) = BiasCopies::kNone;
  /// Whether B has a bias [out], zero at the start: y += s · bias.
  TORCH_ARG(bool, lora_bias) = false;
  /// Rows of embeddings that the adapter has trainable copies of; where a head is tied to the embedding, of its rows.
  TORCH_ARG(TokenIndices, trainable_token_indices);
  /// PEFT's note that the weights are [in, out]; the layout is found by itself, and the files say it.
  TORCH_ARG(bool, fan_in_fan_out) = false;
  /// PEFT's note of the task, as "CAUSAL_LM"; it changes nothing here.
  TORCH_ARG(std::string, task_type);
  /// PEFT's note of the base model; it changes nothing here.
  TORCH_ARG(std::string, base_model_name_or_path);
  /// PEFT's note of the base model's revision; it changes nothing here.
  TORCH_ARG(std::string, revision);
  /// PEFT's note of the Python classes, JSON text that is kept as it is.
  TORCH_ARG(std::string, auto_mapping);
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
  /// The predicate, if there is one.
  const Targeting::Predicate& target_if() const noexcept { return target_if_; }

  /// target_if for the modules of a TorchScript model.
  LoraConfig& target_script_if(Targeting::ScriptPredicate predicate) {
    target_script_if_ = std::move(predicate);
    return *this;
  }
  /// The predicate for TorchScript, if there is one.
  const Targeting::ScriptPredicate& target_script_if() const noexcept { return target_script_if_; }

  /// Declares the row ranges of a fused projection whose parts are not q, k and v in three equal thirds:
  /// `.fused_parts("c_attn", {{"q", 768}, {"k", 256}, {"v", 256}})`.
  LoraConfig& fused_parts(const std::string& name, std::vector<FusedPart> parts) {
    fused_parts_.emplace_back(name, std::move(parts));
    return *this;
  }
  /// The declared row ranges.
  const Targeting::FusedParts& fused_parts() const noexcept { return fused_parts_; }

  /// Where the adapter goes and what it has copies of.
  Targeting targeting() const {
    Targeting targeting;
    targeting.modules = target_modules();
    targeting.exclude = exclude_modules();
    targeting.predicate = target_if();
    targeting.script_predicate = target_script_if();
    targeting.fused_parts = fused_parts();
    targeting.layers = LayerFilter(layers_to_transform().values(), layers_pattern().values());
    targeting.bias = bias();
    targeting.update_bias = lora_bias();
    targeting.modules_to_save = modules_to_save();
    targeting.tokens = trainable_token_indices();
    return targeting;
  }

  /// Throws c10::ValueError for a value outside its range.
  void validate() const {
    check_rank(r(), "r");
    check_alpha(lora_alpha(), "lora_alpha");
    TORCH_CHECK_VALUE(lora_dropout() >= 0 && lora_dropout() < 1,
                      "[lora::LoraConfig] found lora_dropout = ", lora_dropout(),
                      ", expected a probability p with 0 <= p < 1");
    for (const auto& [pattern, rank] : rank_pattern()) check_rank(rank, "rank_pattern[\"" + pattern + "\"]");
    for (const auto& [pattern, alpha] : alpha_pattern()) check_alpha(alpha, "alpha_pattern[\"" + pattern + "\"]");
    check_distinct(rank_pattern(), "rank_pattern");
    check_distinct(alpha_pattern(), "alpha_pattern");
    check_distinct(fused_parts(), "fused_parts");
    for (const auto& entry : exclude_modules().entries()) {
      TORCH_CHECK_VALUE(entry.parts.empty(), "[lora::LoraConfig] found parts in exclude_modules, \"", entry.text,
                        "\", expected modules; choose parts by target_modules");
    }
    check_layers();
    check_copies();
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
  /// The order of patterns decides, and a file of JSON holds each key once.
  template <class Entries>
  static void check_distinct(const Entries& entries, const char* key) {
    std::set<std::string> known;
    for (const auto& entry : entries) {
      TORCH_CHECK_VALUE(known.insert(entry.first).second, "[lora::LoraConfig] found \"", entry.first, "\" twice in ",
                        key, ", expected each pattern once");
    }
  }

  void check_layers() const {
    TORCH_CHECK_VALUE(layers_to_transform().empty() || target_modules().kind() == TargetModules::Kind::kList,
                      "[lora::LoraConfig] found layers_to_transform without a list in target_modules, expected names "
                      "that it confines; a regular expression can name the layers itself");
    TORCH_CHECK_VALUE(layers_pattern().empty() || !layers_to_transform().empty(),
                      "[lora::LoraConfig] found layers_pattern without layers_to_transform, expected both");
    for (const auto index : layers_to_transform().values()) {
      TORCH_CHECK_VALUE(index >= 0, "[lora::LoraConfig] found the layer ", index,
                        " in layers_to_transform, expected indices from 0 on");
    }
  }

  void check_copies() const {
    for (const auto& name : modules_to_save()) {
      TORCH_CHECK_VALUE(!name.empty(),
                        "[lora::LoraConfig] found an empty name in modules_to_save, expected a module's "
                        "path or its end");
    }
    for (const auto& [name, tokens] : trainable_token_indices().embeddings()) {
      TORCH_CHECK_VALUE(!tokens.empty(), "[lora::LoraConfig] found no token in trainable_token_indices, expected some");
      std::set<int64_t> known;
      for (const auto token : tokens) {
        TORCH_CHECK_VALUE(token >= 0 && known.insert(token).second, "[lora::LoraConfig] found the token ", token,
                          " in trainable_token_indices, expected each token once, from 0 on");
      }
    }
    TORCH_CHECK_VALUE(!lora_bias() || init_lora_weights() == LoraInit::kKaiming,
                      "[lora::LoraConfig] found lora_bias with another start than the default, expected the default: "
                      "PEFT reads no other file");
  }

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
