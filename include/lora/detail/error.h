#pragma once

#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>
#include <lora/version.h>

#include <string>
#include <system_error>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN

/// An operation that makes no sense in the state that the adapters are in now.
class StateError : public c10::Error {
 public:
  /// `message` says what was found, what was expected and what to do.
  explicit StateError(std::string message) : c10::Error(std::move(message)) {}
};

/// A file or directory that cannot be read or does not fit; it lists every problem found, not the first one only.
class FormatError : public c10::Error {
 public:
  /// All problems of the file or directory at `path`.
  FormatError(std::string path, std::vector<std::string> problems)
      : c10::Error(text(path, problems)), path_(std::move(path)), problems_(std::move(problems)) {}

  /// The file or directory.
  const std::string& path() const noexcept { return path_; }
  /// A line for each problem.
  const std::vector<std::string>& problems() const noexcept { return problems_; }

 private:
  static std::string text(const std::string& path, const std::vector<std::string>& problems) {
    std::string message = path + ": ";
    if (problems.size() == 1) return message + problems.front();
    message += std::to_string(problems.size()) + " problems";
    for (const auto& problem : problems) message += "\n  " + problem;
    return message;
  }

  std::string path_;
  std::vector<std::string> problems_;
};

/// A file or directory that the system does not let be read or written, whatever is in it.
class SystemError : public FormatError {
 public:
  /// The problem is "<what>: <the system's reason>".
  SystemError(const std::string& path, const std::string& what, const std::error_code& reason)
      : FormatError(path, {what + ": " + reason.message()}) {}
};

LORA_NAMESPACE_END
