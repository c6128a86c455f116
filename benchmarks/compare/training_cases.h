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

/// The lines of one step with the label of each token.
struct PackedLines {
  GPT2Packed packed;
  at::Tensor labels;  // [tokens]
};

/// Lines one after the other, those with the same prompt behind one copy of it, or each by itself. The prompt's last
/// token, which predicts the text's first, is the text's own.
inline PackedLines pack(const Json& lines, std::size_t begin, std::size_t end, bool share_prompts) {
  std::vector<std::int64_t> ids, labels;
  PackedLines result;
  auto& packed = result.packed;
  const auto add_piece = [&](const std::vector<std::int64_t>& tokens) {
    ids.insert(ids.end(), tokens.begin(), tokens.end());
    packed.lengths.push_back(static_cast<std::int64_t>(tokens.size()));
    return packed.lengths.size() - 1;
  };
  std::map<std::vector<std::int64_t>, std::size_t> prompts;
  for (auto row = begin; row < end; ++row) {
    auto prompt = lines[row].at("prompt").get<std::vector<std::int64_t>>();
    auto text = lines[row].at("text").get<std::vector<std::int64_t>>();
    const auto last = prompt.back();
    prompt.pop_back();
    if (!share_prompts) prompts.clear();
    const auto [shared, is_new] = prompts.emplace(prompt, 0);
    if (is_new) {
      shared->second = add_piece(prompt);
      labels.resize(ids.size(), -100);
    }
    labels.insert(labels.end(), text.begin(), text.end());
    labels.push_back(-100);  // the last token has no successor
    text.insert(text.begin(), last);
    packed.sequences.push_back({shared->second, add_piece(text)});
  }
  packed.ids = at::tensor(ids, at::kLong);
  result.labels = at::tensor(labels, at::kLong);
  return result;
}

inline Json e2e(const Arguments& arguments) {
  constexpr std::size_t kBatch = 8;
  const auto lines = read_json(arguments.path("e2e.json"));
  std::vector<PackedLines> batches;
  std::size_t tokens = 0;
  for (std::size_t begin = 0; begin < lines.size(); begin += kBatch) {
    batches.push_back(pack(lines, begin, std::min(lines.size(), begin + kBatch), !arguments.lines_apart));
  }
  for (const auto& line : lines) tokens += line.at("prompt").size() + line.at("text").size();
  auto adapted = load_adapted(arguments);
  auto result = Trainer(arguments, adapted).run(static_cast<int>(batches.size()), [&](int step) {
    const auto& [packed, labels] = batches[static_cast<std::size_t>(step)];
    const auto hidden = adapted.model->transformer->forward_packed(packed);
    return lora::linear_cross_entropy(hidden, adapted.model->lm_head->weight, labels);
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
  for (const std::int64_t tokens : {64, 256, 1024, 4096}) {
    result["tokens"].push_back({tokens, seconds(8, tokens, 12)});
  }
  for (const std::int64_t layers : {1, 4, 16}) result["layers"].push_back({layers, seconds(8, 512, layers)});
  return result;
}
