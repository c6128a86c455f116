#pragma once

#include <lora/version.h>

#include <algorithm>
#include <cstddef>
#include <map>
#include <string>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

inline size_t edit_distance(const std::string& a, const std::string& b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t substituted = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, substituted});
    }
  }
  return row.back();
}

/// The three ends of paths, with as many components as `wanted`, that are most like it.
inline std::vector<std::string> nearest_names(const std::string& wanted, const std::vector<std::string>& paths) {
  const auto components = std::count(wanted.begin(), wanted.end(), '.') + 1;
  std::map<std::string, size_t> distances;
  for (const auto& path : paths) {
    size_t begin = path.size();
    for (auto i = components; i > 0 && begin != std::string::npos; --i) {
      begin = begin == 0 ? std::string::npos : path.rfind('.', begin - 1);
    }
    const auto name = begin == std::string::npos ? path : path.substr(begin + 1);
    distances[name] = edit_distance(wanted, name);
  }
  std::vector<std::string> names;
  for (const auto& [name, distance] : distances) names.push_back(name);
  std::stable_sort(names.begin(), names.end(),
                   [&](const auto& a, const auto& b) { return distances[a] < distances[b]; });
  constexpr size_t kMost = 3;
  names.resize(std::min(names.size(), kMost));
  return names;
}

}  // namespace detail
LORA_NAMESPACE_END
