// What the machine allows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <tuple>
#include <utility>
#include <vector>

#include "measure.h"      // defines: seconds_of
#include "models/gpt2.h"  // defines: GPT2Config
#include "setup.h"        // defines: Arguments, Json

/// The best rate of any product here, and that of a copy into memory that is there.
inline Json limits(const Arguments& arguments) {
  const at::NoGradGuard no_grad;
  double best = 0;
  for (const auto& [rows, in, out] :
       {std::tuple{512, 768, 3072}, std::tuple{512, 3072, 768}, std::tuple{512, 768, 768}}) {
    const auto x = at::randn({rows, in}).to(arguments.scalar_type());
    const auto W = at::randn({in, out}).to(arguments.scalar_type());
    for (const auto kernel : {lora::ProductKernel::kAten, lora::ProductKernel::kOneDnn}) {
      for (const auto& V : {W, W.t().contiguous().t()}) {
        for (int repeat = 0; repeat < 20; ++repeat) {
          const auto seconds = seconds_of([&] { lora::detail::multiply(kernel, x, V); });
          best = std::max(best, 2.0 * rows * in * out / seconds);
        }
      }
    }
  }
  const auto from = at::randn({32, 1024, 1024}), to = at::empty_like(from);
  double copy = 0;
  for (int repeat = 0; repeat < 10; ++repeat) {
    const auto seconds = seconds_of([&] { to.copy_(from); });
    copy = std::max(copy, 2.0 * static_cast<double>(from.nbytes()) / seconds);
  }
  return {{"flops_per_second", best}, {"copy_bytes_per_second", copy}, {"processor", lora::ProductPlan::processor()}};
}

/// The rate of the products of a step with the frozen weights of GPT-2 124M and of nothing else: every weight is read
/// from memory, and every result of the forward stays, as in a step. As large as a step's share of the limit can be.
inline Json products(const Arguments& arguments) {
  constexpr std::int64_t kTokens = 512, kLabels = 508, kChunk = 102;  // as in a step of 4 x 128 tokens
  const GPT2Config config;
  const auto width = config.n_embd, inner = config.inner_size();
  const at::NoGradGuard no_grad;
  lora::keep_freed_memory();
  const auto options = at::TensorOptions(arguments.scalar_type());
  const auto weight = [&](std::int64_t out, std::int64_t in) { return at::full({out, in}, 0.01, options); };
  std::vector<at::Tensor> weights;
  for (std::int64_t layer = 0; layer < config.n_layer; ++layer) {
    for (const auto& [out, in] :
         {std::pair{3 * width, width}, std::pair{width, width}, std::pair{inner, width}, std::pair{width, inner}}) {
      weights.push_back(weight(out, in));
    }
  }
  const auto head = weight(config.vocab_size, width);
  std::map<std::int64_t, at::Tensor> rows;  // by width
  for (const auto size : {width, 3 * width, inner}) rows[size] = at::full({kTokens, size}, 0.01, options);
  double flops = 0;
  const auto product = [&](const at::Tensor& x, const at::Tensor& V) {
    flops += 2.0 * static_cast<double>(x.size(0) * V.numel());
    return lora::detail::multiply(lora::ProductPlan::of_process()->choose(x.size(0), V), x, V);
  };
  double best = 0;
  for (int step = 0; step < arguments.steps; ++step) {
    flops = 0;
    const auto seconds = seconds_of([&] {
      std::vector<at::Tensor> kept;
      for (const auto& W : weights) kept.push_back(product(rows[W.size(1)], W.t()));
      for (std::int64_t row = 0; row < kLabels; row += kChunk) {
        product(product(rows[width].narrow(0, row, std::min(kChunk, kLabels - row)), head.t()), head);
      }
      for (auto W = weights.rbegin(); W != weights.rend(); ++W) {
        if (&*W != &weights.front()) product(rows[W->size(0)], *W);
      }
    });
    best = std::max(best, flops / seconds);
  }
  return {{"flops_per_second", best}};
}
