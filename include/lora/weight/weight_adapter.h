#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/tensor.h>
#include <lora/methods/method.h>
#include <lora/version.h>

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// Values of some rows of an embedding that stand in place of the base's.
struct TokenRows {
  std::vector<int64_t> ids;  // distinct rows of the base
  at::Tensor values;         // [ids, out]

  bool defined() const { return values.defined(); }
  at::Tensor index() const { return at::tensor(ids, at::TensorOptions(at::kLong)).to(values.device()); }
};

/// What one adapter does to one parameter of a model.
struct WeightAdapter {
  using Part = UpdatePart;
  /// A term of a range of a bias: lora_B's bias, which counts scaling times.
  struct Offset {
    std::string name;  // below the adapter's node: the part's or the weight's name; empty for a module with one weight
    int64_t begin = 0;
    at::Tensor values;
    double scaling = 1;
  };

  /// What a range of a bias is multiplied by: a tensor of the weight's update.
  struct Scale {
    int64_t begin = 0;
    at::Tensor values;
  };

  /// A tensor with its place below the adapter's node, empty for the node itself.
  struct Tensor {
    std::string child;
    UpdateTensor tensor;
  };

  std::string adapter;
  std::string name;  // of the weight below the adapter's node, empty for a module with one weight
  double dropout = 0;
  std::vector<Part> parts;  // by ascending rows, without overlap
  std::vector<Offset> offsets;
  std::vector<Scale> scales;
  at::Tensor copy;        // stands in place of the base's values, in their shape
  std::string copy_name;  // the parameter's
  bool copies_buffer = false;
  TokenRows rows;
  bool rows_tied = false;  // the rows' values are listed by the embedding's adapter

  /// Whether forming the weight's values needs more than the base or the copy as they are.
  bool forms_dense() const { return !parts.empty() || rows.defined(); }

  /// Whether it changes a bias by more than a copy.
  bool changes_bias() const { return !offsets.empty() || !scales.empty(); }

  /// Adds to a bias in the dtype of sums, a copy that may be written to, what the adapter makes of `base`.
  void change_bias(const at::Tensor& base, at::Tensor& values) const {
    for (const auto& offset : offsets) {
      values.narrow(0, offset.begin, offset.values.size(0)).add_(offset.values, offset.scaling);
    }
    for (const auto& scale : scales) {
      const auto size = scale.values.size(0);
      const auto scaled = base.narrow(0, scale.begin, size).to(values.scalar_type());
      values.narrow(0, scale.begin, size).add_((scale.values - 1) * scaled);
    }
  }

  std::vector<Tensor> tensors() const {
    std::vector<Tensor> result;
    for (const auto& part : parts) {
      for (auto& tensor : part.update->tensors()) {
        result.push_back({part.name.empty() ? name : part.name, std::move(tensor)});
      }
    }
    for (const auto& offset : offsets) {
      result.push_back({offset.name, {"lora_B_bias", offset.values, TensorRole::kOutput}});
    }
    if (copy.defined()) {
      result.push_back({"", {copy_name, copy, copies_buffer ? TensorRole::kBuffer : TensorRole::kCopy}});
    }
    if (rows.defined() && !rows_tied) result.push_back({"", {"trainable_tokens", rows.values, TensorRole::kCopy}});
    return result;
  }

  /// A copy with tensors of its own on the given device, or on theirs; `known` holds those that several weights share.
  WeightAdapter clone(const std::optional<at::Device>& device,
                      std::map<const c10::TensorImpl*, at::Tensor>& known) const {
    const auto cloned = [&](const at::Tensor& tensor) {
      if (!tensor.defined()) return tensor;
      auto& clone = known[tensor.unsafeGetTensorImpl()];
      const auto options = tensor.options().device(device.value_or(tensor.device()));
      if (!clone.defined()) clone = tensor.detach().to(options, /*non_blocking=*/false, /*copy=*/true);
      return clone;
    };
    auto result = *this;
    for (auto& part : result.parts) {
      part.update = part.update->clone(cloned);
    }
    for (auto& offset : result.offsets) offset.values = cloned(offset.values);
    for (auto& scale : result.scales) scale.values = cloned(scale.values);
    result.copy = cloned(copy);
    result.rows.values = cloned(rows.values);
    return result;
  }
};

}  // namespace detail
LORA_NAMESPACE_END
