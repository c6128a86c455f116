#pragma once

#include <ATen/core/Tensor.h>
#include <lora/version.h>

#include <memory>
#include <string>

namespace torch {
namespace nn {
class Module;
}
}  // namespace torch

LORA_NAMESPACE_BEGIN
namespace detail {

/// The place of one weight in a model. It does not keep the model alive.
class Host {
 public:
  virtual ~Host() = default;

  /// Whether the module that holds the weight still exists.
  virtual bool alive() const = 0;
  /// The module's train / eval switch.
  virtual bool training() const = 0;
  /// The tensor that the module's forward reads now.
  virtual at::Tensor weight() const = 0;
  /// Exchanges the tensor that the module's forward reads.
  virtual void set_weight(const at::Tensor& weight) = 0;
  /// Registers `tensor` as the module's parameter in place of the present one.
  virtual void set_parameter(const at::Tensor& tensor) = 0;
  /// Whether attach() hangs nodes below the host; a TorchScript module takes none.
  virtual bool takes_nodes() const = 0;
  /// Hangs a module with the adapter's tensors below the host.
  virtual void attach(const std::string& name, const std::shared_ptr<torch::nn::Module>& node) = 0;
  virtual void detach(const std::string& name) = 0;
};

}  // namespace detail
LORA_NAMESPACE_END
