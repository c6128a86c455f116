#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>
#include <lora/adapters.h>
#include <lora/detail/error.h>
#include <lora/detail/json.h>
#include <lora/detail/random_state.h>
#include <lora/inject/adapters_json.h>
#include <lora/io/product_plan_json.h>
#include <lora/io/training_file.h>
#include <lora/train/fields.h>
#include <lora/train/optimizer_state.h>
#include <lora/train/schedule.h>
#include <lora/train/values.h>
#include <lora/version.h>
#include <lora/weight/product_plan.h>
#include <torch/optim/optimizer.h>

#include <cstdint>
#include <exception>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <system_error>
#include <type_traits>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN

/// What a training run has to keep so that it can be stopped and continued: continued, it ends bitwise where the
/// uninterrupted run ends (same program, same machine, same number of threads, deterministic operators).
///
/// It refers to the parts of a run and owns none; they have to outlive it. Save after an optimizer step, when no
/// gradient is waiting; make the whole run as for a start before load().
///
/// Example:
/// ```
/// lora::TrainingState state;
/// state.adapters(adapters).optimizer(optimizer).schedule(schedule).setting("seed", 4);
/// int64_t step = state.load("out/run.safetensors") ? state.get<int64_t>("step") : 0;
/// while (step < 300) {
///   …  // forward, backward, optimizer.step(), schedule.step()
///   state.set("step", ++step).save("out/run.safetensors");
/// }
/// ```
class TrainingState {
 public:
  /// Tensors with their names.
  using NamedTensors = detail::NamedTensors;

  /// Keeps every tensor of every adapter, and the kernels that an accelerated model's products run by. load() refuses a
  /// file of other adapters, of another choice of active or trainable ones, or on another base: one whose parameters,
  /// but those that the run trains, hash differently.
  TrainingState& adapters(const Adapters& adapters) {
    adapters_ = adapters;
    base_hash_.clear();
    return *this;
  }

  /// Keeps further tensors by name, `model->named_parameters().pairs()` of a full fine-tuning or buffers that training
  /// changes.
  TrainingState& tensors(const NamedTensors& named) {
    tensors_.insert(tensors_.end(), named.begin(), named.end());
    base_hash_.clear();
    return *this;
  }

  /// Keeps the optimizer's groups with all their options, and its states. All its parameters have to be tensors of
  /// adapters() or tensors(); names decide, so that neither groups nor parameters need be in the saved order.
  TrainingState& optimizer(torch::optim::Optimizer& optimizer) {
    optimizer_ = &optimizer;
    return *this;
  }

  /// Keeps the schedule's step. load() refuses a file of other options or base learning rates.
  TrainingState& schedule(Schedule& schedule) {
    schedule_ = &schedule;
    return *this;
  }

  /// States what is the same from the beginning of a run to its end, a number or a text: load() refuses a file with
  /// another value.
  template <class T>
  TrainingState& setting(const std::string& name, const T& value) {
    static_assert(!std::is_same_v<T, at::Tensor>, "a setting is a number or a text");
    detail::TensorMap none;
    settings_[name] = detail::field_json(detail::to_value(value), name, none);
    return *this;
  }

  /// Keeps a value that changes on the way: a whole number, a real one, a bool, a text or a tensor. load() replaces all
  /// of them by the file's.
  template <class T>
  TrainingState& set(const std::string& name, const T& value) {
    values_[name] = detail::to_value(value);
    return *this;
  }

  /// A value of set() or of the file, by its type. Throws c10::ValueError for an unknown name and for another type.
  template <class T>
  T get(const std::string& name) const {
    const auto found = values_.find(name);
    TORCH_CHECK_VALUE(found != values_.end(), "[lora::TrainingState::get] found no value ", name,
                      ", expected one that set() or the file gave");
    return detail::from_value<T>(found->second, name);
  }

  /// Writes everything and the random states of the CPU and of every device in use into one file, which appears whole
  /// or not at all. Throws a FormatError, c10::ValueError for a trained tensor with NaN or infinite values, StateError
  /// for merged adapters; the older file stays then.
  void save(const std::string& path) const;

  /// Puts a saved state back into the parts; false where there is no file of that name. Throws a FormatError with every
  /// mismatch, and nothing is changed.
  bool load(const std::string& path);

 private:
  void check(const std::string& operation) const;
  NamedTensors all_tensors() const;
  std::vector<at::Device> devices() const;
  std::optional<detail::OptimizerState> optimizer_state() const;
  detail::Json fixed() const;
  std::shared_ptr<ProductPlan> product_plan() const { return adapters_ ? adapters_->state().calls()->plan() : nullptr; }

  std::optional<Adapters> adapters_;
  NamedTensors tensors_;
  torch::optim::Optimizer* optimizer_ = nullptr;
  Schedule* schedule_ = nullptr;
  detail::Json settings_ = detail::Json::object();
  std::map<std::string, c10::IValue> values_;
  mutable std::string base_hash_;  // empty: not known yet
};

