#pragma once

#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>
#include <lora/detail/instruction_set.h>
#include <lora/detail/plain_tensor.h>
#include <lora/functional/attention_call.h>
#include <lora/version.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// The gradients of q, k and v as a step that autograd knows, so that a second derivative is an error and not 0.
struct AttentionBackward : torch::autograd::Function<AttentionBackward> {
  using Context = torch::autograd::AutogradContext;
  using Tensors = torch::autograd::variable_list;

  /// q, k and v are the call's, given for their place in the graph.
  static Tensors forward(Context* /*context*/, const at::Tensor& dout, const at::Tensor& /*q*/, const at::Tensor& /*k*/,
                         const at::Tensor& /*v*/, const AttentionCall* call) {
    return run(dout, *call, /*for_query=*/true, /*for_keys=*/true);
  }

  static Tensors backward(Context* /*context*/, const Tensors& /*gradients*/) {
    TORCH_CHECK_NOT_IMPLEMENTED(false,
                                "[lora::attention] found a second derivative, expected a first one; compute the same "
                                "with at::_scaled_dot_product_attention_math for that");
  }

  /// dq, and dk with dv, where they are wanted.
  static Tensors run(const at::Tensor& dout, const AttentionCall& call, bool for_query, bool for_keys) {
    TORCH_CHECK(
        is_plain_cpu_tensor(dout),
        "[lora::attention] found a gradient that is wrapped or not on the CPU, expected a plain tensor; compute "
        "the same with at::scaled_dot_product_attention for that");
    Tensors gradients(3);
    if (for_query) gradients[0] = empty_heads(call.q);
    if (for_keys) gradients[1] = empty_heads(call.k);
    if (for_keys) gradients[2] = empty_heads(call.v);
    call.backward(with_whole_rows(dout), gradients[0], gradients[1], gradients[2]);
    return gradients;
  }
};

struct AttentionFunction : torch::autograd::Function<AttentionFunction> {
  using Context = torch::autograd::AutogradContext;
  using Tensors = torch::autograd::variable_list;

  static at::Tensor forward(Context* context, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const c10::intrusive_ptr<AttentionOptions>& options) {
    const auto call = run(q, k, v, options, at::empty({q.numel() / q.size(-1), 2}, q.options().dtype(at::kFloat)));
    context->save_for_backward({call.q, call.k, call.v, call.out, call.softmax});
    context->saved_data["options"] = c10::IValue::make_capsule(options);
    context->set_materialize_grads(false);
    return call.out;
  }

  static Tensors backward(Context* context, const Tensors& gradients) {
    const auto& dout = gradients[0];
    Tensors results(4);
    if (!dout.defined()) return results;
    const auto saved = context->get_saved_variables();
    const auto options =
        c10::static_intrusive_pointer_cast<AttentionOptions>(context->saved_data["options"].toCapsule());
    const AttentionCall call{saved[0], saved[1], saved[2], saved[3], saved[4], options};
    const auto found = at::GradMode::is_enabled()
                           ? AttentionBackward::apply(dout, call.q, call.k, call.v, &call)
                           : AttentionBackward::run(dout, call, context->needs_input_grad(0),
                                                    context->needs_input_grad(1) || context->needs_input_grad(2));
    std::copy(found.begin(), found.end(), results.begin());
    return results;
  }

  /// softmax: undefined where no backward follows.
  static AttentionCall run(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const c10::intrusive_ptr<AttentionOptions>& options, const at::Tensor& softmax) {
    AttentionCall call{q, k, v, empty_heads(q), softmax, options};
    call.forward();
    return call;
  }
};

/// What autocast makes of an argument of attention.
inline at::Tensor autocast_argument(const at::Tensor& x) {
  const bool casts = is_plain_cpu_tensor(x) && at::autocast::is_autocast_enabled(at::kCPU);
  return casts ? x.to(at::autocast::get_autocast_dtype(at::kCPU)) : x;
}

/// Whether our kernel takes q [*, L, E], k and v [*, S, E], with any L and S of sequences in them.
inline bool attention_applies(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  if (instruction_set() == InstructionSet::kPlain) return false;  // LibTorch's is faster there
  for (const auto* x : {&q, &k, &v}) {
    if (!is_plain_cpu_tensor(*x) || x->scalar_type() != q.scalar_type()) return false;
    if (x->dim() < 2 || x->dim() != q.dim()) return false;
  }
  const auto leading = static_cast<size_t>(q.dim()) - 2;
  return q.sizes().slice(0, leading) == k.sizes().slice(0, leading) && q.size(-1) == k.size(-1) &&
         k.sizes() == v.sizes() && k.size(-2) > 0 && k.size(-1) > 0;
}

/// Attention by our kernel, of what it takes.
inline at::Tensor attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                         const c10::intrusive_ptr<AttentionOptions>& options) {
  const auto query = with_whole_rows(q), key = with_whole_rows(k), value = with_whole_rows(v);
  const bool records = at::GradMode::is_enabled() && (q.requires_grad() || k.requires_grad() || v.requires_grad());
  return records ? AttentionFunction::apply(query, key, value, options)
                 : AttentionFunction::run(query, key, value, options, /*softmax=*/{}).out;
}

inline double scale_of_scores(const at::Tensor& q, std::optional<double> scale) {
  return scale.value_or(1 / std::sqrt(static_cast<double>(q.size(-1))));
}

