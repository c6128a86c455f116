// Merging on a CUDA device against the CPU's kernel and against float64; skipped where there is no device.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/adapters.h>
#include <lora/cuda/merge.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/linear.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "harness/dense_oracle.h"
#include "harness/merge_jobs.h"
#include "harness/values.h"

#ifdef LINKED_WITH_CUDA
#include <lora/cuda/products.h>

#include <lora/cuda/blas.cuh>
#include <lora/cuda/merge_kernel.cuh>
#endif

namespace gpu_merge_test {
namespace {

using harness::make_job;
using harness::MergeShape;
using lora::cuda::MergeKernel;
using lora::detail::MergeJob;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;
using Jobs = std::vector<std::unique_ptr<MergeJob>>;

TEST(Linking, GivesTheJobsOfCudaDevicesToTheKernels) {
#ifdef LINKED_WITH_CUDA
  EXPECT_TRUE(lora::cuda::has_merge_kernels());
#else
  EXPECT_FALSE(lora::cuda::has_merge_kernels());
#endif
}

#ifdef LINKED_WITH_CUDA
TEST(Launching, IsAnErrorOfTheWeightWhereThereIsNoDevice) {
  if (at::globalContext().hasCUDA()) return;
  const lora::cuda::detail::MergeTable table{nullptr, 0, nullptr, nullptr};
  for (const auto type : {lora::cuda::detail::ElementType::kFloat, lora::cuda::detail::ElementType::kHalf}) {
    EXPECT_THAT(
        [&] {
          lora::cuda::detail::check(lora::cuda::detail::launch_merge(type, table, 1, nullptr), "the merge kernel",
                                    "layer.weight");
        },
        ThrowsMessage<c10::Error>(AllOf(HasSubstr("[lora::merge] found "),
                                        HasSubstr(" from the merge kernel, expected success at layer.weight"))));
  }
}
#endif

template <class Base>
class WithDevice : public Base {
 protected:
  void SetUp() override {
    if (!at::globalContext().hasCUDA() || !lora::cuda::has_merge_kernels()) {
      GTEST_SKIP() << "needs a GPU: there is no CUDA device, or lora::cuda is not built";
    }
  }
  void TearDown() override { lora::cuda::set_merge_kernel(MergeKernel::kOnePass); }
};

const std::vector<MergeShape> kShapes{
    {"one_element", 1, 1, {{0, 1, 1}}},
    {"whole_tiles", 512, 1024, {{0, 512, 8}}},
    {"edges_in_vectors", 300, 1032, {{0, 300, 5}}},
    {"rows_out_of_line", 129, 515, {{0, 129, 3}}},
    {"high_rank", 256, 512, {{0, 256, 100}}},
    {"fused_parts", 2304, 768, {{0, 768, 8}, {1536, 768, 4}}},
    {"adapters_that_overlap", 700, 400, {{0, 700, 4}, {3, 650, 2}, {699, 1, 1}}},
    {"conv1d", 768, 2304, {{0, 2304, 8}}, true},
    {"conv1d_parts", 768, 2304, {{0, 768, 8}, {1536, 768, 17}}, true},
    {"no_rows", 0, 7, {{0, 0, 2}}},
};

std::unique_ptr<MergeJob> on_device(const MergeJob& job) {
  auto result = std::make_unique<MergeJob>();
  result->path = job.path;
  result->transposed = job.transposed;
  result->base = job.base.to(at::kCUDA);
  for (const auto& [begin, update] : job.updates) {
    result->updates.emplace_back(begin, lora::LowRank{update.A.to(at::kCUDA), update.B.to(at::kCUDA), update.scaling});
  }
  return result;
}

/// Merges on the device and compares with float64, and with the CPU's result: both lie within the bound around it.
void check(const Jobs& jobs) {
  Jobs there, here;
  for (const auto& job : jobs) {
    there.push_back(on_device(*job));
    here.push_back(make_job({job->path, 0, 0, {}}, at::kFloat, at::kFloat));
    here.back()->base = job->base;
    here.back()->transposed = job->transposed;
    here.back()->updates = job->updates;
  }
  lora::detail::merge_weights(there);
  lora::detail::merge_weights(here);
  for (size_t i = 0; i < jobs.size(); ++i) {
    const auto& job = *jobs[i];
    const auto dtype = job.base.scalar_type();
    const auto merged = there[i]->merged.cpu();
    EXPECT_TRUE(there[i]->merged.is_cuda());
    EXPECT_EQ(merged.scalar_type(), dtype);
    EXPECT_EQ(merged.sizes(), job.base.sizes());
    EXPECT_TRUE(at::equal(there[i]->base.cpu(), job.base)) << job.path;
    const auto weight = harness::dense_weight(job);
    const auto bound = harness::weight_bound(weight, dtype);
    EXPECT_LE(harness::excess(merged, weight.value, bound), 0) << job.path << " " << c10::toString(dtype);
    EXPECT_LE(harness::excess(merged, here[i]->merged.to(at::kDouble), 2 * bound), 0)
        << job.path << " " << c10::toString(dtype);
  }
}

class DeviceMerge : public WithDevice<::testing::TestWithParam<std::tuple<MergeShape, at::ScalarType>>> {};

TEST_P(DeviceMerge, IsTheCpusWithinTheBound) {
  const auto& [shape, dtype] = GetParam();
  for (const auto kernel : {MergeKernel::kOnePass, MergeKernel::kCublas}) {
    lora::cuda::set_merge_kernel(kernel);
    for (const auto factor_dtype : {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf}) {
      Jobs jobs;
      jobs.push_back(make_job(shape, dtype, factor_dtype));
      check(jobs);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Gpu, DeviceMerge,
                         ::testing::Combine(::testing::ValuesIn(kShapes),
                                            ::testing::Values(at::kDouble, at::kFloat, at::kBFloat16, at::kHalf)),
                         [](const auto& tested) {
                           return std::get<0>(tested.param).name + "_" + c10::toString(std::get<1>(tested.param));
                         });

class DeviceMerges : public WithDevice<::testing::Test> {};

TEST_F(DeviceMerges, MergeManyLayersOfAllDtypes) {
  for (const auto kernel : {MergeKernel::kOnePass, MergeKernel::kCublas}) {
    lora::cuda::set_merge_kernel(kernel);
    Jobs jobs;
    uint64_t seed = 1;
    for (int layer = 0; layer < 24; ++layer) {
      for (const auto dtype : {at::kFloat, at::kBFloat16}) {
        jobs.push_back(make_job({"square", 256, 256, {{0, 256, 8}}}, dtype, dtype, 1e-3, seed += 10));
        jobs.push_back(make_job({"wide", 96, 400, {{0, 96, 4}}}, dtype, at::kFloat, 1e-3, seed += 10));
      }
    }
    check(jobs);
  }
}

TEST_F(DeviceMerges, MergeABaseThatIsAView) {
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    auto job = make_job({"view", 64, 128, {{0, 64, 4}}}, dtype, at::kFloat);
    Jobs jobs;
    jobs.push_back(on_device(*job));
    const auto buffer = at::empty({64 * 128 + 1}, jobs[0]->base.options());
    jobs[0]->base = buffer.narrow(0, 1, 64 * 128).view({64, 128}).copy_(jobs[0]->base);
    lora::detail::merge_weights(jobs);
    const auto weight = harness::dense_weight(*job);
    EXPECT_LE(harness::excess(jobs[0]->merged.cpu(), weight.value, harness::weight_bound(weight, dtype)), 0);
  }
}

TEST_F(DeviceMerges, AreTheSameEveryTime) {
  std::vector<at::Tensor> results;
  for (int i = 0; i < 3; ++i) {
    Jobs jobs;
    jobs.push_back(on_device(*make_job(kShapes[5], at::kBFloat16, at::kFloat)));
    lora::detail::merge_weights(jobs);
    results.push_back(jobs[0]->merged);
  }
  EXPECT_TRUE(at::equal(results[0], results[1]));
  EXPECT_TRUE(at::equal(results[0], results[2]));
}

TEST_F(DeviceMerges, NameTheWeightsThatAreNotFinite) {
  for (const auto kernel : {MergeKernel::kOnePass, MergeKernel::kCublas}) {
    lora::cuda::set_merge_kernel(kernel);
    for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf}) {
      Jobs jobs;
      for (const auto* path : {"first", "second", "third"}) {
        jobs.push_back(on_device(*make_job({path, 300, 520, {{0, 300, 4}}}, dtype, dtype)));
      }
      jobs[1]->base[17][3] = std::nan("");
      jobs[2]->base[0][0] = jobs[2]->base[299][519] = -std::numeric_limits<double>::infinity();
      EXPECT_THAT([&] { lora::detail::merge_weights(jobs); },
                  ThrowsMessage<c10::ValueError>(
                      AllOf(HasSubstr("found 1 NaN or infinite values in W', expected finite ones at second"),
                            HasSubstr("found 2 NaN or infinite values in W', expected finite ones at third"))));
      EXPECT_EQ(jobs[0]->non_finite.load(), 0);
    }
  }
}

/// A whole model: merged by Adapters, unmerged bit for bit.
TEST_F(DeviceMerges, ServeAdapters) {
  torch::nn::Sequential model(torch::nn::Linear(96, 200), torch::nn::Linear(200, 64));
  model->to(at::kCUDA);
  auto adapters = lora::inject(*model, lora::LoraConfig().r(4).lora_alpha(8).target_modules("all-linear"));
  harness::fill(adapters);
  std::map<std::string, at::Tensor> tensors;
  for (const auto& [path, tensor] : adapters.named_tensors("default")) tensors[path] = tensor.cpu();
  std::map<std::string, at::Tensor> before;
  for (const auto& named : model->named_parameters()) before[named.key()] = named.value().detach().cpu();
  adapters.merge();
  for (const auto* layer : {"0", "1"}) {
    const auto path = std::string(layer) + ".lora_default.lora_";
    MergeJob job;
    job.base = model->named_parameters()[std::string(layer) + ".weight"].detach().cpu();
    job.updates.emplace_back(0, lora::LowRank{tensors.at(path + "A"), tensors.at(path + "B"), 2});
    const auto weight = harness::dense_weight(job);
    const auto merged = model->named_children()[layer]->as<torch::nn::Linear>()->weight.detach();
    EXPECT_TRUE(merged.is_cuda());
    EXPECT_LE(harness::excess(merged.cpu(), weight.value, harness::weight_bound(weight, at::kFloat)), 0);
  }
  adapters.unmerge();
  for (const auto& named : model->named_parameters()) {
    EXPECT_TRUE(at::equal(named.value().cpu(), before.at(named.key()))) << named.key();
  }
}

#ifdef LINKED_WITH_CUDA
/// Layers that lie side by side, as cuBLAS takes them in one strided call.
TEST_F(DeviceMerges, AddStackedProducts) {
  const auto base = harness::normal({3, 40, 72}, 1, at::kFloat), A = harness::normal({3, 8, 72}, 2, at::kFloat),
             B = harness::normal({3, 40, 8}, 3, at::kFloat);
  const auto merged = base.to(at::kCUDA), device_A = A.to(at::kCUDA), device_B = B.to(at::kCUDA);
  Jobs jobs;
  std::vector<lora::cuda::detail::Product> products;
  std::vector<at::Tensor> kept;
  for (int64_t i = 0; i < 3; ++i) {
    jobs.push_back(std::make_unique<MergeJob>());
    jobs.back()->base = jobs.back()->merged = merged[i];
    jobs.back()->updates.emplace_back(0, lora::LowRank{device_A[i], device_B[i], 0.5});
    lora::cuda::detail::add_products(*jobs.back(), products, kept);
  }
  const auto batches = lora::cuda::detail::batches_of(products);
  ASSERT_EQ(batches.size(), 1U);
  EXPECT_TRUE(batches[0].strided);
  lora::cuda::detail::BlasProducts<float>(lora::cuda::detail::ElementType::kFloat).run(batches);
  for (int64_t i = 0; i < 3; ++i) {
    MergeJob job;
    job.base = base[i];
    job.updates.emplace_back(0, lora::LowRank{A[i], B[i], 0.5});
    const auto weight = harness::dense_weight(job);
    EXPECT_LE(harness::excess(merged[i].cpu(), weight.value, harness::weight_bound(weight, at::kFloat)), 0);
  }
}
#endif

}  // namespace
}  // namespace gpu_merge_test
