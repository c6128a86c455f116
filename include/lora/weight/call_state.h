#pragma once

#include <c10/util/Exception.h>
#include <lora/version.h>
#include <lora/weight/product_plan.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// What the kernels of one model's adapted weights share while they run. It hangs on the weights, not on a global, so
/// that several libraries in one process see the same state.
class CallState {
 public:
  /// Marks a running kernel.
  class Running {
   public:
    explicit Running(CallState& calls) : calls_(calls) { calls_.running_.fetch_add(1, std::memory_order_relaxed); }
    ~Running() { calls_.running_.fetch_sub(1, std::memory_order_release); }
    Running(const Running&) = delete;
    Running& operator=(const Running&) = delete;

   private:
    CallState& calls_;
  };

  bool running() const { return running_.load(std::memory_order_acquire) != 0; }

  /// Turns the adapters off for the calling thread; calls nest.
  void disable() {
    const std::lock_guard<std::mutex> lock(mutex_);
    disabled_threads_.push_back(std::this_thread::get_id());
    disabled_.store(disabled_threads_.size(), std::memory_order_relaxed);
  }

  /// Takes back one disable() of the calling thread.
  void enable() {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto position = std::find(disabled_threads_.begin(), disabled_threads_.end(), std::this_thread::get_id());
    if (position != disabled_threads_.end()) disabled_threads_.erase(position);
    disabled_.store(disabled_threads_.size(), std::memory_order_relaxed);
  }

  /// Whether the adapters are off for the calling thread.
  bool disabled() const {
    if (disabled_.load(std::memory_order_relaxed) == 0) return false;
    const std::lock_guard<std::mutex> lock(mutex_);
    return std::find(disabled_threads_.begin(), disabled_threads_.end(), std::this_thread::get_id()) !=
           disabled_threads_.end();
  }

  bool disabled_anywhere() const { return disabled_.load(std::memory_order_relaxed) != 0; }

  /// Counts a call of an operator that formed a dense weight; tells it once an operator.
  void count_fallback(const std::string& operator_name) {
    bool first = false;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      first = ++fallbacks_[operator_name] == 1;
    }
    if (first) {
      TORCH_WARN("[lora::weight] ", operator_name,
                 " has no low-rank kernel: it works on the dense W0 + dW, which is right but slower. Told once.");
    }
  }

  /// The plan that products with frozen weights go by; null: every product is ATen's.
  const std::shared_ptr<ProductPlan>& plan() const { return plan_; }
  void set_plan(std::shared_ptr<ProductPlan> plan) { plan_ = std::move(plan); }

  void add_fallbacks(const std::map<std::string, int64_t>& counts) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [operator_name, count] : counts) fallbacks_[operator_name] += count;
  }

  std::map<std::string, int64_t> fallbacks() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return fallbacks_;
  }

 private:
  std::atomic<int64_t> running_{0};
  std::atomic<size_t> disabled_{0};
  mutable std::mutex mutex_;
  std::vector<std::thread::id> disabled_threads_;
  std::map<std::string, int64_t> fallbacks_;
  std::shared_ptr<ProductPlan> plan_;
};

}  // namespace detail
LORA_NAMESPACE_END
