#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAContextLight.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/Exception.h>
#include <cublas_v2.h>
#include <cuda_runtime_api.h>
#include <lora/cuda/merge_body.h>
#include <lora/cuda/products.h>
#include <lora/version.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace cuda {
namespace detail {

inline void check(cudaError_t status, const char* call, const std::string& where) {
  TORCH_CHECK(status == cudaSuccess, "[lora::merge] found ", cudaGetErrorString(status), " from ", call,
              ", expected success at ", where,
              "; check the device, its driver and the architectures that this program was compiled for (",
              "TORCH_CUDA_ARCH_LIST); nothing was changed");
}

inline void check(cublasStatus_t status, const char* call, const std::string& where) {
  TORCH_CHECK(status == CUBLAS_STATUS_SUCCESS, "[lora::merge] found ", cublasGetStatusString(status), " from ", call,
              ", expected success at ", where,
              "; lora::cuda::set_merge_kernel(lora::cuda::MergeKernel::kOnePass) does without; nothing was changed");
}

/// float32 products without TF32 and sums of halves in float32, whatever LibTorch's settings are.
class ExactMath {
 public:
  explicit ExactMath(cublasHandle_t handle) : handle_(handle) {
    static_cast<void>(cublasGetMathMode(handle_, &before_));
    static_cast<void>(cublasSetMathMode(handle_, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION));
  }
  ~ExactMath() { static_cast<void>(cublasSetMathMode(handle_, before_)); }
  ExactMath(const ExactMath&) = delete;
  ExactMath& operator=(const ExactMath&) = delete;

 private:
  cublasHandle_t handle_;
  cublasMath_t before_ = CUBLAS_DEFAULT_MATH;
};

/// Products of one dtype on the current stream. A BLAS counts by columns: it forms mergedᵀ += scaling · rightᵀ · leftᵀ.
template <class Scale>
class BlasProducts {
 public:
  explicit BlasProducts(ElementType type)
      : handle_(at::cuda::getCurrentCUDABlasHandle()),
        type_(type == ElementType::kDouble     ? CUDA_R_64F
              : type == ElementType::kFloat    ? CUDA_R_32F
              : type == ElementType::kBFloat16 ? CUDA_R_16BF
                                               : CUDA_R_16F),
        element_size_(type == ElementType::kDouble  ? 8
                      : type == ElementType::kFloat ? 4
                                                    : 2) {}

  /// Equal shapes at equal distances in one call each, all others in one call together.
  void run(const std::vector<ProductBatch>& batches) {
    const ExactMath math(handle_);
    std::vector<const ProductBatch*> scattered;
    size_t products = 0;
    for (const auto& batch : batches) {
      if (batch.strided) {
        run_strided(batch.products);
      } else if (can_group(batch)) {
        scattered.push_back(&batch);
        products += batch.products.size();
      } else {
        for (const auto& product : batch.products) run_one(product);
      }
    }
    if (products == 1) {
      run_one(scattered.front()->products.front());
    } else if (products > 1) {
      run_grouped(scattered);
    }
  }

 private:
  static constexpr auto kCompute = std::is_same_v<Scale, double> ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F;

  static cublasOperation_t operation(const BlasMatrix& matrix) { return matrix.transposed ? CUBLAS_OP_T : CUBLAS_OP_N; }
  static int size(int64_t value) { return static_cast<int>(value); }  // is_for_blas saw to it

  void run_one(const Product& product) {
    const auto alpha = static_cast<Scale>(product.scaling);
    const Scale beta = 1;
    check(cublasGemmEx(handle_, operation(product.right), operation(product.left), size(product.columns),
                       size(product.rows), size(product.rank), &alpha, product.right.data, type_,
                       size(product.right.stride), product.left.data, type_, size(product.left.stride), &beta,
                       product.merged.data, type_, size(product.merged.stride), kCompute, CUBLAS_GEMM_DEFAULT),
          "cublasGemmEx", *product.path);
  }

