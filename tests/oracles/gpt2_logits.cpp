// gpt2_logits MODEL_FOLDER OUT: loads a Hugging Face GPT-2, writes OUT/data.safetensors with token ids and their
// logits, and the model itself as the folder OUT/model.

#include <ATen/ATen.h>
#include <lora/io/safetensors.h>
#include <torch/utils.h>

#include <algorithm>
#include <string>

#include "models/gpt2.h"             // defines: GPT2LMHeadModel
#include "models/gpt2_checkpoint.h"  // defines: load_gpt2, save_gpt2
#include "oracles/commands.h"

void gpt2_logits(const Arguments& arguments) {
  const auto& out = arguments[1];
  GPT2LMHeadModel model = load_gpt2(arguments[0]);
  model->eval();
  torch::NoGradGuard no_grad;
  torch::manual_seed(7);
  const auto& config = model->config;
  const auto ids = torch::randint(config.vocab_size, {2, std::min<int64_t>(config.n_positions, 32)}, at::kLong);
  lora::save_safetensors({{"ids", ids}, {"logits", model->forward(ids)}}, out + "/data.safetensors");
  save_gpt2(model, out + "/model", /*end_of_text=*/0);
}
