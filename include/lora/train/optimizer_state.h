#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/Exception.h>
#include <c10/util/Type.h>
#include <lora/detail/json.h>
#include <lora/train/fields.h>
#include <lora/train/schedule.h>
#include <lora/version.h>
#include <torch/optim/lbfgs.h>
#include <torch/optim/optimizer.h>
#include <torch/serialize/archive.h>
#include <torch/types.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <typeinfo>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// The names of tensors by their identity.
using TensorNames = std::map<const c10::TensorImpl*, std::string>;

/// The groups and states of any of LibTorch's optimizers by the names of its parameters, where LibTorch itself goes by
/// their positions; and its schedule.
class OptimizerState {
 public:
  /// What load() takes: made and checked before anything changes.
  struct Prepared {
    std::shared_ptr<torch::serialize::InputArchive> archive;  // its copy constructor takes no constant
    int64_t step = 0;
  };

  /// `schedule` may be null. Throws c10::ValueError for a parameter without a name and for another optimizer's
  /// schedule.
  OptimizerState(torch::optim::Optimizer& optimizer, Schedule* schedule, const TensorNames& names)
      : optimizer_(optimizer), schedule_(schedule) {
    const auto& groups = optimizer.param_groups();
    TORCH_CHECK_VALUE(
        schedule == nullptr || (&schedule->optimizer() == &optimizer && schedule->base_lrs().size() == groups.size()),
        "[lora::TrainingState] found a schedule of another optimizer or of other parameter groups, "
        "expected that of optimizer()");
    for (size_t i = 0; i < groups.size(); ++i) {
      groups_.emplace_back();
      for (const auto& parameter : groups[i].params()) {
        const auto name = names.find(parameter.unsafeGetTensorImpl());
        TORCH_CHECK_VALUE(name != names.end(), "[lora::TrainingState] found a parameter of shape ", parameter.sizes(),
                          " without a name in the optimizer, expected one of adapters() or tensors()");
        groups_.back().parameters.push_back(name->second);
      }
      if (schedule != nullptr) groups_.back().base_lr = schedule->base_lrs()[i];
    }
  }

  /// What stays the same from the beginning of a run to its end.
  Json fixed() const {
    auto json = Json::object({{"optimizer", c10::demangle(typeid(optimizer_).name())}});
    if (schedule_ != nullptr) {
      const auto& options = schedule_->options();
      json["schedule"] = {{"type", schedule_name(options.type())},
                          {"warmup_steps", options.warmup_steps()},
                          {"total_steps", options.total_steps()},
                          {"num_cycles", options.num_cycles()}};
    }
    return json;
  }

  /// What changes, as JSON; the states' tensors go into `tensors` as "optimizer/<parameter>/<field>".
  Json json(TensorMap& tensors) const {
    auto groups = Json::array();
    auto states = Json::object();
    for (size_t i = 0; i < groups_.size(); ++i) {
      const auto& group = optimizer_.param_groups()[i];
      groups.push_back({{"parameters", groups_[i].parameters},
                        {"base_lr", groups_[i].base_lr},
                        {"options", fields_json(group.options(), "optimizer", tensors)}});
      for (size_t j = 0; j < group.params().size(); ++j) {
        const auto state = optimizer_.state().find(group.params()[j].unsafeGetTensorImpl());
        if (state == optimizer_.state().end()) continue;
        const auto& name = groups_[i].parameters[j];
        states[name] = fields_json(*writable(*state->second), "optimizer/" + name, tensors);
      }
    }
    return {{"step", schedule_ == nullptr ? 0 : schedule_->current_step()},
            {"groups", std::move(groups)},
            {"states", std::move(states)}};
  }

  /// Makes what load() takes out of a file's JSON and tensors, or reports why that does not fit. Throws a
  /// std::exception where the JSON is none of json().
  Prepared prepare(const Json& saved, const TensorMap& tensors, std::vector<std::string>& problems) const {
    const auto before = problems.size();
    const auto step = saved.at("step").get<int64_t>();
    if (step < 0) problems.push_back("found the step " + std::to_string(step) + ", expected 0 or more");
    const auto group_in_file = match_groups(saved, tensors, problems);
    if (problems.size() > before) return {};
    // The layout of Optimizer::save with the file's values at this optimizer's positions.
    torch::serialize::OutputArchive archive;
    torch::serialize::OutputArchive states(archive.compilation_unit());
    torch::serialize::OutputArchive groups(archive.compilation_unit());
    groups.write("param_groups/size", torch::tensor(static_cast<int64_t>(groups_.size())));
    for (size_t i = 0; i < groups_.size(); ++i) {
      torch::serialize::OutputArchive group(archive.compilation_unit());
      const auto& parameters = optimizer_.param_groups()[i].params();
      group.write("params/size", torch::tensor(static_cast<int64_t>(parameters.size())));
      for (size_t j = 0; j < parameters.size(); ++j) {
        const auto key = std::to_string(reinterpret_cast<size_t>(parameters[j].unsafeGetTensorImpl()));
        group.write("params/" + std::to_string(j), c10::IValue(key));
        const auto state = saved.at("states").find(groups_[i].parameters[j]);
        if (state == saved.at("states").end()) continue;
        auto fields = fields_archive(*state, archive,
                                     [&](const std::string& name) { return placed(tensors.at(name), parameters[j]); });
        states.write(key, fields);
      }
      auto options = fields_archive(saved.at("groups").at(group_in_file[i]).at("options"), archive,
                                    [&](const std::string& name) { return tensors.at(name); });
      group.write("options", options);
      groups.write("param_groups/" + std::to_string(i), group);
    }
    archive.write("pytorch_version", c10::IValue("1.5.0"));
    archive.write("state", states);
    archive.write("param_groups", groups);
    return {std::make_shared<torch::serialize::InputArchive>(reopened(archive)), step};
  }

