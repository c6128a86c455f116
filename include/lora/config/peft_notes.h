#pragma once

#include <lora/version.h>

#include <string>
#include <utility>

/// An option of a configuration: its member with its getters.
#define LORA_OPTION(T, name)                               \
 public:                                                   \
  const T& name() const noexcept { return this->name##_; } \
  T& name() noexcept { return this->name##_; }             \
                                                           \
 private:                                                  \
  T name##_ /* NOLINT */
/// The setter of an option of `Options`, which returns the configuration of the type Derived.
#define LORA_OPTION_SETTER(Options, T, name) \
  using Options::name;                       \
  Derived& name(T value) {                   \
    Options::name() = std::move(value);      \
    return static_cast<Derived&>(*this);     \
  }

LORA_NAMESPACE_BEGIN

/// What PEFT notes in every configuration; it changes nothing here and is kept in files.
class PeftNotes {
  /// The task, as "CAUSAL_LM".
  LORA_OPTION(std::string, task_type);
  /// The base model.
  LORA_OPTION(std::string, base_model_name_or_path);
  /// The base model's revision.
  LORA_OPTION(std::string, revision);
  /// The Python classes, JSON text that is kept as it is.
  LORA_OPTION(std::string, auto_mapping);

 protected:
  /// Calls `visit(key, value)` for each note, under PEFT's key; `notes` is const or not.
  template <class Notes, class Visitor>
  static void visit_notes(Notes& notes, Visitor& visit) {
    visit("auto_mapping", notes.auto_mapping());
    visit("base_model_name_or_path", notes.base_model_name_or_path());
    visit("revision", notes.revision());
    visit("task_type", notes.task_type());
  }
};

/// Options that contain PEFT's notes, with the notes' setters.
template <class Derived, class Options>
class NotedOptions : public Options {
 public:
  LORA_OPTION_SETTER(Options, std::string, task_type)
  LORA_OPTION_SETTER(Options, std::string, base_model_name_or_path)
  LORA_OPTION_SETTER(Options, std::string, revision)
  LORA_OPTION_SETTER(Options, std::string, auto_mapping)
};

LORA_NAMESPACE_END
