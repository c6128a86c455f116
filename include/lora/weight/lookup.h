#pragma once

#include <ATen/TensorIndexing.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/index.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/where.h>
#include <c10/core/GradMode.h>
#include <lora/version.h>
#include <lora/weight/adapted_weight.h>
#include <lora/weight/block_update.h>
#include <lora/weight/kernels.h>

#include <algorithm>
#include <cstdint>

LORA_NAMESPACE_BEGIN
namespace detail {

/// The looked-up rows with those of an adapter's own in place of the base's.
inline at::Tensor with_token_rows(const TokenRows& rows, const at::Tensor& y, const at::Tensor& indices,
                                  int64_t padding_idx) {
  const auto matches = indices.unsqueeze(-1).eq(rows.index());  // [*, ids]
  const auto padding = std::find(rows.ids.begin(), rows.ids.end(), padding_idx);
  const auto found = at::embedding(rows.values, matches.to(at::kByte).argmax(-1),
                                   padding == rows.ids.end() ? -1 : padding - rows.ids.begin());
  return at::where(matches.any(-1, /*keepdim=*/true), found.to(y.scalar_type()), y);
}

/// Rows of a view V of the terms of an update, scaled: for a table V = ΔWᵀ, whose row i is s · (A's column i) · Bᵀ.
inline at::Tensor looked_up_terms(const BlockFactors& adapter, const WeightView& view, const at::Tensor& indices,
                                  int64_t padding_idx) {
  const auto entries = [&](const at::Tensor& table) { return at::embedding(table, indices, padding_idx); };
  if (!view.transposed) {  // V = ΔW: row i is s · (B's row i) · A
    at::Tensor sum;
    for (const auto& term : adapter.parts.front().factors.terms) {
      auto rows = at::matmul(entries(term.B) * term.scaling, term.A);
      sum = sum.defined() ? sum + rows : rows;
    }
    return sum;
  }
  return join_parts(adapter, view.block.rows, -1,
                    [&](const LowRank& term) { return at::linear(entries(term.A.t()) * term.scaling, term.B); });
}

/// The looked-up rows of W0 with what an update makes of them.
inline at::Tensor scaled_lookup(const at::Tensor& y, const BlockUpdate& update, const WeightView& view,
                                const at::Tensor& indices) {
  const auto& of_entry = view.transposed ? update.columns : update.rows;
  const auto& of_width = view.transposed ? update.rows : update.columns;
  auto scaled = y;
  if (of_entry.defined()) scaled = scaled * of_entry.index({indices}).unsqueeze(-1);
  if (of_width.defined()) scaled = scaled * of_width;
  return scaled.to(y.scalar_type());
}

/// Whether looking up rows of the view can stay low-rank.
inline bool looks_up_low_rank(const AdaptedWeightImpl& carrier, bool scale_grad_by_freq) {
  const auto& weight = *carrier.weight();
  const auto& view = carrier.view();
  // That option divides the gradients of single rows, B's share of them too.
  if (scale_grad_by_freq && c10::GradMode::is_enabled() && weight.wants_gradient()) return false;
  const auto snapshot = weight.snapshot();
  const auto matrix = weight.matrix(snapshot->base);
  const bool whole = view.block.rows == matrix.size(0) && view.block.columns == matrix.size(1);
  return std::all_of(snapshot->active.begin(), snapshot->active.end(), [&](const auto& adapter) {
    const bool by_table = view.transposed == weight.transposed();
    if (adapter->rows.defined() && !(whole && by_table)) return false;
    if (view.transposed || adapter->parts.empty()) return true;
    return adapter->parts.size() == 1 && adapter->parts.front().name.empty();
  });
}

/// A lookup has no input to drop elements of: dropout does nothing here, as in PEFT. A row of `padding_idx` takes no
/// gradient, through B neither. Gradients of the adapter are dense where the base's would be sparse.
inline at::Tensor embedding_kernel(const at::Tensor& table, const at::Tensor& index, int64_t padding_idx,
                                   bool scale_grad_by_freq, bool sparse) {
  const auto indices = plain(index, "aten::embedding");
  auto* carrier = as_matrix_carrier(table);
  if (carrier == nullptr || !looks_up_low_rank(*carrier, scale_grad_by_freq)) {
    return at::embedding(plain(table, "aten::embedding"), indices, padding_idx, scale_grad_by_freq, sparse);
  }
  const auto& weight = *carrier->weight();
  const auto& view = carrier->view();
  // A row of padding takes no gradient.
  const auto without_padding = [&](const at::Tensor& y) {
    return padding_idx >= 0 ? at::where((indices != padding_idx).unsqueeze(-1), y, y.detach()) : y;
  };
  return adapted_call(
      *carrier, view.block,
      [&](const at::Tensor& values, const auto& active, const BlockUpdate& update) {
        auto y = at::embedding(view.of(weight.matrix(values)), indices, padding_idx, scale_grad_by_freq, sparse);
        if (update.rows.defined() || update.columns.defined()) {
          y = without_padding(scaled_lookup(y, update, view, indices));
        }
        for (const auto& adapter : active) {
          if (adapter->rows.defined()) y = with_token_rows(adapter->rows, y, indices, padding_idx);
        }
        return y;
      },
      [&](const BlockFactors& adapter, at::Tensor& y) {
        const auto delta = looked_up_terms(adapter, view, indices, padding_idx);
        if (delta.defined()) y.add_(without_padding(delta));
      },
      [&] { return at::embedding(plain(table, "aten::embedding"), indices, padding_idx, scale_grad_by_freq, sparse); });
}

}  // namespace detail
LORA_NAMESPACE_END
