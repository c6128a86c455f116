// adapt_encoder ENCODER.pt DATA OUT: adapts a traced sentence encoder that its executor has already optimised, by a
// contrastive loss on pairs of sentences, checks the laws on the way, and leaves adapter, merged encoder and outputs
// for encoder_adapts.py.

#include <ATen/ATen.h>
#include <lora/adapters.h>        // defines: inject, Adapters, LoraConfig, param_groups
#include <lora/io/safetensors.h>  // defines: load_safetensors, save_safetensors
#include <torch/csrc/jit/serialization/import.h>
#include <torch/optim/adamw.h>

#include <cstdio>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "harness/script.h"  // defines: is_optimised, script_state
#include "oracles/commands.h"

namespace {

using Tensors = std::map<std::string, at::Tensor>;

void require(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error(what);
}

/// Unit vectors [sentences, width] of one side of the pairs.
at::Tensor embed(torch::jit::Module& encoder, const Tensors& data, const std::string& side) {
  return encoder.forward({data.at("ids_" + side), data.at("mask_" + side)}).toTensor();
}

/// Cross-entropy of each sentence's partner among all of them.
at::Tensor contrastive_loss(torch::jit::Module& encoder, const Tensors& data) {
  const auto similarity = at::mm(embed(encoder, data, "a"), embed(encoder, data, "b").t()) * 20;
  return at::cross_entropy_loss(similarity, at::arange(similarity.size(0), at::kLong));
}

void check_gradients(const lora::Adapters& adapters, bool first_step) {
  for (const auto& [name, tensor] : adapters.named_parameters()) {
    require(tensor.grad().defined(), name + " has no gradient");
    const bool behind_zero = first_step && name.find("lora_A") != std::string::npos;  // B is zero in the first step
    require(behind_zero || at::count_nonzero(tensor.grad()).item<int64_t>() > 0, name + " has a zero gradient");
  }
}

void adapt(const std::string& model, const std::string& data_file, const std::string& out) {
  torch::manual_seed(20260109);
  const auto data = lora::load_safetensors(data_file);
  auto encoder = torch::jit::load(model);
  encoder.eval();
  for (int i = 0; i < 5; ++i) contrastive_loss(encoder, data).backward();
  require(harness::is_optimised(encoder), "the executor has not optimised the encoder");
  for (const auto& parameter : encoder.parameters()) parameter.mutable_grad() = at::Tensor();
  const auto state = harness::script_state(encoder);
  const auto base = embed(encoder, data, "a").detach();

  auto adapters = lora::inject(encoder, lora::LoraConfig().r(4).lora_alpha(12).target_modules({"query", "value"}));
  require(at::allclose(embed(encoder, data, "a"), base, 1e-5, 1e-6), "the start is not the base model");
  torch::optim::AdamW optimizer(lora::param_groups(adapters, torch::optim::AdamWOptions(2e-3)));
  std::vector<double> losses;
  for (int step = 0; step < 20; ++step) {
    optimizer.zero_grad();
    const auto loss = contrastive_loss(encoder, data);
    loss.backward();
    check_gradients(adapters, step == 0);
    optimizer.step();
    losses.push_back(loss.item<double>());
    std::printf("step %2d loss %.4f\n", step, losses.back());
  }
  require(losses.back() < 0.7 * losses.front(), "the loss did not go down");
  require(adapters.fallbacks().empty(), "a dense weight was formed");

  const auto adapted = embed(encoder, data, "a").detach();
  adapters.merge();
  require(at::allclose(embed(encoder, data, "a"), adapted, 1e-5, 1e-6), "merged differs from unmerged");
  encoder.save(out + "/merged.pt");
  adapters.unmerge();
  require(at::equal(embed(encoder, data, "a"), adapted), "unmerge is not exact");
  adapters.save(out + "/adapter");
  lora::save_safetensors({{"base", base}, {"adapted", adapted}, {"losses", at::tensor(losses)}},
                         out + "/outputs.safetensors");
  adapters.unload();
  require(harness::script_state(encoder) == state, "a base tensor or its flag changed");
  for (int i = 0; i < 5; ++i) contrastive_loss(encoder, data).backward();
  require(harness::is_optimised(encoder), "the executor does not optimise again");
}

}  // namespace

void adapt_encoder(const Arguments& arguments) { adapt(arguments[0], arguments[1], arguments[2]); }
