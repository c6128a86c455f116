#pragma once

#include <c10/util/Exception.h>
#include <lora/config/adapter_config.h>
#include <lora/version.h>
#include <torch/arg.h>

#include <string>

LORA_NAMESPACE_BEGIN

class IA3;

/// Options of an (IA)³ adapter (Liu et al. 2022, arXiv 2205.05638), with the names and defaults of PEFT's IA3Config;
/// layers_to_transform, layers_pattern, bias and fused_parts are ours.
class IA3Config : public AdapterConfig<IA3Config> {
 public:
  /// The method that it configures.
  using Method = IA3;
  /// PEFT's name of it.
  static constexpr const char* kPeftType = "IA3";
  /// How the names of its tensors in files begin.
  static constexpr const char* kPrefix = "ia3_";

  /// Those of the targets whose input is scaled in place of their output: names as in target_modules, or one regular
  /// expression.
  TORCH_ARG(TargetModules, feedforward_modules);

 public:
  /// Where the adapter goes; its updates scale biases too.
  Targeting targeting() const {
    auto targeting = AdapterOptions::targeting();
    targeting.scales_bias = true;
    return targeting;
  }

  /// Calls `visit(key, value)` for each option that files hold, under PEFT's key; `config` is const or not.
  template <class Config, class Visitor>
  static void visit(Config& config, Visitor& visit) {
    visit_options(config, visit);
    visit("feedforward_modules", config.feedforward_modules());
  }

  /// Throws c10::ValueError for a value outside its range.
  void validate() const {
    validate_options("lora::IA3Config");
    TORCH_CHECK_VALUE(feedforward_modules().kind() != TargetModules::Kind::kAllLinear,
                      "[lora::IA3Config] found \"all-linear\" in feedforward_modules, expected names or a regular "
                      "expression");
    for (const auto& entry : feedforward_modules().entries()) {
      TORCH_CHECK_VALUE(entry.parts.empty(), "[lora::IA3Config] found parts in feedforward_modules, \"", entry.text,
                        "\", expected modules: all parts of a weight have one input");
    }
  }
};

LORA_NAMESPACE_END
