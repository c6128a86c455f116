#pragma once

#include <lora/detail/key_owner.h>
#include <lora/detail/torch_compat.h>
#include <lora/version.h>
#include <lora/weight/convolution.h>
#include <lora/weight/fallback.h>
#include <lora/weight/kernels.h>
#include <lora/weight/lookup.h>
#include <torch/library.h>

#include <memory>
#include <optional>

LORA_NAMESPACE_BEGIN
namespace detail {

/// Registers the kernels with LibTorch's dispatcher, once a process.
class Registrar {
 public:
  Registrar() {
    if (key_is_taken(kAdaptedWeightKey, "aten::linear")) return;
    using torch::Library;
    owner_ = std::make_unique<Library>(Library::FRAGMENT, "lora", std::nullopt, __FILE__, __LINE__);
    owner_->def("_abi() -> int", &abi);

    fallback_ = std::make_unique<Library>(Library::IMPL, "_", kAdaptedWeightKey, __FILE__, __LINE__);
    fallback_->fallback(torch::CppFunction::makeFromBoxedFunction<&dense_fallback>());

    kernels_ = std::make_unique<Library>(Library::IMPL, "aten", kAdaptedWeightKey, __FILE__, __LINE__);
    kernels_->impl("linear", TORCH_FN(linear_kernel));
    kernels_->impl("matmul", TORCH_FN(matmul_kernel));
    kernels_->impl("mm", TORCH_FN(mm_kernel));
    kernels_->impl("addmm", TORCH_FN(addmm_kernel));
    kernels_->impl("conv1d", TORCH_FN(conv1d_kernel));
    kernels_->impl("conv1d.padding", TORCH_FN(conv1d_padding_kernel));
    kernels_->impl("conv2d", TORCH_FN(conv2d_kernel));
    kernels_->impl("conv2d.padding", TORCH_FN(conv2d_padding_kernel));
    kernels_->impl("conv3d", TORCH_FN(conv3d_kernel));
    kernels_->impl("conv3d.padding", TORCH_FN(conv3d_padding_kernel));
    kernels_->impl("convolution", TORCH_FN(convolution_kernel));
    kernels_->impl("_convolution", TORCH_FN(traced_convolution_kernel));
    kernels_->impl("_convolution_mode", TORCH_FN(convolution_mode_kernel));
    kernels_->impl("embedding", TORCH_FN(embedding_kernel));
    kernels_->impl("t", TORCH_FN(t_kernel));
    kernels_->impl("numpy_T", TORCH_FN(numpy_t_kernel));
    kernels_->impl("transpose.int", TORCH_FN(transpose_kernel));
    kernels_->impl("narrow", TORCH_FN(narrow_kernel));
    kernels_->impl("slice.Tensor", TORCH_FN(slice_kernel));
    kernels_->impl("split.Tensor", TORCH_FN(split_kernel));
    kernels_->impl("split.sizes", TORCH_FN(split_with_sizes_kernel));
    kernels_->impl("split_with_sizes", TORCH_FN(split_with_sizes_kernel));
    kernels_->impl("chunk", TORCH_FN(chunk_kernel));
    kernels_->impl("detach", TORCH_FN(detach_kernel));
    kernels_->impl("_autocast_to_reduced_precision", TORCH_FN(autocast_kernel));
    kernels_->impl("_has_compatible_shallow_copy_type", TORCH_FN(compatible_shallow_copy_kernel));
  }

 private:
  std::unique_ptr<torch::Library> owner_;
  std::unique_ptr<torch::Library> fallback_;
  std::unique_ptr<torch::Library> kernels_;
};

inline const Registrar registrar;

/// Throws a StateError where another library, or another version of this one, holds the dispatch key.
inline void check_key_owner() { check_key_owner("lora::inject", kAdaptedWeightKey, "lora::_abi"); }

}  // namespace detail
LORA_NAMESPACE_END
