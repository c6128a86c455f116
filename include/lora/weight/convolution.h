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
#include <lora/weight/block_update.h>
#include <lora/weight/kernels.h>

#include <algorithm>
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
  const auto kernel_sizes = kernel.sizes().vec();
  const auto columns = kernel.numel() / std::max<int64_t>(out, 1);
  // Numbers for channels, as [channels, 1, …].
  const auto by_channel = [&](const at::Tensor& scale) {
    std::vector<int64_t> sizes{scale.size(0)};
    sizes.resize(static_cast<size_t>(spatial) + 1, 1);
    return scale.reshape(sizes);
  };
  const auto form_dense = [&] { return convolve(x, plain(kernel, operator_name), b); };
  return adapted_call(
      *carrier, {0, out, 0, columns},
      [&](const at::Tensor& values, const auto&, const BlockUpdate& update) {
        const auto& [adapters, of_out, of_in] = update;
        if (!of_out.defined() && !of_in.defined()) return convolve(x, values, b);
        const auto scaled = of_in.defined() ? (x * by_channel(of_in.repeat({groups}))).to(x.scalar_type()) : x;
        auto y = convolve(scaled, values, of_out.defined() ? OptionalTensor() : b);
        if (!of_out.defined()) return y;
        const bool has_bias = b && b->defined();
        return scaled_sum(y, by_channel(of_out), 1, has_bias ? OptionalTensor(by_channel(*b)) : OptionalTensor(), 1);
      },
      [&](const BlockFactors& adapter, at::Tensor& y) {
        const auto p = adapter.adapter->dropout;
        const auto dropped = drops_input(*adapter.adapter, weight) ? at::dropout(x, p, /*train=*/true) : x;
        const auto channels = y.dim() - spatial - 1;  // the input may have no batch dimension
        const auto delta = join_parts(adapter, out, channels, [&](const LowRank& term) {
          std::vector<int64_t> sizes = kernel_sizes, times(sizes.size(), 1);
          sizes[0] = term.A.size(0);
          times[0] = groups;
          auto A = term.A.to(x.scalar_type()).reshape(sizes);
          if (groups > 1) A = A.repeat(times);
          const auto h = convolve(dropped, A, OptionalTensor()) * term.scaling;
          return pointwise_convolution(h, term.B.to(h.scalar_type()), spatial, groups);
        });
        if (delta.defined()) y.add_(delta);
      },
      form_dense);
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
