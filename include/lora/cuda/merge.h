#pragma once

#include <lora/merge/merge.h>
#include <lora/version.h>

#include <atomic>

LORA_NAMESPACE_BEGIN
namespace cuda {

/// What merges weights on a CUDA device in a program that is linked with lora::cuda.
enum class MergeKernel {
  /// Our kernel, for every dtype, all weights of one dtype in one launch: reads W0 and writes W′ once.
  kOnePass,
  /// cuBLAS, where base and factors have one dtype and no two updates share an element; one pass elsewhere. cuBLAS adds
  /// to W′ in place: with the copy of W0 before and the search for NaN and infinite values after, memory is passed over
  /// six times instead of twice. It is for ranks so high that the products and no longer the memory set the time.
  kCublas,
};

namespace detail {
inline std::atomic<MergeKernel> chosen_merge_kernel{MergeKernel::kOnePass};
}  // namespace detail

/// Chooses for all later merges.
inline void set_merge_kernel(MergeKernel kernel) { detail::chosen_merge_kernel = kernel; }
/// What was chosen; MergeKernel::kOnePass at first.
inline MergeKernel merge_kernel() { return detail::chosen_merge_kernel; }
/// Whether the program is linked with lora::cuda: else LibTorch's operators merge on a CUDA device.
inline bool has_merge_kernels() { return lora::detail::merge_on_cuda.load() != nullptr; }

}  // namespace cuda
LORA_NAMESPACE_END
