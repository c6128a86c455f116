// The kernel of merge_body.h for a device. It knows nothing of LibTorch, so that each architecture is compiled in
// seconds.
#include <lora/cuda/merge_kernel.cuh>

LORA_NAMESPACE_BEGIN
namespace cuda {
namespace detail {
namespace {

// The bodies are empty for the host, which a __host__ __device__ template may then call without a warning.
template <class T>
class ThreadBlock {
 public:
  C10_HOST_DEVICE explicit ThreadBlock(TileSlices<T>& slices) : slices_(slices) {}

  template <class Step>
  C10_HOST_DEVICE void run([[maybe_unused]] const Step& step) {
#ifdef __CUDA_ARCH__
    step(static_cast<int>(threadIdx.x), registers_);
    __syncthreads();
#endif
  }

  C10_HOST_DEVICE TileSlices<T>& slices() { return slices_; }

  C10_HOST_DEVICE void add([[maybe_unused]] unsigned long long* counter, [[maybe_unused]] unsigned count) {
#ifdef __CUDA_ARCH__
    atomicAdd(counter, static_cast<unsigned long long>(count));
#endif
  }

 private:
  TileSlices<T>& slices_;
  TileRegisters<T> registers_;
};

template <class T>
__global__ void __launch_bounds__(TileShape<T>::kThreads, 2) merge_tiles(MergeTable table) {
  __shared__ TileSlices<T> slices;
  ThreadBlock<T> block(slices);
  TileMerger<T>(table, blockIdx.x).run(block);
}

template <class T>
cudaError_t launch(const MergeTable& table, int64_t tiles, cudaStream_t stream) {
  merge_tiles<T><<<static_cast<unsigned>(tiles), TileShape<T>::kThreads, 0, stream>>>(table);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_merge(ElementType type, const MergeTable& table, int64_t tiles, cudaStream_t stream) {
  switch (type) {
    case ElementType::kFloat:
      return launch<float>(table, tiles, stream);
    case ElementType::kDouble:
      return launch<double>(table, tiles, stream);
    case ElementType::kBFloat16:
      return launch<c10::BFloat16>(table, tiles, stream);
    case ElementType::kHalf:
      return launch<c10::Half>(table, tiles, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace detail
}  // namespace cuda
LORA_NAMESPACE_END
