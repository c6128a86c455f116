// A small run with everything in it that has to be kept: several adapters, LoRA+ groups, dropout, random batches, a
// schedule.
#pragma once

#include <ATen/ATen.h>
#include <lora/lora.h>
#include <torch/optim/adamw.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "harness/temp_folder.h"
#include "harness/values.h"
#include "oracles/models.h"

namespace harness {

using MakeOptimizer = std::function<std::unique_ptr<torch::optim::Optimizer>(const lora::Adapters&)>;

template <class Optimizer, class Options>
MakeOptimizer optimizer_maker(const Options& options, double lr_ratio = 1) {
  return [=](const lora::Adapters& adapters) -> std::unique_ptr<torch::optim::Optimizer> {
    auto groups = lora::param_groups(adapters, options, lora::LoraPlusOptions().lr_ratio(lr_ratio));
    return std::make_unique<Optimizer>(std::move(groups), options);
  };
}

inline const MakeOptimizer kAdamW =
    optimizer_maker<torch::optim::AdamW>(torch::optim::AdamWOptions(0.03).weight_decay(0.1), 16);

inline lora::ScheduleOptions cosine() {
  return lora::ScheduleOptions().type(lora::ScheduleType::kCosine).warmup_steps(2).total_steps(8);
}

struct Choices {
  MakeOptimizer optimizer = kAdamW;
  lora::LoraConfig config = lora::LoraConfig().r(3).lora_alpha(7).lora_dropout(0.25).target_modules({"up", "down"});
  lora::ScheduleOptions schedule = cosine();
  uint64_t base_seed = 5;
  int64_t seed = 1;
  at::Device device = at::kCPU;
};

/// Two adapters on an Mlp whose batches are drawn at random, as are its dropout masks.
struct Training {
  explicit Training(const Choices& options = {}) : device(options.device) {
    {
      const at::NoGradGuard no_grad;
      auto seed = options.base_seed;
      for (auto& parameter : model->parameters()) parameter.copy_(harness::normal(parameter.sizes(), seed++) * 0.3);
    }
    model->to(device);
    adapters = lora::inject(*model, options.config);
    adapters->add(lora::LoraConfig().r(2).target_modules({"down"}), "other");
    adapters->set_active({"default", "other"});
    adapters->set_trainable({"default", "other"});
    optimizer = options.optimizer(*adapters);
    schedule.emplace(*optimizer, options.schedule);
    state.adapters(*adapters).optimizer(*optimizer).schedule(*schedule).setting("seed", options.seed);
  }

  double step() {
    const auto x = at::randn({6, 12}, device);
    const auto closure = [&] {
      optimizer->zero_grad();
      const auto loss = (model->forward(x) - x.narrow(1, 0, 8)).pow(2).mean();
      loss.backward();
      return loss;
    };
    const auto loss = optimizer->step(closure);
    schedule->step();
    return loss.item<double>();
  }

  void steps(int count) {
    for (int i = 0; i < count; ++i) step();
  }

  /// Every byte that a later step depends on.
  std::map<std::string, std::string> bytes() {
    state.save(folder / "bytes");
    std::map<std::string, std::string> result;
    auto file = lora::load_safetensors_with_metadata(folder / "bytes");
    for (const auto& [name, tensor] : file.tensors) result[name] = harness::bytes_of(tensor);
    for (const auto& group : optimizer->param_groups()) {
      result["rates"] += std::to_string(group.options().get_lr()) + " ";
    }
    result["step"] = std::to_string(schedule->current_step());
    return result;
  }

  TempFolder folder;
  at::Device device;
  Mlp model;
  std::optional<lora::Adapters> adapters;
  std::unique_ptr<torch::optim::Optimizer> optimizer;
  std::optional<lora::Schedule> schedule;
  lora::TrainingState state;
};

}  // namespace harness
