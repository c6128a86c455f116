#pragma once

#include <lora/version.h>

#include <cmath>

LORA_NAMESPACE_BEGIN
namespace detail {

inline constexpr const char* kPeftPrefix = "base_model.model.";
inline constexpr const char* kKeyOfA = "lora_A.weight";
inline constexpr const char* kKeyOfB = "lora_B.weight";
inline constexpr const char* kConfigFile = "adapter_config.json";
inline constexpr const char* kTensorFile = "adapter_model.safetensors";
/// Metadata of the tensor file with our own configuration, where PEFT's cannot say all: parts of fused projections.
inline constexpr const char* kOwnConfig = "lora.config";
/// Metadata of the tensor file with what of PEFT's configuration the tensors' meaning depends on: a save that was
/// interrupted between the two files is found by it.
inline constexpr const char* kScalingConfig = "lora.scaling";
inline constexpr const char* kScalingKeys[] = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"};

/// Whether two scalings are equal but for the rounding of their computation.
inline bool same(double a, double b) { return std::abs(a - b) <= 1e-12 * std::abs(a); }

}  // namespace detail
LORA_NAMESPACE_END
