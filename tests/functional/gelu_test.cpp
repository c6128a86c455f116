// lora::gelu against its formula in float64: values and gradients in every dtype, layout, instruction set and number of
// threads.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <lora/functional/gelu.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "harness/dense_oracle.h"
#include "harness/instruction_sets.h"
#include "harness/num_threads.h"
#include "harness/values.h"

namespace gelu_test {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
const std::vector<at::ScalarType> kDtypes{at::kFloat, at::kBFloat16, at::kHalf};

/// GELU by tanh in float64, its slope, and their bounds for arithmetic in float32.
struct Oracle {
  at::Tensor value, slope, value_bound, slope_bound;

  explicit Oracle(const at::Tensor& given) {
    constexpr double kUnit = 0x1p-24;  // the relative error of one rounding
    const double linear = 2 * std::sqrt(2 / M_PI);
    const auto x = given.detach().to(at::kDouble);
    const auto z = linear * (x + 0.044715 * x * x * x);
    const auto sigmoid = at::sigmoid(z), rest = at::sigmoid(-z);
    const auto turn = x * rest * (linear * (1 + 3 * 0.044715 * x * x));
    value = x * sigmoid;
    slope = sigmoid * (1 + turn);
    // e^−z: 2 ulp, which are at most 4 roundings, and the 5 roundings of z (both constants, x², the sum, the product)
    // times z. It enters 1 + e^−z with the weight 1 − σ; the sum and the division round once each. Where e^−z leaves
    // the range of float32, the result is 0 instead of a number below 1e-36.
    const auto power = kUnit * (4 + 5 * z.abs());
    value_bound = value.abs() * (rest * power + 2 * kUnit) + 1e-36;
    // The slope: the same for σ; x·(e^−z·σ)·z′ adds a product, those of e^−z, and the 4 roundings of z′ and of two
    // products; the sum, the product with σ and that with dy round once each.
    slope_bound =
        slope.abs() * (rest * power + 5 * kUnit) + (sigmoid * turn).abs() * (power + rest * power + 9 * kUnit) + 1e-33;
  }
};

/// The largest |found − expected| over its bound and half an ulp of the dtype that it was rounded to.
double worst(const at::Tensor& found, const at::Tensor& expected, const at::Tensor& bound) {
  if (found.numel() == 0) return 0;
  const auto dtype = found.scalar_type();
  const auto rounding = dtype == at::kFloat ? at::zeros_like(bound) : harness::ulp(expected, dtype) * 0.5001;
  return ((found.detach().to(at::kDouble) - expected).abs() / (bound + rounding)).max().item<double>();
}

at::Tensor inputs(int64_t count, at::ScalarType dtype) {
  return at::cat({at::linspace(-14, 14, count / 2, at::kDouble), harness::normal({count - count / 2}, 3) * 2})
      .to(dtype);
}

void check(const at::Tensor& x, const at::Tensor& dy) {
  const auto leaf = x.detach().requires_grad_(true);
  const Oracle oracle(x);
  const auto y = lora::gelu(leaf, "tanh");
  EXPECT_EQ(y.scalar_type(), x.scalar_type());
  EXPECT_EQ(y.sizes(), x.sizes());
  EXPECT_EQ(y.strides(), at::gelu(x, "tanh").strides());
  EXPECT_LE(worst(y, oracle.value, oracle.value_bound), 1);
  EXPECT_TRUE(at::equal(y, lora::gelu(x, "tanh")));
  const auto dx = torch::autograd::grad({y}, {leaf}, {dy})[0];
  EXPECT_EQ(dx.scalar_type(), x.scalar_type());
  const auto wide = dy.to(at::kDouble);
  EXPECT_LE(worst(dx, wide * oracle.slope, wide.abs() * oracle.slope_bound), 1);
}

TEST(Gelu, OracleIsTheDefinition) {
  const auto x = at::linspace(-14, 14, 1001, at::TensorOptions(at::kDouble)).requires_grad_(true);
  const auto y = at::gelu(x, "tanh");
  const Oracle oracle(x);
  EXPECT_LE(harness::largest(y - oracle.value), 1e-14);
  EXPECT_LE(harness::largest(torch::autograd::grad({y.sum()}, {x})[0] - oracle.slope), 1e-13);
}

// Below and above a vector of each width, and a task of 16384 elements.
TEST(Gelu, IsWithinItsBoundAtEverySize) {
  for (const auto dtype : kDtypes) {
    for (const int64_t count : {0, 1, 3, 4, 5, 7, 15, 16, 17, 31, 33, 1000, 16383, 16384, 16385, 100001}) {
      SCOPED_TRACE(std::to_string(count) + " " + c10::toString(dtype));
      check(inputs(count, dtype), harness::normal({count}, 5, dtype));
    }
  }
}

TEST(Gelu, TakesEveryLayout) {
  for (const auto dtype : kDtypes) {
    const auto x = harness::normal({6, 10, 4, 7}, 1, dtype) * 3;
    const std::vector<std::pair<std::string, at::Tensor>> layouts{
        {"contiguous", x},
        {"transposed", x.transpose(1, 3)},
        {"channels last", x.contiguous(at::MemoryFormat::ChannelsLast)},
        {"every second", x.slice(1, 1, 10, 2)},
        {"a column", x.select(3, 2)},
        {"expanded", x.narrow(0, 2, 1).expand({5, 10, 4, 7})},
        {"one number", x[0][1][2][3]},
        {"overlapping", x.flatten().as_strided({20, 10}, {3, 1})},
    };
    for (const auto& [name, layout] : layouts) {
      SCOPED_TRACE(name + " " + c10::toString(dtype));
      check(layout, harness::normal(layout.sizes(), 2, dtype));
      check(layout, harness::normal({}, 2, dtype).expand(layout.sizes()));
      if (layout.dim() > 1) check(layout, harness::normal(layout.transpose(0, 1).sizes(), 2, dtype).transpose(0, 1));
    }
  }
}

template <class T>
void check_instruction_sets(at::ScalarType dtype) {
  for (const int64_t count : {1, 4, 9, 16, 1003}) {
    const auto x = inputs(count, dtype), dy = harness::normal({count}, 5, dtype);
    const Oracle oracle(x);
    const auto wide = dy.to(at::kDouble);
    for (const auto set : harness::instruction_sets()) {
      const auto y = at::full({count + 1}, 77, dtype), dx = at::full({count + 1}, 77, dtype);
      const auto *x_data = x.const_data_ptr<T>(), *dy_data = dy.const_data_ptr<T>();
      using lora::detail::Elementwise;
      lora::detail::run_register_kernel<Elementwise<lora::detail::GeluTanh>::Kernel>(set, count,
                                                                                     y.mutable_data_ptr<T>(), x_data);
      lora::detail::run_register_kernel<Elementwise<lora::detail::GeluTanhBackward>::Kernel>(
          set, count, dx.mutable_data_ptr<T>(), dy_data, x_data);
      SCOPED_TRACE(std::to_string(static_cast<int>(set)) + " " + std::to_string(count) + " " + c10::toString(dtype));
      EXPECT_LE(worst(y.narrow(0, 0, count), oracle.value, oracle.value_bound), 1);
      EXPECT_LE(worst(dx.narrow(0, 0, count), wide * oracle.slope, wide.abs() * oracle.slope_bound), 1);
      EXPECT_EQ(y[count].item<double>(), 77);
      EXPECT_EQ(dx[count].item<double>(), 77);
    }
  }
}

TEST(Gelu, IsWithinItsBoundInEveryInstructionSet) {
  check_instruction_sets<float>(at::kFloat);
  check_instruction_sets<c10::BFloat16>(at::kBFloat16);
  check_instruction_sets<c10::Half>(at::kHalf);
}

TEST(Gelu, IsTheSameOnAnyNumberOfThreads) {
  for (const auto dtype : kDtypes) {
    const auto x = inputs(100003, dtype).requires_grad_(true);
    std::vector<at::Tensor> values, gradients;
    for (const int threads : {1, 2, 3}) {
      const harness::NumThreads guard(threads);
      values.push_back(lora::gelu(x, "tanh"));
      gradients.push_back(torch::autograd::grad({values.back().sum()}, {x})[0]);
      EXPECT_TRUE(at::equal(values.back(), values.front()));
      EXPECT_TRUE(at::equal(gradients.back(), gradients.front()));
    }
  }
}

TEST(Gelu, KnowsTheEnds) {
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const auto x = at::tensor({kInfinity, std::nan(""), 1e30, -1e30, 3e38, -3e38, 0.0, -0.0, 1e-30, -100.0},
                              at::TensorOptions(at::kDouble))
                       .to(dtype)
                       .requires_grad_(true);
    const auto y = lora::gelu(x, "tanh"), expected = at::gelu(x, "tanh");
    const auto dx = torch::autograd::grad({y.sum()}, {x})[0];
    EXPECT_TRUE(at::allclose(y, expected, 1e-2, 0, /*equal_nan=*/true)) << y << expected;
    const std::vector<double> slopes{1, std::nan(""), 1, 0, 1, 0, 0.5, 0.5, 0.5, 0};
    EXPECT_TRUE(at::allclose(dx.to(at::kDouble), at::tensor(slopes, at::kDouble), 0, 1e-33, /*equal_nan=*/true)) << dx;
  }
}

