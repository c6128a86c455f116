# The target lora::cuda: merge kernels for CUDA devices, compiled into every program or shared library that is linked with
# it. So a program's own sources need no nvcc, and a header-only package ships nothing that is bound to one LibTorch.
#   lora_use_cuda(include_dir missing)  makes it, where LibTorch and the toolkit allow; else sets `missing` to the reason
# Call lora_use_torch before. The architectures are LibTorch's: TORCH_CUDA_ARCH_LIST.

function(lora_use_cuda include_dir missing)
  get_target_property(reason lora::torch LORA_CUDA_MISSING)
  set(${missing} "${reason}" PARENT_SCOPE)
  if(reason OR TARGET lora::cuda)
    return()
  endif()
  find_package(CUDAToolkit REQUIRED)
  add_library(lora::cuda INTERFACE IMPORTED GLOBAL)
  target_sources(lora::cuda INTERFACE "${include_dir}/lora/cuda/merge.cpp" "${include_dir}/lora/cuda/merge_kernel.cu")
  target_compile_features(lora::cuda INTERFACE cuda_std_17)
  # Both parts of cuBLAS from the toolkit: the loader would take the second from the libraries that LibTorch brings along.
  target_link_libraries(lora::cuda INTERFACE lora::lora CUDA::cudart CUDA::cublas "-Wl,--push-state,--no-as-needed"
                                             CUDA::cublasLt "-Wl,--pop-state")
endfunction()
