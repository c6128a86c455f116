#pragma once

#include <c10/util/Exception.h>
#include <lora/version.h>

#include <cstdint>
#include <cstdlib>
#include <string>

LORA_NAMESPACE_BEGIN

/// Lets oneDNN keep at most `kernels` compiled kernels, for a process whose inputs have ever other numbers of rows, as
/// batches of texts have; call it before anything is computed.
///
/// oneDNN compiles a kernel for every shape, some hundred kilobytes, and by default keeps 1024 in its own cache and as
/// many in LibTorch's. One training step of a language model has some twenty shapes; a model with more of them than
/// `kernels` compiles in every step, and needs a higher limit. Sets ONEDNN_PRIMITIVE_CACHE_CAPACITY and
/// LRU_CACHE_CAPACITY in the process's environment, which both caches read when they are first used; variables that
/// the user has set stay. No other thread may read the environment meanwhile. Throws a ValueError for `kernels` < 1.
inline void limit_kernel_caches(int64_t kernels = 64) {
  TORCH_CHECK_VALUE(kernels >= 1, "[lora::limit_kernel_caches] found kernels = ", kernels, ", expected at least 1");
  const auto capacity = std::to_string(kernels);
  // The old name of the same variable, which the new one would outdo.
  if (std::getenv("DNNL_PRIMITIVE_CACHE_CAPACITY") == nullptr) {
    ::setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", capacity.c_str(), /*replace=*/0);
  }
  ::setenv("LRU_CACHE_CAPACITY", capacity.c_str(), /*replace=*/0);
}

LORA_NAMESPACE_END