  /// Replaces every state, the options of every group and the schedule's step. On an exception they are as before.
  void load(Prepared& prepared) const {
    auto before = std::move(optimizer_.state());
    optimizer_.state().clear();
    try {
      optimizer_.load(*prepared.archive);
    } catch (...) {
      optimizer_.state() = std::move(before);
      throw;
    }
    if (schedule_ == nullptr) return;
    std::vector<double> lrs;  // the program may have changed them beside its schedule
    for (const auto& group : optimizer_.param_groups()) lrs.push_back(group.options().get_lr());
    schedule_->go_to(prepared.step);
    for (size_t i = 0; i < lrs.size(); ++i) optimizer_.param_groups()[i].options().set_lr(lrs[i]);
  }

 private:
  using Names = std::vector<std::string>;

  struct Group {
    Names parameters;
    Json base_lr;
  };

  /// LBFGS keeps room for a calculation in each step that reads nothing of the last one's; LibTorch cannot write what
  /// is unused of it.
  static std::unique_ptr<torch::optim::OptimizerParamState> writable(const torch::optim::OptimizerParamState& state) {
    auto copy = state.clone();
    auto* const lbfgs = dynamic_cast<torch::optim::LBFGSParamState*>(copy.get());
    if (lbfgs != nullptr) lbfgs->al({});
    return copy;
  }

  /// On the parameter's device and, where it has its shape, with its strides.
  static at::Tensor placed(const at::Tensor& tensor, const at::Tensor& parameter) {
    if (tensor.sizes() != parameter.sizes()) return tensor.to(parameter.device());
    return at::empty_like(parameter, parameter.options().dtype(tensor.dtype()).requires_grad(false)).copy_(tensor);
  }

  /// For each group the index of the file's group with the same parameters.
  std::vector<size_t> match_groups(const Json& saved, const TensorMap& tensors, Names& problems) const {
    std::vector<Names> found;
    std::map<std::string, size_t> found_in;  // the file's group of each parameter
    for (const auto& group : saved.at("groups")) {
      found.push_back(group.at("parameters").get<Names>());
      for (const auto& name : found.back()) found_in[name] = found.size() - 1;
    }
    const auto before = problems.size();
    if (found.size() != groups_.size()) {
      problems.push_back("found " + std::to_string(found.size()) + " parameter groups, expected " +
                         std::to_string(groups_.size()));
    }
    std::set<std::string> known;
    for (const auto& group : groups_) known.insert(group.parameters.begin(), group.parameters.end());
    std::vector<size_t> matches;
    for (size_t i = 0; i < groups_.size(); ++i) {
      const auto& names = groups_[i].parameters;
      const auto first = names.empty() ? found_in.end() : found_in.find(names.front());
      matches.push_back(first == found_in.end() ? i : first->second);
      for (const auto& name : names) {
        if (found_in.count(name) == 0) {
          problems.push_back("found no " + name + " in the optimizer, expected it there");
        } else if (found_in[name] != matches[i]) {
          problems.push_back("found " + name + " in another parameter group than " + names.front() +
                             ", expected both in one");
        }
      }
      if (first == found_in.end()) continue;
      for (const auto& name : found[matches[i]]) {
        if (std::find(names.begin(), names.end(), name) != names.end() || known.count(name) == 0) continue;
        problems.push_back("found " + name + " in the parameter group of " + names.front() +
                           ", expected it in another");
      }
    }
    for (const auto& [name, group] : found_in) {
      if (known.count(name) == 0) problems.push_back("found " + name + " in the optimizer, expected it not there");
    }
    if (problems.size() > before) return matches;
    for (size_t i = 0; i < groups_.size(); ++i) {
      check_base_lr(groups_[i], saved.at("groups").at(matches[i]).at("base_lr"), problems);
      if (found[matches[i]] != groups_[i].parameters) check_order(i, tensors, problems);
    }
    return matches;
  }

  static void check_base_lr(const Group& group, const Json& found, Names& problems) {
    if (found == group.base_lr) return;
    problems.push_back("found the base learning rate " + found.dump() + ", expected " + group.base_lr.dump() +
                       " for the parameter group of " + (group.parameters.empty() ? "none" : group.parameters.front()));
  }

  /// A state over several parameters, as LBFGS has it, holds them one behind the other.
  void check_order(size_t index, const TensorMap& tensors, Names& problems) const {
    const auto& names = groups_[index].parameters;
    for (size_t i = 0; i < names.size(); ++i) {
      const auto prefix = "optimizer/" + names[i] + "/";
      for (auto state = tensors.lower_bound(prefix); state != tensors.end(); ++state) {
        if (state->first.compare(0, prefix.size(), prefix) != 0) break;
        if (state->second.sizes() == optimizer_.param_groups()[index].params()[i].sizes()) continue;
        problems.push_back("found the parameter group of " + names.front() +
                           " in another order, expected the same order for an optimizer that keeps one state for all");
        return;
      }
    }
  }

  torch::optim::Optimizer& optimizer_;
  Schedule* schedule_;
  std::vector<Group> groups_;
};

}  // namespace detail
LORA_NAMESPACE_END
