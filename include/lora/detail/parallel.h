#pragma once

#include <ATen/Parallel.h>
#include <lora/version.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// Calls task(0) … task(count − 1), each once, on up to at::get_num_threads() threads. A task must not throw.
///
/// Plain threads, because at::parallel_for is compiled into the user's code and runs serially there without -fopenmp.
template <class Task>
void parallel_tasks(int64_t count, const Task& task) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (auto i = next.fetch_add(1); i < count; i = next.fetch_add(1)) task(i);
  };
  const auto helpers = std::min<int64_t>(at::get_num_threads(), count) - 1;
  std::vector<std::thread> threads;
  try {
    for (int64_t i = 0; i < helpers; ++i) threads.emplace_back(work);
  } catch (const std::system_error&) {  // the system gives no more threads: those that there are do the work
  }
  work();
  for (auto& thread : threads) thread.join();
}

}  // namespace detail
LORA_NAMESPACE_END
