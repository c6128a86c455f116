#pragma once

#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <lora/version.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

LORA_NAMESPACE_BEGIN
namespace detail {

/// Calls task(0) … task(count − 1), each once, on up to at::get_num_threads() threads. A task must not throw.
///
/// The threads are those of LibTorch's own operators, lent by a TensorIterator over an element for each of them:
/// at::parallel_for is compiled into the user's code and runs serially there without -fopenmp, and threads of our own
/// would fight with LibTorch's, which spin for a while after each operator.
template <class Task>
void parallel_tasks(int64_t count, const Task& task) {
  const auto threads = std::min<int64_t>(at::get_num_threads(), count);
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (auto i = next.fetch_add(1); i < count; i = next.fetch_add(1)) task(i);
  };
  if (threads <= 1 || at::in_parallel_region()) return work();
  auto elements = at::empty({threads}, at::TensorOptions(at::kByte).device(at::kCPU));
  auto iterator = at::TensorIterator::unary_op(elements, elements);
  iterator.for_each([&](char**, const int64_t*, int64_t, int64_t) { work(); }, /*grain_size=*/1);
}

}  // namespace detail
LORA_NAMESPACE_END
