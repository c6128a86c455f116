#pragma once

#include <ATen/autocast_mode.h>
#include <lora/version.h>
#include <torch/csrc/jit/api/function_impl.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/runtime/graph_executor.h>

#include <cstddef>
#include <mutex>
#include <utility>

LORA_NAMESPACE_BEGIN
namespace detail {

/// Keeps TorchScript's executor from optimising while a script model has adapters.
///
/// After its profiling runs the executor builds autodiff subgraphs from the slots' requires_grad, on every thread at
/// once, and the adapters would get no gradient from then on, silently. The number of profiling runs is the one switch
/// that holds for all threads and works for models that have run; the plans that exist are thrown away on both ends.
class ScriptSession {
 public:
  explicit ScriptSession(const torch::jit::Module& root) : root_(root._ivalue()) {
    const std::lock_guard<std::mutex> lock(shared().mutex);
    if (shared().sessions++ == 0) {
      shared().profiled_runs = torch::jit::getNumProfiledRuns().exchange(kNeverOptimise);
    }
    flush(root);
  }

  ~ScriptSession() {
    const std::lock_guard<std::mutex> lock(shared().mutex);
    if (--shared().sessions == 0) torch::jit::getNumProfiledRuns() = shared().profiled_runs;
    if (auto root = root_.lock()) flush(torch::jit::Module(std::move(root)));
  }

  ScriptSession(const ScriptSession&) = delete;
  ScriptSession& operator=(const ScriptSession&) = delete;

 private:
  struct Shared {
    std::mutex mutex;
    size_t sessions = 0;
    size_t profiled_runs = 0;
  };

  static constexpr size_t kNeverOptimise = size_t{1} << 40;

  static Shared& shared() {
    static Shared shared;
    return shared;
  }

  static void flush(const torch::jit::Module& root) {
    // A function keeps one executor with and one without autocast.
    const bool autocast = at::autocast::is_autocast_enabled(at::kCPU);
    for (const bool enabled : {!autocast, autocast}) {
      at::autocast::set_autocast_enabled(at::kCPU, enabled);
      for (const auto& module : root.modules()) {
        for (const auto& method : module.get_methods()) {
          if (!method.function().isGraphFunction()) continue;
          auto& function = torch::jit::toGraphFunction(method.function());
          if (function.graph()->outputs().size() == 1) function.get_executor().debugFlushCompilationCache();
        }
      }
    }
  }

  c10::weak_intrusive_ptr<c10::ivalue::Object> root_;
};

}  // namespace detail
LORA_NAMESPACE_END
