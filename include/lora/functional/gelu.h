#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <c10/core/GradMode.h>
#include <c10/util/string_view.h>
#include <lora/detail/elementwise.h>
#include <lora/detail/lanes.h>
#include <lora/detail/plain_tensor.h>
#include <lora/detail/vector_math.h>
#include <lora/version.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cstdint>

LORA_NAMESPACE_BEGIN
namespace detail {

// GELU by tanh is x·σ(z) with z = 2·√(2/π)·(x + 0.044715·x³).
inline constexpr float kGeluLinear = 1.5957691216057308f;
inline constexpr float kGeluCubic = 0.0713548162726f;

template <int64_t width>
struct GeluTanh {
  using Floats = Vector<float, width>;

  LORA_ALWAYS_INLINE static void run(const Floats (&inputs)[1], Floats& y) {
    const auto& x = inputs[0];
    Floats power;
    exp_lanes(-x * (kGeluLinear + kGeluCubic * (x * x)), power);
    y = x / (1.0f + power);
  }
};

/// From the gradient of y and x: dx = dy·(σ + x·σ·(1 − σ)·z′).
template <int64_t width>
struct GeluTanhBackward {
  using Floats = Vector<float, width>;

  LORA_ALWAYS_INLINE static void run(const Floats (&inputs)[2], Floats& dx) {
    const auto &dy = inputs[0], &given = inputs[1];
    // The slope is 1 above 10 and 0 below −10 to within 1e-35; beyond, its factors leave the range of float32.
    const Floats zero{};
    Floats x = given > 10.0f ? zero + 10.0f : given;
    x = x < -10.0f ? zero - 10.0f : x;
    const Floats square = x * x;
    Floats power;
    exp_lanes(-x * (kGeluLinear + kGeluCubic * square), power);
    const Floats sigmoid = 1.0f / (1.0f + power);
    const Floats slope_of_z = kGeluLinear + 3.0f * kGeluCubic * square;
    dx = dy * (sigmoid * (1.0f + x * (power * sigmoid) * slope_of_z));
  }
};

/// map_elements for plain tensors of one dtype.
template <template <int64_t> class Function, class... Tensors>
void map_tensors(const at::Tensor& result, const Tensors&... inputs) {
  visit_plain_dtype(result.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    map_elements<Function>(result.numel(), result.template mutable_data_ptr<T>(),
                           inputs.template const_data_ptr<T>()...);
  });
}

/// The tensor itself or a copy of it whose memory holds its elements, each once, and nothing else.
inline at::Tensor without_gaps(const at::Tensor& x) { return x.is_non_overlapping_and_dense() ? x : x.clone(); }

inline at::Tensor gelu_tanh_forward(const at::Tensor& x) {
  const auto dense = without_gaps(x);
  auto y = at::empty_like(dense);
  map_tensors<GeluTanh>(y, dense);
  return y;
}

/// dx, in the memory of dy where nobody else holds it.
inline at::Tensor gelu_tanh_backward(const at::Tensor& dy, const at::Tensor& x) {
  const auto dense = without_gaps(x);
  const bool fits = dy.strides() == dense.strides(), owned = is_sole_owner(dy);
  const auto gradient = fits ? dy : at::empty_like(dense).copy_(dy);
  const auto dx = !fits || owned ? gradient : at::empty_like(dense);
  map_tensors<GeluTanhBackward>(dx, gradient, dense);
  return dx;
}

struct GeluTanhFunction : torch::autograd::Function<GeluTanhFunction> {
  using Context = torch::autograd::AutogradContext;
  using Tensors = torch::autograd::variable_list;

  static at::Tensor forward(Context* context, const at::Tensor& x) {
    context->save_for_backward({x});
    context->set_materialize_grads(false);
    return gelu_tanh_forward(x);
  }

  static Tensors backward(Context* context, const Tensors& gradients) {
    const auto& dy = gradients[0];
    if (!dy.defined()) return {at::Tensor()};
    const auto x = context->get_saved_variables()[0];
    // LibTorch's operator has a derivative of its own, for a second backward.
    if (at::GradMode::is_enabled() || !is_plain_cpu_tensor(dy)) return {at::gelu_backward(dy, x, "tanh")};
    return {gelu_tanh_backward(dy, x)};
  }
};

inline bool gelu_applies(const at::Tensor& x, c10::string_view approximate) {
  return approximate == "tanh" && is_plain_cpu_tensor(x);
}

}  // namespace detail

/// at::gelu, x·Φ(x) for "none" and ½x·(1 + tanh(√(2/π)·(x + 0.044715·x³))) for "tanh" (Hendrycks & Gimpel 2016, arXiv
/// 1606.08415, section 2), faster for "tanh" on the CPU: about four times with AVX-512.
///
/// x: [*]; returns y: [*] of its dtype. In float32, bfloat16 and half "tanh" is computed in float32, as
/// x·σ(2·√(2/π)·(x + 0.044715·x³)), which keeps its digits where y is close to 0, and rounded once. Everything else,
/// and a second derivative, is LibTorch's.
inline at::Tensor gelu(const at::Tensor& x, c10::string_view approximate = "none") {
  if (!detail::gelu_applies(x, approximate)) return at::gelu(x, approximate);
  if (at::GradMode::is_enabled() && x.requires_grad()) return detail::GeluTanhFunction::apply(x);
  return detail::gelu_tanh_forward(x);
}

LORA_NAMESPACE_END
