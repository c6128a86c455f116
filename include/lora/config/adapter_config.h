#pragma once

#include <c10/util/Exception.h>
#include <lora/config/peft_notes.h>
#include <lora/config/targets.h>
#include <lora/version.h>

#include <cstdint>
#include <set>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN

/// What the configurations of all methods have in common, by PEFT's names; AdapterConfig adds the setters.
class AdapterOptions : public PeftNotes {
  /// The modules to adapt.
  LORA_OPTION(TargetModules, target_modules);
  /// Modules that are left alone although target_modules or target_if choose them.
  LORA_OPTION(TargetModules, exclude_modules);
  /// Confines the names of target_modules to layers with these indices: in h.3.attn.c_attn the index is 3. A whole path
  /// in target_modules is not confined.
  LORA_OPTION(OneOrMore<int64_t>, layers_to_transform);
  /// The lists of layers that layers_to_transform counts in, as "h": regular expressions; none: any list.
  LORA_OPTION(OneOrMore<std::string>, layers_pattern);
  /// Modules that the adapter has trainable copies of, whole: names as in target_modules. The base keeps its own.
  LORA_OPTION(std::vector<std::string>, modules_to_save);
  /// The biases that the adapter has trainable copies of; the base keeps its own.
  LORA_OPTION(BiasCopies, bias) = BiasCopies::kNone;
  /// Adapts every host for which the predicate holds, beside what target_modules chooses.
  LORA_OPTION(Targeting::Predicate, target_if);
  /// target_if for the modules of a TorchScript model.
  LORA_OPTION(Targeting::ScriptPredicate, target_script_if);
  /// Declares the row ranges of a fused projection whose parts are not q, k and v in three equal thirds:
  /// `.fused_parts("c_attn", {{"q", 768}, {"k", 256}, {"v", 256}})`.
  LORA_OPTION(Targeting::FusedParts, fused_parts);
  /// Whether the adapter's tensors are kept in float32 on a base of lower precision.
  LORA_OPTION(bool, autocast_adapter_dtype) = true;
  /// PEFT's note that the weights are [in, out]; the layout is found by itself, and the files say it.
  LORA_OPTION(bool, fan_in_fan_out) = false;

 public:
  /// Where the adapter goes and what it has copies of.
  Targeting targeting() const {
    Targeting targeting;
    targeting.modules = target_modules();
    targeting.exclude = exclude_modules();
    targeting.predicate = target_if();
    targeting.script_predicate = target_script_if();
    targeting.fused_parts = fused_parts();
    targeting.layers = LayerFilter(layers_to_transform().values(), layers_pattern().values());
    targeting.bias = bias();
    targeting.modules_to_save = modules_to_save();
    return targeting;
  }

  /// Calls `visit(key, value)` for each option that files hold, under PEFT's key; `options` is const or not.
  template <class Options, class Visitor>
  static void visit_options(Options& options, Visitor& visit) {
    visit_notes(options, visit);
    visit("bias", options.bias());
    visit("exclude_modules", options.exclude_modules());
    visit("fan_in_fan_out", options.fan_in_fan_out());
    visit("fused_parts", options.fused_parts());
    visit("layers_pattern", options.layers_pattern());
    visit("layers_to_transform", options.layers_to_transform());
    visit("modules_to_save", options.modules_to_save());
    visit("target_modules", options.target_modules());
  }

 protected:
  /// Throws c10::ValueError for a value outside its range, `type` is the configuration's: "lora::LoraConfig".
  void validate_options(const std::string& type) const {
    check_distinct(fused_parts(), type, "fused_parts");
    for (const auto& entry : exclude_modules().entries()) {
      TORCH_CHECK_VALUE(entry.parts.empty(), "[", type, "] found parts in exclude_modules, \"", entry.text,
                        "\", expected modules; choose parts by target_modules");
    }
    check_layers(type);
    for (const auto& name : modules_to_save()) {
      TORCH_CHECK_VALUE(!name.empty(), "[", type,
                        "] found an empty name in modules_to_save, expected a module's path or "
                        "its end");
    }
    for (const auto& [name, parts] : fused_parts()) check_parts(type, name, parts);
  }

