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

/// Parses JSON, which nlohmann::json by itself does with the last of equal keys, nested without a limit and up to the
/// first zero byte: here each key that is there twice is a problem, and text that is nested deeper than `deepest` or is
/// no JSON to its end is a std::runtime_error.
template <class Json = nlohmann::json>
Json parse_strict_json(std::string_view text, int deepest, std::vector<std::string>& problems) {
  using Event = typename Json::parse_event_t;
  if (text.find('\0') != std::string_view::npos) throw std::runtime_error("a zero byte");
  std::vector<std::set<std::string>> open_objects;
  const auto watch = [&](int depth, Event event, Json& parsed) {
    if (depth > deepest) throw std::runtime_error("nested more than " + std::to_string(deepest) + " deep");
    if (event == Event::object_start) open_objects.emplace_back();
    if (event == Event::object_end) open_objects.pop_back();
    if (event == Event::key && !open_objects.back().insert(parsed.template get<std::string>()).second) {
      problems.push_back("key '" + parsed.template get<std::string>() + "' is there twice");
    }
    return true;
  };
  try {
    return Json::parse(text.begin(), text.end(), watch);
  } catch (const typename Json::exception& error) {
    constexpr size_t kEnough = 300;  // the parser quotes the token that it stumbled on, however long
    throw std::runtime_error(std::string(error.what()).substr(0, kEnough));
  }
}

}  // namespace detail
LORA_NAMESPACE_END
