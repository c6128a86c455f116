// The head-and-loss function on plain heads against the dense formula in float64, and what it takes of memory.
#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/functional/linear_cross_entropy.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "functional/dense_loss.h"
#include "harness/memory.h"
#include "harness/message_of.h"
#include "harness/operators.h"
#include "harness/values.h"

namespace linear_cross_entropy_test {
namespace {

using dense_loss::Answer;
using dense_loss::expect_within;
using dense_loss::kIgnored;
using dense_loss::Problem;
using dense_loss::Shape;
using harness::message_of;
using lora::linear_cross_entropy;
using lora::LinearCrossEntropyOptions;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;

const std::vector<Shape> kShapes{
    {"one_row", {1}, 5, 7, "all", 0},
    {"one_vector", {}, 5, 7, "all", 0, 0.1},
    {"one_class", {4}, 3, 1, "all", 0},
    {"no_features", {4}, 0, 6, "all", 0, 0, false, true},
    {"no_rows", {0}, 5, 7, "all", 0, 0, true},
    {"none_labelled_of_a_sum", {6}, 5, 7, "none", 4, 0.1, true, true},
    {"batch", {3, 5}, 8, 33, "all", 0, 0, false, true},
    {"some_labelled", {3, 9}, 8, 50, "some", 4, 0, false, true},
    {"smoothed", {2, 2, 6}, 8, 50, "some", 5, 0.1, false, true},
    {"smoothed_sum", {20}, 8, 50, "some", 0, 0.3, true, true},
    {"uniform", {12}, 8, 50, "some", 5, 1.0},
    {"chunks_fit", {24}, 16, 65, "all", 8, 0, true},
    {"chunks_leave_one", {25}, 16, 65, "all", 8, 0.1, false, true},
    {"chunk_of_one", {64}, 16, 31, "all", 1, 0, false, true},
    {"chunk_beyond", {7}, 16, 31, "some", 100},
    {"blocks", {5}, 6, 8200, "some", 2, 0.1, false, true},
};

class PlainHead : public ::testing::TestWithParam<std::tuple<Shape, at::ScalarType>> {
 protected:
  Problem problem() const { return Problem(std::get<0>(GetParam()), std::get<1>(GetParam())); }
};

TEST_P(PlainHead, EqualsTheFormula) {
  const auto tested = problem();
  const Answer answer(tested);
  const auto loss = tested.loss();
  EXPECT_EQ(loss.scalar_type(), tested.hidden.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  expect_within(loss, answer.loss, "loss");
  loss.backward();
  EXPECT_EQ(tested.hidden.grad().scalar_type(), tested.hidden.scalar_type());
  expect_within(tested.hidden.grad(), answer.hidden, "d hidden");
  EXPECT_EQ(tested.weight.grad().scalar_type(), tested.weight.scalar_type());
  expect_within(tested.weight.grad(), answer.weight, "d weight");
  if (tested.options.bias().defined()) expect_within(tested.options.bias().grad(), answer.offset, "d bias");
}

TEST_P(PlainHead, TrainsWhatNeedsAGradientAlone) {
  for (const int trained : {0, 1, 2, 3}) {
    auto tested = problem();
    const auto bias = tested.options.bias();
    tested.hidden.requires_grad_(trained == 1);
    tested.weight.requires_grad_(trained == 2);
    if (bias.defined()) bias.requires_grad_(trained == 3);
    const Answer answer(tested);
    const auto loss = tested.loss();
    expect_within(loss, answer.loss, "loss");
    EXPECT_EQ(loss.requires_grad(), trained == 1 || trained == 2 || (trained == 3 && bias.defined()));
    if (!loss.requires_grad()) continue;
    loss.backward();
    if (trained == 1) expect_within(tested.hidden.grad(), answer.hidden, "d hidden");
    if (trained == 2) expect_within(tested.weight.grad(), answer.weight, "d weight");
    if (trained == 3) expect_within(bias.grad(), answer.offset, "d bias");
    EXPECT_EQ(
        tested.hidden.grad().defined() + tested.weight.grad().defined() + (bias.defined() && bias.grad().defined()), 1);
  }
}

TEST_P(PlainHead, GivesTheLossAloneWithoutGradMode) {
  const auto tested = problem();
  const auto expected = tested.loss().detach();
  {
    const at::NoGradGuard no_grad;
    const auto loss = tested.loss();
    EXPECT_FALSE(loss.requires_grad());
    EXPECT_TRUE(at::equal(loss, expected));
  }
  const c10::InferenceMode inference;
  EXPECT_TRUE(at::equal(tested.loss(), expected));
}

INSTANTIATE_TEST_SUITE_P(Function, PlainHead,
                         ::testing::Combine(::testing::ValuesIn(kShapes),
                                            ::testing::Values(at::kDouble, at::kFloat, at::kBFloat16, at::kHalf)),
                         [](const auto& tested) {
                           return std::get<0>(tested.param).name + "_" + c10::toString(std::get<1>(tested.param));
                         });

const Shape kShape{"shape", {4, 6}, 8, 50, "some", 3, 0.1, false, true};

TEST(LinearCrossEntropy, WithoutALabelIsNaNAsLibTorchsMeanWithGradientsOfZero) {
  auto shape = kShape;
  shape.labelled = "none";
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf}) {
    const Problem tested(shape, dtype);
    const auto loss = tested.loss();
    EXPECT_TRUE(std::isnan(loss.item<double>()));
    loss.backward();
    for (const auto& tensor : {tested.hidden, tested.weight, tested.options.bias()}) {
      EXPECT_EQ(harness::largest(tensor.grad()), 0);
    }
  }
}

TEST(LinearCrossEntropy, TakesAnyIndexForIgnored) {
  Problem tested(kShape, at::kDouble);
  const auto expected = tested.loss().item<double>();
  tested.labels.masked_fill_(tested.labels == kIgnored, 17);
  ASSERT_EQ((tested.labels == 17).sum().item<int64_t>(), 16) << "17 is no label of the shape";
  tested.options.ignore_index(17);
  EXPECT_EQ(tested.loss().item<double>(), expected);
}

TEST(LinearCrossEntropy, TakesStridedInputsAndViews) {
  Problem tested(kShape, at::kDouble);
  const auto expected = tested.loss().item<double>();
  tested.hidden = tested.hidden.detach().permute({2, 1, 0}).contiguous().permute({2, 1, 0}).requires_grad_();
  tested.weight = tested.weight.detach().t().contiguous().t().requires_grad_();
  tested.labels = tested.labels.t().contiguous().t();
  const auto loss = tested.loss();
  EXPECT_NEAR(loss.item<double>(), expected, 1e-12);
  loss.backward();
  const Answer answer(tested);
  expect_within(tested.hidden.grad(), answer.hidden, "d hidden");
  expect_within(tested.weight.grad(), answer.weight, "d weight");
}

TEST(LinearCrossEntropy, TakesTensorsThatWereComputed) {
  const Problem tested(kShape, at::kDouble);
  auto doubled = tested;
  doubled.hidden = tested.hidden.detach().div(2).requires_grad_();
  doubled.weight = tested.weight.detach().div(2).requires_grad_();
  linear_cross_entropy(doubled.hidden * 2, doubled.weight * 2, tested.labels, tested.options).backward();
  const Answer answer(tested);
  expect_within(doubled.hidden.grad() / 2, answer.hidden, "d hidden");
  expect_within(doubled.weight.grad() / 2, answer.weight, "d weight");
}

TEST(LinearCrossEntropy, GradientsFollowTheEngine) {
  const Problem tested(kShape, at::kDouble);
  const Answer answer(tested);
  int hooks = 0;
  tested.hidden.register_hook([&](const at::Tensor& gradient) { ++hooks, static_cast<void>(gradient); });
  tested.weight.register_hook([&](const at::Tensor& gradient) { return ++hooks, gradient * 3; });
  const auto loss = tested.loss();
  const auto weight_alone = torch::autograd::grad({loss * 5}, {tested.weight}, {}, /*retain_graph=*/true);
  EXPECT_EQ(hooks, 1);
  expect_within(weight_alone[0] / 15, answer.weight, "d weight");
  EXPECT_FALSE(tested.weight.grad().defined());
  loss.backward();
  EXPECT_EQ(hooks, 3);
  expect_within(tested.hidden.grad(), answer.hidden, "d hidden");
  expect_within(tested.weight.grad() / 3, answer.weight, "d weight");
}

TEST(LinearCrossEntropy, GivesTheSameGradientTwiceIfRetained) {
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const Problem tested(kShape, dtype);
    const std::vector<at::Tensor> inputs{tested.hidden, tested.weight, tested.options.bias()};
    const auto loss = tested.loss();
    const auto first = torch::autograd::grad({loss}, inputs, {}, /*retain_graph=*/true);
    const auto bytes = harness::bytes_of(first[1]);
    const auto second = torch::autograd::grad({loss}, inputs);
    for (size_t i = 0; i < inputs.size(); ++i) EXPECT_TRUE(at::equal(first[i], second[i]));
    EXPECT_EQ(harness::bytes_of(first[1]), bytes) << "the first gradients are no part of the graph";
    EXPECT_THAT(message_of([&] { torch::autograd::grad({loss}, inputs); }),
                HasSubstr("[lora::linear_cross_entropy] found a second backward"));
  }
}

