#pragma once

#include <ATen/ops/_convolution.h>
#include <ATen/ops/_convolution_mode.h>
#include <ATen/ops/conv1d.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/conv3d.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/dropout.h>
#include <c10/util/string_view.h>
#include <lora/version.h>
#include <lora/weight/adapted_weight.h>
#include <lora/weight/kernels.h>
#include <lora/weight/product.h>

#include <cstdint>
#include <optional>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

// A convolution with ΔW = s·B·A is one with A, whose r kernels have W0's size, and then one of size 1 with B
// (Hu et al. 2021's reference code, ConvLoRA). With g groups A convolves each group of channels, which B's rows of that
// group then mix.

using OptionalTensor = std::optional<at::Tensor>;

/// Size 1, at every place: h [batch, groups·r, *] and B [out, r] → [batch, out, *].
inline at::Tensor pointwise_convolution(const at::Tensor& h, const at::Tensor& B, int64_t spatial, int64_t groups) {
  std::vector<int64_t> sizes{B.size(0), B.size(1)};
  sizes.resize(static_cast<size_t>(spatial) + 2, 1);
  const auto kernel = B.reshape(sizes);
  const std::vector<int64_t> ones(static_cast<size_t>(spatial), 1), zeros(static_cast<size_t>(spatial), 0);
  const at::IntArrayRef stride(ones), padding(zeros), dilation(ones);
  if (spatial == 1) return at::conv1d(h, kernel, {}, stride, padding, dilation, groups);
  if (spatial == 2) return at::conv2d(h, kernel, {}, stride, padding, dilation, groups);
  return at::conv3d(h, kernel, {}, stride, padding, dilation, groups);
}

/// `convolve(x, kernel, bias)` with an adapted kernel [out, in / groups, *].
template <class Convolve>
at::Tensor adapted_convolution(const at::Tensor& input, const at::Tensor& kernel, const OptionalTensor& bias,
                               int64_t groups, const char* operator_name, const Convolve& convolve) {
  const auto x = plain(input, operator_name);
  const OptionalTensor b = bias ? OptionalTensor(plain(*bias, operator_name)) : bias;
  auto* carrier = as_carrier(kernel);
  if (carrier == nullptr || carrier->weight()->layout() != WeightLayout::kKernel) {
    return convolve(x, plain(kernel, operator_name), b);
  }
  const auto& weight = *carrier->weight();
  const auto out = kernel.size(0);
  if (groups > 1) {
    const auto snapshot = weight.snapshot();
    for (const auto& adapter : snapshot->active) {
      // The rows of a part need not end where a group does.
      for (const auto& part : adapter->parts) {
        if (part.update->out_features() != out) return convolve(x, plain(kernel, operator_name), b);
      }
    }
  }
  const auto spatial = kernel.dim() - 2;
  return adapted_call(
      *carrier, [&](const at::Tensor& values, const auto&) { return convolve(x, values, b); },
      [&](const WeightAdapter& adapter, at::Tensor& y) {
        const auto dropped = drops_input(adapter, weight) ? at::dropout(x, adapter.dropout, /*train=*/true) : x;
        const auto channels = y.dim() - spatial - 1;  // the input may have no batch dimension
        y.add_(join_parts(adapter, {0, out, 0, 0}, channels, [&](const WeightAdapter::Part& part, const Block&) {
          const auto factors = part.update->low_rank();
          std::vector<int64_t> sizes = kernel.sizes().vec(), times(sizes.size(), 1);
          sizes[0] = factors.A.size(0);
          times[0] = groups;
          auto A = factors.A.to(x.scalar_type()).reshape(sizes);
          if (groups > 1) A = A.repeat(times);
          const auto h = convolve(dropped, A, OptionalTensor()) * factors.scaling;
          return pointwise_convolution(h, factors.B.to(h.scalar_type()), spatial, groups);
        }));
      });
}

// The direct call of each operator, so that autocast treats it as on a plain kernel.

#define LORA_CONVOLUTION_KERNELS(name)                                                                           \
  inline at::Tensor name##_kernel(const at::Tensor& input, const at::Tensor& kernel, const OptionalTensor& bias, \
                                  at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,     \
                                  int64_t groups) {                                                              \
    return adapted_convolution(input, kernel, bias, groups, "aten::" #name,                                      \
                               [&](const at::Tensor& x, const at::Tensor& k, const OptionalTensor& b) {          \
                                 return at::name(x, k, b, stride, padding, dilation, groups);                    \
                               });                                                                               \
  }                                                                                                              \
  inline at::Tensor name##_padding_kernel(const at::Tensor& input, const at::Tensor& kernel,                     \
                                          const OptionalTensor& bias, at::IntArrayRef stride,                    \
                                          c10::string_view padding, at::IntArrayRef dilation, int64_t groups) {  \
    return adapted_convolution(input, kernel, bias, groups, "aten::" #name,                                      \
                               [&](const at::Tensor& x, const at::Tensor& k, const OptionalTensor& b) {          \
                                 return at::name(x, k, b, stride, padding, dilation, groups);                    \
                               });                                                                               \
  }
LORA_CONVOLUTION_KERNELS(conv1d)
LORA_CONVOLUTION_KERNELS(conv2d)
LORA_CONVOLUTION_KERNELS(conv3d)
#undef LORA_CONVOLUTION_KERNELS

inline at::Tensor convolution_mode_kernel(const at::Tensor& input, const at::Tensor& kernel, const OptionalTensor& bias,
                                          at::IntArrayRef stride, c10::string_view padding, at::IntArrayRef dilation,
                                          int64_t groups) {
  return adapted_convolution(input, kernel, bias, groups, "aten::_convolution_mode",
                             [&](const at::Tensor& x, const at::Tensor& k, const OptionalTensor& b) {
                               return at::_convolution_mode(x, k, b, stride, padding, dilation, groups);
                             });
}

// What a trace records. A transposed convolution has its kernel the other way round: it works on the dense one.

inline at::Tensor convolution_kernel(const at::Tensor& input, const at::Tensor& kernel, const OptionalTensor& bias,
                                     at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                     bool transposed, at::IntArrayRef output_padding, int64_t groups) {
  const char* name = "aten::convolution";
  return adapted_convolution(input, transposed ? plain(kernel, name) : kernel, bias, groups, name,
                             [&](const at::Tensor& x, const at::Tensor& k, const OptionalTensor& b) {
                               return at::convolution(x, k, b, stride, padding, dilation, transposed, output_padding,
                                                      groups);
                             });
}

inline at::Tensor traced_convolution_kernel(const at::Tensor& input, const at::Tensor& kernel,
                                            const OptionalTensor& bias, at::IntArrayRef stride, at::IntArrayRef padding,
                                            at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding,
                                            int64_t groups, bool benchmark, bool deterministic, bool cudnn_enabled,
                                            bool allow_tf32) {
  const char* name = "aten::_convolution";
  return adapted_convolution(input, transposed ? plain(kernel, name) : kernel, bias, groups, name,
                             [&](const at::Tensor& x, const at::Tensor& k, const OptionalTensor& b) {
                               return at::_convolution(x, k, b, stride, padding, dilation, transposed, output_padding,
                                                       groups, benchmark, deterministic, cudnn_enabled, allow_tf32);
                             });
}

}  // namespace detail
LORA_NAMESPACE_END
