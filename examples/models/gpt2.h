#pragma once

#include <ATen/ATen.h>
#include <torch/nn/init.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/modules/normalization.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

/// Sizes of a GPT-2 under the names of Hugging Face's config.json; the defaults are the 124M model.
struct GPT2Config {
  std::int64_t vocab_size = 50257;
  std::int64_t n_positions = 1024;
  std::int64_t n_embd = 768;
  std::int64_t n_layer = 12;
  std::int64_t n_head = 12;
  /// Width of the MLP; 0 stands for 4 * n_embd.
  std::int64_t n_inner = 0;
  double layer_norm_epsilon = 1e-5;
  double initializer_range = 0.02;

  std::int64_t inner_size() const { return n_inner > 0 ? n_inner : 4 * n_embd; }
};

/// Keys and values in front of the input, a pair of [batch, head, past, head size] for each layer; empty: none.
using GPT2Past = std::vector<std::pair<torch::Tensor, torch::Tensor>>;

/// Keys and values of the tokens already read, which a forward extends. Reading may begin behind a past.
struct GPT2Cache {
  GPT2Past layers;

  std::int64_t length() const { return layers.empty() ? 0 : layers.front().first.size(2); }
};

/// What a forward reads: tokens or, in their place, embeddings, behind a past whose positions come first.
struct GPT2Inputs {
  torch::Tensor input_ids;      // [batch, length]; undefined where there are embeddings
  torch::Tensor inputs_embeds;  // [batch, length, n_embd], without those of the positions
  GPT2Past past_key_values;     // may need a gradient; a cache takes it as its layers instead
};

/// Sequences without padding, made of pieces that lie one after the other. Sequences that begin alike, as several
/// answers to a prompt, share these pieces, which are computed once; what an adapter's dropout drops there, they share
/// too.
struct GPT2Packed {
  torch::Tensor ids;  // [tokens], those of all pieces
  std::vector<std::int64_t> lengths;
  /// The pieces of each sequence in their order. One that is shared has the same pieces before it everywhere.
  std::vector<std::vector<std::size_t>> sequences;
};

struct GPT2AttentionImpl : torch::nn::Module {
  explicit GPT2AttentionImpl(const GPT2Config& config)
      : c_attn(register_module("c_attn", torch::nn::Linear(config.n_embd, 3 * config.n_embd))),
        c_proj(register_module("c_proj", torch::nn::Linear(config.n_embd, config.n_embd))),
        heads_(config.n_head) {}

  /// x: [batch, length, n_embd] to the same shape; `past` is read and extended where it is given.
  torch::Tensor forward(const torch::Tensor& x, std::pair<torch::Tensor, torch::Tensor>* past) {
    const auto batch = x.size(0), length = x.size(1), width = x.size(2);
    std::vector<torch::Tensor> heads;
    for (const auto& part : c_attn(x).split(width, /*dim=*/2)) {
      heads.push_back(part.view({batch, length, heads_, width / heads_}).transpose(1, 2));
    }
    auto query = heads[0], key = heads[1], value = heads[2];
    if (past != nullptr) {
      if (past->first.defined()) {
        key = torch::cat({past->first, key}, 2);
        value = torch::cat({past->second, value}, 2);
      }
      *past = {key, value};
    }
    const auto mixed = attend(query, key, value);
    return c_proj(mixed.transpose(1, 2).reshape({batch, length, width}));
  }

  /// x: [tokens, n_embd] to the same shape.
  torch::Tensor forward_packed(const torch::Tensor& x, const GPT2Packed& packed) {
    const auto tokens = x.size(0), width = x.size(1);
    std::vector<std::vector<torch::Tensor>> pieces;  // of query, key and value: [heads, length, head size] each
    for (const auto& part : c_attn(x).split(width, /*dim=*/1)) {
      const auto heads = part.view({tokens, heads_, width / heads_}).transpose(0, 1);
      pieces.push_back(heads.split_with_sizes(packed.lengths, /*dim=*/1));
    }
    std::vector<torch::Tensor> mixed(packed.lengths.size());
    for (const auto& sequence : packed.sequences) {
      std::vector<torch::Tensor> whole;
      for (const auto& of_part : pieces) whole.push_back(join(of_part, sequence).unsqueeze(0));
      const auto attended = at::scaled_dot_product_attention(whole[0], whole[1], whole[2], {}, 0.0, /*is_causal=*/true);
      std::int64_t begin = 0;
      for (const auto piece : sequence) {
        const auto length = packed.lengths[piece];
        if (!mixed[piece].defined()) mixed[piece] = attended.squeeze(0).narrow(1, begin, length).transpose(0, 1);
        begin += length;
      }
    }
    return c_proj(torch::cat(mixed).reshape({tokens, width}));
  }

