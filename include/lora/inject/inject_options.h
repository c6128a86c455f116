#pragma once

#include <lora/version.h>
#include <torch/arg.h>

#include <cstdint>
#include <functional>
#include <utility>

LORA_NAMESPACE_BEGIN

/// How adapters are put into a model.
class InjectOptions {
 public:
  /// Runs the model's forward on one batch of the user's data, by its number from 0 on; false where there is none.
  using RunBatch = std::function<bool(int64_t batch)>;

  /// Whether the model's frozen products run by the fastest kernel, see accelerate(), until the adapters are unloaded.
  TORCH_ARG(bool, accelerate) = true;
  /// The data of a start that is made from data, LoraInit::kEva; run without gradients, from the first batch on again
  /// where one round is not enough.
  TORCH_ARG(RunBatch, data);
};

LORA_NAMESPACE_END
