#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iomanip>
#include <iostream>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "finetune/base_model.h"        // defines: ensure_base
#include "finetune/child_process.h"     // defines: ScratchFolder, run_program
#include "finetune/comparison_table.h"  // defines: mean_of, print_comparison
#include "finetune/figures.h"           // defines: write_json
#include "finetune/options.h"           // defines: Options, Method
#include "finetune/report.h"            // defines: fixed

/// Exit code of a run whose loss is not finite.
constexpr int kDivergedExit = 3;

namespace compare_detail {

constexpr std::array<double, 5> kLearningRates = {3e-4, 1e-3, 3e-3, 1e-2, 3e-2};
constexpr std::array<Method, 3> kMethods = {Method::kLora, Method::kLoraPlus, Method::kFull};
constexpr std::uint64_t kSeeds = 3;

using Json = nlohmann::ordered_json;

inline std::string number(double value) {
  std::ostringstream text;
  text << std::setprecision(17) << value;
  return text.str();
}

/// One fine-tuning in a process of its own, so that its peak memory is its own; null where it diverged.
inline std::optional<Json> run(const Options& options, const std::string& base, Method method, double lr,
                               std::uint64_t seed, const std::filesystem::path& scratch) {
  const auto json = (scratch / "figures.json").string();
  std::vector<std::string> arguments = {"--model",
                                        base,
                                        "--method",
                                        method_name(method),
                                        "--lr",
                                        number(lr),
                                        "--seed",
                                        std::to_string(seed),
                                        "--json",
                                        json,
                                        "--output",
                                        (scratch / "output").string(),
                                        "--rank",
                                        std::to_string(options.rank),
                                        "--alpha",
                                        number(options.alpha),
                                        "--dropout",
                                        number(options.dropout),
                                        "--lora-plus-ratio",
                                        number(options.lora_plus_ratio),
                                        "--schedule",
                                        lora::schedule_name(options.schedule),
                                        "--warmup",
                                        std::to_string(options.warmup),
                                        "--batch-size",
                                        std::to_string(options.batch_size),
                                        "--threads",
                                        std::to_string(options.threads),
                                        "--dtype",
                                        options.dtype,
                                        "--device",
                                        options.device};
  const auto add = [&](const std::string& flag, const std::string& value) {
    arguments.push_back(flag);
    arguments.push_back(value);
  };
  if (options.epochs) {
    add("--epochs", number(*options.epochs));
  } else {
    add("--steps", std::to_string(options.steps));
  }
  if (!options.data.empty()) {
    add("--data", options.data);
    add("--dev", options.dev);
  }
  arguments.emplace_back("--targets");
  arguments.insert(arguments.end(), options.targets.begin(), options.targets.end());
  const int exit_code = run_program(arguments, (scratch / "log").string());
  if (exit_code == kDivergedExit) return std::nullopt;
  if (exit_code != 0)
    throw std::runtime_error("a run of the comparison failed with exit code " + std::to_string(exit_code));
  std::ifstream file(json);
  return Json::parse(file);
}

}  // namespace compare_detail

/// LoRA, LoRA+ and full fine-tuning from the same base with equal steps. Each takes the lr of the grid that gives the
/// lowest mean dev loss over the seeds; a table shows the means at that lr.
inline void compare(const Options& options) {
  using namespace compare_detail;
  const auto base = ensure_base(options);
  const ScratchFolder scratch;
  std::cout << "Each method tries the learning rates";
  for (const auto lr : kLearningRates) std::cout << ' ' << lr;
  std::cout << " with the seeds " << options.seed << " to " << options.seed + kSeeds - 1
            << ", each run in a process of its own.\n";
  auto all_runs = Json::array();
  std::vector<std::vector<Json>> best_runs;
  for (const auto method : kMethods) {
    std::vector<Json> best;
    double best_loss = std::numeric_limits<double>::infinity();
    for (const auto lr : kLearningRates) {
      std::vector<Json> runs;
      std::cout << std::left << std::setw(6) << method_name(method) << "lr " << std::setw(7) << lr << "dev loss"
                << std::flush;
      for (auto seed = options.seed; seed < options.seed + kSeeds; ++seed) {
        const auto figures = run(options, base, method, lr, seed, scratch.path());
        std::cout << "  " << (figures ? fixed((*figures)["dev_loss_after"], 4) : "diverged") << std::flush;
        if (figures) {
          all_runs.push_back(*figures);
          runs.push_back(*figures);
        }
      }
      std::cout << '\n';
      if (runs.size() < kSeeds) continue;
      const auto loss = mean_of(runs, "dev_loss_after").value;
      if (loss < best_loss) {
        best_loss = loss;
        best = runs;
      }
    }
    if (best.empty()) throw std::runtime_error("every learning rate of the grid diverged with " + method_name(method));
    best_runs.push_back(best);
  }
  print_comparison(best_runs);
  if (!options.json.empty()) write_json(options.json, {{"runs", all_runs}});
}
