// Cases of what is done with adapters beside training.
#pragma once

#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/linear.h>

#include <string>
#include <vector>

#include "measure.h"        // defines: seconds_of
#include "setup.h"          // defines: Arguments, Adapted
#include "streamed_copy.h"  // defines: StreamedCopy

inline void fill(const lora::Adapters& adapters) {
  const at::NoGradGuard no_grad;
  for (const auto& [name, tensor] : adapters.named_tensors("default")) {
    if (name.find("lora_B") != std::string::npos) tensor.normal_(0, 0.02);
  }
}

/// Merges and unmerges in turn, and beside it copies what a merge has to read and write at the least. The first merge,
/// whose memory the system has yet to give, is told apart.
inline Json merge_times(const Arguments& arguments, lora::Adapters& adapters, const std::vector<at::Tensor>& weights) {
  const at::NoGradGuard no_grad;
  const auto first = seconds_of([&] { adapters.merge(); });
  adapters.unmerge();
  const StreamedCopy copy(weights);
  std::vector<double> merges, unmerges, copies;
  for (int step = 0; step < arguments.steps; ++step) {
    copies.push_back(seconds_of([&] { copy.run(); }));
    merges.push_back(seconds_of([&] { adapters.merge(); }));
    unmerges.push_back(seconds_of([&] { adapters.unmerge(); }));
  }
  return {{"first_merge_seconds", first},
          {"merge_seconds", merges},
          {"unmerge_seconds", unmerges},
          {"copy_seconds", copies}};
}

inline Json merge(const Arguments& arguments) {
  auto adapted = load_adapted(arguments);
  fill(adapted.adapters);
  std::vector<at::Tensor> weights;
  for (const auto& parameter : adapted.model->named_parameters()) {
    const auto ends = [&](const std::string& end) {
      return parameter.key().size() > end.size() &&
             parameter.key().compare(parameter.key().size() - end.size(), end.size(), end) == 0;
    };
    if (ends("c_attn.weight") || ends("attn.c_proj.weight")) weights.push_back(parameter.value());
  }
  return merge_times(arguments, adapted.adapters, weights);
}

inline Json merge_square(const Arguments& arguments) {
  torch::nn::Sequential model(torch::nn::Linear(torch::nn::LinearOptions(4096, 4096).bias(false)));
  model->to(arguments.scalar_type());
  auto adapters = lora::inject(*model, lora::LoraConfig().r(8).target_modules({"0"}));
  fill(adapters);
  return merge_times(arguments, adapters, {model->named_parameters()["0.weight"]});
}

/// 200 Linear layers of 64 × 64 under the names of peers.py.
struct Wide : torch::nn::Module {
  Wide() {
    layers = register_module("layers", torch::nn::ModuleList());
    for (int i = 0; i < 200; ++i) layers->push_back(torch::nn::Linear(64, 64));
  }
  torch::nn::ModuleList layers;
};

inline Json load(const Arguments& arguments) {
  Wide model;
  auto adapters = lora::load(model, arguments.path("wide/adapter-1"));
  std::vector<double> loads, switches;
  for (int step = 0; step < arguments.steps; ++step) {
    const auto name = "other" + std::to_string(step);
    loads.push_back(seconds_of([&] { adapters.load(arguments.path("wide/adapter-2"), name); }));
    switches.push_back(seconds_of([&] { adapters.set_active({name}); }));
    switches.push_back(seconds_of([&] { adapters.set_active({"default"}); }));
    adapters.remove(name);
  }
  return {{"load_seconds", loads}, {"switch_seconds", switches}};
}

/// A forward of the merged model and of one that never had an adapter, both accelerated.
inline Json merged_forward(const Arguments& arguments) {
  const at::NoGradGuard no_grad;
  auto plain = load_gpt2(arguments.path("gpt2"));
  plain->to(arguments.scalar_type());
  for (auto& parameter : plain->parameters()) parameter.set_requires_grad(false);
  lora::accelerate(*plain);
  auto adapted = load_adapted(arguments);
  fill(adapted.adapters);
  adapted.adapters.merge();
  const auto ids = batch_of(arguments);
  std::vector<double> ours, peers;
  for (int step = 0; step < arguments.steps; ++step) {
    peers.push_back(seconds_of([&] { plain->forward(ids); }));
    ours.push_back(seconds_of([&] { adapted.model->forward(ids); }));
  }
  return {{"merged_seconds", ours}, {"plain_seconds", peers}};
}

/// What a carrier without an active adapter costs on one product of 64 × 64, beside at::linear on the plain weight.
inline Json carrier(const Arguments& arguments) {
  const at::NoGradGuard no_grad;
  torch::nn::Sequential model(torch::nn::Linear(torch::nn::LinearOptions(64, 64).bias(false)));
  auto adapters = lora::inject(*model, lora::LoraConfig().r(8).target_modules({"0"}));
  adapters.set_active({});
  const auto plain = model->named_parameters()["0.weight"];
  const auto adapted = model[0]->as<torch::nn::Linear>()->weight;
  const auto x = at::randn({1, 64});
  constexpr int kCalls = 20000;
  std::vector<double> plain_seconds, adapted_seconds;
  for (int step = 0; step < arguments.steps; ++step) {
    const auto per_call = [&](const at::Tensor& weight) {
      return seconds_of([&] {
               for (int call = 0; call < kCalls; ++call) at::linear(x, weight);
             }) /
             kCalls;
    };
    plain_seconds.push_back(per_call(plain));
    adapted_seconds.push_back(per_call(adapted));
  }
  return {{"plain_seconds", plain_seconds}, {"carrier_seconds", adapted_seconds}};
}
