#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <queue>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "file_error.h"          // defines: FileError, read_file
#include "text/word_splitter.h"  // defines: WordSplitter, GPT-2's split by PCRE2

/// GPT-2's byte-level BPE from Hugging Face's vocab.json and merges.txt: any bytes go in and come out again.
class ByteBpe {
 public:
  ByteBpe(const std::string& vocab_path, const std::string& merges_path) {
    read_vocab(vocab_path);
    read_merges(merges_path);
  }

  std::int64_t vocab_size() const { return static_cast<std::int64_t>(bytes_of_.size()); }
  std::int64_t end_of_text() const { return end_of_text_; }

  /// Token ids of `text`; `<|endoftext|>` inside it becomes the special token.
  std::vector<std::int64_t> encode(std::string_view text) const {
    std::vector<std::int64_t> ids;
    for (std::size_t begin = 0;;) {
      const auto special = text.find(kEndOfText, begin);
      for (const auto word : splitter_.split(text.substr(begin, special - begin))) append_word(word, ids);
      if (special == std::string_view::npos) return ids;
      ids.push_back(end_of_text_);
      begin = special + kEndOfText.size();
    }
  }

  /// The bytes of the tokens; a cut token list may end inside a UTF-8 character.
  std::string decode(const std::vector<std::int64_t>& ids) const {
    std::string text;
    for (const auto id : ids) text += bytes_of_.at(static_cast<std::size_t>(id));
    return text;
  }

 private:
  static constexpr std::string_view kEndOfText = "<|endoftext|>";
  static constexpr std::size_t kNone = static_cast<std::size_t>(-1);

  struct Merge {
    std::size_t rank;
    std::int64_t merged;
  };

  /// A pair of neighbours that may be merged: the lowest rank first, the leftmost first among equals.
  struct Candidate {
    std::size_t rank, left;
    std::int64_t left_id, right_id;

    bool operator>(const Candidate& other) const { return rank != other.rank ? rank > other.rank : left > other.left; }
  };

  /// GPT-2 writes the byte b as a printable character: itself where it is one, else the next from U+0100 on.
  static std::array<std::string, 256> byte_characters() {
    std::array<std::string, 256> characters;
    unsigned next = 256;
    for (unsigned byte = 0; byte < 256; ++byte) {
      const bool printable = (byte > 32 && byte < 127) || (byte > 160 && byte != 173);
      const unsigned point = printable ? byte : next++;
      auto& character = characters[byte];
      if (point < 128) {
        character = static_cast<char>(point);
      } else {  // all points are below U+0800: two bytes of UTF-8
        character = {static_cast<char>(0xC0 | (point >> 6)), static_cast<char>(0x80 | (point & 0x3F))};
      }
    }
    return characters;
  }

  void read_vocab(const std::string& path) {
    const auto json = nlohmann::json::parse(read_file(path), nullptr, /*allow_exceptions=*/false);
    if (!json.is_object() || json.empty()) throw FileError(path, {"found no JSON object of tokens and ids"});
    std::vector<std::string> problems;
    std::vector<bool> seen(json.size(), false);
    for (const auto& [token, value] : json.items()) {
      const auto id = value.is_number_unsigned() ? value.get<std::uint64_t>() : json.size();
      if (id >= json.size() || seen[id]) {
        problems.push_back("found the id " + value.dump() + " for '" + token + "', expected 0 to " +
                           std::to_string(json.size() - 1) + ", each once");
      } else {
        seen[id] = true;
        ids_[token] = static_cast<std::int64_t>(id);
      }
    }
    const auto characters = byte_characters();
    std::unordered_map<std::string, char> byte_of;
    for (std::size_t byte = 0; byte < 256; ++byte) {
      byte_of[characters[byte]] = static_cast<char>(byte);
      const auto found = ids_.find(characters[byte]);
      if (found == ids_.end()) {
        problems.push_back("found no token for the byte " + std::to_string(byte));
      } else {
        id_of_byte_[byte] = found->second;
      }
    }
    const auto special = ids_.find(std::string(kEndOfText));
    if (special == ids_.end()) {
      problems.push_back("found no token '" + std::string(kEndOfText) + "'");
    } else {
      end_of_text_ = special->second;
    }
    if (!problems.empty()) throw FileError(path, problems);
    bytes_of_.resize(ids_.size());
    for (const auto& [token, id] : ids_) bytes_of_[static_cast<std::size_t>(id)] = token_bytes(token, byte_of);
  }

