#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/DispatchKey.h>
#include <lora/detail/error.h>
#include <lora/version.h>

#include <cstdint>
#include <string>

LORA_NAMESPACE_BEGIN
namespace detail {

// Kernels for a dispatch key are registered once a process: the first library that is loaded owns the key and says so
// by an operator of no arguments, which returns LORA_ABI; a later one with the same layout works through its kernels.

inline int64_t abi() { return LORA_ABI; }

/// Whether somebody has registered a fallback for the key, or a kernel for an operator. A second backend fallback would
/// end the process.
inline bool key_is_taken(c10::DispatchKey key, const char* operator_name) {
  auto& dispatcher = c10::Dispatcher::singleton();
  const auto found = dispatcher.findSchema({operator_name, ""});
  return dispatcher.hasBackendFallbackForDispatchKey(key) || (found && found->hasKernelForDispatchKey(key));
}

/// Throws a StateError in the name of `function` where another library, or another version of this one, holds the key.
inline void check_key_owner(const std::string& function, c10::DispatchKey key, const char* owner_name) {
  const auto owner = c10::Dispatcher::singleton().findSchema({owner_name, ""});
  if (!owner) {
    throw StateError("[" + function + "] found the dispatch key " + std::string(c10::toString(key)) +
                     " in use by another library, expected it free; the two cannot work in one process");
  }
  torch::jit::Stack stack;
  owner->callBoxed(&stack);
  const auto found = stack.back().toInt();
  if (found != LORA_ABI) {
    throw StateError("[" + function + "] found kernels of layout " + std::to_string(found) +
                     " in this process, expected " + std::to_string(LORA_ABI) +
                     "; build every library of the process with the same version of lora");
  }
}

}  // namespace detail
LORA_NAMESPACE_END
