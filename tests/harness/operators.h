// The operators that LibTorch's dispatcher runs on this thread, with the shapes that they return.
#pragma once

#include <ATen/ATen.h>
#include <ATen/record_function.h>

#include <algorithm>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace harness {

/// Records every operator called on this thread while it lives, nested calls too; backward runs on the calling thread.
class OperatorRecorder {
 public:
  struct Output {
    std::string name;
    std::vector<int64_t> sizes;
    const void* storage;
  };

  OperatorRecorder() : previous_(current()) {
    current() = this;
    handle_ = at::addThreadLocalCallback(
        at::RecordFunctionCallback(&start, &end).needsOutputs(true).scopes({at::RecordScope::FUNCTION}));
  }
  ~OperatorRecorder() {
    at::removeCallback(handle_);
    current() = previous_;
  }
  OperatorRecorder(const OperatorRecorder&) = delete;
  OperatorRecorder& operator=(const OperatorRecorder&) = delete;

  /// In the order in which they began.
  const std::vector<std::string>& names() const { return names_; }

  /// Operators that returned a tensor of these sizes, or of a matrix's transposed or a kernel's flattened ones, in
  /// memory of its own.
  std::set<std::string> makers_of(at::IntArrayRef sizes, const std::set<const void*>& known_storages) const {
    const auto rows = sizes[0], columns = c10::multiply_integers(sizes.slice(1));
    const std::vector<std::vector<int64_t>> forms{sizes.vec(), {rows, columns}, {columns, rows}};
    std::set<std::string> makers;
    for (const auto& output : outputs_) {
      const bool same = std::find(forms.begin(), forms.end(), output.sizes) != forms.end();
      if (same && known_storages.count(output.storage) == 0) makers.insert(output.name);
    }
    return makers;
  }

 private:
  static OperatorRecorder*& current() {
    static thread_local OperatorRecorder* recorder = nullptr;
    return recorder;
  }

  static std::unique_ptr<at::ObserverContext> start(const at::RecordFunction& function) {
    if (current() != nullptr) current()->names_.emplace_back(function.name());
    return nullptr;
  }

  static void end(const at::RecordFunction& function, at::ObserverContext*) {
    if (current() == nullptr) return;
    for (const auto& output : function.outputs()) current()->add(function.name(), output);
  }

  void add(const std::string& name, const c10::IValue& value) {
    if (value.isTensorList()) {
      for (const at::Tensor& tensor : value.toTensorVector()) add(name, tensor);
    }
    if (!value.isTensor() || !value.toTensor().defined() || !value.toTensor().has_storage()) return;
    const auto& tensor = value.toTensor();
    outputs_.push_back({name, tensor.sizes().vec(), tensor.storage().data()});
  }

  OperatorRecorder* previous_;
  at::CallbackHandle handle_ = 0;
  std::vector<std::string> names_;
  std::vector<Output> outputs_;
};

}  // namespace harness
