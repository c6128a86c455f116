// This library's side of the comparison: `compare_ours CASE --inputs FOLDER --threads N …` prints one line of JSON.
// Each case does what the case of the same name in peers.py does, on the same files.
#include <ATen/Parallel.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <exception>
#include <iostream>
#include <map>
#include <string>

#include "adapter_cases.h"   // defines: merge, merge_square, load, merged_forward, carrier
#include "limit_cases.h"     // defines: limits, products
#include "method_cases.h"    // defines: methods
#include "setup.h"           // defines: Arguments, Json, load_adapted
#include "training_cases.h"  // defines: train, profile, e2e, growth

namespace {

Json start(const Arguments& arguments) {
  auto adapted = load_adapted(arguments);
  const auto optimizer = make_optimizer(adapted.adapters);
  adapted.model->train();
  batch_of(arguments);
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  return {{"clock", std::chrono::duration<double>(now).count()}};
}

}  // namespace

int main(int argc, char** argv) {
  const std::map<std::string, Json (*)(const Arguments&)> cases{
      {"train", train},    {"profile", profile}, {"e2e", e2e},           {"growth", growth},
      {"merge", merge},    {"load", load},       {"carrier", carrier},   {"merge_square", merge_square},
      {"start", start},    {"limits", limits},   {"products", products}, {"merged_forward", merged_forward},
      {"methods", methods}};
  Arguments arguments;
  std::string name;
  CLI::App app("One case of the comparison with Python PEFT.");
  app.add_option("case", name)->required()->check(CLI::IsMember(cases));
  app.add_option("--inputs", arguments.inputs, "Folder of make_inputs.py");
  app.add_option("--dtype", arguments.dtype)->check(CLI::IsMember({"float32", "bfloat16"}));
  app.add_option("--threads", arguments.threads);
  app.add_option("--steps", arguments.steps);
  app.add_flag("--full-logits", arguments.full_logits, "The model's logits and LibTorch's loss");
  app.add_flag("--plain", arguments.plain, "Without lora::FastOperators and lora::keep_freed_memory");
  app.add_flag("--lines-apart", arguments.lines_apart, "Compute a prompt again for each line of E2E that has it");
  app.add_flag("--recompute", arguments.recompute, "Recompute the blocks' activations");
  CLI11_PARSE(app, argc, argv);
  try {
    at::set_num_threads(arguments.threads);
    std::cout << cases.at(name)(arguments).dump() << '\n';
  } catch (const std::exception& error) {
    std::cerr << "compare_ours: " << error.what() << '\n';
    return 2;
  }
}