  torch::nn::Linear c_attn, c_proj;

 private:
  /// Row i of the queries sees the whole past and the new tokens up to itself.
  static torch::Tensor attend(const torch::Tensor& query, const torch::Tensor& key, const torch::Tensor& value) {
    const auto length = query.size(2), past = key.size(2) - length;
    if (past == 0 || length == 1) {
      return at::scaled_dot_product_attention(query, key, value, {}, 0.0, /*is_causal=*/past == 0);
    }
    const auto mask = torch::ones({length, past + length}, query.options().dtype(torch::kBool)).tril(past);
    return at::scaled_dot_product_attention(query, key, value, mask);
  }

  static torch::Tensor join(const std::vector<torch::Tensor>& pieces, const std::vector<std::size_t>& sequence) {
    if (sequence.size() == 1) return pieces[sequence.front()];
    std::vector<torch::Tensor> parts;
    for (const auto piece : sequence) parts.push_back(pieces[piece]);
    return torch::cat(parts, 1);
  }

  std::int64_t heads_;
};
TORCH_MODULE(GPT2Attention);

struct GPT2MLPImpl : torch::nn::Module {
  explicit GPT2MLPImpl(const GPT2Config& config)
      : c_fc(register_module("c_fc", torch::nn::Linear(config.n_embd, config.inner_size()))),
        c_proj(register_module("c_proj", torch::nn::Linear(config.inner_size(), config.n_embd))) {}

  torch::Tensor forward(const torch::Tensor& x) { return c_proj(at::gelu(c_fc(x), "tanh")); }

  torch::nn::Linear c_fc, c_proj;
};
TORCH_MODULE(GPT2MLP);

struct GPT2BlockImpl : torch::nn::Module {
  explicit GPT2BlockImpl(const GPT2Config& config)
      : ln_1(register_module("ln_1", torch::nn::LayerNorm(norm_options(config)))),
        attn(register_module("attn", GPT2Attention(config))),
        ln_2(register_module("ln_2", torch::nn::LayerNorm(norm_options(config)))),
        mlp(register_module("mlp", GPT2MLP(config))) {}

  torch::Tensor forward(const torch::Tensor& x, std::pair<torch::Tensor, torch::Tensor>* past) {
    const auto attended = x + attn(ln_1(x), past);
    return attended + mlp(ln_2(attended));
  }

  torch::Tensor forward_packed(const torch::Tensor& x, const GPT2Packed& packed) {
    const auto attended = x + attn->forward_packed(ln_1(x), packed);
    return attended + mlp(ln_2(attended));
  }

  static torch::nn::LayerNormOptions norm_options(const GPT2Config& config) {
    return torch::nn::LayerNormOptions({config.n_embd}).eps(config.layer_norm_epsilon);
  }

  torch::nn::LayerNorm ln_1;
  GPT2Attention attn;
  torch::nn::LayerNorm ln_2;
  GPT2MLP mlp;
};
TORCH_MODULE(GPT2Block);

/// The stack without the head (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").
struct GPT2ModelImpl : torch::nn::Module {
  explicit GPT2ModelImpl(const GPT2Config& config)
      : wte(register_module("wte", torch::nn::Embedding(config.vocab_size, config.n_embd))),
        wpe(register_module("wpe", torch::nn::Embedding(config.n_positions, config.n_embd))),
        h(register_module("h", torch::nn::ModuleList())),
        ln_f(register_module("ln_f", torch::nn::LayerNorm(GPT2BlockImpl::norm_options(config)))) {
    for (std::int64_t layer = 0; layer < config.n_layer; ++layer) h->push_back(GPT2Block(config));
  }