  void run_strided(const std::vector<Product>& products) {
    const auto& first = products[0];
    const auto& second = products[1];
    const auto distance = [&](const BlasMatrix& a, const BlasMatrix& b) {
      return static_cast<long long>(b.data - a.data) / element_size_;
    };
    const auto alpha = static_cast<Scale>(first.scaling);
    const Scale beta = 1;
    check(cublasGemmStridedBatchedEx(
              handle_, operation(first.right), operation(first.left), size(first.columns), size(first.rows),
              size(first.rank), &alpha, first.right.data, type_, size(first.right.stride),
              distance(first.right, second.right), first.left.data, type_, size(first.left.stride),
              distance(first.left, second.left), &beta, first.merged.data, type_, size(first.merged.stride),
              distance(first.merged, second.merged), static_cast<int>(products.size()), kCompute, CUBLAS_GEMM_DEFAULT),
          "cublasGemmStridedBatchedEx", *first.path + " and others of its shape");
  }

#if CUBLAS_VERSION >= 120500
  bool can_group(const ProductBatch& batch) const {
    if (element_size_ != 2) return true;  // it asks for aligned halves
    for (const auto& product : batch.products) {
      for (const auto* data : {product.left.data, product.right.data, product.merged.data}) {
        if (reinterpret_cast<uintptr_t>(data) % 16 != 0) return false;
      }
    }
    return true;
  }

  void run_grouped(const std::vector<const ProductBatch*>& batches) {
    std::vector<cublasOperation_t> left_operations, right_operations;
    std::vector<int> rows, columns, ranks, left_strides, right_strides, merged_strides, sizes;
    std::vector<Scale> alphas;
    std::vector<void*> pointers[3];
    for (const auto* batch : batches) {
      const auto& first = batch->products.front();
      left_operations.push_back(operation(first.left));
      right_operations.push_back(operation(first.right));
      rows.push_back(size(first.rows));
      columns.push_back(size(first.columns));
      ranks.push_back(size(first.rank));
      left_strides.push_back(size(first.left.stride));
      right_strides.push_back(size(first.right.stride));
      merged_strides.push_back(size(first.merged.stride));
      sizes.push_back(static_cast<int>(batch->products.size()));
      alphas.push_back(static_cast<Scale>(first.scaling));
      for (const auto& product : batch->products) {
        pointers[0].push_back(product.right.data);
        pointers[1].push_back(product.left.data);
        pointers[2].push_back(product.merged.data);
      }
    }
    const std::vector<Scale> betas(alphas.size(), 1);
    const auto& where = *batches.front()->products.front().path + " and others";
    // The arrays of pointers are the device's.
    const auto bytes = static_cast<int64_t>(pointers[0].size() * sizeof(void*));
    const auto on_device = at::empty({3 * bytes}, at::TensorOptions(at::kByte).device(at::kCUDA));
    auto* begin = static_cast<char*>(on_device.mutable_data_ptr());
    const auto stream = c10::cuda::getCurrentCUDAStream();
    for (int i = 0; i < 3; ++i) {
      check(cudaMemcpyAsync(begin + i * bytes, pointers[i].data(), static_cast<size_t>(bytes), cudaMemcpyHostToDevice,
                            stream),
            "cudaMemcpyAsync", where);
    }
    const auto array = [&](int i) { return reinterpret_cast<void**>(begin + i * bytes); };
    check(cublasGemmGroupedBatchedEx(handle_, right_operations.data(), left_operations.data(), columns.data(),
                                     rows.data(), ranks.data(), alphas.data(), array(0), type_, right_strides.data(),
                                     array(1), type_, left_strides.data(), betas.data(), array(2), type_,
                                     merged_strides.data(), static_cast<int>(sizes.size()), sizes.data(), kCompute),
          "cublasGemmGroupedBatchedEx", where);
  }
#else
  bool can_group(const ProductBatch&) const { return false; }
  void run_grouped(const std::vector<const ProductBatch*>&) {}
#endif

  cublasHandle_t handle_;
  cudaDataType_t type_;
  int64_t element_size_;
};

}  // namespace detail
}  // namespace cuda
LORA_NAMESPACE_END