TEST(LinearCrossEntropy, IsDifferentiableOnce) {
  const Problem tested(kShape, at::kDouble);
  const Answer answer(tested);
  const auto loss = tested.loss();
  const auto first = torch::autograd::grad({loss * loss}, {tested.hidden}, {}, {}, /*create_graph=*/true)[0];
  expect_within(first / (2 * answer.loss.value), answer.hidden, "d hidden");
  EXPECT_THAT(message_of([&] { first.sum().backward(); }),
              HasSubstr("[lora::linear_cross_entropy] found a second derivative"));
}

TEST(LinearCrossEntropy, SumsGradientsOfHalfPrecisionInFloat32) {
  // 1000 rows of a gradient of 1/2: in a half precision the sum would stop growing at 128 or 1024.
  for (const auto dtype : {at::kBFloat16, at::kHalf}) {
    const auto weight = at::zeros({2, 1}, dtype).requires_grad_(), bias = at::zeros({2}, dtype).requires_grad_();
    const auto options = LinearCrossEntropyOptions().bias(bias).reduction(torch::kSum).chunk_rows(1);
    linear_cross_entropy(at::ones({1000, 1}, dtype), weight, at::zeros({1000}, at::kLong), options).backward();
    EXPECT_TRUE(at::equal(weight.grad(), at::tensor({-500.0, 500.0}).to(dtype).view({2, 1})));
    EXPECT_TRUE(at::equal(bias.grad(), at::tensor({-500.0, 500.0}).to(dtype)));
  }
}

