// The functions beside the products, each beside LibTorch's own.
#include <ATen/ATen.h>
#include <benchmark/benchmark.h>
#include <lora/lora.h>

#include <cstdint>

namespace functional_benchmark {
namespace {

void gelu(benchmark::State& state, bool ours, at::ScalarType dtype) {
  const auto x = at::randn({512, 3072}).to(dtype).requires_grad_(true), g = at::randn({512, 3072}).to(dtype);
  for (auto _ : state) {
    (ours ? lora::gelu(x, "tanh") : at::gelu(x, "tanh")).backward(g);
    x.mutable_grad() = at::Tensor();
  }
}
BENCHMARK_CAPTURE(gelu, libtorch_fp32, false, at::kFloat);
BENCHMARK_CAPTURE(gelu, ours_fp32, true, at::kFloat);
BENCHMARK_CAPTURE(gelu, libtorch_bf16, false, at::kBFloat16);
BENCHMARK_CAPTURE(gelu, ours_bf16, true, at::kBFloat16);

/// Causal attention of 12 heads of 64, by the tokens of each of 4 sequences.
void attention(benchmark::State& state, bool ours, at::ScalarType dtype) {
  const auto make = [&] { return at::randn({4, 12, state.range(0), 64}).to(dtype).requires_grad_(true); };
  const auto q = make(), k = make(), v = make(), g = make().detach();
  for (auto _ : state) {
    const auto y = ours ? lora::attention(q, k, v, /*is_causal=*/true)
                        : at::scaled_dot_product_attention(q, k, v, {}, 0.0, /*is_causal=*/true);
    y.backward(g);
    for (const auto& input : {q, k, v}) input.mutable_grad() = at::Tensor();
  }
}
BENCHMARK_CAPTURE(attention, libtorch_fp32, false, at::kFloat)->RangeMultiplier(4)->Range(16, 1024);
BENCHMARK_CAPTURE(attention, ours_fp32, true, at::kFloat)->RangeMultiplier(4)->Range(16, 1024);
BENCHMARK_CAPTURE(attention, libtorch_bf16, false, at::kBFloat16)->RangeMultiplier(4)->Range(16, 1024);
BENCHMARK_CAPTURE(attention, ours_bf16, true, at::kBFloat16)->RangeMultiplier(4)->Range(16, 1024);

/// The loss of 512 tokens over GPT-2's vocabulary, with the gradient of the hidden states.
void cross_entropy(benchmark::State& state, bool ours, at::ScalarType dtype) {
  const auto hidden = at::randn({512, 768}).to(dtype).requires_grad_(true), head = at::randn({50257, 768}).to(dtype);
  const auto labels = at::randint(50257, {512});
  for (auto _ : state) {
    const auto loss = ours ? lora::linear_cross_entropy(hidden, head, labels)
                           : at::cross_entropy_loss(at::linear(hidden, head), labels);
    loss.backward();
    hidden.mutable_grad() = at::Tensor();
  }
}
BENCHMARK_CAPTURE(cross_entropy, libtorch_fp32, false, at::kFloat)->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(cross_entropy, ours_fp32, true, at::kFloat)->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(cross_entropy, libtorch_bf16, false, at::kBFloat16)->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(cross_entropy, ours_bf16, true, at::kBFloat16)->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace functional_benchmark
