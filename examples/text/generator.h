#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "text/e2e.h"                // defines: Pair
#include "text/generator_domains.h"  // defines: GeneratorDomain, the domains' slots and sentences

/// Writes pairs of one domain in E2E's format; the same seed gives the same pairs on every platform.
class PairGenerator {
 public:
  PairGenerator(const GeneratorDomain& domain, std::uint64_t seed) : domain_(domain), engine_(seed) {}

  /// `count` pairs, none with an input of `taken`; the new inputs are added to `taken`.
  std::vector<Pair> draw(std::size_t count, std::set<std::string>& taken) {
    std::vector<Pair> pairs;
    while (pairs.size() < count) {
      auto pair = draw_one();
      if (taken.insert(pair.input).second) pairs.push_back(std::move(pair));
    }
    return pairs;
  }

 private:
  struct Value {
    std::string slot, text;
  };

  Pair draw_one() {
    std::vector<Value> open;  // what the text has yet to say
    for (const auto& slot : domain_.slots) {
      if (open.empty() || below(4) != 0) open.push_back({slot.name, fill_pools(pick(slot.values))});
    }
    Pair pair;
    for (const auto& value : open) pair.input += (pair.input.empty() ? "" : " | ") + value.slot + " : " + value.text;
    pair.text = say(domain_.openings, open);
    // The first value not yet said leads each of the next sentences, so that the text follows the input's order.
    while (!open.empty()) pair.text += " " + say(domain_.details, open);
    return pair;
  }

  /// Fills a sentence that says the first of `open` and nothing but values of `open`, and takes those out of it.
  std::string say(const std::vector<std::string>& sentences, std::vector<Value>& open) {
    std::vector<std::string> fitting;
    for (const auto& sentence : sentences) {
      if (sentence.find("{" + open.front().slot + "}") == std::string::npos) continue;
      std::size_t said = 0;
      for (const auto& value : open) said += sentence.find("{" + value.slot + "}") != std::string::npos ? 1 : 0;
      std::size_t named = 0;
      for (const char letter : sentence) named += letter == '{' ? 1 : 0;
      if (said == named) fitting.push_back(sentence);
    }
    auto sentence = choose_wording(pick(fitting));
    std::vector<Value> left;
    for (const auto& value : open) {
      const auto mark = "{" + value.slot + "}";
      const auto at = sentence.find(mark);
      if (at == std::string::npos) {
        left.push_back(value);
      } else {
        sentence.replace(at, mark.size(), value.text);
      }
    }
    open = std::move(left);
    return sentence;
  }

  std::string choose_wording(std::string sentence) {
    for (auto begin = sentence.find('<'); begin != std::string::npos; begin = sentence.find('<')) {
      const auto end = sentence.find('>', begin);
      std::vector<std::string> wordings = {""};
      for (auto at = begin + 1; at < end; ++at) {
        if (sentence[at] == '|') {
          wordings.emplace_back();
        } else {
          wordings.back() += sentence[at];
        }
      }
      sentence.replace(begin, end - begin + 1, pick(wordings));
    }
    return sentence;
  }

  std::string fill_pools(std::string pattern) {
    for (const auto& pool : generator_pools()) {
      const auto mark = "{" + pool.name + "}";
      for (auto at = pattern.find(mark); at != std::string::npos; at = pattern.find(mark)) {
        pattern.replace(at, mark.size(), pick(pool.words));
      }
    }
    return pattern;
  }

  const std::string& pick(const std::vector<std::string>& choices) { return choices[below(choices.size())]; }

  /// Uniform below `bound`; the standard's distributions differ from library to library.
  std::size_t below(std::size_t bound) { return static_cast<std::size_t>(engine_() % bound); }

  const GeneratorDomain& domain_;
  std::mt19937_64 engine_;
};
