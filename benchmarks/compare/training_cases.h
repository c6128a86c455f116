// Cases that train.
#pragma once

#include <algorithm>
#include <cstddef>
#include <functional>
#include <initializer_list>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "measure.h"         // defines: seconds_of, resident_bytes, reset_peak
#include "operator_times.h"  // defines: OperatorTimes
#include "setup.h"           // defines: Arguments, Adapted

/// The label of each token, that of its successor; the last of a sequence has none.
inline at::Tensor labels_of(const at::Tensor& ids) {
  return at::cat({ids.slice(1, 1), at::full({ids.size(0), 1}, -100, ids.options())}, 1);
}

/// The mean loss of the labelled tokens.
inline at::Tensor loss_of(const Arguments& arguments, GPT2LMHeadModel model, const at::Tensor& ids,
                          const at::Tensor& labels) {
  if (arguments.full_logits) {
    return at::cross_entropy_loss(model->forward(ids).flatten(0, 1).to(at::kFloat), labels.flatten());
  }
  return lora::linear_cross_entropy(model->transformer->forward(ids), model->lm_head->weight, labels);
}

/// Does `steps` training steps and says how long each took and its loss.
class Trainer {
 public:
  Trainer(const Arguments& arguments, Adapted& adapted) : optimizer_(make_optimizer(adapted.adapters)) {
    adapted.model->train();
    if (arguments.plain) return;
    lora::keep_freed_memory();
    fast_.emplace();
  }

  double step(const at::Tensor& loss) {
    loss.backward();
    optimizer_.step();
    optimizer_.zero_grad();
    return loss.item<double>();
  }

  Json run(int steps, const std::function<at::Tensor(int)>& loss_at) {
    std::vector<double> seconds, losses;
    for (int i = 0; i < steps; ++i) {
      seconds.push_back(seconds_of([&] { losses.push_back(step(loss_at(i))); }));
    }
    return {{"seconds", seconds}, {"losses", losses}};
  }

 private:
  torch::optim::AdamW optimizer_;
  std::optional<lora::FastOperators> fast_;
};

inline Json train(const Arguments& arguments) {
  at::ones({1});  // LibTorch is there before the idle process is measured
  const auto idle = resident_bytes("VmRSS");
  auto adapted = load_adapted(arguments);
  if (arguments.recompute) {
    adapted.model->transformer->run_layer = [](const auto& layer, const at::Tensor& x) {
      return lora::recompute(layer, x);
    };
  }
  const auto ids = batch_of(arguments), labels = labels_of(ids);
  std::int64_t base = 0;
  for (const auto& parameter : adapted.model->transformer->parameters()) {
    base += static_cast<std::int64_t>(parameter.nbytes());
  }
  reset_peak();
  auto result = Trainer(arguments, adapted).run(arguments.steps, [&](int) {
    return loss_of(arguments, adapted.model, ids, labels);
  });
  result["peak_bytes"] = resident_bytes("VmHWM") - idle;
  result["base_bytes"] = base;
  return result;
}

/// Where the time of a step goes: mean seconds of each operator.
inline Json profile(const Arguments& arguments) {
  auto adapted = load_adapted(arguments);
  const auto ids = batch_of(arguments), labels = labels_of(ids);
  Trainer trainer(arguments, adapted);
  const auto loss = [&](int) { return loss_of(arguments, adapted.model, ids, labels); };
  trainer.run(3, loss);
  const OperatorTimes times;
  trainer.run(arguments.steps, loss);
  auto seconds = times.seconds();
  for (auto& [name, value] : seconds) value /= arguments.steps;
  return {{"seconds", seconds}};
}

/// Sequences of one step, one after the other, with the label of each token.
struct Packed {
  at::Tensor ids;     // [tokens]
  at::Tensor labels;  // [tokens]
  std::vector<std::int64_t> lengths;
};

inline Packed pack(const Json& lines, std::size_t begin, std::size_t end) {
  std::vector<std::int64_t> ids, labels;
  Packed packed;
  for (auto row = begin; row < end; ++row) {
    const auto prompt = lines[row].at("prompt").get<std::vector<std::int64_t>>();
    const auto text = lines[row].at("text").get<std::vector<std::int64_t>>();
    ids.insert(ids.end(), prompt.begin(), prompt.end());
    ids.insert(ids.end(), text.begin(), text.end());
    labels.insert(labels.end(), prompt.size() - 1, -100);
    labels.insert(labels.end(), text.begin(), text.end());
    labels.push_back(-100);  // the last token has no successor
    packed.lengths.push_back(static_cast<std::int64_t>(prompt.size() + text.size()));
  }
  packed.ids = at::tensor(ids, at::kLong);
  packed.labels = at::tensor(labels, at::kLong);
  return packed;
}

inline Json e2e(const Arguments& arguments) {
  constexpr std::size_t kBatch = 8;
  const auto lines = read_json(arguments.path("e2e.json"));
  std::vector<Packed> batches;
  std::int64_t tokens = 0;
  for (std::size_t begin = 0; begin < lines.size(); begin += kBatch) {
    batches.push_back(pack(lines, begin, std::min(lines.size(), begin + kBatch)));
    tokens += batches.back().ids.numel();
  }
  auto adapted = load_adapted(arguments);
  auto result = Trainer(arguments, adapted).run(static_cast<int>(batches.size()), [&](int step) {
    const auto& batch = batches[static_cast<std::size_t>(step)];
    const auto hidden = adapted.model->transformer->forward_packed(batch.ids, batch.lengths);
    return lora::linear_cross_entropy(hidden, adapted.model->lm_head->weight, batch.labels);
  });
  result["tokens"] = tokens;
  return result;
}

/// How the seconds of a step grow with one size while the others are GPT-2 124M's, r = 8 and 512 tokens.
inline Json growth(const Arguments& arguments) {
  const auto seconds = [&](std::int64_t rank, std::int64_t tokens, std::int64_t layers) {
    GPT2Config config;
    config.n_layer = layers;
    auto adapted = make_adapted(config, rank);
    const auto length = std::min<std::int64_t>(tokens, 128);
    const auto ids = at::randint(config.vocab_size, {tokens / length, length}, at::kLong), labels = labels_of(ids);
    const auto result = Trainer(arguments, adapted).run(arguments.steps, [&](int) {
      return loss_of(arguments, adapted.model, ids, labels);
    });
    const auto times = result["seconds"].get<std::vector<double>>();
    return *std::min_element(times.begin(), times.end());
  };
  Json result;
  for (const std::int64_t rank : {1, 4, 16, 64, 256}) result["rank"].push_back({rank, seconds(rank, 512, 12)});
  for (const std::int64_t tokens : {64, 128, 256, 512, 1024, 2048, 4096}) {
    result["tokens"].push_back({tokens, seconds(8, tokens, 12)});
  }
  for (const std::int64_t layers : {1, 2, 4, 8, 16}) result["layers"].push_back({layers, seconds(8, 512, layers)});
  return result;
}
