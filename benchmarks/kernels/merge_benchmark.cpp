// Merging beside the copies that it is measured by: W0 read and W′ written once.
#include <ATen/ATen.h>
#include <benchmark/benchmark.h>
#include <lora/lora.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/linear.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "streamed_copy.h"  // defines: StreamedCopy

namespace merge_benchmark {
namespace {

using Matrices = std::vector<std::pair<int64_t, int64_t>>;

/// GPT-2 124M's c_attn and attn.c_proj, 113 MB in float32; or one large weight.
Matrices matrices(int64_t which) {
  if (which != 0) return {{4096, 4096}};
  Matrices gpt2;
  for (int layer = 0; layer < 12; ++layer) {
    gpt2.emplace_back(2304, 768);
    gpt2.emplace_back(768, 768);
  }
  return gpt2;
}

torch::nn::Sequential layers(int64_t which, at::ScalarType dtype) {
  torch::nn::Sequential model;
  for (const auto& [out, in] : matrices(which)) {
    model->push_back(torch::nn::Linear(torch::nn::LinearOptions(in, out).bias(false)));
  }
  model->to(dtype);
  return model;
}

std::vector<at::Tensor> weights(int64_t which, at::ScalarType dtype) {
  std::vector<at::Tensor> tensors;
  for (const auto& parameter : layers(which, dtype)->parameters()) tensors.push_back(parameter.detach());
  return tensors;
}

void set_rate(benchmark::State& state, const std::vector<at::Tensor>& tensors) {
  double bytes = 0;
  for (const auto& tensor : tensors) bytes += 2 * static_cast<double>(tensor.nbytes());
  state.counters["bytes/s"] = benchmark::Counter(bytes, benchmark::Counter::kIsIterationInvariantRate);
}

lora::Adapters adapters_in(torch::nn::Sequential model, int64_t rank) {
  return lora::inject(*model, lora::LoraConfig().r(rank).target_modules("all-linear"));
}

/// Merging after unmerging: W′ is in memory that it had before.
void merge_again(benchmark::State& state, at::ScalarType dtype, int64_t rank) {
  auto model = layers(state.range(0), dtype);
  auto adapters = adapters_in(model, rank);
  adapters.merge();
  for (auto _ : state) {
    state.PauseTiming();
    adapters.unmerge();
    state.ResumeTiming();
    adapters.merge();
  }
  set_rate(state, weights(state.range(0), dtype));
}

/// The first merge of a model, for whose W′ the system has to map and clear memory.
void merge_first(benchmark::State& state, at::ScalarType dtype, int64_t rank) {
  for (auto _ : state) {
    state.PauseTiming();
    {
      auto model = layers(state.range(0), dtype);
      auto adapters = adapters_in(model, rank);
      state.ResumeTiming();
      adapters.merge();
      state.PauseTiming();
    }
    state.ResumeTiming();
  }
  set_rate(state, weights(state.range(0), dtype));
}

/// The limit of merge_again by LibTorch's copy.
void copy_again(benchmark::State& state, at::ScalarType dtype) {
  const auto from = weights(state.range(0), dtype), to = weights(state.range(0), dtype);
  for (auto _ : state) {
    for (size_t i = 0; i < from.size(); ++i) to[i].copy_(from[i]);
  }
  set_rate(state, from);
}

/// The limit of merge_again by copying past the caches.
void stream_again(benchmark::State& state, at::ScalarType dtype) {
  const auto from = weights(state.range(0), dtype);
  const StreamedCopy copy(from);
  for (auto _ : state) copy.run();
  set_rate(state, from);
}

/// LibTorch's copies into fresh memory.
void copy_first(benchmark::State& state, at::ScalarType dtype) {
  const auto from = weights(state.range(0), dtype);
  for (auto _ : state) {
    std::vector<at::Tensor> to;
    for (const auto& tensor : from) to.push_back(tensor.clone());
  }
  set_rate(state, from);
}

void models(benchmark::internal::Benchmark* benchmark) {
  benchmark->ArgName("large")->Arg(0)->Arg(1)->Unit(benchmark::kMillisecond)->UseRealTime();
}

BENCHMARK_CAPTURE(stream_again, fp32, at::kFloat)->Apply(models);
BENCHMARK_CAPTURE(copy_again, fp32, at::kFloat)->Apply(models);
BENCHMARK_CAPTURE(merge_again, fp32_r8, at::kFloat, 8)->Apply(models);
BENCHMARK_CAPTURE(merge_again, fp32_r64, at::kFloat, 64)->Apply(models);
BENCHMARK_CAPTURE(copy_first, fp32, at::kFloat)->Apply(models);
BENCHMARK_CAPTURE(merge_first, fp32_r8, at::kFloat, 8)->Apply(models)->Iterations(10);
BENCHMARK_CAPTURE(stream_again, bf16, at::kBFloat16)->Apply(models);
BENCHMARK_CAPTURE(copy_again, bf16, at::kBFloat16)->Apply(models);
BENCHMARK_CAPTURE(merge_again, bf16_r8, at::kBFloat16, 8)->Apply(models);
BENCHMARK_CAPTURE(merge_again, half_r8, at::kHalf, 8)->Apply(models);
BENCHMARK_CAPTURE(copy_first, bf16, at::kBFloat16)->Apply(models);
BENCHMARK_CAPTURE(merge_first, bf16_r8, at::kBFloat16, 8)->Apply(models)->Iterations(10);

}  // namespace
}  // namespace merge_benchmark
