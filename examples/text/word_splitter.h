#pragma once

// PCRE2's functions carry the width of a code unit in their names.
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <cstddef>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

/// Splits a text into the words that GPT-2's BPE never merges across (the pattern of its encoder.py).
class WordSplitter {
 public:
  WordSplitter() {
    // Unicode's White_Space is spelled out, since PCRE2's \s also takes U+180E.
    const std::string space =
        R"(\t-\r\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})";
    const std::string pattern = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^" + space + "\\p{L}\\p{N}]+|[" +
                                space + "]+(?![^" + space + "])|[" + space + "]+";
    int error = 0;
    PCRE2_SIZE offset = 0;
    code_.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                              PCRE2_UTF | PCRE2_UCP | PCRE2_MATCH_INVALID_UTF, &error, &offset, nullptr));
    if (code_ == nullptr) throw std::runtime_error("PCRE2 refuses the split pattern at " + std::to_string(offset));
  }

  /// Views into `text` that join to it; a run of bytes that are not UTF-8 is a word of its own.
  std::vector<std::string_view> split(std::string_view text) const {
    const std::unique_ptr<pcre2_match_data, MatchDeleter> match(
        pcre2_match_data_create_from_pattern(code_.get(), nullptr));
    std::vector<std::string_view> words;
    std::size_t end = 0;
    while (end < text.size()) {
      const int found = pcre2_match(code_.get(), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), end, 0,
                                    match.get(), nullptr);
      if (found == PCRE2_ERROR_NOMATCH) break;
      if (found < 0) throw std::runtime_error("PCRE2 failed to split a text with error " + std::to_string(found));
      const auto* const range = pcre2_get_ovector_pointer(match.get());
      if (range[0] > end) words.push_back(text.substr(end, range[0] - end));
      words.push_back(text.substr(range[0], range[1] - range[0]));
      end = range[1];
    }
    if (end < text.size()) words.push_back(text.substr(end));
    return words;
  }

 private:
  struct CodeDeleter {
    void operator()(pcre2_code* code) const { pcre2_code_free(code); }
  };
  struct MatchDeleter {
    void operator()(pcre2_match_data* match) const { pcre2_match_data_free(match); }
  };

  std::unique_ptr<pcre2_code, CodeDeleter> code_;
};
