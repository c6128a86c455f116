// Where the time of a piece of work goes: the seconds of each operator of LibTorch, without those that it calls.
#pragma once

#include <ATen/record_function.h>

#include <chrono>
#include <map>
#include <memory>
#include <string>
#include <vector>

/// Adds up the operators of this thread while it lives; a backward runs on the calling thread.
class OperatorTimes {
 public:
  OperatorTimes() {
    current() = this;
    handle_ = at::addThreadLocalCallback(at::RecordFunctionCallback(&start, &end));
    begin_ = Clock::now();
  }
  ~OperatorTimes() {
    at::removeCallback(handle_);
    current() = nullptr;
  }
  OperatorTimes(const OperatorTimes&) = delete;
  OperatorTimes& operator=(const OperatorTimes&) = delete;

  /// By name; "outside of operators" is the rest.
  std::map<std::string, double> seconds() const {
    auto result = seconds_;
    double all = std::chrono::duration<double>(Clock::now() - begin_).count();
    for (const auto& [name, seconds] : seconds_) all -= seconds;
    result["outside of operators"] = all;
    return result;
  }

 private:
  using Clock = std::chrono::steady_clock;
  struct Call {
    Clock::time_point start;
    double inner = 0;
  };

  static OperatorTimes*& current() {
    static thread_local OperatorTimes* times = nullptr;
    return times;
  }
  static std::unique_ptr<at::ObserverContext> start(const at::RecordFunction&) {
    if (current() != nullptr) current()->calls_.push_back({Clock::now()});
    return nullptr;
  }
  static void end(const at::RecordFunction& function, at::ObserverContext*) {
    auto* const times = current();
    if (times == nullptr || times->calls_.empty()) return;
    const auto call = times->calls_.back();
    times->calls_.pop_back();
    const auto seconds = std::chrono::duration<double>(Clock::now() - call.start).count();
    times->seconds_[function.name()] += seconds - call.inner;
    if (!times->calls_.empty()) times->calls_.back().inner += seconds;
  }

  at::CallbackHandle handle_ = 0;
  Clock::time_point begin_;
  std::vector<Call> calls_;
  std::map<std::string, double> seconds_;
};