inline void TrainingState::check(const std::string& operation) const {
  const auto where = "[lora::TrainingState::" + operation + "] found ";
  TORCH_CHECK_VALUE(schedule_ == nullptr || optimizer_ != nullptr, where,
                    "a schedule without its optimizer, expected both");
  if (adapters_ && adapters_->names().empty())
    throw StateError(where + "adapters unloaded, expected them in the model");
  if (adapters_ && !adapters_->merged().empty()) {
    throw StateError(where + "merged adapters, expected none: a run trains unmerged weights; call unmerge()");
  }
}

inline TrainingState::NamedTensors TrainingState::all_tensors() const {
  NamedTensors all;
  if (adapters_) {
    for (const auto& adapter : adapters_->names()) {
      const auto own = adapters_->named_tensors(adapter);
      all.insert(all.end(), own.begin(), own.end());
    }
  }
  all.insert(all.end(), tensors_.begin(), tensors_.end());
  std::set<std::string> names;
  for (const auto& [name, tensor] : all) {
    TORCH_CHECK_VALUE(names.insert(name).second, "[lora::TrainingState] found the tensor name ", name,
                      " twice, expected a name for each tensor");
    TORCH_CHECK_VALUE(tensor.defined(), "[lora::TrainingState] found ", name, " undefined, expected a tensor");
  }
  return all;
}

/// The devices whose random numbers the run may draw.
inline std::vector<at::Device> TrainingState::devices() const {
  std::vector<at::Tensor> tensors;
  for (const auto& [name, tensor] : all_tensors()) tensors.push_back(tensor);
  if (adapters_) {
    for (const auto& [parameter, required] : adapters_->state().original_parameters()) tensors.push_back(parameter);
  }
  return detail::random_devices(tensors);
}

inline std::optional<detail::OptimizerState> TrainingState::optimizer_state() const {
  if (optimizer_ == nullptr) return std::nullopt;
  detail::TensorNames names;
  for (const auto& [name, tensor] : all_tensors()) names.emplace(tensor.unsafeGetTensorImpl(), name);
  return std::optional<detail::OptimizerState>(std::in_place, *optimizer_, schedule_, names);
}

/// What stays the same from the beginning of the run to its end.
inline detail::Json TrainingState::fixed() const {
  auto json = detail::Json::object({{"settings", settings_}});
  if (adapters_) {
    if (base_hash_.empty()) {
      std::set<const c10::TensorImpl*> trained;
      for (const auto& [name, tensor] : tensors_) trained.insert(tensor.unsafeGetTensorImpl());
      base_hash_ = detail::base_hash(adapters_->state(), trained);
    }
    json["base hash"] = base_hash_;
    json.update(detail::adapters_json(adapters_->state()));
  }
  if (const auto optimizer = optimizer_state()) json.update(optimizer->fixed());
  return json;
}

inline void TrainingState::save(const std::string& path) const {
  const c10::NoGradGuard no_grad;
  check("save");
  detail::TrainingFile file;
  detail::put_tensors(file, all_tensors(), devices());
  file.run["fixed"] = fixed();
  if (const auto optimizer = optimizer_state()) file.run["optimizer"] = optimizer->json(file.tensors);
  auto values = detail::Json::object();
  for (const auto& [name, value] : values_) {
    values[name] = detail::field_json(value, detail::kValuePrefix + name, file.tensors);
  }
  file.run["values"] = std::move(values);
  if (const auto plan = product_plan()) {
    plan->complete();  // else a shape that comes later might be decided otherwise when the run goes on
    file.run["products"] = detail::plan_json(*plan);
  }
  detail::write_training_file(path, file);
}

inline bool TrainingState::load(const std::string& path) {
  const c10::NoGradGuard no_grad;
  check("load");
  std::error_code error;
  // Of the name itself: a link to nowhere is something that cannot be read.
  if (std::filesystem::symlink_status(path, error).type() == std::filesystem::file_type::not_found) return false;
  const auto file = detail::read_training_file(path);
  const auto tensors = all_tensors();
  const auto expected = fixed();
  const auto optimizer = optimizer_state();
  std::optional<detail::OptimizerState::Prepared> prepared;
  std::map<std::string, c10::IValue> values;
  std::vector<std::string> problems;
  ProductPlan::Choices products;
  try {
    if (file.run.contains("products")) products = detail::plan_choices(file.run["products"]);
    detail::add_differences("", file.run.at("fixed"), expected, problems);
    detail::compare_tensors(file, tensors, devices(), problems);
    const auto state = file.run.find("optimizer");
    if (optimizer && state != file.run.end()) prepared = optimizer->prepare(*state, file.tensors, problems);
    const auto copy = [&](const std::string& name) { return file.tensors.at(name).clone(); };
    for (const auto& [name, value] : file.run.at("values").items()) values[name] = detail::field_value(value, copy);
  } catch (const std::exception&) {
    problems.push_back("found a run that cannot be read, expected what lora::TrainingState::save writes");
  }
  if (!problems.empty()) throw FormatError(path, std::move(problems));
  try {
    if (prepared) optimizer->load(*prepared);
  } catch (const c10::Error& refused) {
    throw FormatError(path,
                      {"found a state that the optimizer refuses: " + std::string(refused.what_without_backtrace())});
  }
  detail::take_tensors(file, tensors, devices());
  if (const auto plan = product_plan()) plan->pin(products);
  values_ = std::move(values);
  return true;
}

LORA_NAMESPACE_END
