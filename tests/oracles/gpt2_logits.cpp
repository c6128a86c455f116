// gpt2_logits MODEL_FOLDER OUT: loads a Hugging Face GPT-2, writes OUT/data.safetensors with token ids and their
// logits, and the model itself as the folder OUT/model.

#include <ATen/ATen.h>
#include <lora/io/safetensors.h>
#include <torch/utils.h>

#include <algorithm>
#include <string>

#include "models/gpt2.h"             // defines: GPT2LMHeadModel
#include "models/gpt2_checkpoint.h"  // defines: load_gpt2, save_gpt2
#include "oracles/program.h"         // defines: run_program

int main(int argc, char** argv) {
  return run_program(argc == 3, "gpt2_logits MODEL_FOLDER OUT", [&] {
    const std::string out = argv[2];
    GPT2LMHeadModel model = load_gpt2(argv[1]);
    model->eval();
    torch::NoGradGuard no_grad;
    torch::manual_seed(7);
    const auto& config = model->config;
    const auto ids = torch::randint(config.vocab_size, {2, std::min<int64_t>(config.n_positions, 32)}, at::kLong);
    lora::save_safetensors({{"ids", ids}, {"logits", model->forward(ids)}}, out + "/data.safetensors");
    save_gpt2(model, out + "/model", /*end_of_text=*/0);
  });
}
