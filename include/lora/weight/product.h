#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <lora/version.h>
#include <lora/weight/adapted_weight.h>
#include <lora/weight/block_update.h>
#include <lora/weight/dropout.h>
#include <lora/weight/low_rank_product.h>

#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// Adds to `terms` what an adapter adds to a product with V, a view of its weight; alpha is the product's factor. All
/// parts drop the same elements of x.
inline void add_terms(const BlockFactors& adapter, const WeightView& view, double alpha,
                      const std::shared_ptr<const Dropout>& dropout, std::vector<LowRankTerm>& terms) {
  for (const auto& part : adapter.parts) {
    const auto begin = part.rows.in_block;
    for (const auto& term : part.factors.terms) {
      // V is Wᵀ for x·Wᵀ, where the rows of W are columns of the result.
      terms.push_back({term.A, term.B, !view.transposed, view.transposed ? 0 : begin, view.transposed ? begin : 0,
                       alpha * term.scaling, dropout});
    }
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
  // Of a scaled product the sum is a step of its own.
  const bool is_affine = call.is_scaled() || (call.alpha == 1 && (!addend || (call.beta == 1 && addend->dim() == 1)));
  // Whatever does not fit is left to ATen, which says what is wrong.
  if (call.plan == nullptr || !is_affine || x.dim() == 0 || x.size(-1) != matrix.size(0)) return ProductKernel::kAten;
  if (x.scalar_type() != matrix.scalar_type() || x.device() != matrix.device()) return ProductKernel::kAten;
  const bool adds = addend && !call.is_scaled();
  if (adds && (addend->size(0) != matrix.size(1) || addend->scalar_type() != x.scalar_type())) {
    return ProductKernel::kAten;
  }
  return call.plan->choose(matrix.size(0) == 0 ? 0 : x.numel() / matrix.size(0), matrix);
}

/// The product of a call whose kernel is not chosen yet. A matrix that is itself trained, as an adapter's copy, is
/// multiplied by the plain operator with its own gradient.
inline at::Tensor product_of(ProductCall call) {
  if (c10::GradMode::is_enabled() && call.matrix.requires_grad()) {
    auto y = call.is_scaled()
                 ? scaled_sum(at::matmul(call.in_scale.defined() ? call.x * call.in_scale : call.x, call.matrix),
                              call.out_scale, call.alpha, call.addend, call.beta)
                 : call.plain(call.x, call.matrix, call.addend);
    if (call.terms.empty()) return y;
    call.matrix = call.in_scale = call.out_scale = at::Tensor();
    call.addend = std::move(y);
    call.beta = 1;
    call.plain = [](const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>& sum) {
      return sum->clone();
    };
    call.x = call.x.to(call.addend->scalar_type());
  } else {
    const bool is_plain = call.terms.empty() && !call.is_scaled();
    if (is_plain && at::autocast::is_autocast_enabled(call.x.device().type())) {
      return call.plain(call.x, call.matrix, call.addend);
    }
    apply_autocast(call);
    call.kernel = chosen_kernel(call);
    if (is_plain && call.kernel == ProductKernel::kAten) return call.plain(call.x, call.matrix, call.addend);
  }
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return LowRankProduct::run(call);
}

/// The parameter's values as a plain tensor in the base's dtype, differentiable in the adapters' tensors.
inline at::Tensor dense_weight(AdaptedWeightImpl& carrier);

/// Adds alpha·x·ΔWᵀ of the updates that multiply by themselves.
inline void add_products(const BlockFactors& adapter, const at::Tensor& x, double alpha,
                         const std::shared_ptr<const Dropout>& dropout, at::Tensor& y) {
  if (adapter.products.empty()) return;
  const auto dropped = dropout == nullptr ? x : dropout->apply(x);
  for (const auto& product : adapter.products) {
    const auto& rows = product.rows;
    auto delta = product.update->product(dropped).to(y.scalar_type());
    if (rows.length != delta.size(-1)) delta = delta.narrow(-1, rows.in_update, rows.length);
    (rows.length == y.size(-1) ? y : y.narrow(-1, rows.in_block, rows.length)).add_(delta, alpha);
  }
}

/// y + alpha·x·ΔWᵀ for the updates with frozen factors: two products without a gradient of their matrices.
inline at::Tensor with_frozen_factors(const BlockFactors& adapter, const at::Tensor& x, double alpha,
                                      const std::shared_ptr<const Dropout>& dropout,
                                      const std::shared_ptr<ProductPlan>& plan, at::Tensor y) {
  if (adapter.frozen.empty()) return y;
  const auto plain = [](const at::Tensor& from, const at::Tensor& matrix, const std::optional<at::Tensor>&) {
    return at::matmul(from, matrix);
  };
  const auto product = [&](const at::Tensor& from, const at::Tensor& matrix) {
    return ProductCall{plain, from, matrix.to(from.scalar_type()), {}, 1, 1, plan, ProductKernel::kAten, {}, {}, {}};
  };
  const auto dropped = dropout == nullptr ? x : dropout->apply(x);
  for (const auto& [rows, factors] : adapter.frozen) {
    auto call = product(product_of(product(dropped, factors.A.t())), factors.B.t());
    call.in_scale = factors.middle;
    call.out_scale = factors.rows;
    call.alpha = alpha;
    const bool whole = rows.length == y.size(-1);
    if (whole) call.addend = y;
    const auto result = product_of(std::move(call));
    if (whole) {
      y = result;
    } else {
      y.narrow(-1, rows.in_block, rows.length).add_(result);
    }
  }
  return y;
}

/// beta·addend + alpha·x·V for a view V [in, out] of an adapted weight, the adapters' terms with alpha.
///
/// `plain` runs the operator that the caller would run on a plain weight, so that without an active adapter and with
/// ATen's kernel the result is that operator's bit for bit. The weight of an embedding is multiplied with by a tied
/// head, which the adapter leaves as it is but for rows of tokens.
inline at::Tensor adapted_product(const at::Tensor& x, AdaptedWeightImpl& carrier, const WeightView& view,
                                  const std::optional<at::Tensor>& addend, double beta, double alpha,
                                  const char* operator_name, ProductCall::Plain plain) {
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
  ProductCall call{
      plain, x, view.of(weight->matrix(values)), addend, alpha, beta, calls->plan(), ProductKernel::kAten, {}, {}, {}};
  BlockUpdate update;
  std::vector<std::shared_ptr<const Dropout>> dropouts;
  if (adapted && !table) {
    auto found = block_update(*snapshot, *weight, view.block, /*by_product=*/view.transposed);
    if (!found) {
      calls->count_fallback(operator_name);
      const auto dense = dense_weight(carrier);
      return plain(x, view.transposed == carrier.view().transposed ? dense : dense.t(), addend);
    }
    update = std::move(*found);
    for (const auto& adapter : update.adapters) {
      std::shared_ptr<const Dropout> dropout;
      if (drops_input(*adapter.adapter, *weight))
        dropout = std::make_shared<const Dropout>(adapter.adapter->dropout, x);
      add_terms(adapter, view, alpha, dropout, call.terms);
      dropouts.push_back(std::move(dropout));
    }
    call.in_scale = view.transposed ? update.columns : update.rows;
    call.out_scale = view.transposed ? update.rows : update.columns;
  }
  auto y = product_of(std::move(call));
  for (size_t i = 0; i < update.adapters.size(); ++i) {
    add_products(update.adapters[i], x, alpha, dropouts[i], y);
    y = with_frozen_factors(update.adapters[i], x, alpha, dropouts[i], calls->plan(), std::move(y));
  }
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
      if (!adapter->changes_bias() && adapter->parts.empty()) continue;
      if (!own) values = widened_copy(values, wide);
      own = true;
      adapter->change_bias(weight.base(), values);
      for (const auto& part : adapter->parts) {
        weight.matrix(values)
            .narrow(0, part.begin, part.update->out_features())
            .add_(part.update->dense(part.base(weight.base(), weight.layout())));
      }
    }
    values = values.to(snapshot->base.scalar_type());
  }
  return carrier.is_matrix() ? carrier.view().of(weight.matrix(values)) : values;
}

}  // namespace detail
LORA_NAMESPACE_END
