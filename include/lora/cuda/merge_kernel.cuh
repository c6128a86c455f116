#pragma once

#include <cuda_runtime_api.h>
#include <lora/cuda/merge_body.h>
#include <lora/version.h>

#include <cstdint>

LORA_NAMESPACE_BEGIN
namespace cuda {
namespace detail {

/// Merges all `tiles` of a table, whose arrays are the device's, by one launch.
cudaError_t launch_merge(ElementType type, const MergeTable& table, int64_t tiles, cudaStream_t stream);

}  // namespace detail
}  // namespace cuda
LORA_NAMESPACE_END
