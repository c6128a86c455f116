#pragma once

#include <cstddef>
#include <fstream>
#include <ios>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

/// A file that can't be used: its path and what is wrong with it, in one line.
class FileError : public std::runtime_error {
 public:
  FileError(const std::string& path, const std::vector<std::string>& problems)
      : std::runtime_error(path + ": " + join(problems)) {}

 private:
  static std::string join(const std::vector<std::string>& problems) {
    constexpr std::size_t kShown = 5;
    std::string line;
    for (std::size_t i = 0; i < problems.size() && i < kShown; ++i) line += (i > 0 ? "; " : "") + problems[i];
    if (problems.size() > kShown) line += "; and " + std::to_string(problems.size() - kShown) + " more";
    return line;
  }
};

inline std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream content;
  // A folder opens as a file and fails on reading; an empty file sets the fail bit of `content`, not of `file`.
  if (!file || file.peek() == std::ifstream::traits_type::eof() ? !file.eof() : !(content << file.rdbuf())) {
    throw FileError(path, {"can't be read; check the path and the permissions"});
  }
  return content.str();
}