TEST(Gelu, LeavesTheRestToLibTorch) {
  const auto check_same = [](const at::Tensor& given, const char* approximate) {
    const auto x = given.detach().requires_grad_(true);
    const auto y = lora::gelu(x, approximate), expected = at::gelu(x, approximate);
    EXPECT_TRUE(at::equal(y, expected));
    EXPECT_TRUE(at::equal(torch::autograd::grad({y.sum()}, {x})[0], torch::autograd::grad({expected.sum()}, {x})[0]));
  };
  for (const auto dtype : kDtypes) check_same(inputs(100, dtype), "none");
  check_same(inputs(100, at::kDouble), "none");
  check_same(inputs(100, at::kDouble), "tanh");
  EXPECT_TRUE(at::equal(lora::gelu(at::ones({3})), at::gelu(at::ones({3}))));
  EXPECT_TRUE(lora::gelu(at::ones({3}, at::kMeta), "tanh").is_meta());
  EXPECT_THROW(lora::gelu(at::ones({3}), "tan"), c10::Error);
  EXPECT_THROW(lora::gelu(at::ones({3}, at::kLong), "tanh"), c10::Error);
}

TEST(Gelu, HasASecondDerivative) {
  const auto x = inputs(200, at::kFloat).requires_grad_(true);
  const auto second = [&](const at::Tensor& y) {
    const auto first = torch::autograd::grad({y.sum()}, {x}, {}, c10::nullopt, /*create_graph=*/true)[0];
    return torch::autograd::grad({first.sum()}, {x})[0];
  };
  EXPECT_TRUE(at::equal(second(lora::gelu(x, "tanh")), second(at::gelu(x, "tanh"))));
}