  /// The order of patterns decides, and a file of JSON holds each key once.
  template <class Entries>
  static void check_distinct(const Entries& entries, const std::string& type, const char* key) {
    std::set<std::string> known;
    for (const auto& entry : entries) {
      TORCH_CHECK_VALUE(known.insert(entry.first).second, "[", type, "] found \"", entry.first, "\" twice in ", key,
                        ", expected each pattern once");
    }
  }

  /// Throws c10::ValueError for what is no probability to drop with.
  static void check_dropout(double p, const std::string& type, const char* name) {
    TORCH_CHECK_VALUE(p >= 0 && p < 1, "[", type, "] found ", name, " = ", p,
                      ", expected a probability p with 0 <= p < 1");
  }

  /// Throws c10::ValueError for a rank below 1.
  static void check_rank(int64_t rank, const std::string& type, const std::string& name) {
    TORCH_CHECK_VALUE(rank > 0, "[", type, "] found ", name, " = ", rank, ", expected a rank of at least 1");
  }

 private:
  void check_layers(const std::string& type) const {
    TORCH_CHECK_VALUE(
        layers_to_transform().empty() || target_modules().kind() == TargetModules::Kind::kList, "[", type,
        "] found layers_to_transform without a list in target_modules, expected names that it confines; a "
        "regular expression can name the layers itself");
    TORCH_CHECK_VALUE(layers_pattern().empty() || !layers_to_transform().empty(), "[", type,
                      "] found layers_pattern without layers_to_transform, expected both");
    for (const auto index : layers_to_transform().values()) {
      TORCH_CHECK_VALUE(index >= 0, "[", type, "] found the layer ", index,
                        " in layers_to_transform, expected indices from 0 on");
    }
  }

  static void check_parts(const std::string& type, const std::string& name, const std::vector<FusedPart>& parts) {
    TORCH_CHECK_VALUE(!parts.empty(), "[", type, "] found no parts in fused_parts(\"", name, "\")");
    std::set<std::string> known;
    for (const auto& part : parts) {
      TORCH_CHECK_VALUE(known.insert(part.name).second, "[", type, "] found the part \"", part.name,
                        "\" twice in fused_parts(\"", name, "\"), expected a name for each range of rows");
      TORCH_CHECK_VALUE(!part.name.empty() && part.name.find('.') == std::string::npos && part.size > 0, "[", type,
                        "] found the part {\"", part.name, "\", ", part.size, "} in fused_parts(\"", name,
                        "\"), expected a name without dots and a positive number of rows");
    }
  }
};

/// The options that the configurations of all methods have in common, with setters that return the configuration.
template <class Derived>
class AdapterConfig : public NotedOptions<Derived, AdapterOptions> {
 public:
  LORA_OPTION_SETTER(AdapterOptions, TargetModules, target_modules)
  LORA_OPTION_SETTER(AdapterOptions, TargetModules, exclude_modules)
  LORA_OPTION_SETTER(AdapterOptions, OneOrMore<int64_t>, layers_to_transform)
  LORA_OPTION_SETTER(AdapterOptions, OneOrMore<std::string>, layers_pattern)
  LORA_OPTION_SETTER(AdapterOptions, std::vector<std::string>, modules_to_save)
  LORA_OPTION_SETTER(AdapterOptions, BiasCopies, bias)
  LORA_OPTION_SETTER(AdapterOptions, Targeting::Predicate, target_if)
  LORA_OPTION_SETTER(AdapterOptions, Targeting::ScriptPredicate, target_script_if)
  LORA_OPTION_SETTER(AdapterOptions, bool, autocast_adapter_dtype)
  LORA_OPTION_SETTER(AdapterOptions, bool, fan_in_fan_out)

  using AdapterOptions::fused_parts;
  /// Adds the row ranges of one projection.
  Derived& fused_parts(const std::string& name, std::vector<FusedPart> parts) {
    AdapterOptions::fused_parts().emplace_back(name, std::move(parts));
    return static_cast<Derived&>(*this);
  }
};

LORA_NAMESPACE_END
