// What is given to cuBLAS, computed here by loops as a BLAS reads it: which jobs, which matrices, in which calls.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <lora/cuda/merge.h>
#include <lora/cuda/products.h>

#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "harness/dense_oracle.h"
#include "harness/values.h"

namespace products_test {
namespace {

using lora::cuda::detail::BlasMatrix;
using lora::cuda::detail::Product;
using lora::detail::MergeJob;

std::unique_ptr<MergeJob> make_job(at::IntArrayRef sizes, bool transposed, at::ScalarType dtype = at::kDouble) {
  auto job = std::make_unique<MergeJob>();
  job->path = "weight";
  job->transposed = transposed;
  job->base = harness::normal(sizes, 1, dtype);
  return job;
}

void add_update(MergeJob& job, int64_t begin, int64_t rows, int64_t rank, uint64_t seed) {
  const auto in = job.base.size(job.transposed ? 0 : 1);
  const auto dtype = job.base.scalar_type();
  job.updates.emplace_back(begin, lora::LowRank{harness::normal({rank, in}, seed, dtype),
                                                harness::normal({rows, rank}, seed + 1, dtype), 0.5});
}

double& element(const BlasMatrix& matrix, int64_t row, int64_t column) {
  if (matrix.transposed) std::swap(row, column);
  return reinterpret_cast<double*>(matrix.data)[row * matrix.stride + column];
}

void run(const Product& product) {
  for (int64_t i = 0; i < product.rows; ++i) {
    for (int64_t j = 0; j < product.columns; ++j) {
      for (int64_t k = 0; k < product.rank; ++k) {
        element(product.merged, i, j) += product.scaling * element(product.left, i, k) * element(product.right, k, j);
      }
    }
  }
}

at::Tensor expected(const MergeJob& job) {
  const auto result = job.base.clone();
  const auto by_rows = job.transposed ? result.t() : result;
  for (const auto& [begin, update] : job.updates) {
    by_rows.narrow(0, begin, update.B.size(0)).add_(at::mm(update.B, update.A), update.scaling);
  }
  return result;
}

class BlasJob : public ::testing::TestWithParam<bool> {};

TEST_P(BlasJob, IsTheSumOfItsProducts) {
  const auto job = make_job({6, 11}, GetParam());
  add_update(*job, 0, 2, 3, 2);
  add_update(*job, 3, 3, 1, 4);
  auto& first = job->updates[0].second;
  auto& second = job->updates[1].second;
  first.A = first.A.t().contiguous().t();                        // the transpose of a row-major matrix
  first.B = at::cat({first.B, first.B}, 1).narrow(1, 0, 3);      // rows apart
  second.A = at::stack({second.A, second.A}, -1).select(-1, 0);  // elements apart: no BLAS reads that
  second.B = at::stack({second.B, second.B}, 0).transpose(0, 2).select(2, 1).t();  // one column, elements apart
  std::vector<Product> products;
  std::vector<at::Tensor> kept;
  job->merged = job->base.clone();
  lora::cuda::detail::add_products(*job, products, kept);
  ASSERT_EQ(products.size(), 2U);
  for (const auto& product : products) run(product);
  EXPECT_TRUE(at::allclose(job->merged, expected(*job), 1e-14, 1e-14));
}

INSTANTIATE_TEST_SUITE_P(Layouts, BlasJob, ::testing::Bool(),
                         [](const auto& tested) { return tested.param ? "transposed" : "by_rows"; });

TEST(BlasJobs, LeaveOutEmptyProducts) {
  const auto job = make_job({0, 4}, false);
  add_update(*job, 0, 0, 2, 2);
  std::vector<Product> products;
  std::vector<at::Tensor> kept;
  job->merged = job->base.clone();
  lora::cuda::detail::add_products(*job, products, kept);
  EXPECT_TRUE(products.empty());
}

TEST(BlasJobs, HaveOneDtypeAndNoElementInTwoUpdates) {
  const auto job = make_job({6, 5}, false, at::kFloat);
  add_update(*job, 3, 3, 2, 2);
  add_update(*job, 0, 3, 2, 4);
  EXPECT_TRUE(lora::cuda::detail::is_for_blas(*job));
  add_update(*job, 2, 2, 2, 6);
  EXPECT_FALSE(lora::cuda::detail::is_for_blas(*job));
  job->updates.pop_back();
  job->updates[1].second.B = job->updates[1].second.B.to(at::kDouble);
  EXPECT_FALSE(lora::cuda::detail::is_for_blas(*job));
}

/// A product whose matrices lie at the given places.
Product at_place(char* left, char* right, char* merged, int64_t rows = 4) {
  Product product;
  product.left = {left, 2, false};
  product.right = {right, 8, false};
  product.merged = {merged, 8, false};
  product.rows = rows;
  product.columns = 8;
  product.rank = 2;
  return product;
}

TEST(BlasBatches, KnowShapesAtEqualDistances) {
  char memory[1024];
  const auto batches = lora::cuda::detail::batches_of({
      at_place(memory + 40, memory + 400, memory + 200),
      at_place(memory, memory + 300, memory + 100),
      at_place(memory + 80, memory + 500, memory + 300),
      at_place(memory, memory, memory, 5),
  });
  ASSERT_EQ(batches.size(), 2U);
  EXPECT_EQ(batches[0].products.size(), 3U);
  EXPECT_TRUE(batches[0].strided);
  EXPECT_EQ(batches[0].products[0].merged.data, memory + 100);
  EXPECT_EQ(batches[1].products.size(), 1U);
  EXPECT_FALSE(batches[1].strided);
}

TEST(BlasBatches, KnowShapesThatLieAnywhere) {
  char memory[1024];
  for (const int64_t shift : {0, 1, 2}) {
    auto last = at_place(memory + 80, memory + 500, memory + 300);
    (shift == 0 ? last.left : shift == 1 ? last.right : last.merged).data += 16;
    const auto batches = lora::cuda::detail::batches_of(
        {at_place(memory, memory + 300, memory + 100), at_place(memory + 40, memory + 400, memory + 200), last});
    ASSERT_EQ(batches.size(), 1U);
    EXPECT_FALSE(batches[0].strided);
  }
}

TEST(BlasBatches, AreOfOneScaling) {
  char memory[1024];
  auto scaled = at_place(memory + 40, memory + 400, memory + 200);
  scaled.scaling = 2;
  EXPECT_EQ(lora::cuda::detail::batches_of({at_place(memory, memory + 300, memory + 100), scaled}).size(), 2U);
}

TEST(MergeKernelChoice, IsKept) {
  EXPECT_EQ(lora::cuda::merge_kernel(), lora::cuda::MergeKernel::kOnePass);
  lora::cuda::set_merge_kernel(lora::cuda::MergeKernel::kCublas);
  EXPECT_EQ(lora::cuda::merge_kernel(), lora::cuda::MergeKernel::kCublas);
  lora::cuda::set_merge_kernel(lora::cuda::MergeKernel::kOnePass);
}

}  // namespace
}  // namespace products_test
