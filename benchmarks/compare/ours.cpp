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
#include <tuple>

#include "adapter_cases.h"   // defines: merge, merge_square, load, merged_forward, carrier
#include "measure.h"         // defines: seconds_of
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

/// The best rate of any product here, and that of a copy into memory that is there.
Json limits(const Arguments& arguments) {
  const at::NoGradGuard no_grad;
  double best = 0;
  for (const auto& [rows, in, out] :
       {std::tuple{512, 768, 3072}, std::tuple{512, 3072, 768}, std::tuple{512, 768, 768}}) {
    const auto x = at::randn({rows, in}).to(arguments.scalar_type());
    const auto W = at::randn({in, out}).to(arguments.scalar_type());
    for (const auto kernel : {lora::ProductKernel::kAten, lora::ProductKernel::kOneDnn}) {
      for (const auto& V : {W, W.t().contiguous().t()}) {
        for (int repeat = 0; repeat < 20; ++repeat) {
          const auto seconds = seconds_of([&] { lora::detail::multiply(kernel, x, V); });
          best = std::max(best, 2.0 * rows * in * out / seconds);
        }
      }
    }
  }
  const auto from = at::randn({32, 1024, 1024}), to = at::empty_like(from);
  double copy = 0;
  for (int repeat = 0; repeat < 10; ++repeat) {
    const auto seconds = seconds_of([&] { to.copy_(from); });
    copy = std::max(copy, 2.0 * static_cast<double>(from.nbytes()) / seconds);
  }
  return {{"flops_per_second", best}, {"copy_bytes_per_second", copy}, {"processor", lora::ProductPlan::processor()}};
}

}  // namespace

int main(int argc, char** argv) {
  const std::map<std::string, Json (*)(const Arguments&)> cases{{"train", train},
                                                                {"profile", profile},
                                                                {"e2e", e2e},
                                                                {"growth", growth},
                                                                {"merge", merge},
                                                                {"load", load},
                                                                {"carrier", carrier},
                                                                {"merge_square", merge_square},
                                                                {"start", start},
                                                                {"limits", limits},
                                                                {"merged_forward", merged_forward}};
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
