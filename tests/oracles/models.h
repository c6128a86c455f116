// The C++ twins of models.py: the same names, shapes and values.
#pragma once

#include <ATen/ATen.h>
#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>

#include <map>
#include <string>

/// y = down(tanh(up(x))): x [*, 12] -> y [*, 8]; neither layer is square, and down has no bias.
struct MlpImpl : torch::nn::Module {
  MlpImpl()
      : up(register_module("up", torch::nn::Linear(12, 20))),
        down(register_module("down", torch::nn::Linear(torch::nn::LinearOptions(20, 8).bias(false)))) {}

  torch::Tensor forward(const torch::Tensor& x) { return down(torch::tanh(up(x))); }

  torch::nn::Linear up, down;
};
TORCH_MODULE(Mlp);

/// Self-attention by one torch::nn::MultiheadAttention of 4 heads: x [length, batch, 16] -> y of the same shape.
struct MhaBlockImpl : torch::nn::Module {
  MhaBlockImpl() : attn(register_module("attn", torch::nn::MultiheadAttention(16, 4))) {}

  torch::Tensor forward(const torch::Tensor& x) {
    return std::get<0>(attn(x, x, x, /*key_padding_mask=*/torch::Tensor(), /*need_weights=*/false));
  }

  torch::nn::MultiheadAttention attn;
};
TORCH_MODULE(MhaBlock);

/// The registered parameters and buffers under their names, as Python's state_dict.
inline std::map<std::string, torch::Tensor> state_dict(const torch::nn::Module& module) {
  std::map<std::string, torch::Tensor> tensors;
  for (const auto& named : module.named_parameters()) tensors.emplace(named.key(), named.value());
  for (const auto& named : module.named_buffers()) tensors.emplace(named.key(), named.value());
  return tensors;
}
