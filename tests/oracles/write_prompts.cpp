// write_prompts OUT: a GPT-2 and virtual tokens of every form that the library saves, each with its logits, for
// peft_loads_our_prompts.py.

#include <ATen/ATen.h>
#include <lora/io/safetensors.h>        // defines: save_safetensors
#include <lora/prompt/prefix_tuning.h>  // defines: PrefixTuning, PrefixTuningConfig
#include <lora/prompt/prompt_tuning.h>  // defines: PromptTuning, PromptTuningConfig
#include <torch/utils.h>

#include <string>
#include <utility>
#include <vector>

#include "models/gpt2.h"             // defines: GPT2LMHeadModel, GPT2Inputs
#include "models/gpt2_checkpoint.h"  // defines: save_gpt2
#include "oracles/commands.h"

namespace {

void write(const std::string& out) {
  torch::NoGradGuard no_grad;
  GPT2Config config;
  config.vocab_size = 50;
  config.n_positions = 20;
  config.n_embd = 24;
  config.n_layer = 2;
  config.n_head = 3;
  config.initializer_range = 0.2;
  GPT2LMHeadModel model(config);
  save_gpt2(model, out + "/model", /*end_of_text=*/0);
  const auto ids = torch::randint(config.vocab_size, {2, 9}, at::kLong);
  const auto save_logits = [&](const std::string& name, const GPT2Inputs& inputs) {
    lora::save_safetensors({{"ids", ids}, {"logits", model->forward(inputs)}}, out + "/" + name + "/data.safetensors");
  };

  const auto options =
      lora::PrefixTuningConfig().num_virtual_tokens(4).num_layers(2).num_attention_heads(3).token_dim(24);
  auto projected = options, zero = options;
  projected.prefix_projection(true).encoder_hidden_size(10);
  zero.init_weights(lora::PrefixInit::kZero);
  for (const auto& [name, choice] : std::vector<std::pair<std::string, lora::PrefixTuningConfig>>{
           {"prefix", options}, {"prefix_projection", projected}, {"prefix_zero", zero}}) {
    const lora::PrefixTuning prefix(choice);
    prefix->save(out + "/" + name);
    save_logits(name, {ids, {}, prefix->past_key_values(2)});
  }
  for (const bool is_complete : {false, true}) {
    auto choice = lora::PromptTuningConfig().num_virtual_tokens(4).token_dim(24);
    if (is_complete) choice.num_layers(2).num_attention_heads(3);
    const lora::PromptTuning prompt(choice);
    const std::string name = is_complete ? "prompt" : "prompt_of_few_options";
    prompt->save(out + "/" + name);
    save_logits(name, {{}, prompt->prepend(model->transformer->wte(ids)), {}});
  }
}

}  // namespace

void write_prompts(const Arguments& arguments) {
  torch::manual_seed(20260128);
  write(arguments[0]);
}
