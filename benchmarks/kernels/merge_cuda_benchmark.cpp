// Merging on a CUDA device beside the copy that it cannot be faster than: reading W0 and writing W′ once. Without a
// device there is nothing to measure and nothing is listed.
#include <ATen/ATen.h>
#include <benchmark/benchmark.h>
#include <lora/cuda/merge.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace merge_cuda_benchmark {
namespace {

using lora::cuda::MergeKernel;
using lora::detail::MergeJob;

/// `count` layers of one shape with an update each, factors in the dtype of the base.
std::vector<std::unique_ptr<MergeJob>> layers(const benchmark::State& state, at::ScalarType dtype) {
  const auto rows = state.range(1), columns = state.range(2), rank = state.range(3);
  const auto options = at::TensorOptions(dtype).device(at::kCUDA);
  std::vector<std::unique_ptr<MergeJob>> jobs;
  for (int64_t i = 0; i < state.range(0); ++i) {
    jobs.push_back(std::make_unique<MergeJob>());
    jobs.back()->path = std::to_string(i);
    jobs.back()->base = at::randn({rows, columns}, options);
    jobs.back()->updates.emplace_back(
        0, lora::LowRank{at::randn({rank, columns}, options), at::randn({rows, rank}, options), 0.01});
  }
  return jobs;
}

void set_rate(benchmark::State& state, at::ScalarType dtype) {
  const auto bytes = 2 * state.range(0) * state.range(1) * state.range(2) * static_cast<int64_t>(elementSize(dtype));
  state.counters["bytes/s"] =
      benchmark::Counter(static_cast<double>(bytes), benchmark::Counter::kIsIterationInvariantRate);
}

/// Waits for the device.
void finish(const at::Tensor& tensor) { benchmark::DoNotOptimize(tensor[0][0].item<double>()); }

void copy_on_device(benchmark::State& state, at::ScalarType dtype) {
  const auto jobs = layers(state, dtype);
  for (const auto& job : jobs) job->merged = job->base.clone();
  finish(jobs.back()->merged);
  for (auto _ : state) {
    for (const auto& job : jobs) job->merged.copy_(job->base);
    finish(jobs.back()->merged);
  }
  set_rate(state, dtype);
}

void merge_on_device(benchmark::State& state, at::ScalarType dtype, MergeKernel kernel) {
  auto jobs = layers(state, dtype);
  lora::cuda::set_merge_kernel(kernel);
  lora::detail::merge_weights(jobs);  // the first one loads the kernels and takes the memory
  for (auto _ : state) lora::detail::merge_weights(jobs);
  set_rate(state, dtype);
}

// Layers, rows, columns and rank: GPT-2's, then large ones up to ranks at which products set the time.
void shapes(benchmark::internal::Benchmark* benchmark) {
  benchmark->Args({12, 2304, 768, 8})->UseRealTime()->Unit(benchmark::kMicrosecond);
  for (const int64_t rank : {8, 16, 64, 128, 256}) benchmark->Args({32, 4096, 4096, rank});
}

[[maybe_unused]] const bool registered = [] {
  if (!at::globalContext().hasCUDA()) return false;
  const auto add = [](const std::string& name, auto run) { shapes(benchmark::RegisterBenchmark(name.c_str(), run)); };
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const std::string name = c10::toString(dtype);
    add("copy_on_device/" + name, [dtype](benchmark::State& state) { copy_on_device(state, dtype); });
    add("merge_on_device/" + name,
        [dtype](benchmark::State& state) { merge_on_device(state, dtype, MergeKernel::kOnePass); });
    add("merge_on_device_by_cublas/" + name,
        [dtype](benchmark::State& state) { merge_on_device(state, dtype, MergeKernel::kCublas); });
  }
  return true;
}();

}  // namespace
}  // namespace merge_cuda_benchmark
