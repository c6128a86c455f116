#pragma once

#include <c10/util/Exception.h>
#include <lora/version.h>

#include <cctype>
#include <regex>
#include <string>
#include <utility>

LORA_NAMESPACE_BEGIN
namespace detail {

/// A regular expression in the dialect of Python's `re`, as PEFT's configurations hold them.
///
/// std::regex (ECMAScript) does the matching. The constructs that it lacks or reads differently (look-behind, named
/// groups, inline flags, atomic groups, possessive quantifiers, `\A`, `\Z`, POSIX classes) are a c10::ValueError, so
/// that a pattern never means something else than in Python. Module paths hold no newline, hence `.`, `^` and `$`
/// agree.
class PythonRegex {
 public:
  explicit PythonRegex(std::string pattern) : pattern_(std::move(pattern)) {
    check_dialect();
    try {
      regex_ = std::regex(translated(), std::regex::ECMAScript);
    } catch (const std::regex_error& error) {
      TORCH_CHECK_VALUE(false, "[lora::regex] found the pattern \"", pattern_,
                        "\", expected a valid regular expression: ", error.what());
    }
  }

  /// Python's re.fullmatch(pattern, text) is not None.
  bool fullmatch(const std::string& text) const { return std::regex_match(text, regex_); }

 private:
  [[noreturn]] void refuse(const std::string& construct) const {
    TORCH_CHECK_VALUE(
        false, "[lora::regex] found ", construct, " in the pattern \"", pattern_,
        "\", expected the part of Python's dialect that std::regex reads alike; rewrite the pattern or use "
        "target_if");
  }

  void check_dialect() const {
    bool in_class = false;
    for (size_t i = 0; i < pattern_.size(); ++i) {
      const char c = pattern_[i];
      const char next = i + 1 < pattern_.size() ? pattern_[i + 1] : '\0';
      if (c == '\\') {
        if (next == '\0') refuse("a trailing backslash");
        // A letter behind a backslash is either one of these or reads differently in the two dialects.
        if (std::isalpha(static_cast<unsigned char>(next)) &&
            std::string(in_class ? "dDwWsSnrtfv" : "dDwWsSbBnrtfv").find(next) == std::string::npos) {
          refuse(std::string("\\") + next);
        }
        if (std::isdigit(static_cast<unsigned char>(next))) refuse("a back-reference or octal escape");
        ++i;
      } else if (in_class) {
        if (c == ']') in_class = false;
        if (c == '[' && (next == ':' || next == '.' || next == '=')) refuse("a POSIX class");
      } else if (c == '[') {
        in_class = true;
        if (next == '^') ++i;
        // A leading ']' is a literal in Python and ends an empty class in ECMAScript.
        if (i + 1 < pattern_.size() && pattern_[i + 1] == ']') refuse("a class that begins with ']'");
      } else if (c == '(' && next == '?') {
        const char kind = i + 2 < pattern_.size() ? pattern_[i + 2] : '\0';
        if (kind != ':' && kind != '=' && kind != '!') refuse(std::string("(?") + kind);
      } else if ((c == '*' || c == '+' || c == '?' || c == '}') && next == '+') {
        refuse("a possessive quantifier");
      } else if (c == '{' && !is_quantifier(i)) {
        refuse("a '{' that is no quantifier");
      }
    }
  }

  /// True for {m}, {m,} and {m,n} at `begin`; Python's {,n} is written out by translated().
  bool is_quantifier(size_t begin) const {
    size_t i = begin + 1;
    bool digits = false;
    while (i < pattern_.size() && std::isdigit(static_cast<unsigned char>(pattern_[i]))) digits = true, ++i;
    if (i < pattern_.size() && pattern_[i] == ',') {
      ++i;
      while (i < pattern_.size() && std::isdigit(static_cast<unsigned char>(pattern_[i]))) digits = true, ++i;
    }
    return digits && i < pattern_.size() && pattern_[i] == '}';
  }

  std::string translated() const {
    std::string result;
    for (size_t i = 0; i < pattern_.size(); ++i) {
      result += pattern_[i];
      const bool escaped = i > 0 && pattern_[i - 1] == '\\' && !(i > 1 && pattern_[i - 2] == '\\');
      if (pattern_[i] == '{' && !escaped && i + 1 < pattern_.size() && pattern_[i + 1] == ',') result += '0';
    }
    return result;
  }

  std::string pattern_;
  std::regex regex_;
};

}  // namespace detail
LORA_NAMESPACE_END