TEST(LinearCrossEntropy, ScalesGradientsOfFloat16BeforeTheyVanish) {
  // d hidden of one row among 2^13 is about 2^-13 · 2^-14, below float16's smallest number, but not 2^10 times as much.
  const auto hidden = at::zeros({1 << 13, 1}, at::kHalf).requires_grad_();
  const auto weight = at::full({2, 1}, 0x1p-14, at::kHalf);
  weight[1].neg_();
  const auto loss = linear_cross_entropy(hidden, weight, at::zeros({1 << 13}, at::kLong));
  (loss * 0x1p10).backward();
  EXPECT_TRUE(at::equal(hidden.grad(), at::full({1 << 13, 1}, -0x1p-17, at::kHalf)));
}

TEST(LinearCrossEntropy, RefusesWhatDoesNotFitBeforeAnyWork) {
  const auto hidden = at::zeros({4, 6, 8}), weight = at::zeros({50, 8}), bias = at::zeros({50});
  const auto labels = at::zeros({4, 6}, at::kLong);
  const auto wrong_label = [&](int64_t label) {
    auto wrong = labels.clone();
    wrong[2][3] = label;
    return wrong;
  };
  using Options = LinearCrossEntropyOptions;
  struct Case {
    at::Tensor hidden, weight, labels;
    Options options;
    std::vector<std::string> said;
  };
  const std::vector<Case> cases{
      {at::Tensor(), weight, labels, Options(), {"an undefined tensor"}},
      {at::zeros({4, 6, 9}), weight, labels, Options(), {"hidden [4, 6, 9] and head_weight [50, 8]"}},
      {at::scalar_tensor(1), weight, labels, Options(), {"hidden []"}},
      {hidden, bias, labels, Options(), {"head_weight [50]"}},
      {hidden, at::zeros({0, 8}), labels, Options(), {"a head without a row"}},
      {hidden.to(at::kInt), weight, labels, Options(), {"hidden of Int"}},
      {hidden, weight.to(at::kBFloat16), labels, Options(), {"Float and head_weight of BFloat16", "autocast"}},
      {hidden, weight, labels, Options().bias(at::zeros({8})), {"a bias [8], expected [vocab] = [50]"}},
      {hidden, weight, labels, Options().bias(bias.to(at::kDouble)), {"a bias of Double"}},
      {hidden, weight, labels.to(at::kInt), Options(), {"labels of Int, expected int64"}},
      {hidden, weight, labels.view({24}), Options(), {"labels [24] for hidden [4, 6, 8]"}},
      {hidden, weight, labels.to(at::kMeta), Options(), {"tensors on cpu and meta"}},
      {hidden, weight, labels, Options().label_smoothing(1.5), {"label_smoothing 1.5"}},
      {hidden, weight, labels, Options().label_smoothing(std::nan("")), {"label_smoothing nan"}},
      {hidden, weight, labels, Options().chunk_rows(-1), {"chunk_rows -1"}},
      {hidden, weight, wrong_label(50), Options(), {"the label 50 in row 15", "50 classes or ignore_index, -100"}},
      {hidden, weight, wrong_label(-1), Options(), {"the label -1 in row 15"}},
      {hidden, weight, wrong_label(-100), Options().ignore_index(-1), {"the label -100 in row 15"}},
  };
  for (const auto& tested : cases) {
    const harness::OperatorRecorder recorder;
    const auto message = message_of<c10::ValueError>(
        [&] { linear_cross_entropy(tested.hidden, tested.weight, tested.labels, tested.options); });
    EXPECT_THAT(message, HasSubstr("[lora::linear_cross_entropy] found "));
    for (const auto& said : tested.said) EXPECT_THAT(message, HasSubstr(said));
    EXPECT_THAT(recorder.names(), Not(::testing::Contains("aten::linear")));
  }
}