/// Attention by our kernel with the arguments of lora::attention; undefined where it does not take them.
inline at::Tensor try_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool is_causal,
                                std::optional<double> scale, int64_t past) {
  const auto query = autocast_argument(q), key = autocast_argument(k), value = autocast_argument(v);
  if (!attention_applies(query, key, value)) return {};
  return attend(query, key, value,
                c10::make_intrusive<AttentionOptions>(std::vector<int64_t>{0, query.size(-2)},
                                                      std::vector<int64_t>{0, key.size(-2)}, is_causal,
                                                      scale_of_scores(query, scale), std::min(past, key.size(-2))));
}

}  // namespace detail

/// at::scaled_dot_product_attention without mask and dropout, softmax(scale·q·kᵀ)·v (Vaswani et al. 2017, arXiv
/// 1706.03762, section 3.2.1), faster on the CPU: forward and backward together two to four times with AVX-512.
///
/// q: [*, L, E], k and v: [*, S, E], in any strides; returns [*, L, E] of their dtype, in memory as [B, L, H, E] where
/// it is [B, H, L, E]. With is_causal query i sees the keys 0 to past + i: `past` keys stand in front of the queries'
/// own, as those of a prefix or of tokens read before. scale: of the scores, by default 1/√E. float32, bfloat16 and
/// half are computed in float32 and rounded once, in memory that grows with L and S and not with their product (Dao et
/// al. 2022, arXiv 2205.14135); autocast has its way. Everything else is LibTorch's. Throws a c10::ValueError for a
/// past below 0. A second derivative throws a c10::NotImplementedError.
inline at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool is_causal = false,
                            std::optional<double> scale = std::nullopt, int64_t past = 0) {
  TORCH_CHECK_VALUE(past >= 0, "[lora::attention] found past = ", past,
                    ", expected 0 or more; give the number of keys in front of the first query's own");
  auto out = detail::try_attention(q, k, v, is_causal, scale, past);
  if (out.defined()) return out;
  if (past == 0 || !is_causal) return at::scaled_dot_product_attention(q, k, v, {}, /*dropout_p=*/0, is_causal, scale);
  const auto mask = at::ones({q.size(-2), k.size(-2)}, q.options().dtype(at::kBool)).tril(past);
  return at::scaled_dot_product_attention(q, k, v, mask, /*dropout_p=*/0, /*is_causal=*/false, scale);
}

/// attention of sequences of different lengths without padding, each by itself.
///
/// q, k and v: [tokens, heads, E], the sequences' tokens one behind the other; offsets: int64 [n + 1] on the CPU, n ≥
/// 1: sequence i has the tokens [offsets[i], offsets[i + 1]), from 0 to all, none where they are equal. Returns
/// [tokens, heads, E]. Otherwise as attention. Throws a c10::ValueError where shapes or offsets do not fit.
inline at::Tensor packed_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                   const at::Tensor& offsets, bool is_causal = false,
                                   std::optional<double> scale = std::nullopt) {
  TORCH_CHECK_VALUE(
      q.dim() == 3 && q.sizes() == k.sizes() && v.dim() == 3 && v.sizes().slice(0, 2) == q.sizes().slice(0, 2),
      "[lora::packed_attention] found q ", q.sizes(), ", k ", k.sizes(), " and v ", v.sizes(),
      ", expected [tokens, heads, E]; give a padded batch to lora::attention");
  TORCH_CHECK_VALUE(offsets.dim() == 1 && offsets.numel() > 1 && offsets.scalar_type() == at::kLong && offsets.is_cpu(),
                    "[lora::packed_attention] found offsets ", offsets.sizes(), " of ", offsets.scalar_type(), " on ",
                    offsets.device(),
                    ", expected int64 [sequences + 1] on the CPU; give the first token of each sequence "
                    "and the number of tokens");
  const auto adjacent = offsets.contiguous();
  const std::vector<int64_t> ends(adjacent.const_data_ptr<int64_t>(),
                                  adjacent.const_data_ptr<int64_t>() + adjacent.numel());
  TORCH_CHECK_VALUE(ends.front() == 0 && ends.back() == q.size(0) && std::is_sorted(ends.begin(), ends.end()),
                    "[lora::packed_attention] found offsets ", at::IntArrayRef(ends),
                    ", expected ascending ones from 0 to the ", q.size(0),
                    " tokens; give the first token of each sequence and the number of tokens");

  const auto heads_first = [](const at::Tensor& x) { return x.unsqueeze(0).transpose(1, 2); };
  const auto tokens_first = [](const at::Tensor& x) { return x.transpose(1, 2).squeeze(0); };
  const auto query = heads_first(detail::autocast_argument(q)), key = heads_first(detail::autocast_argument(k)),
             value = heads_first(detail::autocast_argument(v));
  if (detail::attention_applies(query, key, value)) {
    return tokens_first(detail::attend(
        query, key, value,
        c10::make_intrusive<detail::AttentionOptions>(ends, ends, is_causal, detail::scale_of_scores(query, scale))));
  }
  std::vector<at::Tensor> sequences;
  for (size_t i = 1; i < ends.size(); ++i) {
    const auto of_sequence = [&](const at::Tensor& x) { return x.narrow(2, ends[i - 1], ends[i] - ends[i - 1]); };
    sequences.push_back(
        tokens_first(at::scaled_dot_product_attention(of_sequence(query), of_sequence(key), of_sequence(value),
                                                      /*attn_mask=*/{}, /*dropout_p=*/0, is_causal, scale)));
  }
  return at::cat(sequences);
}

LORA_NAMESPACE_END
