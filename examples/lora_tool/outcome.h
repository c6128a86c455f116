#pragma once

#include <c10/util/Exception.h>
#include <lora/detail/error.h>  // defines: FormatError, SystemError

#include <exception>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "finetune/error_line.h"  // defines: error_line, an exception in one line

using Json = nlohmann::ordered_json;

/// The answer of a command, for people and for programs.
struct Outcome {
  int exit_code = 0;
  std::string text;
  Json json;
};

/// A command that ends with "no" and has written nothing.
class Refused : public std::runtime_error {
 public:
  explicit Refused(const std::exception& error) : std::runtime_error(error_line(error)) {}
};

/// What a step that judges an adapter returns; an error of it is a "no", unless the system keeps a file from it.
template <class Step>
auto judged(const Step& step) {
  try {
    return step();
  } catch (const lora::SystemError&) {
    throw;
  } catch (const c10::Error& error) {
    throw Refused(error);
  }
}

/// A bad combination of flags, or a path where nothing is that could be read.
class UsageError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Everything that is wrong, a line each.
inline std::vector<std::string> problems_of(const c10::Error& error) {
  if (const auto* const format = dynamic_cast<const lora::FormatError*>(&error)) {
    std::vector<std::string> problems;
    for (const auto& problem : format->problems()) problems.push_back(error_line(std::runtime_error(problem)));
    return problems;
  }
  return {error_line(error)};
}
