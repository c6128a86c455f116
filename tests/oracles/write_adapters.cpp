// write_adapters OUT: adapters of every form that the library saves, each with its base model, inputs and outputs as a
// case folder for peft_loads_ours.py.

#include <ATen/ATen.h>
#include <lora/adapters.h>        // defines: inject, Adapters, LoraConfig
#include <lora/io/safetensors.h>  // defines: save_safetensors
#include <torch/nn/modules/container/sequential.h>
#include <torch/utils.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "models/gpt2.h"             // defines: GPT2LMHeadModel
#include "models/gpt2_checkpoint.h"  // defines: save_gpt2
#include "oracles/commands.h"
#include "oracles/models.h"  // defines: Mlp, MhaBlock, state_dict

namespace {

using lora::LoraConfig;

/// One folder: the model, its adapters and what it computes with each choice of them.
class CaseFolder {
 public:
  CaseFolder(const std::string& out, const std::string& name, const std::string& model) : path_(out + "/" + name) {
    std::filesystem::create_directories(path_);
    manifest_["model"] = model;
    manifest_["data"] = "data.safetensors";
    manifest_["cases"] = nlohmann::json::array();
  }

  const std::string& path() const { return path_; }
  nlohmann::ordered_json& manifest() { return manifest_; }

  void base(const torch::nn::Module& module) {
    manifest_["base"] = "base.safetensors";
    lora::save_safetensors(state_dict(module), path_ + "/base.safetensors");
  }

  void adapters(const lora::Adapters& adapters) {
    adapters.save(path_ + "/adapter");
    for (const auto& name : adapters.names()) {
      manifest_["adapters"][name] = name == "default" ? "adapter" : "adapter/" + name;
    }
  }

  void output(const std::vector<std::string>& active, const torch::Tensor& x, const torch::Tensor& y) {
    const std::string name = "y" + std::to_string(manifest_["cases"].size());
    data_["x"] = x;
    data_[name] = y;
    manifest_["cases"].push_back({{"active", active}, {"input", "x"}, {"output", name}});
  }

  void write() {
    lora::save_safetensors(data_, path_ + "/data.safetensors");
    std::ofstream(path_ + "/manifest.json") << manifest_.dump(1) << '\n';
  }

