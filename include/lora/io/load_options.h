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
  /// Renames modules of the file for a base whose modules are called otherwise: pairs of a regular expression (Python's
  /// dialect) and its replacement, with \1 to \9 for groups; the first that is found in a key is applied, as in PEFT.
  /// Keys count without "base_model.model.". With a mapping the tensors alone choose the modules to adapt.
  ///
  /// Example: `lora::LoadOptions().key_mapping({{"^model\\.layers", "decoder.blocks"}})`.
  using KeyMapping = std::vector<std::pair<std::string, std::string>>;
  TORCH_ARG(KeyMapping, key_mapping);
  /// Tensors that the file may lack: modules, by path or its end behind a dot, whose values then stay those of a new
  /// adapter (ΔW = 0) or of the base.
  TORCH_ARG(TargetModules, may_lack);
  /// Tensors of the file that may be left out: modules of the file, named as in may_lack.
  TORCH_ARG(TargetModules, may_ignore);
};

LORA_NAMESPACE_END
