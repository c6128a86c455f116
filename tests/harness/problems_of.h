// What a call lists that throws a FormatError.
#pragma once

#include <gtest/gtest.h>
#include <lora/detail/error.h>

#include <string>
#include <vector>

namespace harness {

/// The problems of the FormatError that the call has to end in.
template <class Function>
std::vector<std::string> problems_of(const Function& function) {
  try {
    function();
  } catch (const lora::FormatError& error) {
    return error.problems();
  }
  ADD_FAILURE() << "expected a FormatError";
  return {};
}

}  // namespace harness
