// The product of an adapted weight as one step for autograd: against the same formula in LibTorch's own operators,
// which have gradients of their own, of any order.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <lora/lora.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/utils.h>

#include <cmath>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "harness/dense_oracle.h"
#include "harness/num_threads.h"
#include "harness/operators.h"
#include "harness/values.h"

namespace low_rank_product_test {
namespace {

using lora::detail::Dropout;
using lora::detail::LowRankProduct;
using lora::detail::LowRankTerm;
using lora::detail::ProductCall;

constexpr int64_t kIn = 12, kOut = 9, kRank = 3;

struct Case {
  std::string name;
  bool transposed = false;  // the product x·W in place of x·Wᵀ
  bool parts = false;       // two terms, of ranges
  bool dropout = false;
  double alpha = 1;
  double beta = 1;
  std::vector<int64_t> x_sizes = {2, 3, kIn};
  std::vector<int64_t> addend_sizes = {};
};

void PrintTo(const Case& tested, std::ostream* out) { *out << tested.name; }

/// Tensors of a case, all with gradients but V.
struct Operands {
  Operands(const Case& tested, at::ScalarType dtype) {
    const auto leaf = [&](at::IntArrayRef sizes, uint64_t seed) {
      return harness::normal(sizes, seed, dtype).requires_grad_(true);
    };
    x = leaf(tested.x_sizes, 1);
    matrix = harness::normal({kIn, kOut}, 2, dtype);
    if (!tested.addend_sizes.empty()) addend = leaf(tested.addend_sizes, 3);
    const auto add = [&](int64_t begin, int64_t size, uint64_t seed) {
      LowRankTerm term;
      term.transposed = tested.transposed;
      (tested.transposed ? term.in_begin : term.out_begin) = begin;
      // A of x·Wᵀ has the columns of W; of x·W, where they are the result's, B has the columns of x.
      term.A = leaf({kRank, tested.transposed ? kOut : kIn}, seed);
      term.B = leaf({size, kRank}, seed + 1);
      term.scaling = 0.75 * tested.alpha;
      if (tested.dropout) term.dropout = std::make_shared<const Dropout>(0.4, x.detach());
      terms.push_back(term);
    };
    const auto rows = tested.transposed ? kIn : kOut;
    if (tested.parts) {
      add(1, 3, 10);
      add(5, rows - 5, 20);
    } else {
      add(0, rows, 10);
    }
  }

  std::vector<at::Tensor> leaves() const {
    std::vector<at::Tensor> result{x};
    for (const auto& term : terms) {
      result.push_back(term.A);
      result.push_back(term.B);
    }
    if (addend) result.push_back(*addend);
    return result;
  }

