#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/DispatchKey.h>
#include <lora/version.h>

LORA_NAMESPACE_BEGIN
namespace detail {

/// The dispatch key of adapted weights: above autograd and autocast and used by no backend. LibTorch keeps it for its
/// tests; a second user in the same process is found by registrar.h.
inline constexpr c10::DispatchKey kAdaptedWeightKey = c10::DispatchKey::TESTING_ONLY_GenericWrapper;

/// The dispatch key that a thread switches on for FastOperators: above the other and like it kept for LibTorch's tests.
inline constexpr c10::DispatchKey kFastOperatorsKey = c10::DispatchKey::TESTING_ONLY_GenericMode;

}  // namespace detail
LORA_NAMESPACE_END
