#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "finetune/method.h"   // defines: methods, method_of
#include "finetune/options.h"  // defines: Options, Method

/// What a comparison runs: each method with each learning rate and seed, from the same base.
struct Comparison {
  std::string flag;
  std::vector<const Method*> methods;
  std::vector<double> learning_rates;
  std::uint64_t seeds;
  std::size_t evaluations;  // of the dev loss in a run, the last one after the last step
  std::size_t steps;        // where --steps is not given

  /// The flags that one of the methods takes.
  std::set<std::string> flags() const {
    std::set<std::string> all;
    for (const auto* method : methods) all.insert(method->flags.begin(), method->flags.end());
    return all;
  }
};

/// --compare: few methods, in depth.
inline Comparison lora_comparison() {
  return {
      "--compare", {&method_of("lora"), &method_of("lora+"), &method_of("full")}, {3e-4, 1e-3, 3e-3, 1e-2, 3e-2}, 3, 10,
      300};
}

/// --compare-methods: all of them, in a quarter of an hour.
inline Comparison methods_comparison() {
  Comparison comparison{"--compare-methods", {}, {2e-3, 1e-2, 3e-2, 1e-1, 3e-1}, 1, 1, 100};
  for (const auto& method : methods()) comparison.methods.push_back(&method);
  return comparison;
}

/// The comparison that the options ask for.
inline std::optional<Comparison> comparison_of(const Options& options) {
  if (!options.compare && !options.compare_methods) return std::nullopt;
  auto comparison = options.compare ? lora_comparison() : methods_comparison();
  if (!options.grid.empty()) comparison.learning_rates = options.grid;
  return comparison;
}

/// The flags that not every method has.
inline std::set<std::string> all_flags() { return methods_comparison().flags(); }
