#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/TensorImpl.h>
#include <lora/base/weight_layout.h>
#include <lora/detail/error.h>
#include <lora/detail/torch_compat.h>
#include <lora/methods/method.h>
#include <lora/version.h>
#include <lora/weight/call_state.h>
#include <lora/weight/host.h>
#include <lora/weight/weight_adapter.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// One parameter with the adapters that are active on it; its carrier and all views of it share it.
class AdaptedWeight {
 public:
  /// What the kernels read: replaced as a whole, never changed.
  struct Snapshot {
    at::Tensor base;  // W0, or W0 with the merged adapters in it
    std::vector<std::shared_ptr<const WeightAdapter>> active;

    /// The base, or the copy that an active adapter puts in its place, in the base's dtype.
    at::Tensor values() const {
      for (const auto& adapter : active) {
        if (adapter->copy.defined()) return adapter->copy.to(base.scalar_type());
      }
      return base;
    }
  };

  /// `absent`: the model has no such parameter, and `base` is what it counts as, zeros.
  AdaptedWeight(std::shared_ptr<Host> host, at::Tensor base, std::shared_ptr<CallState> calls,
                WeightLayout layout = WeightLayout::kRows, bool absent = false)
      : host_(std::move(host)), base_(std::move(base)), calls_(std::move(calls)), layout_(layout), absent_(absent) {
    publish(base_, {});
  }

  Host& host() const { return *host_; }
  const at::Tensor& base() const { return base_; }
  bool absent() const { return absent_; }
  WeightLayout layout() const { return layout_; }
  bool transposed() const { return is_transposed(layout_); }
  /// A tensor in the parameter's layout as [out, in].
  at::Tensor matrix(const at::Tensor& stored) const { return as_matrix(stored, layout_); }
  const std::shared_ptr<CallState>& calls() const { return calls_; }
  void set_calls(std::shared_ptr<CallState> calls) { calls_ = std::move(calls); }

  /// Whether an embedding's weight is multiplied with as well, as a tied head does: an adapter changes lookups alone,
  /// so that one tensor cannot stand for both uses.
  bool multiplied() const { return multiplied_.load(std::memory_order_relaxed); }
  void note_multiplied() { multiplied_.store(true, std::memory_order_relaxed); }

  std::shared_ptr<const Snapshot> snapshot() const { return std::atomic_load(&snapshot_); }

  /// Whether an adapter that is active now is being trained.
  bool wants_gradient() const {
    for (const auto& adapter : snapshot()->active) {
      for (const auto& named : adapter->tensors()) {
        if (named.tensor.tensor.requires_grad()) return true;
      }
      if (adapter->rows.defined() && adapter->rows.values.requires_grad()) return true;
      for (const auto& scale : adapter->scales) {
        if (scale.values.requires_grad()) return true;
      }
    }
    return false;
  }

  /// Lets a merged weight follow Module::to(); W0 itself follows as the registered parameter that it is.
  void moved(std::optional<c10::Device> device, std::optional<at::ScalarType> dtype);

  void publish(at::Tensor base, std::vector<std::shared_ptr<const WeightAdapter>> active) {
    auto next = std::make_shared<const Snapshot>(Snapshot{std::move(base), std::move(active)});
    std::atomic_store(&snapshot_, std::shared_ptr<const Snapshot>(std::move(next)));
  }

 private:
  std::shared_ptr<Host> host_;
  at::Tensor base_;  // the registered parameter: the same TensorImpl, so that it follows to() and load()
  std::shared_ptr<CallState> calls_;
  WeightLayout layout_;
  bool absent_;
  std::atomic<bool> multiplied_{false};
  std::shared_ptr<const Snapshot> snapshot_;
};

/// A rectangle of a matrix: rows [row, row + rows), columns [column, column + columns).
struct Block {
  int64_t row = 0;
  int64_t rows = 0;
  int64_t column = 0;
  int64_t columns = 0;
};

/// Which part of an adapted matrix a tensor stands for: a block of it, perhaps transposed.
struct WeightView {
  Block block;
  bool transposed = false;

  int64_t size(int64_t dim) const { return (dim == 0) != transposed ? block.rows : block.columns; }

  WeightView transpose() const { return {block, !transposed}; }

  WeightView narrow(int64_t dim, int64_t start, int64_t length) const {
    auto view = *this;
    if ((dim == 0) != transposed) {
      view.block.row += start;
      view.block.rows = length;
    } else {
      view.block.column += start;
      view.block.columns = length;
    }
    return view;
  }

  at::Tensor of(at::Tensor full) const {
    if (block.rows != full.size(0)) full = full.narrow(0, block.row, block.rows);
    if (block.columns != full.size(1)) full = full.narrow(1, block.column, block.columns);
    return transposed ? full.t() : full;
  }
};

