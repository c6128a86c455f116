#pragma once

#include <lora/version.h>
#include <torch/arg.h>

#include <utility>

LORA_NAMESPACE_BEGIN

/// How adapters are put into a model.
class InjectOptions {
 public:
  /// Whether the model's frozen products run by the fastest kernel, see accelerate(), until the adapters are unloaded.
  TORCH_ARG(bool, accelerate) = true;
};

LORA_NAMESPACE_END
