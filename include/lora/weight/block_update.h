#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <lora/version.h>
#include <lora/weight/adapted_weight.h>

#include <algorithm>
#include <memory>
#include <optional>
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

/// One adapter's updates of the rows and columns of a block, in factors.
struct BlockFactors {
  struct Part {
    Overlap rows;  // in the block
    Factors factors;
  };
  struct Product {
    Overlap rows;
    const Update* update;
  };
  struct Frozen {
    Overlap rows;
    FrozenFactors factors;
  };
  const WeightAdapter* adapter;
  std::vector<Part> parts;
  std::vector<Product> products;  // those whose product is wanted in place of their factors
  std::vector<Frozen> frozen;     // those whose frozen factors are

  bool empty() const { return parts.empty() && products.empty() && frozen.empty(); }
};

/// What the active adapters make of a block of a weight: diag(rows)·W0·diag(columns) + Σ of their factors.
struct BlockUpdate {
  std::vector<BlockFactors> adapters;
  at::Tensor rows;     // [block.rows]; undefined: ones
  at::Tensor columns;  // [block.columns], of a kernel [channels]; undefined: ones
};

/// Adds a scale of a part of `size` rows or columns to one that several updates share: 1 + Σ (scale − 1).
inline void add_scale(at::Tensor& sum, const at::Tensor& scale, int64_t begin, int64_t size) {
  const bool whole = scale.size(0) == size;
  if (!sum.defined() && whole) {
    sum = scale;
    return;
  }
  const auto change = whole ? scale - 1 : at::constant_pad_nd(scale - 1, {begin, size - begin - scale.size(0)});
  sum = sum.defined() ? sum + change : change + 1;
}

/// The updates of a block in factors; nothing where they have none: an update without factors, rows scaled by one
/// adapter and columns by another, or scales of W0 where merged adapters or a copy stand in its place. `by_product`: an
/// update may stay as it is where its own product is quicker.
inline std::optional<BlockUpdate> block_update(const AdaptedWeight::Snapshot& snapshot, const AdaptedWeight& weight,
                                               const Block& block, bool by_product = false) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);  // which would round W0·Aᵀ
  BlockUpdate update;
  for (const auto& adapter : snapshot.active) {
    BlockFactors found{adapter.get(), {}, {}, {}};
    for (const auto& part : adapter->parts) {
      const Overlap rows(part.begin, part.update->out_features(), block);
      if (rows.length <= 0) continue;
      const bool all_columns = by_product && block.columns == part.update->in_features();
      if (all_columns && part.update->has_product()) {
        found.products.push_back({rows, part.update.get()});
        continue;
      }
      if (all_columns && c10::GradMode::is_enabled() && rows.length == part.update->out_features()) {
        if (auto frozen = part.update->frozen_factors()) {
          found.frozen.push_back({rows, std::move(*frozen)});
          continue;
        }
      }
      if (!part.update->is_factored()) return std::nullopt;
      auto factors = part.update->factors(part.base(weight.base(), weight.layout()));
      for (auto& term : factors.terms) {
        if (term.A.size(1) != block.columns) term.A = term.A.narrow(1, block.column, block.columns);
        if (term.B.size(0) != rows.length) term.B = term.B.narrow(0, rows.in_update, rows.length);
      }
      if (factors.rows.defined()) {
        if (factors.rows.size(0) != rows.length) factors.rows = factors.rows.narrow(0, rows.in_update, rows.length);
        add_scale(update.rows, factors.rows, rows.in_block, block.rows);
      }
      if (factors.columns.defined()) {
        // A part's columns are scaled in its rows alone.
        if (rows.length != block.rows || factors.rows.defined()) return std::nullopt;
        const auto in = part.update->in_features();
        if (in != block.columns) {
          factors.columns = scale_of_columns(factors.columns, in).narrow(0, block.column, block.columns);
        }
        add_scale(update.columns, factors.columns, 0, factors.columns.size(0));
      }
      found.parts.push_back({rows, std::move(factors)});
    }
    if (!found.empty()) update.adapters.push_back(std::move(found));
  }
  if (update.rows.defined() && update.columns.defined()) return std::nullopt;
  const bool scales = update.rows.defined() || update.columns.defined();
  if (scales && !snapshot.values().is_same(weight.base())) return std::nullopt;
  return update;
}

/// Joins what the parts of an adapter give for their rows of a block into `rows` elements of dimension `dim`, zeros
/// between them. `piece(term)` is what one term gives for its rows.
template <class Piece>
at::Tensor join_parts(const BlockFactors& adapter, int64_t rows, int64_t dim, const Piece& piece) {
  std::vector<at::Tensor> pieces;
  int64_t end = 0;
  const auto zeros = [&](int64_t length) {
    auto sizes = pieces.front().sizes().vec();
    sizes[static_cast<size_t>(dim < 0 ? dim + pieces.front().dim() : dim)] = length;
    return at::zeros(sizes, pieces.front().options());
  };
  for (const auto& part : adapter.parts) {
    if (part.factors.terms.empty()) continue;
    auto sum = piece(part.factors.terms.front());
    for (size_t i = 1; i < part.factors.terms.size(); ++i) sum = sum + piece(part.factors.terms[i]);
    pieces.push_back(std::move(sum));
    if (part.rows.in_block > end) pieces.insert(pieces.end() - 1, zeros(part.rows.in_block - end));
    end = part.rows.in_block + part.rows.length;
  }
  if (pieces.empty()) return {};
  if (end < rows) pieces.push_back(zeros(rows - end));
  return pieces.size() == 1 ? pieces.front() : at::cat(pieces, dim);
}

/// Runs an operator on an adapted parameter: `base_call(values, active, update)` on the values that it has without
/// updates, scaled as the update says, then `add(adapter, y)` of each active adapter's terms to the result y; or
/// `dense_call()` where updates of the block have no factors.
template <class BaseCall, class Add, class DenseCall>
at::Tensor adapted_call(AdaptedWeightImpl& carrier, const Block& block, const BaseCall& base_call, const Add& add,
                        const DenseCall& dense_call) {
  static const std::vector<std::shared_ptr<const WeightAdapter>> none;
  const auto weight = carrier.weight();
  const auto calls = weight->calls();
  const CallState::Running running(*calls);
  const auto snapshot = weight->snapshot();
  carrier.synchronise();
  const c10::impl::ExcludeDispatchKeyGuard below(kAdaptedWeightKey);

  if (snapshot->active.empty() || calls->disabled()) return base_call(snapshot->base, none, BlockUpdate());
  const auto update = block_update(*snapshot, *weight, block);
  if (!update) return dense_call();
  auto y = base_call(snapshot->values(), snapshot->active, *update);
  for (const auto& adapter : update->adapters) add(adapter, y);
  return y;
}

/// Whether the adapter drops elements of its input now.
inline bool drops_input(const WeightAdapter& adapter, const AdaptedWeight& weight) {
  return adapter.dropout > 0 && weight.host().training();
}

}  // namespace detail
LORA_NAMESPACE_END
