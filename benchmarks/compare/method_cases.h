// Cases of the methods beside LoRA.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "measure.h"         // defines: seconds_of
#include "setup.h"           // defines: Arguments, make_optimizer
#include "training_cases.h"  // defines: labels_of, loss_of

/// Training steps of each method on GPT-2 124M's c_attn and attn.c_proj and forwards of DoRA, each in turn with LoRA's,
/// so that what one leaves in the caches and in the allocator is not another's but LoRA's: [the method's, LoRA's]
/// seconds. LoRA and DoRA with r = 8, VeRA with PEFT's 256, MoRA and MiSS with as many parameters as r = 8 or fewer.
inline Json methods(const Arguments& arguments) {
  auto model = load_gpt2(arguments.path("gpt2"));
  model->to(arguments.scalar_type());
  const std::string reference = "LoRA";
  const lora::TargetModules targets{"c_attn", "attn.c_proj"};
  auto adapters = lora::inject(*model, lora::LoraConfig().r(8).lora_alpha(16).target_modules(targets), reference);
  adapters.add(lora::LoraConfig().r(8).lora_alpha(16).use_dora(true).target_modules(targets), "DoRA");
  adapters.add(lora::VeraConfig().target_modules(targets), "VeRA");
  adapters.add(lora::MoraConfig().mora_type(1).target_modules(targets), "MoRA, type 1");
  adapters.add(lora::MoraConfig().mora_type(6).target_modules(targets), "MoRA, type 6");
  adapters.add(lora::IA3Config().target_modules(targets), "IA3");
  adapters.add(lora::MissConfig().r(8).target_modules(targets), "MiSS");
  adapters.add(lora::LoraConfig()
                   .r(8)
                   .lora_alpha(16)
                   .init_lora_weights(lora::LoraInit::kPissa)
                   .pissa_niter(2)
                   .target_modules(targets),
               "PiSSA");

  lora::keep_freed_memory();
  const lora::FastOperators fast;
  const auto ids = batch_of(arguments), labels = labels_of(ids);
  std::map<std::string, torch::optim::AdamW> optimizers;
  for (const auto& name : adapters.names()) {
    adapters.set_trainable({name});
    optimizers.emplace(name, make_optimizer(adapters));
  }
  const auto activate = [&](const std::string& name) {
    adapters.set_active({name});
    adapters.set_trainable({name});
  };
  const auto in_turn = [&](const std::string& name, int rounds, const std::function<void(const std::string&)>& work) {
    std::vector<std::pair<double, double>> pairs;
    for (int i = 0; i < rounds; ++i) {
      activate(reference);
      const auto seconds = seconds_of([&] { work(reference); });
      activate(name);
      pairs.emplace_back(seconds_of([&] { work(name); }), seconds);
    }
    return pairs;
  };
  std::map<std::string, std::vector<std::pair<double, double>>> steps;
  model->train();
  for (const auto& name : adapters.names()) {
    if (name == reference) continue;
    steps[name] = in_turn(name, arguments.steps, [&](const std::string& active) {
      loss_of(arguments, model, ids, labels).backward();
      auto& optimizer = optimizers.at(active);
      optimizer.step();
      optimizer.zero_grad();
    });
  }
  model->eval();
  const at::NoGradGuard no_grad;
  const auto one = ids.narrow(0, 0, 1).narrow(1, 0, 1);
  const auto rounds = 6 * arguments.steps;
  const auto forwards = in_turn("DoRA", rounds, [&](const std::string&) { model->transformer->forward(ids); });
  const auto tokens = in_turn("DoRA", 2 * rounds, [&](const std::string&) { model->transformer->forward(one); });
  return {{"seconds", steps}, {"dora_forward_seconds", forwards}, {"dora_token_seconds", tokens}};
}