TEST(LinearCrossEntropy, NeverHasMoreThanAChunkOfLogits) {
  constexpr int64_t kRows = 96, kClasses = 3000, kWidth = 8, kChunk = 8;
  for (const bool trained : {false, true}) {
    const auto hidden = harness::normal({kRows, kWidth}, 1, at::kFloat).requires_grad_();
    const auto weight = harness::normal({kClasses, kWidth}, 2, at::kFloat).requires_grad_(trained);
    const auto labels = at::arange(kRows, at::kLong);
    const harness::LargestAllocation allocations;
    linear_cross_entropy(hidden, weight, labels, LinearCrossEntropyOptions().chunk_rows(kChunk)).backward();
    EXPECT_LE(allocations.bytes(), kChunk * kClasses * 4);
  }
}

TEST(LinearCrossEntropy, ChoosesChunksOfSomeMegabytes) {
  constexpr int64_t kRows = 300, kClasses = 50257;
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const auto hidden = harness::normal({kRows, 2}, 1, dtype).requires_grad_();
    const auto weight = harness::normal({kClasses, 2}, 2, dtype);
    const harness::LargestAllocation allocations;
    linear_cross_entropy(hidden, weight, at::arange(kRows, at::kLong)).backward();
    EXPECT_LE(allocations.bytes(), int64_t{24} << 20);
    EXPECT_GE(allocations.bytes(), int64_t{12} << 20);
  }
}

TEST(LinearCrossEntropy, MultipliesLabelledRowsOnlyAndNothingBackwardWithoutGradient) {
  auto hidden = harness::normal({40, 8}, 1, at::kFloat);
  const auto weight = harness::normal({50, 8}, 2, at::kFloat);
  const auto labels = at::full({40}, kIgnored, at::kLong);
  labels.narrow(0, 10, 3).fill_(5);
  const auto products = [&] {
    const harness::OperatorRecorder recorder;
    linear_cross_entropy(hidden, weight, labels);
    EXPECT_FALSE(recorder.makers_of({3, 50}, {}).empty());
    EXPECT_THAT(recorder.makers_of({40, 50}, {}), IsEmpty());
    return std::count(recorder.names().begin(), recorder.names().end(), "aten::mm");
  };
  EXPECT_EQ(products(), 1);
  hidden.requires_grad_();
  EXPECT_EQ(products(), 2);
  const at::NoGradGuard no_grad;
  EXPECT_EQ(products(), 1);
}

}  // namespace
}  // namespace linear_cross_entropy_test
