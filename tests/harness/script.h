// What tests and oracles do with a TorchScript module.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/jit/api/function_impl.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/runtime/graph_executor.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <string>

#include "harness/values.h"

namespace harness {

inline torch::jit::Module submodule(torch::jit::Module module, const std::string& path) {
  for (size_t begin = 0; begin < path.size();) {
    const auto dot = std::min(path.find('.', begin), path.size());
    module = module.attr(path.substr(begin, dot - begin)).toModule();
    begin = dot + 1;
  }
  return module;
}

inline at::Tensor run(torch::jit::Module& module, const at::Tensor& x) { return module.forward({x}).toTensor(); }

/// Lets the executor profile and optimise the model, with and without gradient.
inline void warm_up(torch::jit::Module& module, const at::Tensor& x) {
  for (const bool with_grad : {true, false}) {
    for (int i = 0; i < 4; ++i) {
      const auto y = run(module, x.detach().requires_grad_(with_grad));
      if (y.requires_grad()) y.sum().backward();
    }
  }
  for (const auto& parameter : module.parameters()) parameter.mutable_grad() = at::Tensor();
}

/// Whether the executor of the model's forward has an optimised plan.
inline bool is_optimised(const torch::jit::Module& module) {
  try {
    torch::jit::toGraphFunction(module.get_method("forward").function()).getDebugState();
    return true;
  } catch (const c10::Error&) {
    return false;
  }
}

/// What a model's owner may notice of its parameters: the tensor, its flag and its bytes.
inline std::map<std::string, std::string> script_state(const torch::jit::Module& module) {
  std::map<std::string, std::string> state;
  for (const auto& named : module.named_parameters()) {
    state[named.name] = std::to_string(reinterpret_cast<uintptr_t>(named.value.unsafeGetTensorImpl())) + "|" +
                        std::to_string(named.value.requires_grad()) + "|" + c10::toString(named.value.scalar_type()) +
                        "|" + bytes_of(named.value);
  }
  return state;
}

}  // namespace harness