/// The carrier: a tensor without storage that stands for W0 + Σ sᵢ·ΔWᵢ, or what an adapter puts in place of W0, and
/// never forms it.
class AdaptedWeightImpl final : public c10::TensorImpl {
 public:
  /// `owner` is kept alive by the carrier: the adapters of a model live as long as the model.
  AdaptedWeightImpl(std::shared_ptr<AdaptedWeight> weight, WeightView view, std::shared_ptr<void> owner)
      : c10::TensorImpl(c10::DispatchKeySet(kAdaptedWeightKey), weight->base().dtype(), weight->base().device()),
        weight_(std::move(weight)),
        view_(view),
        owner_(std::move(owner)) {
    if (is_matrix()) {
      const auto columns = weight_->base().size(1);
      const bool flipped = view_.transposed != weight_->transposed();
      const std::array<int64_t, 2> sizes{view_.size(0), view_.size(1)};
      const std::array<int64_t, 2> strides{flipped ? 1 : columns, flipped ? columns : 1};
      set_sizes_and_strides(c10::IntArrayRef(sizes), c10::IntArrayRef(strides));
    } else {
      set_sizes_and_strides(weight_->base().sizes(), weight_->base().strides());
    }
    set_storage_access_should_throw();
  }

  /// Whether the carrier is closed under transposing and slicing; of any other parameter it stands for the whole.
  bool is_matrix() const {
    return weight_->layout() != WeightLayout::kKernel && weight_->layout() != WeightLayout::kPlain;
  }

  const std::shared_ptr<AdaptedWeight>& weight() const { return weight_; }
  const WeightView& view() const { return view_; }
  const std::shared_ptr<void>& owner() const { return owner_; }

  /// Announces the dtype and device of the base, which to() changes behind the carrier's back.
  void synchronise() { announce(weight_->base().dtype(), weight_->base().device()); }

  void announce(caffe2::TypeMeta dtype, c10::Device device) {
    if (data_type_ != dtype) data_type_ = dtype;
    if (device_opt_ != device) device_opt_ = device;
  }

  // A weak reference to the tensor outlives it; it must not keep the model's adapters.
  void release_resources() override {
    weight_.reset();
    owner_.reset();
    c10::TensorImpl::release_resources();
  }

  const char* tensorimpl_type_name() const override {
    return "an adapted weight, which has no storage (lora: call unload() or merge() on the adapters before saving, "
           "moving or reading the weight; its plain value is the module's registered parameter)";
  }

  c10::intrusive_ptr<c10::TensorImpl> shallow_copy_and_detach(const c10::VariableVersion&, bool) const override {
    refuse_copy();
  }
  c10::intrusive_ptr<c10::TensorImpl> shallow_copy_and_detach(c10::VariableVersion&&, bool) const override {
    refuse_copy();
  }
  void shallow_copy_from(const c10::intrusive_ptr<c10::TensorImpl>&) override { refuse_copy(); }

  [[noreturn]] static void refuse_copy() {
    throw StateError(
        "[lora::weight] found an adapted weight where a plain tensor's data is exchanged or copied, expected a plain "
        "tensor; call unload() or merge() on the adapters first");
  }

 private:
  std::shared_ptr<AdaptedWeight> weight_;
  WeightView view_;
  std::shared_ptr<void> owner_;
};

/// The carrier behind a tensor, or null. Throws a StateError for another library's tensor on the same key.
inline AdaptedWeightImpl* as_carrier(const at::Tensor& tensor) {
  auto* impl = tensor.unsafeGetTensorImpl();
  if (!impl->key_set().has(kAdaptedWeightKey)) return nullptr;
  auto* carrier = dynamic_cast<AdaptedWeightImpl*>(impl);
  if (carrier == nullptr) {
    throw StateError(std::string("[lora::weight] found another library's tensor on the dispatch key ") +
                     c10::toString(kAdaptedWeightKey) +
                     ", expected adapted weights alone; the two libraries cannot work in one process");
  }
  return carrier;
}

inline void AdaptedWeight::moved(std::optional<c10::Device> device, std::optional<at::ScalarType> dtype) {
  if (!host_->alive()) return;
  const auto snapshot = this->snapshot();
  const auto options =
      snapshot->base.options().device(device.value_or(base_.device())).dtype(dtype.value_or(base_.scalar_type()));
  const auto member = host_->weight();
  if (absent_) base_.set_data(base_.to(options));
  if (!snapshot->base.is_same(base_)) {
    const auto merged = snapshot->base.to(options);
    publish(merged, snapshot->active);
    if (member.is_same(snapshot->base)) host_->set_weight(merged);
  }
  if (auto* carrier = as_carrier(member)) carrier->announce(options.dtype(), options.device());
}

inline at::Tensor make_carrier(std::shared_ptr<AdaptedWeight> weight, std::shared_ptr<void> owner) {
  const c10::InferenceMode no_inference(false);  // the carrier outlives the mode and may need a gradient then
  WeightView whole;
  if (weight->layout() != WeightLayout::kPlain) {
    const auto matrix = weight->matrix(weight->base());
    whole = {{0, matrix.size(0), 0, matrix.size(1)}, weight->transposed()};
  }
  return at::detail::make_tensor<AdaptedWeightImpl>(std::move(weight), whole, std::move(owner));
}

inline at::Tensor make_view(AdaptedWeightImpl& carrier, const WeightView& view) {
  return at::detail::make_tensor<AdaptedWeightImpl>(carrier.weight(), view, carrier.owner());
}

}  // namespace detail
LORA_NAMESPACE_END
