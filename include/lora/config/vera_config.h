#pragma once

#include <c10/util/Exception.h>
#include <lora/config/adapter_config.h>
#include <lora/version.h>
#include <torch/arg.h>

#include <cmath>
#include <cstdint>
#include <string>

LORA_NAMESPACE_BEGIN

class VeRA;

/// Options of a VeRA adapter (Kopiczko et al. 2024, arXiv 2310.11454), with the names and defaults of PEFT's
/// VeraConfig; exclude_modules and fused_parts are ours.
class VeraConfig : public AdapterConfig<VeraConfig> {
 public:
  /// The method that it configures.
  using Method = VeRA;
  /// PEFT's name of it.
  static constexpr const char* kPeftType = "VERA";
  /// How the names of its tensors in files begin.
  static constexpr const char* kPrefix = "vera_";

  /// Rows of the shared A and columns of the shared B; at least 1.
  TORCH_ARG(int64_t, r) = 256;
  /// The seed that A and B are drawn by.
  TORCH_ARG(int64_t, projection_prng_key) = 0;
  /// Whether files hold A and B; without, a loader draws them again by the key.
  TORCH_ARG(bool, save_projection) = true;
  /// Probability with which an element of the input is dropped before A, in training only; 0 ≤ p < 1.
  TORCH_ARG(double, vera_dropout) = 0.0;
  /// The start of d.
  TORCH_ARG(double, d_initial) = 0.1;
  /// PEFT's note that d and b start as they should; here they do.
  TORCH_ARG(bool, init_weights) = true;

 public:
  /// Calls `visit(key, value)` for each option that files hold, under PEFT's key; `config` is const or not.
  template <class Config, class Visitor>
  static void visit(Config& config, Visitor& visit) {
    visit_options(config, visit);
    visit("d_initial", config.d_initial());
    visit("init_weights", config.init_weights());
    visit("projection_prng_key", config.projection_prng_key());
    visit("r", config.r());
    visit("save_projection", config.save_projection());
    visit("vera_dropout", config.vera_dropout());
  }

  /// Throws c10::ValueError for a value outside its range.
  void validate() const {
    const std::string type = "lora::VeraConfig";
    validate_options(type);
    check_rank(r(), type, "r");
    check_dropout(vera_dropout(), type, "vera_dropout");
    TORCH_CHECK_VALUE(std::isfinite(d_initial()) && d_initial() != 0, "[", type, "] found d_initial = ", d_initial(),
                      ", expected a finite number other than 0: with d = 0 and b = 0 nothing is ever learned");
  }
};

LORA_NAMESPACE_END
