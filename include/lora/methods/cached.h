#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/StorageImpl.h>
#include <c10/util/SmallVector.h>
#include <c10/util/intrusive_ptr.h>
#include <lora/version.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <utility>

LORA_NAMESPACE_BEGIN
namespace detail {

/// The values of a tensor at one time: its memory and the count of what was written to it.
class TensorStamp {
 public:
  explicit TensorStamp(const at::Tensor& tensor)
      : storage_(tensor.storage().getWeakStorageImpl()), offset_(tensor.storage_offset()), version_(version(tensor)) {}

  /// Whether the tensor has these values still. The weak pointer keeps the address from being given to another storage.
  bool is(const at::Tensor& tensor) const {
    return storage_._unsafe_get_target() == tensor.storage().unsafeGetStorageImpl() &&
           offset_ == tensor.storage_offset() && version_ == version(tensor);
  }

 private:
  static int64_t version(const at::Tensor& tensor) { return tensor.is_inference() ? 0 : tensor._version(); }

  c10::weak_intrusive_ptr<c10::StorageImpl> storage_;
  int64_t offset_;
  int64_t version_;
};

/// A value that is computed from tensors, without gradients, and kept until one of them changes. Safe for several
/// threads.
template <class Value>
class Cached {
 public:
  /// The same with gradients where autograd records the sources: nothing is kept of it then.
  template <class Compute>
  Value get_or_record(std::initializer_list<const at::Tensor*> sources, const Compute& compute) const {
    const auto requires_grad = [](const at::Tensor* tensor) { return tensor->requires_grad(); };
    if (c10::GradMode::is_enabled() && std::any_of(sources.begin(), sources.end(), requires_grad)) return compute();
    return get(sources, compute);
  }

  template <class Compute>
  Value get(std::initializer_list<const at::Tensor*> sources, const Compute& compute) const {
    const auto known = std::atomic_load(&entry_);
    const bool fresh = known != nullptr &&
                       std::equal(sources.begin(), sources.end(), known->stamps.begin(),
                                  [](const at::Tensor* tensor, const TensorStamp& stamp) { return stamp.is(*tensor); });
    if (fresh) return known->value;
    auto entry = std::make_shared<Entry>();
    for (const auto* tensor : sources) entry->stamps.emplace_back(*tensor);
    {
      const c10::InferenceMode no_inference(false);  // the value outlives the mode
      const c10::NoGradGuard no_grad;
      entry->value = compute();
    }
    std::atomic_store(&entry_, std::shared_ptr<const Entry>(entry));
    return entry->value;
  }

 private:
  struct Entry {
    c10::SmallVector<TensorStamp, 4> stamps;
    Value value;
  };
  mutable std::shared_ptr<const Entry> entry_;
};

}  // namespace detail
LORA_NAMESPACE_END
