#pragma once

#include <c10/util/Exception.h>
#include <lora/detail/error.h>
#include <lora/version.h>
#include <torch/arg.h>
#include <torch/optim/optimizer.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

LORA_NAMESPACE_BEGIN

/// How the learning rate goes on after its linear warm-up from 0, as in transformers' schedules of these names.
enum class ScheduleType {
  kConstant,  ///< It stays.
  kLinear,    ///< It falls in a line to 0 at total_steps and stays there.
  kCosine,    ///< It follows num_cycles waves of a cosine until total_steps, and the same waves beyond.
};

/// "constant", "linear" or "cosine".
inline const char* schedule_name(ScheduleType type) {
  return type == ScheduleType::kConstant ? "constant" : type == ScheduleType::kLinear ? "linear" : "cosine";
}

/// Options of a Schedule.
class ScheduleOptions {
 public:
  /// How the learning rate goes on after the warm-up.
  TORCH_ARG(ScheduleType, type) = ScheduleType::kConstant;
  /// Steps of linear warm-up; step 0 has the learning rate 0 then.
  TORCH_ARG(int64_t, warmup_steps) = 0;
  /// Steps of the whole run, the warm-up included; a constant schedule has no need of it.
  TORCH_ARG(int64_t, total_steps) = 0;
  /// Waves of the cosine; half a wave falls from the base learning rate to 0.
  TORCH_ARG(double, num_cycles) = 0.5;

 public:
  /// Throws c10::ValueError for a value out of range.
  void validate() const {
    TORCH_CHECK_VALUE(warmup_steps() >= 0, "[lora::ScheduleOptions] found warmup_steps = ", warmup_steps(),
                      ", expected 0 or more");
    const bool needs_total = type() != ScheduleType::kConstant;
    TORCH_CHECK_VALUE(total_steps() >= (needs_total ? 1 : 0),
                      "[lora::ScheduleOptions] found total_steps = ", total_steps(), ", expected ",
                      needs_total ? "1" : "0", " or more for a ", schedule_name(type()),
                      " schedule; set it to the number of optimizer steps");
    TORCH_CHECK_VALUE(std::isfinite(num_cycles()), "[lora::ScheduleOptions] found num_cycles = ", num_cycles(),
                      ", expected a finite number");
  }
};

/// The factor on every base learning rate at a step, counted from 0. More warm-up than total steps is allowed, as in
/// transformers: the schedule ends in its warm-up.
///
/// Throws c10::ValueError for a negative step and for options out of range.
inline double schedule_factor(const ScheduleOptions& options, int64_t step) {
  options.validate();
  TORCH_CHECK_VALUE(step >= 0, "[lora::schedule_factor] found the step ", step, ", expected 0 or more");
  const auto ratio = [](int64_t part, int64_t whole) {
    return static_cast<double>(part) / static_cast<double>(std::max<int64_t>(1, whole));
  };
  const auto warmup = options.warmup_steps();
  const auto total = options.total_steps();
  if (step < warmup) return ratio(step, warmup);
  if (options.type() == ScheduleType::kConstant) return 1.0;
  if (options.type() == ScheduleType::kLinear) return std::max(0.0, ratio(total - step, total - warmup));
  constexpr double kPi = 3.14159265358979323846;
  const double progress = ratio(step - warmup, total - warmup);
  return std::max(0.0, 0.5 * (1.0 + std::cos(kPi * options.num_cycles() * 2.0 * progress)));
}

/// Sets the learning rates of an optimizer's groups, each to its own base learning rate times the schedule's factor.
///
/// The base learning rates are those that the groups have when it is made, which sets the rates of step 0. Call step()
/// after every optimizer.step(). The optimizer has to outlive it.
class Schedule {
 public:
  /// Sets the learning rates of step 0.
  Schedule(torch::optim::Optimizer& optimizer, const ScheduleOptions& options)
      : optimizer_(&optimizer), options_(options) {
    options_.validate();
    for (const auto& group : optimizer.param_groups()) base_lrs_.push_back(group.options().get_lr());
    go_to(0);
  }

  /// Sets the learning rates of the next step.
  void step() { go_to(step_ + 1); }

  /// Sets the learning rates of the given step, from 0. Throws a StateError where groups were added meanwhile.
  void go_to(int64_t step) {
    const auto factor = schedule_factor(options_, step);
    auto& groups = optimizer_->param_groups();
    if (groups.size() != base_lrs_.size()) {
      throw StateError("[lora::Schedule] found " + std::to_string(groups.size()) + " parameter groups, expected the " +
                       std::to_string(base_lrs_.size()) +
                       " that the schedule was made for; make it after the last add_param_group");
    }
    for (size_t i = 0; i < groups.size(); ++i) groups[i].options().set_lr(base_lrs_[i] * factor);
    step_ = step;
  }

  /// The optimizer whose learning rates it sets.
  const torch::optim::Optimizer& optimizer() const noexcept { return *optimizer_; }
  /// As they were given.
  const ScheduleOptions& options() const noexcept { return options_; }
  /// The step whose learning rates are set: the number of calls of step().
  int64_t current_step() const noexcept { return step_; }
  /// The learning rates at factor 1, in the order of the groups.
  const std::vector<double>& base_lrs() const noexcept { return base_lrs_; }

 private:
  torch::optim::Optimizer* optimizer_;
  ScheduleOptions options_;
  std::vector<double> base_lrs_;
  int64_t step_ = 0;
};

LORA_NAMESPACE_END
