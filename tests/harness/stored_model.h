// A model with the values of a golden file.
#pragma once

#include <ATen/ATen.h>
#include <lora/io/safetensors.h>
#include <torch/nn/module.h>

#include <functional>
#include <memory>
#include <string>

#include "oracles/models.h"

namespace harness {

struct StoredModel {
  std::shared_ptr<torch::nn::Module> module;
  std::function<at::Tensor(const at::Tensor&)> forward;
};

template <class Holder>
StoredModel stored_model(Holder holder) {
  return {holder.ptr(), [holder](const at::Tensor& x) mutable { return holder->forward(x); }};
}

/// A new model in eval with the parameters and buffers of a safetensors file.
template <class Holder>
StoredModel stored_model(const std::string& file) {
  Holder holder;
  const at::NoGradGuard no_grad;
  const auto values = lora::load_safetensors(file);
  for (auto& [name, tensor] : state_dict(*holder)) tensor.copy_(values.at(name));
  holder->eval();
  return stored_model(holder);
}

}  // namespace harness