  /// input_ids: [batch, length] to hidden states [batch, length, n_embd].
  torch::Tensor forward(const torch::Tensor& input_ids, GPT2Cache* cache = nullptr) {
    return forward(GPT2Inputs{input_ids, {}, {}}, cache);
  }

  /// The same for all that can be read.
  torch::Tensor forward(const GPT2Inputs& inputs, GPT2Cache* cache = nullptr) {
    check_inputs(inputs, cache);
    const auto& past = inputs.past_key_values;
    auto x = inputs.inputs_embeds.defined() ? inputs.inputs_embeds : wte(inputs.input_ids);
    const auto begin = cache != nullptr ? cache->length() : GPT2Cache{past}.length();
    const auto end = begin + x.size(1);
    TORCH_CHECK_VALUE(end <= wpe->options.num_embeddings(), "[GPT2] found ", end, " tokens, expected at most ",
                      wpe->options.num_embeddings(), " (n_positions); shorten the input");
    if (cache != nullptr) cache->layers.resize(h->size());
    x = x + wpe(torch::arange(begin, end, x.options().dtype(torch::kInt64)));
    return run_blocks(x, [this, cache, past](std::size_t layer, const torch::Tensor& hidden) {
      if (cache != nullptr) return block(layer).forward(hidden, &cache->layers[layer]);
      if (past.empty()) return block(layer).forward(hidden, nullptr);
      auto of_layer = past[layer];  // its own, as a layer may be run twice
      return block(layer).forward(hidden, &of_layer);
    });
  }

  /// Hidden states [tokens, n_embd]: what a padded batch gives, without the padding and without computing twice what
  /// sequences share.
  torch::Tensor forward_packed(const GPT2Packed& packed) {
    const auto x = wte(packed.ids) + wpe(positions_of(packed));
    return run_blocks(x, [this, packed](std::size_t layer, const torch::Tensor& hidden) {
      return block(layer).forward_packed(hidden, packed);
    });
  }

  /// A layer of the stack as a function of the hidden states.
  using Layer = std::function<torch::Tensor(const torch::Tensor&)>;
  /// Runs a layer; set it to run them in another way, as with activation recomputation.
  std::function<torch::Tensor(const Layer&, const torch::Tensor&)> run_layer;

  torch::nn::Embedding wte, wpe;
  torch::nn::ModuleList h;
  torch::nn::LayerNorm ln_f;

 private:
  void check_inputs(const GPT2Inputs& inputs, const GPT2Cache* cache) const {
    const bool embeds = inputs.inputs_embeds.defined();
    TORCH_CHECK_VALUE(embeds != inputs.input_ids.defined(), "[GPT2] found ", embeds ? "both" : "neither",
                      " of input_ids and inputs_embeds, expected one of them");
    const auto& past = inputs.past_key_values;
    TORCH_CHECK_VALUE(cache == nullptr || past.empty(),
                      "[GPT2] found past_key_values beside a cache, expected them as the layers of a new cache");
    const auto layers = cache != nullptr ? cache->layers.size() : past.size();
    TORCH_CHECK_VALUE(layers == 0 || layers == h->size(), "[GPT2] found a past of ", layers, " layers, expected ",
                      h->size());
  }

  /// [tokens]: where each token stands in its sequences.
  torch::Tensor positions_of(const GPT2Packed& packed) const {
    constexpr std::int64_t kNowhere = -1;
    const auto count = packed.lengths.size();
    std::vector<std::int64_t> begins(count, kNowhere);
    for (const auto& sequence : packed.sequences) {
      std::int64_t begin = 0;
      for (const auto piece : sequence) {
        TORCH_CHECK_VALUE(piece < count, "[GPT2] found piece ", piece, " in a sequence, expected one of ", count);
        const auto end = begin + packed.lengths[piece];
        TORCH_CHECK_VALUE(end <= wpe->options.num_embeddings(), "[GPT2] found ", end, " tokens, expected at most ",
                          wpe->options.num_embeddings(), " (n_positions); shorten the input");
        if (begins[piece] == kNowhere) begins[piece] = begin;
        TORCH_CHECK_VALUE(begins[piece] == begin, "[GPT2] found piece ", piece, " behind ", begins[piece], " and ",
                          begin, " tokens, expected the same pieces before it in every sequence");
        begin = end;
      }
    }
    std::vector<torch::Tensor> positions;
    for (std::size_t piece = 0; piece < count; ++piece) {
      const auto begin = begins[piece];
      TORCH_CHECK_VALUE(begin != kNowhere, "[GPT2] found piece ", piece,
                        " in no sequence, expected each in one or more");
      positions.push_back(torch::arange(begin, begin + packed.lengths[piece], packed.ids.options()));
    }
    return torch::cat(positions);
  }