  at::Tensor x, matrix;
  std::optional<at::Tensor> addend;
  std::vector<LowRankTerm> terms;
};

at::Tensor product(const Case& tested, const Operands& of, lora::ProductKernel kernel) {
  const auto plain = [&](const at::Tensor& x, const at::Tensor& matrix, const std::optional<at::Tensor>& addend) {
    const auto y = at::matmul(x, matrix) * tested.alpha;
    return addend ? y + *addend * tested.beta : y;
  };
  const auto plan = std::make_shared<lora::ProductPlan>(kernel);
  return LowRankProduct::run({plain, of.x, of.matrix, of.addend, tested.alpha, tested.beta, plan, kernel, of.terms});
}

/// The formula, term by term.
at::Tensor expected_product(const Case& tested, const Operands& of) {
  auto y = at::matmul(of.x, of.matrix) * tested.alpha;
  if (of.addend) y = y + *of.addend * tested.beta;
  for (const auto& term : of.terms) {
    auto x = of.x;
    if (term.dropout != nullptr) x = x * term.dropout->apply(at::ones_like(x.detach()));
    const auto W = at::matmul(term.B, term.A) * term.scaling;  // [out, in] of x·Wᵀ, [in, out] of x·W
    const auto V = term.transposed ? W : W.t();
    auto whole = at::zeros({kIn, kOut}, V.options().requires_grad(false));
    whole = at::slice_scatter(whole, V, tested.transposed ? 0 : 1, term.in_begin + term.out_begin,
                              term.in_begin + term.out_begin + V.size(tested.transposed ? 0 : 1));
    y = y + at::matmul(x, whole);
  }
  return y;
}

class LowRankProductTest : public ::testing::TestWithParam<Case> {};

void expect_close(const std::vector<at::Tensor>& found, const std::vector<at::Tensor>& expected, double bound) {
  ASSERT_EQ(found.size(), expected.size());
  for (size_t i = 0; i < found.size(); ++i) {
    ASSERT_EQ(found[i].defined(), expected[i].defined()) << i;
    if (!expected[i].defined()) continue;
    EXPECT_LT(harness::relative_error(found[i], expected[i]), bound) << i;
  }
}

TEST_P(LowRankProductTest, HasTheFormulasValueAndGradients) {
  const Operands of(GetParam(), at::kDouble);
  const auto y = product(GetParam(), of, lora::ProductKernel::kAten);
  const auto expected = expected_product(GetParam(), of);
  EXPECT_LT(harness::relative_error(y, expected), 1e-13);
  const auto g = harness::normal(y.sizes(), 7);
  expect_close(torch::autograd::grad({y}, of.leaves(), {g}), torch::autograd::grad({expected}, of.leaves(), {g}),
               1e-13);
}

TEST_P(LowRankProductTest, HasThemInOneDnnsProducts) {
  if (!lora::ProductPlan::has_onednn()) GTEST_SKIP() << "this LibTorch has no mkldnn::_linear_pointwise";
  auto tested = GetParam();
  if (tested.alpha != 1 || tested.beta != 1 || tested.addend_sizes.size() > 1) return;  // ATen's, by chosen_kernel
  const Operands of(tested, at::kFloat);
  const auto y = product(tested, of, lora::ProductKernel::kOneDnn);
  const auto expected = expected_product(tested, of);
  const auto bound = 16 * harness::epsilon(at::kFloat);
  EXPECT_LT(harness::relative_error(y, expected), bound);
  const auto g = harness::normal(y.sizes(), 7, at::kFloat);
  expect_close(torch::autograd::grad({y}, of.leaves(), {g}), torch::autograd::grad({expected}, of.leaves(), {g}),
               bound);
}

TEST_P(LowRankProductTest, HasTheSecondGradients) {
  const Operands of(GetParam(), at::kDouble);
  const auto second = [&](const at::Tensor& y) {
    const auto g = harness::normal(y.sizes(), 7).requires_grad_(true);
    const auto first = torch::autograd::grad({y.pow(2)}, of.leaves(), {g}, /*retain_graph=*/true,
                                             /*create_graph=*/true);
    at::Tensor sum;
    uint64_t seed = 40;
    for (const auto& gradient : first) {
      const auto term = (gradient * harness::normal(gradient.sizes(), seed++)).sum();
      sum = sum.defined() ? sum + term : term;
    }
    auto inputs = of.leaves();
    inputs.push_back(g);
    return torch::autograd::grad({sum}, inputs, {}, /*retain_graph=*/false, /*create_graph=*/false,
                                 /*allow_unused=*/true);
  };
  expect_close(second(product(GetParam(), of, lora::ProductKernel::kAten)), second(expected_product(GetParam(), of)),
               1e-12);
}

TEST_P(LowRankProductTest, ComputesWhatIsAskedForAlone) {
  for (size_t wanted = 0; wanted < Operands(GetParam(), at::kDouble).leaves().size(); ++wanted) {
    const Operands of(GetParam(), at::kDouble);
    const auto leaves = of.leaves();
    for (size_t i = 0; i < leaves.size(); ++i) leaves[i].set_requires_grad(i == wanted);
    const auto y = product(GetParam(), of, lora::ProductKernel::kAten);
    const auto expected = expected_product(GetParam(), of);
    const auto g = harness::normal(y.sizes(), 7);
    expect_close(torch::autograd::grad({y}, {leaves[wanted]}, {g}),
                 torch::autograd::grad({expected}, {leaves[wanted]}, {g}), 1e-13);
  }
}

INSTANTIATE_TEST_SUITE_P(Products, LowRankProductTest,
                         ::testing::Values(Case{"plain"}, Case{"one_row", false, false, false, 1, 1, {kIn}},
                                           Case{"no_rows", false, false, false, 1, 1, {0, kIn}},
                                           Case{"bias", false, false, false, 1, 1, {4, kIn}, {kOut}},
                                           Case{"alpha_beta", false, false, false, -1.5, 0.5, {4, kIn}, {4, kOut}},
                                           Case{"addend_broadcast", false, true, false, 2, 3, {4, kIn}, {1, kOut}},
                                           Case{"parts", false, true}, Case{"transposed", true},
                                           Case{"transposed_parts", true, true}, Case{"dropout", false, false, true},
                                           Case{"dropout_parts", false, true, true},
                                           Case{"dropout_transposed_parts", true, true, true}),
                         [](const auto& tested) { return tested.param.name; });

TEST(LowRankProductMemory, KeepsNeitherXTwiceNorAnythingOfItsSize) {
  const Case tested{"dropout", false, false, true, 1, 1, {50, kIn}};
  const Operands of(tested, at::kDouble);
  const harness::OperatorRecorder recorder;
  const auto y = product(tested, of, lora::ProductKernel::kAten);
  const auto* node = dynamic_cast<torch::autograd::CppNode<LowRankProduct>*>(y.grad_fn().get());
  ASSERT_NE(node, nullptr);
  // x is saved as it is; what the node makes itself is [tokens, r].
  const auto saved = node->ctx_.saved_data.at("saved").toCapsule();
  const auto& kept = static_cast<const LowRankProduct::Saved&>(*saved);
  ASSERT_EQ(kept.narrowed.size(), 1U);
  EXPECT_EQ(kept.narrowed[0].numel(), 50 * kRank);
  EXPECT_TRUE(node->ctx_.get_saved_variables()[0].is_same(of.x) ||
              node->ctx_.get_saved_variables()[0].data_ptr() == of.x.data_ptr());
}

TEST(LowRankProductMemory, HandsOnAGradientThatNothingElseHolds) {
  const Case tested{"plain", false, false, false, 1, 1, {2, 25, kIn}};
  Operands of(tested, at::kFloat);
  of.x = of.x.detach().requires_grad_(true) * 1;
  bool is_sole = false;
  of.x.register_hook([&](const at::Tensor& gradient) { is_sole = gradient.storage().use_count() == 1; });
  product(tested, of, lora::ProductKernel::kAten).sum().backward();
  EXPECT_TRUE(is_sole);
}

TEST(DropoutOfProducts, DropsTheSameAgainAndScalesTheRest) {
  for (const auto dtype : {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf}) {
    const auto x = at::ones({40, 33}, at::TensorOptions(dtype));
    torch::manual_seed(4);
    const Dropout dropout(0.25, x);
    const auto once = dropout.apply(x);
    EXPECT_TRUE(at::equal(dropout.apply(x), once));
    EXPECT_TRUE(at::equal(dropout.apply(x.t().contiguous().t()), once)) << "by place, not by memory";
    torch::manual_seed(4);
    EXPECT_TRUE(at::equal(Dropout(0.25, x).apply(x), once)) << "the same seed";
    EXPECT_FALSE(at::equal(Dropout(0.25, x).apply(x), once));
    const auto kept = once.to(at::kDouble).masked_select(once != 0);
    EXPECT_LE((kept - 1 / 0.75).abs().max().item<double>(), 0.5 * harness::epsilon(dtype) * 1.34);
  }
}

TEST(DropoutOfProducts, DropsEachElementWithItsProbability) {
  torch::manual_seed(5);
  for (const double p : {0.01, 0.1, 0.5, 0.9}) {
    constexpr int kDraws = 200;
    const auto x = at::ones({64, 100}, at::kFloat);
    auto dropped = at::zeros_like(x);
    for (int draw = 0; draw < kDraws; ++draw) dropped += (Dropout(p, x).apply(x) == 0).to(at::kFloat);
    // Six standard deviations of the whole, and of the worst of 6400 elements.
    const double all = dropped.sum().item<double>() / (kDraws * 6400.0);
    EXPECT_NEAR(all, p, 6 * std::sqrt(p * (1 - p) / (kDraws * 6400.0)));
    const double deviation = (dropped / kDraws - p).abs().max().item<double>();
    EXPECT_LT(deviation, 6 * std::sqrt(p * (1 - p) / kDraws) + 6.0 / kDraws);
  }
}

TEST(DropoutOfProducts, IsTheSameWithAnyNumberOfThreads) {
  const auto x = harness::normal({300, 257}, 1, at::kFloat);
  const Dropout dropout(0.3, x);
  const harness::NumThreads guard(1);
  const auto once = dropout.apply(x);
  at::set_num_threads(3);
  EXPECT_TRUE(at::equal(dropout.apply(x), once));
}

TEST(DropoutOfProducts, DrawsPhilox) {
  // The known answers of the generator's authors (Random123, kat_vectors): counter 0 and key 0, and the counter of all
  // ones cannot be asked for here.
  lora::detail::Lanes<uint32_t> words[4];
  lora::detail::philox_lanes(0, 0, words);
  EXPECT_EQ(words[0][0], 0x6627e8d5U);
  EXPECT_EQ(words[1][0], 0xe169c58dU);
  EXPECT_EQ(words[2][0], 0xbc57ac4cU);
  EXPECT_EQ(words[3][0], 0x9b00dbd8U);
}

}  // namespace
}  // namespace low_rank_product_test
