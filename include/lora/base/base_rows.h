#pragma once

#include <ATen/core/Tensor.h>
#include <lora/base/weight_layout.h>
#include <lora/version.h>

#include <cstdint>
#include <utility>

LORA_NAMESPACE_BEGIN

/// The rows of a frozen weight that an update is for.
class BaseRows {
 public:
  BaseRows() = default;
  /// Rows [begin, begin + size) of a parameter's values.
  BaseRows(at::Tensor values, detail::WeightLayout layout, int64_t begin, int64_t size)
      : values_(std::move(values)), layout_(layout), begin_(begin), size_(size) {}

  /// W0 [out, in] of the rows, without a gradient; a view where the parameter's strides allow.
  at::Tensor matrix() const {
    const auto whole = detail::as_matrix(values_.detach(), layout_);
    return size_ == whole.size(0) ? whole : whole.narrow(0, begin_, size_);
  }

  /// The whole parameter as it is stored.
  const at::Tensor& values() const { return values_; }

 private:
  at::Tensor values_;
  detail::WeightLayout layout_ = detail::WeightLayout::kRows;
  int64_t begin_ = 0;
  int64_t size_ = 0;
};

LORA_NAMESPACE_END
