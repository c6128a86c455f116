#pragma once

#include <chrono>
#include <cstddef>
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
#include "finetune/comparison.h"        // defines: Comparison
#include "finetune/comparison_table.h"  // defines: mean_of, MethodRuns
#include "finetune/figures.h"           // defines: write_json
#include "finetune/options.h"           // defines: Options, Method
#include "finetune/report.h"            // defines: fixed

/// Exit code of a run whose loss is not finite.
constexpr int kDivergedExit = 3;

namespace compare_detail {

using Json = nlohmann::ordered_json;

inline std::string number(double value) {
  std::ostringstream text;
  text << std::setprecision(17) << value;
  return text.str();
}

/// The flags of one run; of those that not every method has it gets what was given.
inline std::vector<std::string> arguments_of(const Options& options, const std::string& base, const Method& method,
                                             double lr, std::uint64_t seed) {
  std::vector<std::string> arguments;
  const auto add = [&](const std::string& flag, const std::string& value) {
    arguments.push_back(flag);
    arguments.push_back(value);
  };
  add("--model", base);
  add("--method", method.name);
  add("--lr", number(lr));
  add("--seed", std::to_string(seed));
  add("--schedule", lora::schedule_name(options.schedule));
  add("--warmup", std::to_string(options.warmup));
  add("--batch-size", std::to_string(options.batch_size));
  add("--evaluations", std::to_string(options.evaluations));
  add("--threads", std::to_string(options.threads));
  add("--dtype", options.dtype);
  add("--device", options.device);
  if (options.epochs) {
    add("--epochs", number(*options.epochs));
  } else {
    add("--steps", std::to_string(options.steps));
  }
  if (!options.data.empty()) {
    add("--data", options.data);
    add("--dev", options.dev);
  }
  if (options.dev_pairs > 0) add("--dev-pairs", std::to_string(options.dev_pairs));
  for (const auto& flag : method.flags) {
    const auto given = options.given.find(flag);
    if (given == options.given.end()) continue;
    arguments.push_back(flag);
    arguments.insert(arguments.end(), given->second.begin(), given->second.end());
  }
  return arguments;
}

/// One fine-tuning in a process of its own, so that its peak memory is its own; null where it diverged.
inline std::optional<Json> run(std::vector<std::string> arguments, const std::filesystem::path& scratch) {
  const auto json = (scratch / "figures.json").string();
  for (const auto& word : {std::string("--json"), json, std::string("--output"), (scratch / "output").string()}) {
    arguments.push_back(word);
  }
  const int exit_code = run_program(arguments, (scratch / "log").string());
  if (exit_code == kDivergedExit) return std::nullopt;
  if (exit_code != 0)
    throw std::runtime_error("a run of the comparison failed with exit code " + std::to_string(exit_code));
  std::ifstream file(json);
  return Json::parse(file);
}

/// How much time the runs that are left will take, as those so far did.
class TimeLeft {
 public:
  explicit TimeLeft(std::size_t runs) : runs_(runs) {}

  std::string after_another_run() {
    ++done_;
    const auto seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count();
    const auto left = seconds / static_cast<double>(done_) * static_cast<double>(runs_ - done_);
    return std::to_string(done_) + "/" + std::to_string(runs_) + " runs, " + fixed(left, 0) + " s left";
  }

 private:
  std::size_t runs_, done_ = 0;
  std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

}  // namespace compare_detail

/// Each method from the same base with equal steps and data. It takes the lr of the grid that gives the lowest mean dev
/// loss over the seeds; `print` shows its runs at that lr, method by method.
inline void compare(const Options& options, const Comparison& comparison,
                    void (*print)(const std::vector<MethodRuns>& methods)) {
  using namespace compare_detail;
  const auto base = ensure_base(options);
  const ScratchFolder scratch;
  const auto& rates = comparison.learning_rates;
  const auto seeds = comparison.seeds;
  std::cout << "Each method tries the learning rates";
  for (const auto lr : rates) std::cout << ' ' << lr;
  std::cout << " with the seed" << (seeds == 1 ? " " : "s ") << options.seed;
  if (seeds > 1) std::cout << " to " << options.seed + seeds - 1;
  std::cout << ", each run in a process of its own.\n";
  auto all_runs = Json::array();
  std::vector<MethodRuns> best_runs;
  TimeLeft time_left(comparison.methods.size() * rates.size() * seeds);
  for (const auto* method : comparison.methods) {
    MethodRuns best;
    double best_loss = std::numeric_limits<double>::infinity();
    for (const auto lr : rates) {
      MethodRuns runs;
      std::string so_far;
      std::cout << std::left << std::setw(11) << method->name << "lr " << std::setw(7) << lr << "dev loss"
                << std::flush;
      for (auto seed = options.seed; seed < options.seed + seeds; ++seed) {
        const auto figures = run(arguments_of(options, base, *method, lr, seed), scratch.path());
        so_far = time_left.after_another_run();
        std::cout << "  " << (figures ? fixed((*figures)["dev_loss_after"], 4) : "diverged") << std::flush;
        if (figures) {
          all_runs.push_back(*figures);
          runs.push_back(*figures);
        }
      }
      std::cout << "   " << so_far << '\n';
      if (runs.size() < seeds) continue;
      const auto loss = mean_of(runs, "dev_loss_after").value;
      if (loss < best_loss) {
        best_loss = loss;
        best = runs;
      }
    }
    if (best.empty()) throw std::runtime_error("every learning rate of the grid diverged with " + method->name);
    best_runs.push_back(best);
  }
  print(best_runs);
  if (!options.json.empty()) write_json(options.json, {{"runs", all_runs}});
}
