#pragma once

#include <ATen/core/Tensor.h>
#include <lora/version.h>

#include <memory>
#include <set>
#include <string>

namespace torch {
namespace nn {
class Module;
}
}  // namespace torch

LORA_NAMESPACE_BEGIN
namespace detail {

/// Something that refers to a model and does not keep it alive.
class ModelReference {
 public:
  virtual ~ModelReference() = default;

  /// Called with the objects of a model that is alive, when the first handle on its adapters is made again.
  virtual void hold(const std::set<const void*>& /*alive*/) {}
  /// Called when the last handle on the adapters is gone: only kernels ask from now on.
  virtual void let_go() {}
};

/// What a model needs for as long as there are carriers in it.
class CarrierSession : public ModelReference {
 public:
  /// Called before the first carrier goes in; again without effect.
  virtual void begin() = 0;
  /// Called after the last carrier is out; again without effect.
  virtual void end() = 0;
};

/// The place of one weight in a model.
class Host : public ModelReference {
 public:
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
  /// Called before the weight's value is taken without its gradient though an adapter on it is being trained.
  virtual void check_detached() const {}
};

}  // namespace detail
LORA_NAMESPACE_END
