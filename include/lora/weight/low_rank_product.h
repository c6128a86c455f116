#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_unsafe_view.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/GradMode.h>
#include <c10/util/FunctionRef.h>
#include <lora/detail/error.h>
#include <lora/version.h>
#include <lora/weight/dropout.h>
#include <lora/weight/frozen_product.h>
#include <lora/weight/product_plan.h>
#include <lora/weight/scaled_rows.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// One low-rank term of a product with an adapted matrix V [in, out]: y[:, out range] += s · (x[:, in range] · D) · U
/// with D [in range, r] and U [r, out range].
struct LowRankTerm {
  at::Tensor A;             // [r, *]
  at::Tensor B;             // [*, r]
  bool transposed = false;  // D = B and U = A in place of D = Aᵀ and U = Bᵀ
  int64_t in_begin = 0;
  int64_t out_begin = 0;
  double scaling = 1;
  std::shared_ptr<const Dropout> dropout;  // of all of x; null: none

  /// Casts the factors to a dtype: they are small, x is not.
  LowRankTerm to(at::ScalarType dtype) const {
    auto cast = *this;
    cast.A = A.to(dtype);
    cast.B = B.to(dtype);
    return cast;
  }
  at::Tensor down() const { return transposed ? B : A.t(); }
  at::Tensor up() const { return transposed ? A : B.t(); }
  at::Tensor in_range(const at::Tensor& x) const { return range(x, in_begin, transposed ? B.size(0) : A.size(1)); }
  at::Tensor out_range(const at::Tensor& y) const { return range(y, out_begin, transposed ? A.size(1) : B.size(0)); }

 private:
  static at::Tensor range(const at::Tensor& matrix, int64_t begin, int64_t size) {
    return size == matrix.size(1) ? matrix : matrix.narrow(1, begin, size);
  }
};

/// y = beta·addend + alpha·((x ⊙ in_scale)·V) ⊙ out_scale + Σ terms, V frozen.
struct ProductCall {
  /// beta·addend + alpha·x·V by the operator that runs on a plain weight.
  using Plain = c10::function_ref<at::Tensor(const at::Tensor& x, const at::Tensor& matrix,
                                             const std::optional<at::Tensor>& addend)>;

  Plain plain;
  at::Tensor x;       // [*, in]
  at::Tensor matrix;  // V [in, out]
  std::optional<at::Tensor> addend;
  double alpha = 1;
  double beta = 1;
  std::shared_ptr<ProductPlan> plan;  // null: every product is ATen's
  ProductKernel kernel = ProductKernel::kAten;
  std::vector<LowRankTerm> terms;  // alpha is in their scaling
  at::Tensor in_scale = {};        // [in]; undefined: ones
  at::Tensor out_scale = {};       // [out]; undefined: ones

  bool is_scaled() const { return in_scale.defined() || out_scale.defined(); }
};

/// The product as one step for autograd (Hu et al. 2021, arXiv 2106.09685, equation 3).
///
/// Scaling happens in the [tokens, r] tensors, and what is [tokens, out] or [tokens, in] is accumulated in place. x is
/// saved once for all terms, and only where a gradient needs it; dropped elements are found again by their seed. No
/// gradient is computed that nobody asks for.
class LowRankProduct : public torch::autograd::Function<LowRankProduct> {
  using Variables = torch::autograd::variable_list;

 public:
  /// What the backward needs beside the saved tensors: x, A and B of each term, the scales, V and x·V.
  struct Saved : torch::CustomClassHolder {
    std::vector<LowRankTerm> terms;    // without A and B
    std::vector<at::Tensor> narrowed;  // h = s·x·D of each term, [tokens, r]
    std::vector<int64_t> x_sizes;
    std::optional<std::vector<int64_t>> addend_sizes;
    double alpha = 1;
    double beta = 1;
    std::shared_ptr<ProductPlan> plan;
    ProductKernel kernel = ProductKernel::kAten;
    bool has_in_scale = false;
    bool has_out_scale = false;
    at::Tensor base;  // (x ⊙ in_scale)·V where the result is scaled
  };