TEST(Gelu, SavesItsInputAlone) {
  const auto x = inputs(100, at::kFloat).requires_grad_(true);
  const auto h = x * 1;
  const auto y = lora::gelu(h, "tanh");
  y.detach().zero_();  // y is not needed for the gradient
  const auto dx = torch::autograd::grad({y.sum()}, {x}, {}, /*retain_graph=*/true)[0];
  EXPECT_GT(harness::largest(dx), 0.5);
  h.detach().add_(1);
  EXPECT_THROW(torch::autograd::grad({y.sum()}, {x}), c10::Error);
}

TEST(Gelu, WritesOverAGradientThatNobodyElseHolds) {
  const auto x = inputs(100, at::kFloat).requires_grad_(true);
  const auto dy = harness::normal({100}, 5).to(at::kFloat), twice = dy * 2;
  const auto expected = torch::autograd::grad({lora::gelu(x, "tanh")}, {x}, {twice})[0];
  EXPECT_TRUE(at::equal(twice, dy * 2));  // it is the caller's

  const auto y = lora::gelu(x, "tanh");
  const void* memory = nullptr;
  y.register_hook([&](const at::Tensor& gradient) { memory = gradient.const_data_ptr(); });
  const auto dx = torch::autograd::grad({y * 2}, {x}, {dy})[0];
  EXPECT_EQ(dx.const_data_ptr(), memory);
  EXPECT_TRUE(at::equal(dx, expected));
}

TEST(Gelu, LeavesAGradientThatAnotherHolds) {
  const auto x = inputs(100, at::kFloat).requires_grad_(true);
  const auto other = at::zeros({100}).requires_grad_(true);
  const auto dy = harness::normal({100}, 5).to(at::kFloat), twice = dy * 2;
  const auto expected = torch::autograd::grad({lora::gelu(x, "tanh")}, {x}, {twice})[0];

  const auto y = lora::gelu(x, "tanh");
  y.retain_grad();
  at::Tensor kept;
  y.register_hook([&](const at::Tensor& gradient) { kept = gradient; });
  ((y + other) * 2).backward(dy);
  EXPECT_TRUE(at::equal(kept, twice));
  EXPECT_TRUE(at::equal(y.grad(), twice));
  EXPECT_TRUE(at::equal(other.grad(), twice));
  EXPECT_TRUE(at::equal(x.grad(), expected));

  at::Tensor part;
  const auto z = lora::gelu(x, "tanh");
  z.register_hook([&](const at::Tensor& gradient) { part = gradient.narrow(0, 3, 10); });
  EXPECT_TRUE(at::equal(torch::autograd::grad({z * 2}, {x}, {dy})[0], expected));
  EXPECT_TRUE(at::equal(part, twice.narrow(0, 3, 10)));
}

}  // namespace
}  // namespace gelu_test
