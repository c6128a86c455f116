// Values that depend on a seed only, and comparisons by bits.
#pragma once

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <lora/adapters.h>
#include <torch/nn/module.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace harness {

/// Standard normal values from a generator of their own, so that the global one stays where it is.
inline at::Tensor normal(at::IntArrayRef sizes, uint64_t seed, at::ScalarType dtype = at::kDouble) {
  return at::randn(sizes, at::detail::createCPUGenerator(seed), at::TensorOptions(at::kDouble)).to(dtype);
}

/// Gives every tensor of an adapter, B too, values other than zero.
inline void fill(const lora::Adapters& adapters, const std::string& name = "default", uint64_t seed = 11) {
  const at::NoGradGuard no_grad;
  for (auto& [path, tensor] : adapters.named_tensors(name)) tensor.copy_(normal(tensor.sizes(), seed++) * 0.3);
}

/// A pair A [r, in], B [out, r] of an oracle: ΔW = s·B·A.
struct Factors {
  std::string path;
  at::Tensor A, B;
  double scaling;
  std::string name_of_A = "lora_A", name_of_B = "lora_B";

  /// The gradients of A and B from that of ΔW, by the chain rule.
  void add_gradients(const at::Tensor& dW, std::map<std::string, at::Tensor>& gradients) const {
    gradients[path + "." + name_of_A] = scaling * at::mm(B.t(), dW);
    gradients[path + "." + name_of_B] = scaling * at::mm(dW, A.t());
  }
};

inline double largest(const at::Tensor& tensor) {
  return tensor.numel() == 0 ? 0 : tensor.detach().to(at::kDouble).abs().max().item<double>();
}

inline std::string bytes_of(const at::Tensor& tensor) {
  const auto plain = tensor.detach().contiguous();
  return plain.numel() == 0 ? "" : std::string(static_cast<const char*>(plain.const_data_ptr()), plain.nbytes());
}

/// The bytes of a module's registered parameters by name, without those of adapters.
inline std::map<std::string, std::string> base_bytes(const torch::nn::Module& module) {
  std::map<std::string, std::string> bytes;
  for (const auto& named : module.named_parameters()) {
    if (named.key().find(".lora_") == std::string::npos) bytes[named.key()] = bytes_of(named.value());
  }
  return bytes;
}

/// What a module's owner may notice of its parameters: the tensor itself, its flag, its dtype and its bytes.
inline std::map<std::string, std::string> parameter_state(const torch::nn::Module& module) {
  auto state = base_bytes(module);
  for (const auto& named : module.named_parameters()) {
    const auto entry = state.find(named.key());
    if (entry == state.end()) {
      state[named.key()] = "an adapter's";
      continue;
    }
    entry->second += "|" + std::to_string(reinterpret_cast<uintptr_t>(named.value().unsafeGetTensorImpl())) + "|" +
                     std::to_string(named.value().requires_grad()) + "|" + c10::toString(named.value().scalar_type());
  }
  return state;
}

}  // namespace harness
