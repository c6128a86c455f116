#pragma once

#include <ATen/ops/cat.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <lora/version.h>
#include <lora/weight/adapted_weight.h>

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// The rows that an update of rows [begin, begin + size) has in common with a block, counted in the update and the
/// block.
struct Overlap {
  Overlap(int64_t begin, int64_t size, const Block& block) {
    const auto first = std::max(begin, block.row);
    length = std::min(begin + size, block.row + block.rows) - first;
    in_update = first - begin;
    in_block = first - block.row;
  }
  int64_t in_update = 0;
  int64_t in_block = 0;
  int64_t length = 0;  // none if not positive
};

/// Joins what each part of an adapter gives for its rows of a block into `block.rows` elements of dimension `dim`,
/// zeros between them; undefined where the adapter has no row in the block. `piece` gets the part and the block of its
/// ΔW.
template <class Piece>
at::Tensor join_parts(const WeightAdapter& adapter, const Block& block, int64_t dim, const Piece& piece) {
  std::vector<at::Tensor> pieces;
  int64_t end = 0;
  const auto zeros = [&](int64_t length) {
    auto sizes = pieces.front().sizes().vec();
    sizes[static_cast<size_t>(dim < 0 ? dim + pieces.front().dim() : dim)] = length;
    return at::zeros(sizes, pieces.front().options());
  };
  for (const auto& part : adapter.parts) {
    const Overlap rows(part.begin, part.update->out_features(), block);
    if (rows.length <= 0) continue;
    pieces.push_back(piece(part, Block{rows.in_update, rows.length, block.column, block.columns}));
    if (rows.in_block > end) pieces.insert(pieces.end() - 1, zeros(rows.in_block - end));
    end = rows.in_block + rows.length;
  }
  if (pieces.empty()) return {};
  if (end < block.rows) pieces.push_back(zeros(block.rows - end));
  return pieces.size() == 1 ? pieces.front() : at::cat(pieces, dim);
}

/// x · ΔWᵀ of one adapter: x [*, block.columns] → [*, block.rows], undefined where the adapter has no row in the block.
inline at::Tensor adapter_product(const WeightAdapter& adapter, const at::Tensor& x, const Block& block) {
  return join_parts(adapter, block, -1,
                    [&](const WeightAdapter::Part& part, const Block& rows) { return part.update->product(x, rows); });
}

/// x · ΔW of one adapter: x [*, block.rows] → [*, block.columns], undefined where the adapter has no row in the block.
inline at::Tensor adapter_transposed_product(const WeightAdapter& adapter, const at::Tensor& x, const Block& block) {
  at::Tensor sum;
  for (const auto& part : adapter.parts) {
    const Overlap rows(part.begin, part.update->out_features(), block);
    if (rows.length <= 0) continue;
    auto term = part.update->transposed_product(x.narrow(-1, rows.in_block, rows.length),
                                                {rows.in_update, rows.length, block.column, block.columns});
    sum = sum.defined() ? sum + term : term;
  }
  return sum;
}

/// Adds to y = x · V what replacing rows of the parameter changes, for a view V of it.
inline void add_row_change(const TokenRows& rows, const at::Tensor& values, const AdaptedWeight& weight,
                           const at::Tensor& x, const WeightView& view, double scale, at::Tensor& y) {
  const bool table = weight.transposed();
  const auto first = table ? view.block.column : view.block.row;
  const auto count = table ? view.block.columns : view.block.rows;
  const auto other = table ? view.block.row : view.block.column;
  const auto others = table ? view.block.rows : view.block.columns;
  auto index = rows.index();
  auto change = rows.values - values.index_select(0, index).to(rows.values.scalar_type());
  const auto inside = (index >= first).logical_and(index < first + count).nonzero().flatten();
  index = index.index_select(0, inside) - first;
  change = change.index_select(0, inside).narrow(1, other, others).to(x.scalar_type());
  if (view.transposed != table) {  // the rows are outputs
    y.index_add_(-1, index, at::linear(x, change).to(y.scalar_type()), scale);
  } else {
    y.add_(at::matmul(x.index_select(-1, index), change), scale);
  }
}

