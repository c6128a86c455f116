#pragma once

#include <lora/version.h>

#include <nlohmann/json.hpp>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// Parses JSON, which nlohmann::json by itself does with the last of equal keys and nested without a limit: here each
/// key that is there twice is a problem, and text nested deeper than `deepest` or no JSON is a std::runtime_error.
inline nlohmann::json parse_strict_json(std::string_view text, int deepest, std::vector<std::string>& problems) {
  using Event = nlohmann::json::parse_event_t;
  std::vector<std::set<std::string>> open_objects;
  const auto watch = [&](int depth, Event event, nlohmann::json& parsed) {
    if (depth > deepest) throw std::runtime_error("nested more deeply than the format's");
    if (event == Event::object_start) open_objects.emplace_back();
    if (event == Event::object_end) open_objects.pop_back();
    if (event == Event::key && !open_objects.back().insert(parsed.get<std::string>()).second) {
      problems.push_back("key '" + parsed.get<std::string>() + "' is there twice");
    }
    return true;
  };
  try {
    return nlohmann::json::parse(text.begin(), text.end(), watch);
  } catch (const nlohmann::json::exception& error) {
    constexpr size_t kEnough = 300;  // the parser quotes the token that it stumbled on, however long
    throw std::runtime_error(std::string(error.what()).substr(0, kEnough));
  }
}

}  // namespace detail
LORA_NAMESPACE_END
