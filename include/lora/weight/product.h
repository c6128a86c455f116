#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <lora/version.h>
#include <lora/weight/adapted_weight.h>
#include <lora/weight/dropout.h>
#include <lora/weight/low_rank_product.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>
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

/// Adds to `terms` what an adapter adds to a product with V, a view of its weight; alpha is the product's factor. All
/// parts drop the same elements of x.
inline void add_terms(const WeightAdapter& adapter, const WeightView& view, double alpha,
                      const std::shared_ptr<const Dropout>& dropout, std::vector<LowRankTerm>& terms) {
  const auto& block = view.block;
  for (const auto& part : adapter.parts) {
    const Overlap rows(part.begin, part.update->out_features(), block);
    if (rows.length <= 0) continue;
    auto factors = part.update->low_rank();
    if (factors.A.size(1) != block.columns) factors.A = factors.A.narrow(1, block.column, block.columns);
    if (factors.B.size(0) != rows.length) factors.B = factors.B.narrow(0, rows.in_update, rows.length);
    // V is Wᵀ for x·Wᵀ, where the rows of W are columns of the result.
    terms.push_back({std::move(factors.A), std::move(factors.B), !view.transposed, view.transposed ? 0 : rows.in_block,
                     view.transposed ? rows.in_block : 0, alpha * factors.scaling, dropout});
  }
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

/// Whether the adapter drops elements of its input now.
inline bool drops_input(const WeightAdapter& adapter, const AdaptedWeight& weight) {
  return adapter.dropout > 0 && weight.host().training();
}

/// Casts what autocast would cast of a product's operands; nothing where it is off.
inline void apply_autocast(ProductCall& call) {
  const auto device = call.x.device().type();
  if (!at::autocast::is_autocast_enabled(device)) return;
  const auto dtype = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const at::Tensor& tensor) {
    return tensor.is_floating_point() && tensor.scalar_type() != at::kDouble ? tensor.to(dtype) : tensor;
  };
  call.x = cast(call.x);
  call.matrix = cast(call.matrix);
  if (call.addend) call.addend = cast(*call.addend);
}

/// The kernel that the model's plan chooses for a product with a frozen matrix.
inline ProductKernel chosen_kernel(const ProductCall& call) {
  const auto& [x, matrix, addend] = std::tie(call.x, call.matrix, call.addend);
  const bool is_affine = call.alpha == 1 && (!addend || (call.beta == 1 && addend->dim() == 1));
  // Whatever does not fit is left to ATen, which says what is wrong.
  if (call.plan == nullptr || !is_affine || x.dim() == 0 || x.size(-1) != matrix.size(0)) return ProductKernel::kAten;
  if (x.scalar_type() != matrix.scalar_type() || x.device() != matrix.device()) return ProductKernel::kAten;
  if (addend && (addend->size(0) != matrix.size(1) || addend->scalar_type() != x.scalar_type())) {
    return ProductKernel::kAten;
  }
  return call.plan->choose(matrix.size(0) == 0 ? 0 : x.numel() / matrix.size(0), matrix);
}

/// The product of a call whose kernel is not chosen yet. A matrix that is itself trained, as an adapter's copy, is
/// multiplied by the plain operator with its own gradient.
inline at::Tensor product_of(ProductCall call) {
  if (c10::GradMode::is_enabled() && call.matrix.requires_grad()) {
    auto y = call.plain(call.x, call.matrix, call.addend);
    if (call.terms.empty()) return y;
    call.matrix = at::Tensor();
    call.addend = std::move(y);
    call.beta = 1;
    call.plain = [](const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>& sum) {
      return sum->clone();
    };
    call.x = call.x.to(call.addend->scalar_type());
  } else {
    if (call.terms.empty() && at::autocast::is_autocast_enabled(call.x.device().type())) {
      return call.plain(call.x, call.matrix, call.addend);
    }
    apply_autocast(call);
    call.kernel = chosen_kernel(call);
    if (call.terms.empty() && call.kernel == ProductKernel::kAten) {
      return call.plain(call.x, call.matrix, call.addend);
    }
  }
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return LowRankProduct::run(call);
}

/// beta·addend + alpha·x·V for a view V [in, out] of an adapted weight, the adapters' terms with alpha.
///
/// `plain` runs the operator that the caller would run on a plain weight, so that without an active adapter and with
/// ATen's kernel the result is that operator's bit for bit. The weight of an embedding is multiplied with by a tied
/// head, which the adapter leaves as it is but for rows of tokens.
inline at::Tensor adapted_product(const at::Tensor& x, AdaptedWeightImpl& carrier, const WeightView& view,
                                  const std::optional<at::Tensor>& addend, double beta, double alpha,
                                  ProductCall::Plain plain) {
  const auto weight = carrier.weight();
  const bool table = weight->layout() == WeightLayout::kTable;
  if (table) weight->note_multiplied();
  const auto calls = weight->calls();
  const CallState::Running running(*calls);
  const auto snapshot = weight->snapshot();
  carrier.synchronise();
  const c10::impl::ExcludeDispatchKeyGuard below(kAdaptedWeightKey);

  const bool adapted = !snapshot->active.empty() && !calls->disabled();
  const auto values = adapted && !table ? snapshot->values() : table ? weight->base() : snapshot->base;
  ProductCall call{plain, x, view.of(weight->matrix(values)), addend, alpha, beta, calls->plan(), ProductKernel::kAten,
                   {}};
  if (adapted && !table) {
    for (const auto& adapter : snapshot->active) {
      if (adapter->parts.empty()) continue;
      std::shared_ptr<const Dropout> dropout;
      if (drops_input(*adapter, *weight)) dropout = std::make_shared<const Dropout>(adapter->dropout, x);
      add_terms(*adapter, view, alpha, dropout, call.terms);
    }
  }
  auto y = product_of(std::move(call));
  if (adapted) {
    for (const auto& adapter : snapshot->active) {
      if (adapter->rows.defined()) add_row_change(adapter->rows, values, *weight, x, view, alpha, y);
    }
  }
  return y;
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