/// Runs an operator on an adapted parameter: `base_call(values, active)` on the values that it has without low-rank
/// updates, then `add(adapter, y)` of each active adapter's update to the result y.
template <class BaseCall, class Add>
at::Tensor adapted_call(AdaptedWeightImpl& carrier, const BaseCall& base_call, const Add& add) {
  using Active = std::vector<std::shared_ptr<const WeightAdapter>>;
  static const Active none;
  const auto weight = carrier.weight();
  const auto calls = weight->calls();
  const CallState::Running running(*calls);
  const auto snapshot = weight->snapshot();
  carrier.synchronise();
  const c10::impl::ExcludeDispatchKeyGuard below(kAdaptedWeightKey);

  if (snapshot->active.empty() || calls->disabled()) return base_call(snapshot->base, none);
  auto y = base_call(snapshot->values(), snapshot->active);
  for (const auto& adapter : snapshot->active) {
    if (!adapter->parts.empty()) add(*adapter, y);
  }
  return y;
}

/// The input of an adapter's update: with dropped elements in training.
inline at::Tensor update_input(const WeightAdapter& adapter, const AdaptedWeight& weight, const at::Tensor& x) {
  const bool drops = adapter.dropout > 0 && weight.host().training();
  return drops ? at::dropout(x, adapter.dropout, /*train=*/true) : x;
}

/// x · V for a view V [in, out] of an adapted weight: `base_product(V of the base)` + Σ `scale` · x · ΔVᵢ.
///
/// `base_product` runs the operator that the caller would run on a plain weight, so that without an active adapter the
/// result is that operator's bit for bit. The weight of an embedding is multiplied with by a tied head, which the
/// adapter leaves as it is but for rows of tokens.
template <class BaseProduct>
at::Tensor adapted_product(const at::Tensor& x, AdaptedWeightImpl& carrier, const WeightView& view, double scale,
                           const BaseProduct& base_product) {
  auto& weight = *carrier.weight();
  const bool table = weight.layout() == WeightLayout::kTable;
  if (table) weight.note_multiplied();
  return adapted_call(
      carrier,
      [&](const at::Tensor& adapted, const auto& active) {
        const auto& values = table ? weight.base() : adapted;
        auto y = base_product(carrier.view().of(weight.matrix(values)));
        for (const auto& adapter : active) {
          if (adapter->rows.defined()) add_row_change(adapter->rows, values, weight, x, view, scale, y);
        }
        return y;
      },
      [&](const WeightAdapter& adapter, at::Tensor& y) {
        if (table) return;
        const auto input = update_input(adapter, weight, x);
        const auto delta = view.transposed ? adapter_product(adapter, input, view.block)
                                           : adapter_transposed_product(adapter, input, view.block);
        if (delta.defined()) y.add_(delta, scale);
      });
}

/// A copy to add to in place, by views of it as a matrix.
inline at::Tensor widened_copy(const at::Tensor& values, at::ScalarType dtype) {
  const auto format = values.dim() > 2 ? c10::MemoryFormat::Contiguous : c10::MemoryFormat::Preserve;
  return values.to(values.options().dtype(dtype), /*non_blocking=*/false, /*copy=*/true, format);
}

/// The parameter's values as a plain tensor in the base's dtype, differentiable in the adapters' tensors.
inline at::Tensor dense_weight(AdaptedWeightImpl& carrier) {
  const auto& weight = *carrier.weight();
  const CallState::Running running(*weight.calls());
  const auto snapshot = weight.snapshot();
  carrier.synchronise();
  const c10::impl::ExcludeDispatchKeyGuard below(kAdaptedWeightKey);

  // Autocast would round B·A, though the operator may be one that it leaves alone.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);

  auto values = snapshot->base;
  if (!snapshot->active.empty() && !weight.calls()->disabled()) {
    values = snapshot->values();
    const auto wide = accumulation_dtype(values.scalar_type());
    bool own = false;  // whether values may be written to
    for (const auto& adapter : snapshot->active) {
      if (!adapter->rows.defined()) continue;
      values = values.to(wide).index_copy(0, adapter->rows.index(), adapter->rows.values.to(wide));
      own = true;
    }
    for (const auto& adapter : snapshot->active) {
      if (adapter->offsets.empty() && adapter->parts.empty()) continue;
      if (!own) values = widened_copy(values, wide);
      own = true;
      for (const auto& offset : adapter->offsets) {
        values.narrow(0, offset.begin, offset.values.size(0)).add_(offset.values, offset.scaling);
      }
      for (const auto& part : adapter->parts) {
        weight.matrix(values).narrow(0, part.begin, part.update->out_features()).add_(part.update->dense());
      }
    }
    values = values.to(snapshot->base.scalar_type());
  }
  return carrier.is_matrix() ? carrier.view().of(weight.matrix(values)) : values;
}

}  // namespace detail
LORA_NAMESPACE_END
