// Merges on CUDA devices, for programs that are linked with lora::cuda: this file and merge_kernel.cu become part of
// them.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <lora/cuda/merge.h>
#include <lora/cuda/merge_plan.h>
#include <lora/cuda/products.h>
#include <lora/merge/merge.h>
#include <lora/version.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <lora/cuda/blas.cuh>
#include <lora/cuda/merge_kernel.cuh>
#include <map>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace cuda {
namespace detail {
namespace {

using lora::detail::MergeJob;
using Jobs = std::vector<MergeJob*>;

/// The paths of jobs that one call computes.
std::string paths_of(const Jobs& jobs) {
  const auto& first = jobs.front()->path;
  return jobs.size() == 1 ? first : first + " and " + std::to_string(jobs.size() - 1) + " more";
}

/// Runs a plan on the current stream and waits for it: the counts decide whether the model is changed.
void run(const MergePlan& plan) {
  if (plan.tiles() == 0) return;
  const auto where = paths_of(plan.jobs());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto options = at::TensorOptions(at::kByte).device(at::kCUDA);
  const auto count = plan.matrices().size();

  std::vector<char> host(count * sizeof(MergeMatrix) + plan.updates().size() * sizeof(MergeUpdate));
  const auto updates_at = count * sizeof(MergeMatrix);
  std::memcpy(host.data(), plan.matrices().data(), updates_at);
  std::memcpy(host.data() + updates_at, plan.updates().data(), host.size() - updates_at);
  const auto device = at::empty({static_cast<int64_t>(host.size())}, options);
  auto* begin = static_cast<char*>(device.mutable_data_ptr());
  check(cudaMemcpyAsync(begin, host.data(), host.size(), cudaMemcpyHostToDevice, stream), "cudaMemcpyAsync", where);

  std::vector<int64_t> found(count);
  const auto non_finite = at::zeros({static_cast<int64_t>(count)}, options.dtype(at::kLong));
  auto* counters = non_finite.mutable_data_ptr<int64_t>();
  const MergeTable table{reinterpret_cast<const MergeMatrix*>(begin), static_cast<int64_t>(count),
                         reinterpret_cast<const MergeUpdate*>(begin + updates_at),
                         reinterpret_cast<unsigned long long*>(counters)};
  check(launch_merge(plan.type(), table, plan.tiles(), stream), "the merge kernel", where);
  check(cudaMemcpyAsync(found.data(), counters, count * sizeof(int64_t), cudaMemcpyDeviceToHost, stream),
        "cudaMemcpyAsync", where);
  check(cudaStreamSynchronize(stream), "the merge", where);
  for (size_t i = 0; i < count; ++i) plan.jobs()[i]->non_finite = found[i];
}

/// Adds to a copy of W0 by cuBLAS.
void merge_by_blas(const Jobs& jobs, ElementType type) {
  std::vector<Product> products;
  std::vector<at::Tensor> kept;
  for (auto* job : jobs) {
    job->merged = at::empty_like(job->base, c10::MemoryFormat::Contiguous).copy_(job->base);
    add_products(*job, products, kept);
  }
  if (products.empty()) return;
  const auto batches = batches_of(std::move(products));
  if (type == ElementType::kDouble) {
    BlasProducts<double>(type).run(batches);
  } else {
    BlasProducts<float>(type).run(batches);
  }
}

void merge_jobs_on_cuda(const Jobs& jobs) {
  std::map<std::pair<c10::DeviceIndex, ElementType>, Jobs> groups;
  for (auto* job : jobs) {
    const auto type = element_type(job->base.scalar_type());
    if (type) {
      groups[{job->base.device().index(), *type}].push_back(job);
    } else {
      lora::detail::merge_by_operators(*job);
    }
  }
  for (const auto& [place, group] : groups) {
    const c10::cuda::CUDAGuard guard(place.first);
    MergePlan plan(place.second);
    Jobs for_blas;
    for (auto* job : group) {
      if (merge_kernel() == MergeKernel::kCublas && is_for_blas(*job)) {
        for_blas.push_back(job);
      } else {
        plan.add(*job);
      }
    }
    merge_by_blas(for_blas, place.second);
    for (auto* job : for_blas) plan.add_check(*job);
    run(plan);
  }
}

/// Before main: from then on lora::detail::merge_weights gives the jobs of CUDA devices to this file.
[[maybe_unused]] const bool linked = (lora::detail::merge_on_cuda = &merge_jobs_on_cuda, true);

}  // namespace
}  // namespace detail
}  // namespace cuda
LORA_NAMESPACE_END
