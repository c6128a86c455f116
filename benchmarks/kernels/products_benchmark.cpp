// The products of adapted layers: each kernel for the shapes of GPT-2 124M, and what an adapter adds.
#include <ATen/ATen.h>
#include <benchmark/benchmark.h>
#include <lora/lora.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/linear.h>

#include <cstdint>

namespace products_benchmark {
namespace {

void set_rate(benchmark::State& state, double flops) {
  state.counters["FLOP/s"] = benchmark::Counter(flops, benchmark::Counter::kIsIterationInvariantRate);
}

/// x [rows, in] · V [in, out], V in memory as [out, in].
void frozen_product(benchmark::State& state, lora::ProductKernel kernel, at::ScalarType dtype) {
  const at::NoGradGuard no_grad;
  const auto rows = state.range(0), in = state.range(1), out = state.range(2);
  const auto x = at::randn({rows, in}).to(dtype), W = at::randn({out, in}).to(dtype);
  for (auto _ : state) benchmark::DoNotOptimize(lora::detail::multiply(kernel, x, W.t()));
  set_rate(state, 2.0 * static_cast<double>(rows * in * out));
}

void shapes(benchmark::internal::Benchmark* benchmark) {
  for (const int64_t rows : {1, 16, 512}) {
    benchmark->Args({rows, 768, 2304});
    benchmark->Args({rows, 3072, 768});
  }
  benchmark->Args({128, 768, 50257});
}

BENCHMARK_CAPTURE(frozen_product, aten_fp32, lora::ProductKernel::kAten, at::kFloat)->Apply(shapes);
BENCHMARK_CAPTURE(frozen_product, onednn_fp32, lora::ProductKernel::kOneDnn, at::kFloat)->Apply(shapes);
BENCHMARK_CAPTURE(frozen_product, aten_bf16, lora::ProductKernel::kAten, at::kBFloat16)->Apply(shapes);
BENCHMARK_CAPTURE(frozen_product, onednn_bf16, lora::ProductKernel::kOneDnn, at::kBFloat16)->Apply(shapes);

/// A layer with a LoRA of the given rank, 0: none.
struct Layer {
  Layer(int64_t in, int64_t out, int64_t rank, bool accelerated, double dropout = 0) {
    model->push_back(torch::nn::Linear(in, out));
    for (auto& parameter : model->parameters()) parameter.set_requires_grad(false);
    if (rank > 0) {
      const auto config = lora::LoraConfig().r(rank).lora_dropout(dropout).target_modules({"0"});
      lora::inject(*model, config, "default", lora::InjectOptions().accelerate(accelerated));
    } else if (accelerated) {
      lora::accelerate(*model);
    }
  }
  torch::nn::Sequential model;
};

/// Forward and backward of 512 tokens through 768 × 2304, by the rank.
void training(benchmark::State& state, bool accelerated, double dropout) {
  Layer layer(768, 2304, state.range(0), accelerated, dropout);
  const auto x = at::randn({512, 768}).requires_grad_(true), g = at::randn({512, 2304});
  for (auto _ : state) {
    layer.model->forward(x).backward(g);
    x.mutable_grad() = at::Tensor();
  }
}
BENCHMARK_CAPTURE(training, aten, false, 0.0)->Arg(0)->Arg(1)->Arg(8)->Arg(64)->Arg(256);
BENCHMARK_CAPTURE(training, accelerated, true, 0.0)->Arg(0)->Arg(1)->Arg(8)->Arg(64)->Arg(256);
BENCHMARK_CAPTURE(training, accelerated_with_dropout, true, 0.1)->Arg(8);

/// One row through 64 × 64: what the carrier and the adapter cost beside the product.
void one_row(benchmark::State& state, int64_t rank, bool active) {
  const at::NoGradGuard no_grad;
  Layer layer(64, 64, rank, rank > 0);
  if (rank > 0 && !active) lora::adapters_of(*layer.model).set_active({});
  const auto weight = layer.model[0]->as<torch::nn::Linear>()->weight;
  const auto x = at::randn({1, 64});
  for (auto _ : state) benchmark::DoNotOptimize(at::linear(x, weight));
}
BENCHMARK_CAPTURE(one_row, plain, 0, false);
BENCHMARK_CAPTURE(one_row, carrier_without_active_adapter, 8, false);
BENCHMARK_CAPTURE(one_row, lora_of_rank_8, 8, true);

}  // namespace
}  // namespace products_benchmark