  GPT2BlockImpl& block(std::size_t layer) { return *h->ptr<GPT2BlockImpl>(layer); }

  template <class Forward>
  torch::Tensor run_blocks(torch::Tensor x, const Forward& forward) {
    for (std::size_t layer = 0; layer < h->size(); ++layer) {
      const auto run = [forward, layer](const torch::Tensor& hidden) { return forward(layer, hidden); };
      x = run_layer ? run_layer(run, x) : run(x);
    }
    return ln_f(x);
  }
};
TORCH_MODULE(GPT2Model);

/// A linear layer without bias whose weight is another module's parameter.
struct TiedLinearImpl : torch::nn::LinearImpl {
  explicit TiedLinearImpl(const torch::Tensor& shared)
      // One number, as the constructor draws a weight that is replaced at once.
      : LinearImpl(torch::nn::LinearOptions(1, 1).bias(false)) {
    options = torch::nn::LinearOptions(shared.size(1), shared.size(0)).bias(false);
    weight = parameters_["weight"] = shared;
  }
};
TORCH_MODULE(TiedLinear);

/// What the weights of a new GPT-2 hold: GPT-2's random start, or whatever is cheapest, as they are about to be loaded.
enum class GPT2Start { kRandom, kToBeLoaded };

/// GPT-2 with its language model head, parameter names as Hugging Face's GPT2LMHeadModel; it has no dropout of its own.
struct GPT2LMHeadModelImpl : torch::nn::Module {
  explicit GPT2LMHeadModelImpl(const GPT2Config& gpt2_config, GPT2Start start = GPT2Start::kRandom)
      : config(gpt2_config), transformer(register_module("transformer", GPT2Model(gpt2_config))) {
    if (start == GPT2Start::kRandom) initialize();
    lm_head = register_module("lm_head", TiedLinear(transformer->wte->weight));
  }

  /// input_ids: [batch, length] to logits [batch, length, vocab_size]; padding on the right needs no mask.
  torch::Tensor forward(const torch::Tensor& input_ids, GPT2Cache* cache = nullptr) {
    return lm_head(transformer->forward(input_ids, cache));
  }

  /// The same for all that can be read; the embeddings' positions have logits too.
  torch::Tensor forward(const GPT2Inputs& inputs, GPT2Cache* cache = nullptr) {
    return lm_head(transformer->forward(inputs, cache));
  }

  const GPT2Config config;
  GPT2Model transformer;
  TiedLinear lm_head{nullptr};

 private:
  void initialize() {
    torch::NoGradGuard no_grad;
    for (auto& parameter : named_parameters()) {
      const auto& name = parameter.key();
      const auto ends_with = [&](const std::string& suffix) {
        return name.size() >= suffix.size() && name.compare(name.size() - suffix.size(), suffix.size(), suffix) == 0;
      };
      if (name.find("ln_") != std::string::npos) continue;
      if (ends_with(".bias")) {
        torch::nn::init::zeros_(parameter.value());
      } else {
        // Two residual branches a layer: their sum keeps its variance by this factor (GPT-2, section 2.3).
        const double residual = ends_with("c_proj.weight") ? std::sqrt(2.0 * static_cast<double>(config.n_layer)) : 1.0;
        torch::nn::init::normal_(parameter.value(), 0.0, config.initializer_range / residual);
      }
    }
  }
};
TORCH_MODULE(GPT2LMHeadModel);
