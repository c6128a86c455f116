#pragma once

#include <lora/config/targets.h>
#include <lora/version.h>
#include <torch/arg.h>

#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN

/// How an adapter is read: strictly, but for what is named here.
class LoadOptions {
 public:
  /// Pairs of a regular expression (Python's dialect) and its replacement, with \1 to \9 for groups.
  using KeyMapping = std::vector<std::pair<std::string, std::string>>;
  /// Renames modules of the file for a base whose modules are called otherwise; the first pair that is found in a key
  /// is applied, as in PEFT. Keys count without "base_model.model.". With a mapping the tensors alone choose the
  /// modules to adapt.
  ///
  /// Example: `lora::LoadOptions().key_mapping({{"^model\\.layers", "decoder.blocks"}})`.
  TORCH_ARG(KeyMapping, key_mapping);
  /// Tensors that the file may lack: modules, by path or its end behind a dot, whose values are then those of a new
  /// adapter (ΔW = 0, A drawn at random) or of the base.
  TORCH_ARG(TargetModules, may_lack);
  /// Tensors of the file that may be left out: modules of the file, after key_mapping, named as in may_lack.
  TORCH_ARG(TargetModules, may_ignore);
  /// Whether the model's frozen products run by the fastest kernel, see InjectOptions; of an adapter that is loaded
  /// into a model without one.
  TORCH_ARG(bool, accelerate) = true;
};

LORA_NAMESPACE_END