 private:
  std::string path_;
  nlohmann::ordered_json manifest_;
  std::map<std::string, torch::Tensor> data_;
};

/// Moves every tensor that is trained, so that no B is zero and no copy is the base's.
void randomize(lora::Adapters& adapters) {
  torch::NoGradGuard no_grad;
  const auto trainable = adapters.trainable();
  adapters.set_trainable(adapters.names());
  for (auto& tensor : adapters.parameters()) tensor.add_(torch::randn_like(tensor), 0.3);
  adapters.set_trainable(trainable);
}

/// A model with one adapter "default": the output of the base and of the adapted model.
template <class Model, class Config>
void write_one(CaseFolder folder, Model model, const Config& config, const torch::Tensor& x) {
  model->eval();
  torch::NoGradGuard no_grad;
  folder.output({}, x, model->forward(x));
  auto adapters = lora::inject(*model, config);
  randomize(adapters);
  folder.adapters(adapters);
  folder.output({"default"}, x, model->forward(x));
  folder.write();
}

void write_mlps(const std::string& out) {
  const auto x = torch::randn({5, 12});
  const std::vector<std::pair<std::string, LoraConfig>> configs = {
      {"plain", LoraConfig().r(3).lora_alpha(7).target_modules({"up", "down"})},
      {"fractional_alpha", LoraConfig().r(3).lora_alpha(2.5).target_modules({"up"})},
      {"rslora", LoraConfig().r(5).lora_alpha(7).use_rslora(true).target_modules({"down"})},
      {"regex", LoraConfig().r(2).target_modules("u.|d(?=own).*").lora_dropout(0.3)},
      {"all_linear", LoraConfig().r(4).lora_alpha(1).target_modules("all-linear").exclude_modules({"up"})},
      {"patterns",
       LoraConfig().r(3).target_modules({"up", "down"}).rank_pattern({{"down", 5}}).alpha_pattern({{"^up", 11}})},
      {"gaussian", LoraConfig().init_lora_weights(lora::LoraInit::kGaussian).target_modules({"up"})},
      {"predicate", LoraConfig().r(2).target_if([](const auto& name, const auto&) { return name == "down"; })},
  };
  for (const auto& [name, config] : configs) {
    Mlp model;
    CaseFolder folder(out, "mlp_" + name, "mlp");
    folder.base(*model);
    write_one(std::move(folder), model, config, x);
  }
}

void write_several_adapters(const std::string& out) {
  Mlp model;
  torch::NoGradGuard no_grad;
  CaseFolder folder(out, "mlp_several", "mlp");
  folder.base(*model);
  const auto x = torch::randn({4, 12});
  auto adapters = lora::inject(*model, LoraConfig().r(3).lora_alpha(7).target_modules({"up", "down"}));
  adapters.add(LoraConfig().r(2).lora_alpha(5).target_modules({"down"}), "other");
  randomize(adapters);
  folder.adapters(adapters);
  for (const auto& active : std::vector<std::vector<std::string>>{{"default"}, {"other"}, {"default", "other"}, {}}) {
    adapters.set_active(active);
    folder.output(active, x, model->forward(x));
  }
  folder.write();
}

void write_sequential(const std::string& out) {
  torch::nn::Sequential model;
  model->push_back("a", torch::nn::Linear(7, 9));
  model->push_back("relu", torch::nn::ReLU());
  model->push_back("b", torch::nn::Linear(9, 5));
  CaseFolder folder(out, "sequential", "sequential");
  folder.manifest()["layers"] = {{"a", "Linear"}, {"relu", "ReLU"}, {"b", "Linear"}};
  folder.base(*model);
  write_one(std::move(folder), model, LoraConfig().r(2).lora_alpha(3).target_modules({"b"}), torch::randn({3, 7}));
}

void write_attention(const std::string& out) {
  const auto x = torch::randn({6, 2, 16});
  const auto config = [](const std::vector<std::string>& targets) {
    return LoraConfig().r(3).lora_alpha(7).target_modules(targets);
  };
  const std::vector<std::pair<std::string, LoraConfig>> choices = {
      {"whole", config({"attn"})},
      {"in_proj", config({"in_proj"})},
      {"q_v", config({"in_proj[q,v]"})},
      {"out_proj", config({"out_proj"})},
      {"q_v_and_out_proj_of_other_rank", config({"in_proj[q,v]", "out_proj"})
                                             .lora_alpha(6)
                                             .rank_pattern({{"out_proj", 2}})
                                             .alpha_pattern({{"out_proj", 4}})},
      {"q_v_rslora", config({"in_proj[q,v]"}).use_rslora(true)}};
  for (const auto& [name, choice] : choices) {
    MhaBlock model;
    CaseFolder folder(out, "mha_" + name, "mha");
    folder.base(*model);
    write_one(std::move(folder), model, choice, x);
  }
}

GPT2LMHeadModel small_gpt2() {
  GPT2Config config;
  config.vocab_size = 50;
  config.n_positions = 20;
  config.n_embd = 24;
  config.n_layer = 2;
  config.n_head = 3;
  GPT2LMHeadModel model(config);
  torch::NoGradGuard no_grad;
  for (auto& parameter : model->parameters()) parameter.add_(torch::randn_like(parameter), 0.15);
  return model;
}

template <class Config>
void write_gpt2_case(const std::string& out, const std::string& name, const Config& config, const torch::Tensor& ids) {
  const auto model = small_gpt2();
  CaseFolder folder(out, "gpt2_" + name, "gpt2");
  folder.manifest()["base"] = "model";
  save_gpt2(model, folder.path() + "/model", /*end_of_text=*/0);
  write_one(std::move(folder), model, config, ids);
}

void write_gpt2(const std::string& out) {
  const auto ids = torch::randint(50, {2, 9}, at::kLong);
  const auto lora = [](const std::vector<std::string>& targets) {
    return LoraConfig().r(4).lora_alpha(12).target_modules(targets);
  };
  const std::vector<std::pair<std::string, LoraConfig>> choices = {
      {"attention", lora({"c_attn", "attn.c_proj"})},
      {"q_v", lora({"c_attn[q,v]"})},
      {"q_v_rslora", lora({"c_attn[q,v]", "c_fc"}).use_rslora(true)},
      {"k_and_mlp", lora({"c_attn[k]", "mlp.c_proj", "c_fc"})},
      {"every_part", lora({"c_attn[q,k,v]", "attn.c_proj"})},
      {"unequal_parts", lora({"c_attn[b,c]"}).fused_parts("c_attn", {{"a", 30}, {"b", 7}, {"c", 35}})},
      {"ranks", lora({"c_attn[q,v]", "attn.c_proj"})
                    .rank_pattern({{"h.0.attn.c_attn", 2}, {"c_proj", 5}})
                    .alpha_pattern({{"h.1.attn.c_attn", 3}})},
      {"embedding", lora({"wte", "c_attn"})},
      {"tokens_of_a_tied_head", lora({"c_attn"}).trainable_token_indices({7, 0, 33})}};
  for (const auto& [name, choice] : choices) write_gpt2_case(out, name, choice, ids);
}

/// Every option that reaches further than the factors of a Linear.
void write_options(const std::string& out) {
  using lora::BiasCopies;
  const auto lora = [](const std::vector<std::string>& targets) {
    return LoraConfig().r(3).lora_alpha(7).target_modules(targets);
  };
  const std::vector<std::pair<std::string, LoraConfig>> choices = {
      {"embedding", lora({"wte", "mix"})},
      {"conv", lora({"conv", "h.1.mix"})},
      {"bias_all", lora({"mix"}).bias(BiasCopies::kAll)},
      {"bias_lora_only", lora({"mix", "conv"}).bias(BiasCopies::kAdaptedOnly)},
      {"lora_bias", lora({"mix", "conv"}).lora_bias(true)},
      {"modules_to_save", lora({"mix"}).modules_to_save({"classifier", "norm"})},
      {"bias_and_modules", lora({"mix", "conv"}).bias(BiasCopies::kAll).modules_to_save({"classifier"})},
      {"tokens", lora({"mix"}).trainable_token_indices({{"wte", {9, 1, 4}}})},
      {"layers", lora({"mix"}).layers_to_transform(1).layers_pattern("h")},
      {"layers_without_pattern", lora({"mix"}).layers_to_transform({0})},
      {"everything", lora({"wte", "mix", "conv"})
                         .exclude_modules({"h.0.mix"})
                         .bias(BiasCopies::kAdaptedOnly)
                         .modules_to_save({"norm", "dense"})
                         .rank_pattern({{"conv", 2}})
                         .alpha_pattern({{"wte", 3}})
                         .use_rslora(true)}};
  const auto ids = torch::randint(11, {4, 7}, at::kLong);
  for (const auto& [name, choice] : choices) {
    Reader model;
    CaseFolder folder(out, "reader_" + name, "reader");
    folder.base(*model);
    write_one(std::move(folder), model, choice, ids);
  }
  Convs convs;
  CaseFolder folder(out, "convs", "convs");
  folder.base(*convs);
  write_one(std::move(folder), convs, lora({"first", "second"}), torch::randn({2, 2, 3, 6, 6}));
}

template <class Config>
void write_mlp(const std::string& out, const std::string& name, Config config) {
  Mlp model;
  CaseFolder folder(out, "mlp_" + name, "mlp");
  folder.base(*model);
  write_one(std::move(folder), model, config.target_modules({"up", "down"}), torch::randn({5, 12}));
}

/// The methods beside LoRA that PEFT has, and LoRA's other starts.
void write_methods(const std::string& out) {
  using lora::LoraInit;
  const auto dora = LoraConfig().r(3).lora_alpha(7).use_dora(true);
  write_mlp(out, "dora", dora);
  write_mlp(out, "vera", lora::VeraConfig().r(5));
  write_mlp(out, "vera_without_projection", lora::VeraConfig().r(5).projection_prng_key(9).save_projection(false));
  write_mlp(out, "ia3", lora::IA3Config().feedforward_modules({"down"}));
  write_mlp(out, "ia3_without_feedforward", lora::IA3Config());
  write_mlp(out, "miss", lora::MissConfig().r(3));
  write_mlp(out, "miss_bat", lora::MissConfig().r(4).init_weights(lora::MissForm::kBat));
  write_mlp(out, "miss_mini", lora::MissConfig().r(3).mini_r(4).init_weights(lora::MissForm::kMini));
  for (const auto& [name, init] :
       {std::pair{"pissa", LoraInit::kPissa}, {"olora", LoraInit::kOlora}, {"orthogonal", LoraInit::kOrthogonal}}) {
    write_mlp(out, name, LoraConfig().r(4).lora_alpha(7).init_lora_weights(init));
    write_mlp(out, std::string(name) + "_rslora",
              LoraConfig().r(4).lora_alpha(7).use_rslora(true).init_lora_weights(init));
  }

  const auto ids = torch::randint(50, {2, 9}, at::kLong);
  auto of_gpt2 = dora;
  write_gpt2_case(out, "dora", of_gpt2.target_modules({"c_attn", "attn.c_proj"}), ids);
  write_gpt2_case(out, "dora_q_v", of_gpt2.target_modules({"c_attn[q,v]"}), ids);
  write_gpt2_case(out, "vera", lora::VeraConfig().r(5).target_modules({"c_attn", "c_fc"}), ids);
  write_gpt2_case(out, "ia3",
                  lora::IA3Config().target_modules({"c_attn", "mlp.c_proj"}).feedforward_modules({"mlp.c_proj"}), ids);
  write_gpt2_case(out, "ia3_q_v_of_one_layer",
                  lora::IA3Config().target_modules({"c_attn[q,v]"}).layers_to_transform({1}), ids);
  write_gpt2_case(out, "pissa_q_v",
                  LoraConfig().r(3).lora_alpha(7).init_lora_weights(LoraInit::kPissa).target_modules({"c_attn[q,v]"}),
                  ids);

  Reader model;
  CaseFolder folder(out, "reader_dora", "reader");
  folder.base(*model);
  of_gpt2.target_modules({"wte", "mix", "conv"});
  write_one(std::move(folder), model, of_gpt2, torch::randint(11, {4, 7}, at::kLong));
  Convs convs;
  CaseFolder of_convs(out, "convs_ia3", "convs");
  of_convs.base(*convs);
  write_one(std::move(of_convs), convs,
            lora::IA3Config().target_modules({"first", "second"}).feedforward_modules({"second"}),
            torch::randn({2, 2, 3, 6, 6}));
}

}  // namespace

void write_adapters(const Arguments& arguments) {
  torch::manual_seed(20260107);
  const auto& out = arguments[0];
  write_mlps(out);
  write_several_adapters(out);
  write_sequential(out);
  write_attention(out);
  write_gpt2(out);
  write_options(out);
  write_methods(out);
}
