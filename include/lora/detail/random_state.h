#pragma once

#include <ATen/Context.h>
#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <lora/version.h>

#include <algorithm>
#include <mutex>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// The CPU and the devices of the tensors: those whose random numbers are drawn for them.
inline std::vector<at::Device> random_devices(const std::vector<at::Tensor>& tensors) {
  std::vector<at::Device> devices{at::kCPU};
  for (const auto& tensor : tensors) {
    const bool known = std::find(devices.begin(), devices.end(), tensor.device()) != devices.end();
    if (!known && !tensor.is_meta()) devices.push_back(tensor.device());
  }
  return devices;
}

/// The state of a device's default random generator: bytes on the CPU.
inline at::Tensor random_state(at::Device device) {
  auto generator = at::globalContext().defaultGenerator(device);
  const std::lock_guard<std::mutex> lock(generator.mutex());
  return generator.get_state();
}

/// Sets a device's default random generator to a state of random_state().
inline void set_random_state(at::Device device, const at::Tensor& state) {
  auto generator = at::globalContext().defaultGenerator(device);
  const std::lock_guard<std::mutex> lock(generator.mutex());
  generator.set_state(state);
}

/// Throws what set_random_state would throw, and changes nothing.
inline void check_random_state(at::Device device, const at::Tensor& state) {
  auto generator = at::globalContext().defaultGenerator(device);
  const std::lock_guard<std::mutex> lock(generator.mutex());
  generator.clone().set_state(state);
}

}  // namespace detail
LORA_NAMESPACE_END
