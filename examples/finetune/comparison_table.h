#pragma once

#include <cmath>
#include <cstdint>
#include <iomanip>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "finetune/report.h"  // defines: fixed, bytes_text

/// The figures of one method's runs, which differ in their seed alone.
using MethodRuns = std::vector<nlohmann::ordered_json>;

struct Mean {
  double value = 0.0, deviation = 0.0;

  std::string text() const { return fixed(value, 4) + " +- " + fixed(deviation, 4); }
};

/// Mean and sample deviation of one figure over runs that differ in their seed.
inline Mean mean_of(const MethodRuns& runs, const std::string& key) {
  Mean mean;
  const auto count = static_cast<double>(runs.size());
  for (const auto& run : runs) mean.value += run[key].get<double>() / count;
  for (const auto& run : runs) mean.deviation += std::pow(run[key].get<double>() - mean.value, 2) / (count - 1.0);
  mean.deviation = std::sqrt(mean.deviation);
  return mean;
}

/// One line a method from its runs at its best lr; the last method is the one that the gains are measured against.
inline void print_comparison(const std::vector<MethodRuns>& methods) {
  const auto gain = [](const MethodRuns& runs) {
    return mean_of(runs, "dev_loss_before").value - mean_of(runs, "dev_loss_after").value;
  };
  const auto& full = methods.back();
  std::cout << "\nMeans over the seeds at each method's best lr; losses in nats per token, +- the seeds' standard "
               "deviation.\n"
            << "Peak memory is the resident memory of a process that does one run, LibTorch's code included.\n\n"
            << std::left << std::setw(8) << "method" << std::setw(8) << "lr" << std::setw(19) << "trained"
            << std::setw(11) << "saved" << std::setw(9) << "time" << std::setw(11) << "peak" << std::setw(20)
            << "new domain" << std::setw(8) << "gain"
            << "old domains\n"
            << std::setw(66) << "none" << std::setw(28) << mean_of(full, "dev_loss_before").text().substr(0, 6)
            << mean_of(full, "old_domain_loss_before").text().substr(0, 6) << '\n';
  for (const auto& runs : methods) {
    const auto& first = runs.front();
    const auto trained = first["trainable_parameters"].get<std::int64_t>();
    const auto share = 100.0 * static_cast<double>(trained) / full.front()["trainable_parameters"].get<double>();
    std::cout << std::setw(8) << first["method"].get<std::string>() << std::setw(8)
              << nlohmann::json(first["learning_rate"]).dump() << std::setw(19)
              << std::to_string(trained) + " (" + fixed(share, 1) + " %)" << std::setw(11)
              << bytes_text(first["adapter_bytes"].get<std::int64_t>()) << std::setw(9)
              << fixed(mean_of(runs, "seconds").value, 1) + " s" << std::setw(11)
              << bytes_text(static_cast<std::int64_t>(mean_of(runs, "peak_memory_bytes").value)) << std::setw(20)
              << mean_of(runs, "dev_loss_after").text() << std::setw(8)
              << fixed(100.0 * gain(runs) / gain(full), 1) + " %" << mean_of(runs, "old_domain_loss_after").text()
              << '\n';
  }
  std::cout << std::flush;
}

/// A Markdown table with a line for each method, at its best lr.
inline void print_methods(const std::vector<MethodRuns>& methods) {
  std::cout << "\n| method | lr | trained parameters | saved | a step | peak memory | dev loss |\n"
            << "|---|---|---|---|---|---|---|\n";
  for (const auto& runs : methods) {
    const auto& first = runs.front();
    const auto seconds = mean_of(runs, "seconds").value / first["steps"].get<double>();
    std::cout << "| " << first["method"].get<std::string>() << " | " << nlohmann::json(first["learning_rate"]).dump()
              << " | " << first["trainable_parameters"].get<std::int64_t>() << " | "
              << bytes_text(first["adapter_bytes"].get<std::int64_t>()) << " | " << fixed(1e3 * seconds, 1) << " ms | "
              << bytes_text(static_cast<std::int64_t>(mean_of(runs, "peak_memory_bytes").value)) << " | "
              << fixed(mean_of(runs, "dev_loss_after").value, 4) << " |\n";
  }
  std::cout << std::flush;
}
