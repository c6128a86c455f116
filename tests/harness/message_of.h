// What a call says that throws.
#pragma once

#include <c10/util/Exception.h>

#include <exception>
#include <string>

namespace harness {

/// The message of the exception, LibTorch's without its backtrace; empty where the call returns.
template <class Function>
std::string message_of(const Function& function) {
  try {
    function();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

}  // namespace harness
