#pragma once

#include <c10/util/Exception.h>

#include <cstddef>
#include <exception>
#include <string>

/// What went wrong, in one line; a c10::Error without its backtrace.
inline std::string error_line(const std::exception& error) {
  const auto* const torch_error = dynamic_cast<const c10::Error*>(&error);
  const std::string text = torch_error != nullptr ? torch_error->what_without_backtrace() : error.what();
  std::string line;
  for (const char letter : text) {
    if (letter == '\n') {
      if (!line.empty() && line.back() != ';' && line.back() != ':') line += ';';
    } else if (letter != ' ' || line.empty() || line.back() != ' ') {
      if (!line.empty() && line.back() == ';' && letter != ' ') line += ' ';
      line += letter;
    }
  }
  while (!line.empty() && (line.back() == ';' || line.back() == ' ')) line.pop_back();
  return line;
}
