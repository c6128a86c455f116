#pragma once

#include <lora/version.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <ostream>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN

/// What an injection did: each entry of target_modules with the modules that it matched.
struct InjectionReport {
  /// An adapted module, or parameter that the adapter has a copy of.
  struct Module {
    std::string path;          ///< In the model.
    std::string parts;         ///< "[q,v]"; empty: the whole weight.
    int64_t out_features = 0;  ///< Rows of the matrix, or of the copy.
    int64_t in_features = 0;   ///< 0: a vector.
    int64_t parameters = 0;    ///< Of the adapter on this module.
  };
  /// A target, or another option, with what it matched.
  struct Entry {
    std::string target;           ///< As the configuration says it.
    std::vector<Module> modules;  ///< In the model's order.
  };

  std::string adapter;               ///< Its name.
  std::vector<Entry> entries;        ///< In the order of the configuration.
  std::vector<std::string> notes;    ///< Tied weights, modules left out: what the user would want to know.
  int64_t trainable_parameters = 0;  ///< Of the model, all trainable adapters together.
  int64_t total_parameters = 0;      ///< Of the model with its adapters.
};

namespace detail {

/// "h.0.attn.c_attn" → "h.*.attn.c_attn": equal layers print as one line.
inline std::string without_numbers(const std::string& path) {
  std::string result;
  std::istringstream components(path);
  for (std::string component; std::getline(components, component, '.');) {
    const bool number = !component.empty() && component.find_first_not_of("0123456789") == std::string::npos;
    result += (result.empty() ? "" : ".") + (number ? "*" : component);
  }
  return result;
}

/// The entries and the notes.
inline void print_adapter(std::ostream& out, const InjectionReport& report) {
  out << "adapter \"" << report.adapter << "\"\n";
  for (const auto& entry : report.entries) {
    std::vector<std::pair<std::string, int64_t>> lines;
    for (const auto& module : entry.modules) {
      std::ostringstream line;
      line << detail::without_numbers(module.path) << module.parts << "  [" << module.out_features;
      if (module.in_features > 0) line << ", " << module.in_features;
      line << "]  " << module.parameters << " parameters each";
      const auto text = line.str();
      auto known = std::find_if(lines.begin(), lines.end(), [&](const auto& other) { return other.first == text; });
      if (known == lines.end()) known = lines.insert(lines.end(), {text, 0});
      ++known->second;
    }
    out << "  " << entry.target << ": " << entry.modules.size()
        << (entry.modules.size() == 1 ? " module\n" : " modules\n");
    for (const auto& [line, count] : lines) out << "    " << count << " x " << line << "\n";
  }
  for (const auto& note : report.notes) out << "  note: " << note << "\n";
}

}  // namespace detail

/// A line for each target, and for each kind of module that it matched.
inline std::ostream& operator<<(std::ostream& out, const InjectionReport& report) {
  detail::print_adapter(out, report);
  const auto share = report.total_parameters == 0 ? 0.0
                                                  : 100.0 * static_cast<double>(report.trainable_parameters) /
                                                        static_cast<double>(report.total_parameters);
  const auto precision = out.precision(3);
  out << "  trainable: " << report.trainable_parameters << " of " << report.total_parameters << " parameters (" << share
      << " %)\n";
  out.precision(precision);
  return out;
}

LORA_NAMESPACE_END
