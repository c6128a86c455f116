#pragma once

#include <c10/util/Exception.h>
#include <lora/version.h>

#include <cctype>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <regex>
#include <string>
#include <utility>

LORA_NAMESPACE_BEGIN
namespace detail {

/// A pattern that Python reads and std::regex does not, or not alike.
class UnsupportedPattern : public c10::ValueError {
 public:
  using c10::ValueError::ValueError;
};

/// A regular expression in the dialect of Python's `re`, as PEFT's configurations hold them.
///
/// std::regex (ECMAScript) does the matching. The constructs that it lacks or reads differently (look-behind, named
/// groups, inline flags, atomic groups, possessive quantifiers, `\A`, `\Z`, POSIX classes) are an UnsupportedPattern,
/// so that a pattern never means something else than in Python. Module paths hold no newline, hence `.`, `^` and `$`
/// agree.
class PythonRegex {
 public:
  explicit PythonRegex(std::string pattern) : pattern_(std::move(pattern)) {
    const auto translation = translated();
    try {
      regex_ = std::regex(translation, kMatching);
    } catch (const std::regex_error& error) {
      TORCH_CHECK_VALUE(false, "[lora::regex] found the pattern \"", pattern_,
                        "\", expected a valid regular expression: ", error.what());
    }
  }

  /// Python's re.fullmatch(pattern, text) is not None.
  bool fullmatch(const std::string& text) const { return std::regex_match(text, regex_); }

 private:
  friend class PythonSubstitution;

  [[noreturn]] void refuse(const std::string& construct) const {
    throw UnsupportedPattern({__func__, __FILE__, static_cast<uint32_t>(__LINE__)}, refusal(construct));
  }
  /// For what no pattern needs, and a damaged or hostile file may hold.
  [[noreturn]] void refuse_excess(const std::string& excess) const { TORCH_CHECK_VALUE(false, refusal(excess)); }

  std::string refusal(const std::string& found) const {
    return "[lora::regex] found " + found + " in the pattern \"" + pattern_ +
           "\", expected the part of Python's dialect that std::regex reads alike; rewrite the pattern or use "
           "target_if";
  }

  /// The pattern for std::regex; what that would read differently is refused.
  std::string translated() const {
    // std::regex compiles by recursion: these keep a pattern out of a file from using up the stack.
    if (pattern_.size() > kLongest) refuse_excess("more than " + std::to_string(kLongest) + " characters");
    std::string result;
    bool in_class = false;
    int depth = 0;
    for (size_t i = 0; i < pattern_.size(); ++i) {
      const char c = pattern_[i];
      const char next = i + 1 < pattern_.size() ? pattern_[i + 1] : '\0';
      result += c;
      if (c == '\\') {
        if (next == '\0') refuse_excess("a trailing backslash");
        // A letter behind a backslash is either one of these or reads differently in the two dialects.
        if (std::isalpha(static_cast<unsigned char>(next)) &&
            std::string(in_class ? "dDwWsSnrtfv" : "dDwWsSbBnrtfv").find(next) == std::string::npos) {
          refuse(std::string("\\") + next);
        }
        if (std::isdigit(static_cast<unsigned char>(next))) refuse("a back-reference or octal escape");
        result += next;
        ++i;
      } else if (in_class) {
        if (c == ']') in_class = false;
        if (c == '[' && (next == ':' || next == '.' || next == '=')) refuse("a POSIX class");
      } else if (c == '[') {
        in_class = true;
        if (next == '^') {
          result += next;
          ++i;
        }
        // A leading ']' is a literal in Python and ends an empty class in ECMAScript.
        if (i + 1 < pattern_.size() && pattern_[i + 1] == ']') refuse("a class that begins with ']'");
      } else if (c == '(') {
        if (++depth > kDeepest) refuse_excess("groups nested more than " + std::to_string(kDeepest) + " deep");
        const char kind = next == '?' && i + 2 < pattern_.size() ? pattern_[i + 2] : '\0';
        if (next == '?' && kind != ':' && kind != '=' && kind != '!') refuse(std::string("(?") + kind);
      } else if (c == ')') {
        --depth;
      } else if ((c == '*' || c == '+' || c == '?' || c == '}') && next == '+') {
        refuse("a possessive quantifier");
      } else if (c == '{') {
        if (!is_quantifier(i)) refuse("a '{' that is no quantifier");
        if (next == ',') result += '0';  // Python's {,n}
      }
    }
    return result;
  }

  /// True for {m}, {m,}, {,n} and {m,n} at `begin`.
  bool is_quantifier(size_t begin) const {
    size_t i = begin + 1;
    bool digits = false;
    const auto skip_number = [&] {
      const size_t first = i;
      while (i < pattern_.size() && std::isdigit(static_cast<unsigned char>(pattern_[i]))) ++i;
      // std::regex counts in an int and reads a larger number as another one.
      if (i - first > kMostDigits) refuse_excess("a repetition of more than 9999 times");
      digits = digits || i > first;
    };
    skip_number();
    if (i < pattern_.size() && pattern_[i] == ',') {
      ++i;
      skip_number();
    }
    return digits && i < pattern_.size() && pattern_[i] == '}';
  }

  // A pattern such as (.*.*)*x keeps std::regex busy for ages, and it may come out of a file: libstdc++ has a way of
  // matching whose time is bounded, for patterns without back-references.
#if defined(__GLIBCXX__)
  static constexpr auto kMatching = std::regex::ECMAScript | std::regex_constants::__polynomial;
#else
  static constexpr auto kMatching = std::regex::ECMAScript;
#endif
  static constexpr size_t kLongest = 4096;
  static constexpr int kDeepest = 64;
  static constexpr size_t kMostDigits = 4;

  std::string pattern_;
  std::regex regex_;
};

/// Python's re.sub with a pattern and a replacement, in which \\1 to \\9 stand for groups and \\\\ for a backslash;
/// what else a backslash begins in Python is a c10::ValueError.
class PythonSubstitution {
 public:
  PythonSubstitution(const std::string& pattern, const std::string& replacement)
      // Which of several matches the groups hold is told by std::regex's own way alone.
      : regex_(PythonRegex(pattern).translated(), std::regex::ECMAScript) {
    const auto digit = [&](size_t i) {
      return i < replacement.size() && std::isdigit(static_cast<unsigned char>(replacement[i])) != 0;
    };
    for (size_t i = 0; i < replacement.size(); ++i) {
      if (replacement[i] != '\\') {
        if (replacement[i] == '$') format_ += '$';
        format_ += replacement[i];
        continue;
      }
      ++i;
      const bool group =
          digit(i) && !digit(i + 1) && static_cast<unsigned>(replacement[i] - '0') <= regex_.mark_count();
      TORCH_CHECK_VALUE((group && replacement[i] != '0') || (i < replacement.size() && replacement[i] == '\\'),
                        "[lora::regex] found the replacement \"", replacement, "\" for the pattern \"", pattern,
                        "\" with ", regex_.mark_count(),
                        " groups, expected of backslashes only \\1 to \\9 for groups "
                        "that it has and \\\\ for itself");
      if (group) format_ += '$';
      format_ += replacement[i];
    }
  }

  /// The text with every match replaced; nothing where there is none, or where the text has more than 4096 characters.
  std::optional<std::string> operator()(const std::string& text) const {
    // std::regex searches by recursion: a key of a file must not use up the stack.
    if (text.size() > PythonRegex::kLongest || !std::regex_search(text, regex_)) return std::nullopt;
    return std::regex_replace(text, regex_, format_);
  }

 private:
  std::regex regex_;
  std::string format_;
};

}  // namespace detail
LORA_NAMESPACE_END
