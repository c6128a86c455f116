#pragma once

#include <c10/util/Exception.h>
#include <lora/config/adapter_config.h>
#include <lora/version.h>
#include <torch/arg.h>

#include <array>
#include <cstdint>
#include <string>

LORA_NAMESPACE_BEGIN

class MiSS;

/// The form of MiSS's block D; PEFT's init_weights names it.
enum class MissForm {
  kBalance,  ///< D [r, out].
  kBat,      ///< D [out / r, r, r], which multiplies the blocks of W0 as well.
  kMini,     ///< D [r, mini_r], repeated along the outputs.
};

/// PEFT's values for a MissForm.
inline constexpr std::array<const char*, 3> peft_names(MissForm) { return {"true", "bat", "mini"}; }

/// Options of a MiSS adapter (Kang and Yin 2024, arXiv 2409.15371), with the names and defaults of PEFT's MissConfig;
/// fused_parts is ours.
class MissConfig : public AdapterConfig<MissConfig> {
 public:
  /// The method that it configures.
  using Method = MiSS;
  /// PEFT's name of it.
  static constexpr const char* kPeftType = "MISS";
  /// How the names of its tensors in files begin.
  static constexpr const char* kPrefix = "miss_";

  /// The inputs that are summed to one have this distance; at least 1.
  TORCH_ARG(int64_t, r) = 64;
  /// Probability with which an element of the input is dropped, in training only; 0 ≤ p < 1. kBat drops none.
  TORCH_ARG(double, miss_dropout) = 0.0;
  /// Columns of kMini's D; divides the outputs.
  TORCH_ARG(int64_t, mini_r) = 1;
  /// The form of D; all start at zero.
  TORCH_ARG(MissForm, init_weights) = MissForm::kBalance;

 public:
  /// Calls `visit(key, value)` for each option that files hold, under PEFT's key; `config` is const or not.
  template <class Config, class Visitor>
  static void visit(Config& config, Visitor& visit) {
    visit_options(config, visit);
    visit("init_weights", config.init_weights());
    visit("mini_r", config.mini_r());
    visit("miss_dropout", config.miss_dropout());
    visit("r", config.r());
  }

  /// Throws c10::ValueError for a value outside its range.
  void validate() const {
    const std::string type = "lora::MissConfig";
    validate_options(type);
    check_rank(r(), type, "r");
    check_rank(mini_r(), type, "mini_r");
    check_dropout(miss_dropout(), type, "miss_dropout");
  }
};

LORA_NAMESPACE_END
