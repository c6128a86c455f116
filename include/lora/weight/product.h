#pragma once

#include <ATen/ops/cat.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <lora/version.h>
#include <lora/weight/adapted_weight.h>

#include <algorithm>
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

inline at::Tensor zero_columns(const at::Tensor& like, int64_t columns) {
  auto sizes = like.sizes().vec();
  sizes.back() = columns;
  return at::zeros(sizes, like.options());
}

/// x · ΔWᵀ of one adapter: x [*, block.columns] → [*, block.rows], undefined where the adapter has no row in the block.
inline at::Tensor adapter_product(const WeightAdapter& adapter, const at::Tensor& x, const Block& block) {
  std::vector<at::Tensor> pieces;
  int64_t end = 0;
  for (const auto& part : adapter.parts) {
    const Overlap rows(part.begin, part.update->out_features(), block);
    if (rows.length <= 0) continue;
    auto piece = part.update->product(x, {rows.in_update, rows.length, block.column, block.columns});
    if (rows.in_block > end) pieces.push_back(zero_columns(piece, rows.in_block - end));
    pieces.push_back(std::move(piece));
    end = rows.in_block + rows.length;
  }
  if (pieces.empty()) return {};
  if (end < block.rows) pieces.push_back(zero_columns(pieces.front(), block.rows - end));
  return pieces.size() == 1 ? pieces.front() : at::cat(pieces, -1);
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

/// x · V for a view V [in, out] of an adapted weight: `base_product(V of the base)` + Σ `scale` · x · ΔVᵢ.
///
/// `base_product` runs the operator that the caller would run on a plain weight, so that without an active adapter the
/// result is that operator's bit for bit.
template <class BaseProduct>
at::Tensor adapted_product(const at::Tensor& x, AdaptedWeightImpl& carrier, const WeightView& view, double scale,
                           const BaseProduct& base_product) {
  const auto weight = carrier.weight();
  const auto calls = weight->calls();
  const CallState::Running running(*calls);
  const auto snapshot = weight->snapshot();
  carrier.synchronise();
  const c10::impl::ExcludeDispatchKeyGuard below(kAdaptedWeightKey);

  auto y = base_product(carrier.view().of(weight->matrix(snapshot->base)));
  if (snapshot->active.empty() || calls->disabled()) return y;
  for (const auto& adapter : snapshot->active) {
    const bool drops = adapter->dropout > 0 && weight->host().training();
    const auto dropped = drops ? at::dropout(x, adapter->dropout, /*train=*/true) : x;
    const auto delta = view.transposed ? adapter_product(*adapter, dropped, view.block)
                                       : adapter_transposed_product(*adapter, dropped, view.block);
    if (delta.defined()) y.add_(delta, scale);
  }
  return y;
}

/// W0 + Σ sᵢ·ΔWᵢ as a plain tensor in the base's dtype, differentiable in the adapters' tensors.
inline at::Tensor dense_weight(AdaptedWeightImpl& carrier) {
  const auto& weight = *carrier.weight();
  const CallState::Running running(*weight.calls());
  const auto snapshot = weight.snapshot();
  carrier.synchronise();
  const c10::impl::ExcludeDispatchKeyGuard below(kAdaptedWeightKey);

  // Autocast would round B·A, though the operator may be one that it leaves alone.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);

  auto dense = weight.matrix(snapshot->base);
  if (!snapshot->active.empty() && !weight.calls()->disabled()) {
    dense = dense.to(accumulation_dtype(dense.scalar_type()), /*non_blocking=*/false, /*copy=*/true);
    for (const auto& adapter : snapshot->active) {
      for (const auto& part : adapter->parts) {
        dense.narrow(0, part.begin, part.update->out_features()).add_(part.update->dense());
      }
    }
    dense = dense.to(snapshot->base.scalar_type());
  }
  return carrier.view().of(dense);
}

}  // namespace detail
LORA_NAMESPACE_END
