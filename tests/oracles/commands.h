// The commands of the program `judged`, each in a file of its name: what they do stands there.
#pragma once

#include <string>
#include <vector>

using Arguments = std::vector<std::string>;

void adapt_encoder(const Arguments& arguments);
void copy_checkpoint(const Arguments& arguments);
void copy_safetensors(const Arguments& arguments);
void copy_torch_pickle(const Arguments& arguments);
void encode_strings(const Arguments& arguments);
void gpt2_logits(const Arguments& arguments);
void write_adapters(const Arguments& arguments);
void write_prompts(const Arguments& arguments);
