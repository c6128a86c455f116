// What a call says that throws.
#pragma once

#include <c10/util/Exception.h>

#include <exception>
#include <string>

namespace harness {

/// The message of the exception, LibTorch's without its backtrace; empty where the call returns. Exceptions that are no
/// Error pass on.
template <class Error = std::exception, class Function>
std::string message_of(const Function& function) {
  try {
    function();
  } catch (const Error& error) {
    const auto* torch_error = dynamic_cast<const c10::Error*>(&error);
    return torch_error != nullptr ? torch_error->what_without_backtrace() : error.what();
  }
  return "";
}

}  // namespace harness
