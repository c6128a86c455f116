#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/string_view.h>
#include <lora/detail/key_owner.h>
#include <lora/detail/plain_tensor.h>
#include <lora/detail/torch_compat.h>
#include <lora/functional/attention.h>
#include <lora/functional/gelu.h>
#include <lora/version.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>

LORA_NAMESPACE_BEGIN
namespace detail {

inline at::Tensor fast_gelu_kernel(const at::Tensor& x, c10::string_view approximate) {
  const c10::impl::ExcludeDispatchKeyGuard below(kFastOperatorsKey);
  return lora::gelu(x, approximate);
}

/// The number of past keys by which a mask that is the same for all heads lets query i see the keys 0 to past + i;
/// nothing for another mask.
inline std::optional<int64_t> causal_past(const at::Tensor& q, const at::Tensor& k, const at::Tensor& mask) {
  if (!is_plain_cpu_memory(mask) || mask.scalar_type() != at::kBool || mask.numel() == 0) return std::nullopt;
  if (mask.dim() < 2 || mask.dim() > q.dim() || k.dim() != q.dim() || mask.stride(-1) != 1) return std::nullopt;
  const auto queries = q.size(-2), keys = k.size(-2);
  if (mask.size(-2) != queries || mask.size(-1) != keys) return std::nullopt;
  for (int64_t dim = 3; dim <= mask.dim(); ++dim) {
    const auto size = mask.size(-dim);
    if (size != 1 && (mask.stride(-dim) != 0 || size != q.size(-dim))) return std::nullopt;
  }
  const auto* row = mask.const_data_ptr<bool>();
  const auto past = static_cast<int64_t>(std::find(row, row + keys, false) - row) - 1;
  if (past < 0) return std::nullopt;
  for (int64_t i = 0; i < queries; ++i, row += mask.stride(-2)) {
    const auto* const end = row + std::min(keys, past + i + 1);
    if (std::find(row, end, false) != end || std::find(end, row + keys, true) != row + keys) return std::nullopt;
  }
  return past;
}

inline at::Tensor fast_attention_kernel(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                        const std::optional<at::Tensor>& mask, double dropout, bool is_causal,
                                        std::optional<double> scale, bool enable_gqa) {
  const c10::impl::ExcludeDispatchKeyGuard below(kFastOperatorsKey);
  const bool masked = mask && mask->defined();
  if (dropout == 0 && !enable_gqa) {
    if (!masked) return lora::attention(q, k, v, is_causal, scale);
    if (const auto past = is_causal ? std::nullopt : causal_past(q, k, *mask)) {
      auto out = try_attention(q, k, v, /*is_causal=*/true, scale, *past);
      if (out.defined()) return out;
    }
  }
  return at::scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, scale, enable_gqa);
}

/// Registers the kernels with LibTorch's dispatcher, once a process. Every other operator passes over the key.
class FastOperatorsRegistrar {
 public:
  FastOperatorsRegistrar() {
    if (key_is_taken(kFastOperatorsKey, "aten::gelu")) return;
    using torch::Library;
    owner_ = std::make_unique<Library>(Library::FRAGMENT, "lora", std::nullopt, __FILE__, __LINE__);
    owner_->def("_fast_operators_abi() -> int", &abi);

    fallback_ = std::make_unique<Library>(Library::IMPL, "_", kFastOperatorsKey, __FILE__, __LINE__);
    fallback_->fallback(torch::CppFunction::makeFallthrough());

    kernels_ = std::make_unique<Library>(Library::IMPL, "aten", kFastOperatorsKey, __FILE__, __LINE__);
    kernels_->impl("gelu", TORCH_FN(fast_gelu_kernel));
    kernels_->impl("scaled_dot_product_attention", TORCH_FN(fast_attention_kernel));
  }

 private:
  std::unique_ptr<torch::Library> owner_;
  std::unique_ptr<torch::Library> fallback_;
  std::unique_ptr<torch::Library> kernels_;
};

}  // namespace detail

/// While it lives, LibTorch's GELU and scaled dot product attention are run on its thread as lora::gelu and
/// lora::attention run them, so that a model which is already written gets their speed.
///
///     { const lora::FastOperators fast; loss = model->forward(ids); }
///     loss.backward();
///
/// Attention with a boolean mask by which query i sees the keys 0 to past + i, the same for all heads, is that of
/// lora::attention too: LibTorch has no other way to say it. A backward follows the forward that it belongs to, with
/// the guard or without. Guards nest, and live and die on one thread, each before those that are older. What the
/// functions leave to LibTorch, attention with another mask or dropout, and every other operator is LibTorch's as
/// without. Throws a StateError where another library holds the dispatch key.
class FastOperators {
 public:
  FastOperators() : switched_on_(owned_key()) {}
  FastOperators(const FastOperators&) = delete;
  FastOperators& operator=(const FastOperators&) = delete;

 private:
  static c10::DispatchKey owned_key() {
    // Here and not at the start of the process: a source file that makes no guard compiles no kernel.
    static const detail::FastOperatorsRegistrar registrar;
    detail::check_key_owner("lora::FastOperators", detail::kFastOperatorsKey, "lora::_fast_operators_abi");
    return detail::kFastOperatorsKey;
  }

  c10::impl::IncludeDispatchKeyGuard switched_on_;
};

LORA_NAMESPACE_END