  static at::Tensor run(const ProductCall& call) {
    Variables inputs{call.x};
    for (const auto& term : call.terms) {
      inputs.push_back(term.A);
      inputs.push_back(term.B);
    }
    if (call.in_scale.defined()) inputs.push_back(call.in_scale);
    if (call.out_scale.defined()) inputs.push_back(call.out_scale);
    if (call.addend) inputs.push_back(*call.addend);
    const bool records =
        c10::GradMode::is_enabled() &&
        std::any_of(inputs.begin(), inputs.end(), [](const at::Tensor& input) { return input.requires_grad(); });
    return records ? apply(c10::make_intrusive<Saved>(), &call, at::TensorList(inputs)) : compute(call, nullptr);
  }

  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const c10::intrusive_ptr<Saved>& saved,
                            const ProductCall* call, at::TensorList inputs) {
    const auto y = [&] {
      const at::AutoDispatchBelowADInplaceOrView no_autograd;  // else y may be a view that nobody may write to
      return compute(*call, saved.get());
    }();
    saved->x_sizes = call->x.sizes().vec();
    saved->alpha = call->alpha;
    saved->beta = call->beta;
    saved->plan = call->plan;
    saved->kernel = call->kernel;
    saved->has_in_scale = call->in_scale.defined();
    saved->has_out_scale = call->out_scale.defined();
    Variables variables(inputs.begin(), inputs.end());
    if (call->addend) {
      saved->addend_sizes = call->addend->sizes().vec();
      variables.pop_back();  // its values are in no gradient
    }
    const bool trains_in = wants(call->in_scale), trains_out = wants(call->out_scale);
    bool needs_x = trains_in;
    for (const auto& term : call->terms) {
      needs_x = needs_x || (term.transposed ? term.B : term.A).requires_grad();
      saved->terms.push_back(term);
      saved->terms.back().A = saved->terms.back().B = at::Tensor();
    }
    if (!needs_x) variables.front() = at::Tensor();
    variables.push_back(call->x.requires_grad() || trains_in ? call->matrix : at::Tensor());
    const auto base = std::exchange(saved->base, at::Tensor());
    variables.push_back(trains_out ? base : at::Tensor());
    ctx->save_for_backward(std::move(variables));
    ctx->saved_data["saved"] = c10::IValue::make_capsule(saved);
    return y;
  }

  static Variables backward(torch::autograd::AutogradContext* ctx, const Variables& gradients) {
    const auto capsule = ctx->saved_data["saved"].toCapsule();
    const auto& saved = static_cast<const Saved&>(*capsule);
    const auto variables = ctx->get_saved_variables();
    const bool again = c10::GradMode::is_enabled();  // this backward is to be differentiated itself
    const auto kernel = again ? ProductKernel::kAten : saved.kernel;
    const auto dy = rows_of(gradients.front()).contiguous();  // it is read several times
    const auto x = variables.front().defined() ? rows_of(variables.front()) : at::Tensor();
    const auto in_index = 1 + 2 * saved.terms.size(), out_index = in_index + (saved.has_in_scale ? 1 : 0);
    const auto end = out_index + (saved.has_out_scale ? 1 : 0);
    const auto in_scale = saved.has_in_scale ? variables[in_index] : at::Tensor();
    const auto out_scale = saved.has_out_scale ? variables[out_index] : at::Tensor();
    const auto &matrix = variables[end], &base = variables[end + 1];
    const bool wants_in = saved.has_in_scale && ctx->needs_input_grad(in_index);
    const bool wants_out = saved.has_out_scale && ctx->needs_input_grad(out_index);

    Variables results(end);
    auto d_base = dy;
    if (wants_out) {
      if (again) refuse_second_derivative();
      at::Tensor sums;
      std::tie(d_base, sums) = scale_gradients(dy, rows_of(base), out_scale);
      results[out_index] = scaled(sums, saved.alpha);
    } else if (out_scale.defined()) {
      d_base = scaled_sum(dy, out_scale, 1, {}, 0);
    }
    at::Tensor dx;
    if (ctx->needs_input_grad(0) || wants_in) {
      dx = base_gradient(saved, d_base, matrix, again);
      if (wants_in) results[in_index] = (dx * x).sum(0).to(in_scale.scalar_type());
      if (in_scale.defined()) dx = scaled_sum(dx, in_scale, 1, {}, 0);
    }
    if (!ctx->needs_input_grad(0)) dx = at::Tensor();
    for (size_t k = 0; k < saved.terms.size(); ++k) {
      auto stored = saved.terms[k];
      stored.A = variables[1 + 2 * k];
      stored.B = variables[2 + 2 * k];
      const auto term = stored.to(dy.scalar_type());
      const auto dy_range = term.out_range(dy);
      // A transposed copy of what is [tokens, r] is cheap, and a product that reads it as [r, tokens] several times as
      // fast as one with r columns.
      auto& d_down = results[(term.transposed ? 2 : 1) + 2 * k];
      auto& d_up = results[(term.transposed ? 1 : 2) + 2 * k];
      if (ctx->needs_input_grad(static_cast<size_t>(&d_up - results.data()))) {
        if (again && !x.defined()) refuse_second_derivative();
        const auto h = again ? narrowed(term, x, kernel) : saved.narrowed[k];
        d_up = multiply(kernel, h.t().contiguous(), dy_range);
        if (!term.transposed) d_up = d_up.t();
        d_up = d_up.to((term.transposed ? stored.A : stored.B).scalar_type());
      }
      const bool wants_down = ctx->needs_input_grad(static_cast<size_t>(&d_down - results.data()));
      if (!wants_down && !dx.defined()) continue;
      const auto dh = scaled(multiply(kernel, dy_range, term.up().t()), term.scaling);
      if (wants_down) {
        d_down = multiply(kernel, dh.t().contiguous(), term.in_range(dropped(term, x)));
        if (term.transposed) d_down = d_down.t();
        d_down = d_down.to((term.transposed ? stored.B : stored.A).scalar_type());
      }
      if (!dx.defined()) continue;
      if (term.dropout == nullptr) {
        add_product(kernel, term.in_range(dx), dh, term.down().t());
      } else {
        auto through = at::zeros_like(dx);
        add_product(kernel, term.in_range(through), dh, term.down().t());
        dx.add_(dropped(term, through));
      }
    }
    // No view in autograd's sense, whose base would hold the memory too: the next node may write over it.
    if (dx.defined()) results.front() = at::_unsafe_view(dx, saved.x_sizes);
    if (saved.addend_sizes) {
      const bool wanted = ctx->needs_input_grad(results.size());
      results.push_back(wanted ? gradients.front().sum_to_size(*saved.addend_sizes) * saved.beta : at::Tensor());
    }
    results.insert(results.begin(), 2, at::Tensor());  // of `saved` and `call`
    return results;
  }

 private:
  static bool wants(const at::Tensor& scale) { return scale.defined() && scale.requires_grad(); }

  [[noreturn]] static void refuse_second_derivative() {
    throw StateError(
        "[lora::weight] found a second derivative of an adapter whose product keeps no input, as with a frozen A or "
        "trained scales, expected a first one");
  }

  static at::Tensor rows_of(const at::Tensor& x) { return x.dim() == 1 ? x.unsqueeze(0) : x.flatten(0, -2); }

  static at::Tensor dropped(const LowRankTerm& term, const at::Tensor& x) {
    return term.dropout == nullptr ? x : term.dropout->apply(x);
  }

  static at::Tensor scaled(const at::Tensor& tensor, double factor) { return factor == 1 ? tensor : tensor * factor; }

  /// h = s·x·D.
  static at::Tensor narrowed(const LowRankTerm& term, const at::Tensor& x, ProductKernel kernel) {
    return scaled(multiply(kernel, term.in_range(dropped(term, x)), term.down()), term.scaling);
  }

  static at::Tensor frozen_product(const ProductCall& call, Saved* saved) {
    if (call.is_scaled()) {
      const auto x = call.in_scale.defined() ? scaled_sum(call.x, call.in_scale, 1, {}, 0) : call.x;
      auto base = multiply(call.kernel, x, call.matrix);
      if (saved != nullptr) saved->base = base;
      return saved != nullptr ? scaled_sum(base, call.out_scale, call.alpha, call.addend, call.beta)
                              : scaled_sum_(base, call.out_scale, call.alpha, call.addend, call.beta);
    }
    if (call.kernel == ProductKernel::kOneDnn) return onednn_product(call.x, call.matrix, call.addend);
    return call.plain(call.x, call.matrix, call.addend);
  }

  /// `saved`: null where there is no backward to come.
  static at::Tensor compute(const ProductCall& call, Saved* saved) {
    auto y = frozen_product(call, saved);
    if (call.terms.empty()) return y;
    const auto x = rows_of(call.x);
    const auto rows = rows_of(y);
    for (const auto& stored : call.terms) {
      const auto term = stored.to(x.scalar_type());
      const auto h = narrowed(term, x, call.kernel);
      add_product(call.kernel, term.out_range(rows), h, term.up());
      if (saved != nullptr) saved->narrowed.push_back(h);
    }
    return y;
  }

  /// alpha·dy·Vᵀ, zeros where the terms are all that depends on x.
  static at::Tensor base_gradient(const Saved& saved, const at::Tensor& dy, const at::Tensor& matrix, bool again) {
    if (!matrix.defined()) return at::zeros({dy.size(0), saved.x_sizes.back()}, dy.options());
    const auto transposed = matrix.t();
    const bool choose = saved.plan != nullptr && !again;
    const auto kernel = choose ? saved.plan->choose(dy.size(0), transposed) : ProductKernel::kAten;
    const auto dx = multiply(kernel, dy, transposed);
    return scaled(dx, saved.alpha);
  }
};

}  // namespace detail
LORA_NAMESPACE_END
