#pragma once

#include <ATen/Context.h>
#include <ATen/autocast_mode.h>
#include <lora/inject/hosts/script_object.h>
#include <lora/version.h>
#include <lora/weight/host.h>
#include <torch/csrc/jit/api/function_impl.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/runtime/graph_executor.h>

#include <cstddef>
#include <exception>
#include <set>
#include <utility>

LORA_NAMESPACE_BEGIN
namespace detail {

/// Keeps TorchScript's executor from optimising while there are carriers in a script model.
///
/// After its profiling runs the executor builds autodiff subgraphs from the slots' requires_grad, on every thread at
/// once, and the adapters would get no gradient from then on, silently. The number of profiling runs is the one switch
/// that holds for all threads and works for models that have run; the plans that exist are thrown away on both ends.
/// Each session raises it by the same amount and takes that back, so that the sessions of several models, and of
/// several libraries in one process, need no common state. A plan that any model makes for its first run meanwhile is
/// not optimised, not even later: right, but slower.
class ScriptSession final : public CarrierSession {
 public:
  explicit ScriptSession(const torch::jit::Module& root) : root_(root) {}
  ~ScriptSession() override { end(); }
  ScriptSession(const ScriptSession&) = delete;
  ScriptSession& operator=(const ScriptSession&) = delete;

  void begin() override {
    if (running_) return;
    torch::jit::getNumProfiledRuns() += kNeverOptimise;
    try {
      flush(root_.module());
    } catch (...) {
      torch::jit::getNumProfiledRuns() -= kNeverOptimise;
      throw;
    }
    running_ = true;
  }

  void end() override {
    if (!running_) return;
    running_ = false;
    torch::jit::getNumProfiledRuns() -= kNeverOptimise;
    try {
      if (root_.alive()) flush(root_.module());
    } catch (const std::exception& error) {
      TORCH_WARN("[lora::adapters] found TorchScript's plans not to be thrown away: the model runs on, not optimised: ",
                 error.what());
    }
  }

  void hold(const std::set<const void*>& alive) override { root_.hold(alive); }
  void let_go() override { root_.let_go(); }

 private:
  static constexpr size_t kNeverOptimise = size_t{1} << 40;

  /// Switches autocast for a scope: a function keeps one executor for each state of it.
  class Autocast {
   public:
    explicit Autocast(at::DeviceType device) : device_(device), before_(at::autocast::is_autocast_enabled(device)) {}
    ~Autocast() { set(before_); }
    Autocast(const Autocast&) = delete;
    Autocast& operator=(const Autocast&) = delete;
    void set(bool enabled) { at::autocast::set_autocast_enabled(device_, enabled); }

   private:
    at::DeviceType device_;
    bool before_;
  };

  static void flush(const torch::jit::Module& root) {
    Autocast cpu(at::kCPU), cuda(at::kCUDA);
    for (const bool on_cpu : {false, true}) {
      for (const bool on_cuda : {false, true}) {
        if (on_cuda && !at::hasCUDA()) continue;
        cpu.set(on_cpu);
        cuda.set(on_cuda);
        flush_present(root);
      }
    }
  }

  static void flush_present(const torch::jit::Module& root) {
    for (const auto& module : root.modules()) {
      for (const auto& method : module.get_methods()) {
        if (!method.function().isGraphFunction()) continue;
        auto& function = torch::jit::toGraphFunction(method.function());
        if (function.graph()->outputs().size() == 1) function.get_executor().debugFlushCompilationCache();
      }
    }
  }

  ScriptObject root_;
  bool running_ = false;
};

}  // namespace detail
LORA_NAMESPACE_END
