// Cases of the methods beside LoRA.
#pragma once

#include <algorithm>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "measure.h"         // defines: seconds_of
#include "setup.h"           // defines: Arguments, make_optimizer
#include "training_cases.h"  // defines: labels_of, loss_of

/// A training step and a forward of each method on GPT-2 124M's c_attn and attn.c_proj, in turn in one process: an
/// adapter of each in the model, one of them active. LoRA and DoRA with r = 8, VeRA with PEFT's 256, MoRA and MiSS with
/// as many parameters as r = 8 or fewer.
inline Json methods(const Arguments& arguments) {
  auto model = load_gpt2(arguments.path("gpt2"));
  model->to(arguments.scalar_type());
  const lora::TargetModules targets{"c_attn", "attn.c_proj"};
  auto adapters = lora::inject(*model, lora::LoraConfig().r(8).lora_alpha(16).target_modules(targets), "LoRA");
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
  std::map<std::string, std::vector<double>> steps, forwards, tokens;
  model->train();
  for (int i = 0; i < arguments.steps; ++i) {
    for (auto& [name, optimizer] : optimizers) {
      adapters.set_active({name});
      adapters.set_trainable({name});
      steps[name].push_back(seconds_of([&, &step = optimizer] {
        loss_of(arguments, model, ids, labels).backward();
        step.step();
        step.zero_grad();
      }));
    }
  }
  model->eval();
  const at::NoGradGuard no_grad;
  const auto one = ids.narrow(0, 0, 1).narrow(1, 0, 1);
  for (int i = 0; i < 3 * arguments.steps; ++i) {
    for (const auto& [name, optimizer] : optimizers) {
      adapters.set_active({name});
      forwards[name].push_back(seconds_of([&] { model->transformer->forward(ids); }));
      tokens[name].push_back(seconds_of([&] { model->transformer->forward(one); }));
    }
  }
  return {{"seconds", steps}, {"forward_seconds", forwards}, {"token_seconds", tokens}};
}
