#pragma once

#include <lora/detail/error.h>
#include <lora/detail/strict_json.h>
#include <lora/version.h>

#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

// Ordered, because the first matching entry of rank_pattern and alpha_pattern wins.
using Json = nlohmann::ordered_json;

/// Reads a JSON object, `what` it is to its file. Throws a FormatError for anything else, for a key that is there
/// twice, and for nesting that is deeper than any of ours: writing it into an error message would use up the stack.
inline Json parse_object(const std::string& text, const std::string& path,
                         const std::string& what = "an adapter's configuration") {
  constexpr int kDeepest = 16;
  std::vector<std::string> problems;
  try {
    auto json = parse_strict_json<Json>(text, kDeepest, problems);
    if (json.is_object() && problems.empty()) return json;
    if (!json.is_object()) problems.push_back("found no JSON object, expected " + what);
  } catch (const std::runtime_error& error) {
    problems.push_back("found no JSON object, expected " + what + ": " + error.what());
  }
  throw FormatError(path, std::move(problems));
}

/// JSON as text. Throws a FormatError where a name is not UTF-8.
inline std::string dump(const Json& json, const std::string& path, int indent = -1) {
  try {
    return json.dump(indent);
  } catch (const Json::exception& error) {
    throw FormatError(path, {std::string("cannot be written: ") + error.what()});
  }
}

/// A line for each value of `found` that is not that of `expected`, objects gone through key by key.
inline void add_differences(const std::string& name, const Json& found, const Json& expected,
                            std::vector<std::string>& problems) {
  if (found == expected) return;
  if (!found.is_object() || !expected.is_object()) {
    const auto text = [](const Json& value) { return value.is_null() ? "nothing" : value.dump(); };
    problems.push_back("found " + text(found) + ", expected " + text(expected) + " for " + name);
    return;
  }
  const auto at = [](const Json& object, const std::string& key) {
    const auto value = object.find(key);
    return value == object.end() ? Json() : *value;
  };
  const auto below = [&](const std::string& key) { return name.empty() ? key : name + "." + key; };
  for (const auto& [key, value] : expected.items()) add_differences(below(key), at(found, key), value, problems);
  for (const auto& [key, value] : found.items()) {
    if (!expected.contains(key)) add_differences(below(key), value, Json(), problems);
  }
}

}  // namespace detail
LORA_NAMESPACE_END
