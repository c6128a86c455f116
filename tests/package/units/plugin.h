// A part of a program that adapts and runs models by itself: another translation unit, or a shared library.
#pragma once

#include <lora/adapters.h>
#include <torch/nn/modules/linear.h>

namespace plugin {

struct Net : torch::nn::Module {
  Net() : fc(register_module("fc", torch::nn::Linear(6, 4))) {}
  at::Tensor forward(const at::Tensor& x) { return fc->forward(x); }
  torch::nn::Linear fc;
};

/// Gives the net an adapter of rank 2 and scaling 4.
[[gnu::visibility("default")]] lora::Adapters adapt(Net& net);

[[gnu::visibility("default")]] at::Tensor run(Net& net, const at::Tensor& x);

}  // namespace plugin
