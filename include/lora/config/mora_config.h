#pragma once

#include <c10/util/Exception.h>
#include <lora/config/adapter_config.h>
#include <lora/version.h>
#include <torch/arg.h>

#include <cstdint>
#include <string>

LORA_NAMESPACE_BEGIN

class MoRA;

/// Options of a MoRA adapter (Jiang et al. 2024, arXiv 2405.12130). PEFT has no such method: the names are those of the
/// paper's code.
class MoraConfig : public AdapterConfig<MoraConfig> {
 public:
  /// The method that it configures.
  using Method = MoRA;
  /// The name of it in files.
  static constexpr const char* kPeftType = "MORA";
  /// How the names of its tensors in files begin.
  static constexpr const char* kPrefix = "mora_";

  /// The rank of a LoRA with as many parameters; at least 1.
  TORCH_ARG(int64_t, r) = 8;
  /// How inputs are compressed and outputs decompressed: 1, by shared rows and columns; 6, by rotation.
  TORCH_ARG(int64_t, mora_type) = 6;
  /// Probability with which an element of the input is dropped, in training only; 0 ≤ p < 1.
  TORCH_ARG(double, mora_dropout) = 0.0;

 public:
  /// Calls `visit(key, value)` for each option that files hold; `config` is const or not.
  template <class Config, class Visitor>
  static void visit(Config& config, Visitor& visit) {
    visit_options(config, visit);
    visit("mora_dropout", config.mora_dropout());
    visit("mora_type", config.mora_type());
    visit("r", config.r());
  }

  /// Throws c10::ValueError for a value outside its range.
  void validate() const {
    const std::string type = "lora::MoraConfig";
    validate_options(type);
    check_rank(r(), type, "r");
    check_dropout(mora_dropout(), type, "mora_dropout");
    TORCH_CHECK_VALUE(mora_type() == 1 || mora_type() == 6, "[", type, "] found mora_type = ", mora_type(),
                      ", expected 1 (shared rows and columns) or 6 (rotation)");
  }
};

LORA_NAMESPACE_END
