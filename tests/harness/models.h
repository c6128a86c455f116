// Small models, one for each kind of host: each knows its input, targets and the weights that its adapters reach.
#pragma once

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <lora/config/targets.h>
#include <lora/inject/hosts/module_hosts.h>
#include <torch/nn/module.h>
#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/modules/transformercoder.h>
#include <torch/nn/modules/transformerlayer.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "oracles/models.h"

namespace harness {

/// A model and its forward.
struct Subject {
  std::shared_ptr<torch::nn::Module> module;
  std::function<at::Tensor(const at::Tensor&)> forward;
};

/// The rows of a registered parameter from `row` on that one pair A, B acts on. In `tensors`, the path of the pair, "*"
/// stands for the adapter's node: "up.*" is "up.lora_default".
struct AdaptedRows {
  std::string tensors;
  std::string parameter;
  int64_t row = 0;
  bool table = false;  // the parameter holds [entries, out], an embedding's

  /// The parameter's values, or their gradient, as the matrix [out, in] that A and B make.
  at::Tensor matrix(const at::Tensor& stored) const { return table ? stored.t() : stored.flatten(1); }
  std::string A() const { return table ? "lora_embedding_A" : "lora_A"; }
  std::string B() const { return table ? "lora_embedding_B" : "lora_B"; }
};

struct HostCase {
  std::string name;
  std::function<Subject()> make;  // the same values every time
  std::vector<int64_t> input;
  lora::TargetModules targets;
  std::vector<AdaptedRows> rows;
  std::string dense_operator = "";  // the operator without a low-rank kernel, where the host has one
};

inline void PrintTo(const HostCase& host, std::ostream* out) { *out << host.name; }
inline std::string case_name(const ::testing::TestParamInfo<HostCase>& info) { return info.param.name; }

template <class Holder, class... Arguments>
std::function<Subject()> maker(Arguments... arguments) {
  return [=] {
    torch::manual_seed(7);
    Holder model(arguments...);
    return Subject{model.ptr(), [model](const at::Tensor& x) mutable { return model->forward(x); }};
  };
}

/// Linear layers at depth 4: trunk.blocks.N.mix.{proj, back}.
struct MixImpl : torch::nn::Module {
  MixImpl()
      : proj(register_module("proj", torch::nn::Linear(10, 14))),
        back(register_module("back", torch::nn::Linear(torch::nn::LinearOptions(14, 10).bias(false)))) {}
  at::Tensor forward(const at::Tensor& x) { return x + back(at::tanh(proj(x))); }
  torch::nn::Linear proj, back;
};
TORCH_MODULE(Mix);

struct BlockImpl : torch::nn::Module {
  BlockImpl() : mix(register_module("mix", Mix())) {}
  at::Tensor forward(const at::Tensor& x) { return mix(x); }
  Mix mix;
};
TORCH_MODULE(Block);

struct TrunkImpl : torch::nn::Module {
  TrunkImpl() : blocks(register_module("blocks", torch::nn::ModuleList(Block(), Block()))) {}
  at::Tensor forward(at::Tensor x) {
    for (const auto& block : *blocks) x = block->as<Block>()->forward(x);
    return x;
  }
  torch::nn::ModuleList blocks;
};
TORCH_MODULE(Trunk);

struct DeepImpl : torch::nn::Module {
  DeepImpl() : trunk(register_module("trunk", Trunk())) {}
  at::Tensor forward(const at::Tensor& x) { return trunk(x); }
  Trunk trunk;
};
TORCH_MODULE(Deep);

/// One Linear under two names, run twice in a forward.
struct TwiceImpl : torch::nn::Module {
  TwiceImpl() : first(register_module("first", torch::nn::Linear(12, 9))), again(register_module("again", first)) {}
  at::Tensor forward(const at::Tensor& x) { return first(x) + at::tanh(again(x * 0.5)); }
  torch::nn::Linear first, again;
};
TORCH_MODULE(Twice);

/// A fused projection of three parts.
struct FusedImpl : torch::nn::Module {
  FusedImpl() : c_attn(register_module("c_attn", torch::nn::Linear(12, 30))) {}
  at::Tensor forward(const at::Tensor& x) { return c_attn(x); }
  torch::nn::Linear c_attn;
};
TORCH_MODULE(Fused);

/// A type of the user's own, whose forward multiplies with a weight of another name.
struct ProjectionImpl : torch::nn::Module {
  ProjectionImpl(int64_t in, int64_t out) : kernel(register_parameter("kernel", at::randn({out, in}))) {
    static const bool known = [] { return lora::register_host<ProjectionImpl>(&ProjectionImpl::kernel), true; }();
    static_cast<void>(known);
  }
  at::Tensor forward(const at::Tensor& x) { return at::matmul(x, kernel.t()); }
  at::Tensor kernel;
};
TORCH_MODULE(Projection);

struct OwnImpl : torch::nn::Module {
  OwnImpl() : project(register_module("project", Projection(12, 9))) {}
  at::Tensor forward(const at::Tensor& x) { return at::tanh(project(x)); }
  Projection project;
};
TORCH_MODULE(Own);

/// A Linear on another module's weight.
struct TiedHeadImpl : torch::nn::LinearImpl {
  explicit TiedHeadImpl(const at::Tensor& shared)
      : torch::nn::LinearImpl(torch::nn::LinearOptions(shared.size(1), shared.size(0)).bias(false)) {
    weight = parameters_["weight"] = shared;
  }
};
TORCH_MODULE(TiedHead);

/// An embedding and a head on the same weight [15, 6]; the input holds token numbers.
struct TiedImpl : torch::nn::Module {
  TiedImpl()
      : wte(register_module("wte", torch::nn::Embedding(15, 6))),
        mix(register_module("mix", torch::nn::Linear(6, 6))),
        head(register_module("head", TiedHead(wte->weight))) {}
  at::Tensor forward(const at::Tensor& ids) { return head(at::tanh(mix(wte(ids)))); }

