// The C++ twins of models.py: the same names, shapes and values.
#pragma once

#include <ATen/ATen.h>
#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/modules/normalization.h>
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

/// x + tanh(mix(ln(x))).
struct LayerImpl : torch::nn::Module {
  LayerImpl()
      : ln(register_module("ln", torch::nn::LayerNorm(torch::nn::LayerNormOptions({6})))),
        mix(register_module("mix", torch::nn::Linear(6, 6))) {}

  torch::Tensor forward(const torch::Tensor& x) { return x + torch::tanh(mix(ln(x))); }

  torch::nn::LayerNorm ln;
  torch::nn::Linear mix;
};
TORCH_MODULE(Layer);

/// out(tanh(dense(x))): x [*, 5] -> [*, 3].
struct HeadImpl : torch::nn::Module {
  HeadImpl()
      : dense(register_module("dense", torch::nn::Linear(5, 4))),
        out(register_module("out", torch::nn::Linear(4, 3))) {}

  torch::Tensor forward(const torch::Tensor& x) { return out(torch::tanh(dense(x))); }

  torch::nn::Linear dense, out;
};
TORCH_MODULE(Head);

/// Reads tokens and classifies: ids [batch, length] -> [batch, 3]; a layer of every kind that options reach.
struct ReaderImpl : torch::nn::Module {
  ReaderImpl()
      : wte(register_module("wte", torch::nn::Embedding(torch::nn::EmbeddingOptions(11, 6).padding_idx(0)))),
        h(register_module("h", torch::nn::ModuleList(Layer(), Layer()))),
        conv(register_module("conv", torch::nn::Conv1d(torch::nn::Conv1dOptions(6, 5, 3).stride(2).padding(1)))),
        norm(register_module("norm", torch::nn::BatchNorm1d(5))),
        classifier(register_module("classifier", Head())) {}

  torch::Tensor forward(const torch::Tensor& ids) {
    auto x = wte(ids);
    for (const auto& layer : *h) x = layer->as<Layer>()->forward(x);
    return classifier(norm(conv(x.transpose(1, 2))).mean(-1));
  }

  torch::nn::Embedding wte;
  torch::nn::ModuleList h;
  torch::nn::Conv1d conv;
  torch::nn::BatchNorm1d norm;
  Head classifier;
};
TORCH_MODULE(Reader);

/// x [batch, 2, 3, 6, 6] -> [batch, 5, 3, 3] by a Conv3d without bias and a Conv2d with string padding.
struct ConvsImpl : torch::nn::Module {
  ConvsImpl()
      : first(register_module(
            "first", torch::nn::Conv3d(torch::nn::Conv3dOptions(2, 4, {3, 2, 2}).stride({1, 2, 2}).bias(false)))),
        second(register_module("second", torch::nn::Conv2d(torch::nn::Conv2dOptions(4, 5, 3).padding(torch::kSame)))) {}

  torch::Tensor forward(const torch::Tensor& x) { return second(torch::tanh(first(x)).squeeze(2)); }

  torch::nn::Conv3d first;
  torch::nn::Conv2d second;
};
TORCH_MODULE(Convs);

/// The registered parameters and buffers under their names, as Python's state_dict.
inline std::map<std::string, torch::Tensor> state_dict(const torch::nn::Module& module) {
  std::map<std::string, torch::Tensor> tensors;
  for (const auto& named : module.named_parameters()) tensors.emplace(named.key(), named.value());
  for (const auto& named : module.named_buffers()) tensors.emplace(named.key(), named.value());
  return tensors;
}