  /// The bytes that a token stands for; a special token, which is not written in byte characters, stands for itself.
  static std::string token_bytes(const std::string& token, const std::unordered_map<std::string, char>& byte_of) {
    if (token == kEndOfText) return token;
    std::string bytes;
    for (std::size_t at = 0; at < token.size();) {
      const std::size_t length = static_cast<unsigned char>(token[at]) < 0x80 ? 1 : 2;
      const auto found = byte_of.find(token.substr(at, length));
      if (found == byte_of.end()) return token;
      bytes += found->second;
      at += length;
    }
    return bytes;
  }

  void read_merges(const std::string& path) {
    const auto content = read_file(path);
    std::vector<std::string> problems;
    std::size_t number = 0, rank = 0;
    for (std::size_t begin = 0; begin < content.size();) {
      auto end = content.find('\n', begin);
      if (end == std::string::npos) end = content.size();
      auto line = content.substr(begin, end - begin);
      begin = end + 1;
      ++number;
      if (!line.empty() && line.back() == '\r') line.pop_back();
      if (line.empty() || (number == 1 && line.rfind("#version", 0) == 0)) continue;
      const auto blank = line.find(' ');
      const auto left = ids_.find(line.substr(0, blank));
      const auto right = blank == std::string::npos ? ids_.end() : ids_.find(line.substr(blank + 1));
      const auto merged =
          left == ids_.end() || right == ids_.end() ? ids_.end() : ids_.find(left->first + right->first);
      if (merged == ids_.end()) {
        problems.push_back("line " + std::to_string(number) + ": found '" + line +
                           "', expected two tokens that join to a third of the vocabulary");
      } else {
        merges_.emplace(pair_key(left->second, right->second), Merge{rank++, merged->second});
      }
    }
    if (!problems.empty()) throw FileError(path, problems);
  }

  static std::uint64_t pair_key(std::int64_t left, std::int64_t right) {
    return (static_cast<std::uint64_t>(left) << 32) | static_cast<std::uint64_t>(right);
  }

  /// Merges the word's bytes, best pair first (Sennrich et al. 2016), in O(n log n) of its length.
  void append_word(std::string_view word, std::vector<std::int64_t>& ids) const {
    const auto size = word.size();
    std::vector<std::int64_t> symbol(size);  // -1: merged into the one on its left
    std::vector<std::size_t> next(size), previous(size);
    for (std::size_t i = 0; i < size; ++i) {
      symbol[i] = id_of_byte_[static_cast<unsigned char>(word[i])];
      next[i] = i + 1 < size ? i + 1 : kNone;
      previous[i] = i > 0 ? i - 1 : kNone;
    }
    std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue;
    const auto consider = [&](std::size_t left) {
      if (left == kNone || next[left] == kNone) return;
      const auto found = merges_.find(pair_key(symbol[left], symbol[next[left]]));
      if (found != merges_.end()) queue.push({found->second.rank, left, symbol[left], symbol[next[left]]});
    };
    for (std::size_t i = 0; i < size; ++i) consider(i);
    while (!queue.empty()) {
      const auto best = queue.top();
      queue.pop();
      const auto right = next[best.left];
      if (right == kNone || symbol[best.left] != best.left_id || symbol[right] != best.right_id) continue;
      symbol[best.left] = merges_.at(pair_key(best.left_id, best.right_id)).merged;
      symbol[right] = -1;
      next[best.left] = next[right];
      if (next[right] != kNone) previous[next[right]] = best.left;
      consider(previous[best.left]);
      consider(best.left);
    }
    for (const auto id : symbol) {
      if (id >= 0) ids.push_back(id);
    }
  }

  WordSplitter splitter_;
  std::unordered_map<std::string, std::int64_t> ids_;
  std::vector<std::string> bytes_of_;
  std::array<std::int64_t, 256> id_of_byte_{};
  std::unordered_map<std::uint64_t, Merge> merges_;
  std::int64_t end_of_text_ = 0;
};
