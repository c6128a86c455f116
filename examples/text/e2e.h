#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "file_error.h"  // defines: FileError, read_file

/// An input `slot : value | slot : value` and one text that says it.
struct Pair {
  std::string input, text;
};

namespace e2e_detail {

inline std::string trim(const std::string& text) {
  const char* const blanks = " \t\r";
  const auto begin = text.find_first_not_of(blanks);
  return begin == std::string::npos ? "" : text.substr(begin, text.find_last_not_of(blanks) - begin + 1);
}

/// What is wrong with the fields of an input; empty where nothing is.
inline std::string input_problem(const std::string& input) {
  for (std::size_t begin = 0; begin <= input.size();) {
    const auto bar = input.find('|', begin);
    const auto end = bar == std::string::npos ? input.size() : bar;
    const auto field = input.substr(begin, end - begin);
    const auto colon = field.find(':');
    if (colon == std::string::npos || trim(field.substr(0, colon)).empty() || trim(field.substr(colon + 1)).empty()) {
      return "found the field '" + trim(field) + "', expected 'slot : value'";
    }
    begin = end + 1;
  }
  return "";
}

}  // namespace e2e_detail

/// Reads a file of pairs in the format of the E2E challenge (Novikova et al. 2017) as the LoRA paper's data folder has
/// it: one `slot : value | slot : value||text` a line. A FileError tells every broken line by its number.
inline std::vector<Pair> read_e2e(const std::string& path) {
  const auto content = read_file(path);
  std::vector<Pair> pairs;
  std::vector<std::string> problems;
  std::size_t number = 0;
  for (std::size_t begin = 0; begin < content.size();) {
    auto end = content.find('\n', begin);
    if (end == std::string::npos) end = content.size();
    const auto line = content.substr(begin, end - begin);
    begin = end + 1;
    ++number;
    if (e2e_detail::trim(line).empty()) continue;
    const auto where = "line " + std::to_string(number) + ": ";
    const auto bars = line.find("||");
    if (bars == std::string::npos) {
      problems.push_back(where + "found no '||' between input and text");
      continue;
    }
    Pair pair{e2e_detail::trim(line.substr(0, bars)), e2e_detail::trim(line.substr(bars + 2))};
    const auto problem = pair.text.empty() ? "found no text after '||'" : e2e_detail::input_problem(pair.input);
    if (problem.empty()) {
      pairs.push_back(std::move(pair));
    } else {
      problems.push_back(where + problem);
    }
  }
  if (problems.empty() && pairs.empty()) problems.emplace_back("found no pair, expected lines 'slot : value||text'");
  if (!problems.empty()) throw FileError(path, problems);
  return pairs;
}