  torch::nn::Embedding wte;
  torch::nn::Linear mix;
  TiedHead head;
};
TORCH_MODULE(Tied);

/// Attention from x [length, batch, 16] to its first two positions; with a width other than 16, by weights for q, k and
/// v.
struct CrossImpl : torch::nn::Module {
  explicit CrossImpl(int64_t width)
      : width_(width),
        attn(register_module("attn", torch::nn::MultiheadAttention(
                                         torch::nn::MultiheadAttentionOptions(16, 4).kdim(width).vdim(width)))) {}
  at::Tensor forward(const at::Tensor& x) {
    const auto memory = x.narrow(0, 0, 2).narrow(-1, 0, width_);
    return std::get<0>(attn(x, memory, memory, /*key_padding_mask=*/at::Tensor(), /*need_weights=*/false));
  }
  int64_t width_;
  torch::nn::MultiheadAttention attn;
};
TORCH_MODULE(Cross);

/// Rows of a table, chosen by the order of x's values: x [*, 9] -> [*, 6].
struct LookupImpl : torch::nn::Module {
  explicit LookupImpl(const torch::nn::EmbeddingOptions& options)
      : wte(register_module("wte", torch::nn::Embedding(options))) {}
  at::Tensor forward(const at::Tensor& x) {
    const auto ids = std::get<1>(x.detach().sort(/*stable=*/true, /*dim=*/-1));
    return at::tanh(wte(ids) * x.unsqueeze(-1)).sum(-2);
  }
  torch::nn::Embedding wte;
};
TORCH_MODULE(Lookup);

/// One convolution, whatever its dimensions and options.
template <class Convolution, class Options>
struct ConvolutionBlock : torch::nn::Module {
  explicit ConvolutionBlock(const Options& options) : conv(register_module("conv", Convolution(options))) {}
  at::Tensor forward(const at::Tensor& x) { return at::tanh(conv(x)); }
  Convolution conv;
};

template <class Convolution, class Options>
std::function<Subject()> convolution(const Options& options) {
  return [=] {
    torch::manual_seed(7);
    const auto model = std::make_shared<ConvolutionBlock<Convolution, Options>>(options);
    return Subject{model, [model](const at::Tensor& x) { return model->forward(x); }};
  };
}

/// A Bilinear form of both halves of x.
struct FormImpl : torch::nn::Module {
  FormImpl() : form(register_module("form", torch::nn::Bilinear(5, 7, 6))) {}
  at::Tensor forward(const at::Tensor& x) {
    const auto halves = x.split_with_sizes({5, 7}, -1);
    return form(halves[0], halves[1]);
  }
  torch::nn::Bilinear form;
};
TORCH_MODULE(Form);

inline Subject make_sequential() {
  torch::manual_seed(7);
  torch::nn::Sequential model(torch::nn::Linear(12, 20), torch::nn::Tanh(),
                              torch::nn::Linear(torch::nn::LinearOptions(20, 8).bias(false)));
  return {model.ptr(), [model](const at::Tensor& x) mutable { return model->forward(x); }};
}

inline Subject make_encoder() {
  torch::manual_seed(7);
  torch::nn::TransformerEncoderLayer layer(
      torch::nn::TransformerEncoderLayerOptions(16, 4).dim_feedforward(20).dropout(0));
  torch::nn::TransformerEncoder model(torch::nn::TransformerEncoderOptions(layer, 2));
  return {model.ptr(), [model](const at::Tensor& x) mutable { return model->forward(x); }};
}

inline std::vector<AdaptedRows> encoder_rows() {
  std::vector<AdaptedRows> rows;
  for (const std::string layer : {"layers.0.", "layers.1."}) {
    rows.push_back({layer + "self_attn.*.in_proj", layer + "self_attn.in_proj_weight"});
    rows.push_back({layer + "self_attn.out_proj.*", layer + "self_attn.out_proj.weight"});
    rows.push_back({layer + "linear1.*", layer + "linear1.weight"});
    rows.push_back({layer + "linear2.*", layer + "linear2.weight"});
  }
  return rows;
}

/// Every kind of host of the library, each with a forward through all its adapted weights.
inline const std::vector<HostCase>& host_cases() {
  const std::vector<AdaptedRows> mlp{{"up.*", "up.weight"}, {"down.*", "down.weight"}};
  const std::vector<AdaptedRows> conv{{"conv.*", "conv.weight"}};
  using torch::nn::Conv1dOptions;
  using torch::nn::Conv2dOptions;
  using torch::nn::Conv3dOptions;
  static const std::vector<HostCase> cases{
      {"Mlp", maker<Mlp>(), {5, 12}, {"up", "down"}, mlp},
      {"MlpOf3dInput", maker<Mlp>(), {2, 3, 12}, {"up", "down"}, mlp},
      {"MlpOf1dInput", maker<Mlp>(), {12}, {"up", "down"}, mlp},
      {"Deep",
       maker<Deep>(),
       {3, 10},
       {"mix.proj", "trunk.blocks.1.mix.back"},
       {{"trunk.blocks.0.mix.proj.*", "trunk.blocks.0.mix.proj.weight"},
        {"trunk.blocks.1.mix.proj.*", "trunk.blocks.1.mix.proj.weight"},
        {"trunk.blocks.1.mix.back.*", "trunk.blocks.1.mix.back.weight"}}},
      {"Twice", maker<Twice>(), {4, 12}, {"again"}, {{"first.*", "first.weight"}}},
      {"Sequential", &make_sequential, {5, 12}, {"0", "2"}, {{"0.*", "0.weight"}, {"2.*", "2.weight"}}},
      {"FusedParts",
       maker<Fused>(),
       {4, 12},
       {"c_attn[q,v]"},
       {{"c_attn.*.q", "c_attn.weight", 0}, {"c_attn.*.v", "c_attn.weight", 20}}},
      {"OwnType", maker<Own>(), {4, 12}, {"project"}, {{"project.*", "project.kernel"}}},
      {"AttentionSelf",
       maker<MhaBlock>(),
       {3, 2, 16},
       {"in_proj[q,v]", "out_proj"},
       {{"attn.*.q", "attn.in_proj_weight", 0},
        {"attn.*.v", "attn.in_proj_weight", 32},
        {"attn.out_proj.*", "attn.out_proj.weight"}}},
      {"AttentionCross",
       maker<Cross>(16),
       {3, 2, 16},
       {"attn"},
       {{"attn.*.in_proj", "attn.in_proj_weight"}, {"attn.out_proj.*", "attn.out_proj.weight"}}},
      {"AttentionKdim",
       maker<Cross>(12),
       {3, 2, 16},
       {"q_proj", "k_proj", "v_proj"},
       {{"attn.*.q_proj", "attn.q_proj_weight"},
        {"attn.*.k_proj", "attn.k_proj_weight"},
        {"attn.*.v_proj", "attn.v_proj_weight"}}},
      {"Encoder", &make_encoder, {3, 2, 16}, "all-linear", encoder_rows()},
      {"Embedding",
       maker<Lookup>(torch::nn::EmbeddingOptions(11, 6)),
       {3, 9},
       {"wte"},
       {{"wte.*", "wte.weight", 0, true}}},
      {"EmbeddingPadded",
       maker<Lookup>(torch::nn::EmbeddingOptions(11, 6).padding_idx(4)),
       {2, 3, 9},
       {"wte"},
       {{"wte.*", "wte.weight", 0, true}}},
      {"Conv1d",
       convolution<torch::nn::Conv1d>(Conv1dOptions(4, 6, 3).stride(2).padding(1)),
       {2, 4, 9},
       {"conv"},
       conv},
      {"Conv1dUnbatched", convolution<torch::nn::Conv1d>(Conv1dOptions(4, 6, 3)), {4, 9}, {"conv"}, conv},
      {"Conv1dSame",
       convolution<torch::nn::Conv1d>(Conv1dOptions(4, 6, 4).padding(torch::kSame).bias(false)),
       {2, 4, 9},
       {"conv"},
       conv},
      {"Conv1dReflect",
       convolution<torch::nn::Conv1d>(Conv1dOptions(4, 6, 3).padding(2).padding_mode(torch::kReflect)),
       {2, 4, 9},
       {"conv"},
       conv},
      {"Conv2d",
       convolution<torch::nn::Conv2d>(Conv2dOptions(3, 5, {3, 2}).dilation({2, 1})),
       {2, 3, 7, 6},
       {"conv"},
       conv},
      {"Conv2dCircular",
       convolution<torch::nn::Conv2d>(Conv2dOptions(3, 5, 3).padding(1).padding_mode(torch::kCircular)),
       {2, 3, 7, 6},
       {"conv"},
       conv},
      {"Conv2dGroups",
       convolution<torch::nn::Conv2d>(Conv2dOptions(6, 9, 3).groups(3).padding(1)),
       {2, 6, 5, 4},
       {"conv"},
       conv},
      {"Conv2dDepthwise",
       convolution<torch::nn::Conv2d>(Conv2dOptions(4, 12, 3).groups(4)),
       {2, 4, 5, 4},
       {"conv"},
       conv},
      {"Conv2dParts",
       convolution<torch::nn::Conv2d>(Conv2dOptions(3, 6, 1)),
       {2, 3, 4, 4},
       {"conv[q,v]"},
       {{"conv.*.q", "conv.weight", 0}, {"conv.*.v", "conv.weight", 4}}},
      {"Conv3d",
       convolution<torch::nn::Conv3d>(Conv3dOptions(2, 4, 2).stride({1, 2, 1})),
       {2, 2, 4, 4, 3},
       {"conv"},
       conv},
      {"ConvTranspose2d",
       convolution<torch::nn::ConvTranspose2d>(torch::nn::ConvTranspose2dOptions(4, 3, 3).stride(2)),
       {2, 4, 3, 3},
       {"conv"},
       conv,
       "aten::conv_transpose2d.input"},
      {"Bilinear", maker<Form>(), {4, 12}, {"form"}, {{"form.*", "form.weight"}}, "aten::bilinear"},
  };
  return cases;
}

}  // namespace harness
