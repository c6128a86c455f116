#pragma once

#include <lora/detail/error.h>
#include <lora/version.h>
#include <torch/csrc/jit/api/module.h>

#include <set>
#include <string>
#include <utility>

LORA_NAMESPACE_BEGIN
namespace detail {

/// A TorchScript module, not owned.
///
/// A weak reference to a dead object keeps its slots, and so the carriers in them and all that these own: it would keep
/// itself. Hence it is held only while there are handles, which then find out that the model is gone. Without any, the
/// carriers are the only ones to ask, out of the slots of the living object.
class ScriptObject {
 public:
  explicit ScriptObject(const torch::jit::Module& module) : address_(module._ivalue().get()), weak_(module._ivalue()) {}

  bool alive() const { return held_ && !weak_.expired(); }

  torch::jit::Module module() const {
    auto object = held_ ? weak_.lock() : Pointer();
    if (!object) {
      throw StateError(
          "[lora::adapters] found a TorchScript module destroyed, or not in the model that adapters_of was "
          "called with, expected the model that was injected into");
    }
    return torch::jit::Module(std::move(object));
  }

  /// For a kernel, whose carrier was read from a slot of the object: an attribute that is a flag, false without it.
  bool flag(const std::string& attribute) const {
    if (address_ == nullptr) return false;
    const auto slot = address_->type()->findAttributeSlot(attribute);
    return slot && address_->getSlot(*slot).isBool() && address_->getSlot(*slot).toBool();
  }

  void hold(const std::set<const void*>& alive) {
    if (held_ || address_ == nullptr || alive.count(address_) == 0) return;
    weak_ = Weak(Pointer::reclaim_copy(address_));
    held_ = true;
  }

  void let_go() {
    if (held_ && weak_.expired()) address_ = nullptr;
    held_ = false;
    weak_.reset();
  }

 private:
  using Pointer = c10::intrusive_ptr<c10::ivalue::Object>;
  using Weak = c10::weak_intrusive_ptr<c10::ivalue::Object>;

  c10::ivalue::Object* address_;
  Weak weak_;
  bool held_ = true;
};

}  // namespace detail
LORA_NAMESPACE_END
