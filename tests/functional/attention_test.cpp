// lora::attention and lora::packed_attention against softmax(scale·q·kᵀ)·v in float64: values and gradients in every
// dtype, shape, layout, instruction set and number of threads.
#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <gtest/gtest.h>
#include <lora/functional/attention.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "harness/dense_oracle.h"
#include "harness/instruction_sets.h"
#include "harness/message_of.h"
#include "harness/num_threads.h"
#include "harness/operators.h"
#include "harness/values.h"

namespace attention_test {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kUnit = 0x1p-24;  // the relative error of one rounding to float32
const std::vector<at::ScalarType> kDtypes{at::kFloat, at::kBFloat16, at::kHalf};

struct Result {
  at::Tensor out, dq, dk, dv;
};

at::Tensor wide(const at::Tensor& x) { return x.detach().to(at::kDouble); }

/// Rounding a sum to the dtype; that to float32 is one more of the roundings that are counted.
at::Tensor last_rounding(const at::Tensor& expected, at::ScalarType dtype) {
  return dtype == at::kFloat ? kUnit * expected.abs() : harness::ulp(expected, dtype) * 0.5001;
}

/// Attention and its gradients in float64, and the bounds of theirs for arithmetic in float32.
struct Oracle {
  Result value, bound;

  Oracle(const at::Tensor& given_q, const at::Tensor& given_k, const at::Tensor& given_v, const at::Tensor& given_dout,
         bool causal, std::optional<double> given_scale = {}, int64_t past = 0) {
    const auto dtype = given_q.scalar_type();
    const auto q = wide(given_q), k = wide(given_k), v = wide(given_v), dout = wide(given_dout);
    const auto queries = static_cast<double>(q.size(-2)), keys = static_cast<double>(k.size(-2)),
               size = static_cast<double>(q.size(-1)), scale = given_scale.value_or(1 / std::sqrt(size));
    const auto product = [](const at::Tensor& a, const at::Tensor& b) { return at::matmul(a, b.transpose(-2, -1)); };
    const auto t = [](const at::Tensor& x) { return x.transpose(-2, -1); };

    auto scores = scale * product(q, k);
    if (causal) {
      const auto seen = at::ones({q.size(-2), k.size(-2)}, at::kBool).tril(past);
      scores = scores.masked_fill(seen.logical_not(), -kInfinity);
    }
    const auto maximum = scores.amax(-1, /*keepdim=*/true);
    const auto p = at::softmax(scores, -1);
    value.out = at::matmul(p, v);
    const auto dp = product(dout, v), delta = (dout * value.out).sum(-1, /*keepdim=*/true);
    const auto ds = scale * p * (dp - delta);
    value.dq = at::matmul(ds, k);
    value.dk = at::matmul(t(ds), q);
    value.dv = at::matmul(t(p), dout);

    // A score: the sum's E roundings, the scale's and that of the product with it. Then that of the difference to the
    // maximum, and 2 ulp of e^x, at most 4 roundings. What is farther below than e^x reaches comes out as 0.
    const auto of_weight = at::where(
        p > 0, kUnit * ((size + 2) * std::abs(scale) * product(q.abs(), k.abs()) + (maximum - scores) + 4), 0);
    // Their sum is off by the mean of that; it has keys / 4 + 2 roundings in the narrowest vectors, and 6 more where a
    // block of 512 keys is joined, as have the sums of p·v; its reciprocal and the product with it round.
    const double blocks = std::ceil(keys / 512) - 1;
    const auto of_sum = (p * of_weight).sum(-1, /*keepdim=*/true) + kUnit * (keys / 4 + 2 + 6 * blocks);
    const auto of_p = of_weight + of_sum + 2 * kUnit;
    bound.out = at::matmul(p * (of_p + kUnit * (keys + 6 * blocks)), v.abs()) + 1e-36 + last_rounding(value.out, dtype);
    const auto of_dp = kUnit * size * product(dout.abs(), v.abs());
    const auto of_delta = (dout.abs() * (bound.out + kUnit * size * value.out.abs())).sum(-1, /*keepdim=*/true);
    const auto of_ds = std::abs(scale) * p * ((of_p + 4 * kUnit) * (dp - delta).abs() + of_dp + of_delta) + 1e-36;
    bound.dq = at::matmul(of_ds + kUnit * keys * ds.abs(), k.abs()) + last_rounding(value.dq, dtype);
    bound.dk = at::matmul(t(of_ds + kUnit * queries * ds.abs()), q.abs()) + last_rounding(value.dk, dtype);
    bound.dv = at::matmul(t(p * (of_p + kUnit * queries)), dout.abs()) + 1e-36 + last_rounding(value.dv, dtype);
  }
};

using Function = std::function<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&)>;

Result run(const Function& function, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
           const at::Tensor& dout) {
  const auto of = [](const at::Tensor& x) { return x.detach().requires_grad_(true); };
  const auto a = of(q), b = of(k), c = of(v);
  const auto out = function(a, b, c);
  const auto gradients = torch::autograd::grad({out}, {a, b, c}, {dout});
  return {out.detach(), gradients[0], gradients[1], gradients[2]};
}

/// The largest |found − expected| over its bound.
double worst(const at::Tensor& found, const at::Tensor& expected, const at::Tensor& bound) {
  if (found.sizes() != expected.sizes()) return kInfinity;
  return found.numel() == 0 ? 0 : ((wide(found) - expected).abs() / bound).max().item<double>();
}

void expect_near(const Result& found, const Oracle& oracle) {
  EXPECT_LE(worst(found.out, oracle.value.out, oracle.bound.out), 1);
  EXPECT_LE(worst(found.dq, oracle.value.dq, oracle.bound.dq), 1);
  EXPECT_LE(worst(found.dk, oracle.value.dk, oracle.bound.dk), 1);
  EXPECT_LE(worst(found.dv, oracle.value.dv, oracle.bound.dv), 1);
}

void expect_equal(const Result& found, const Result& expected) {
  EXPECT_TRUE(at::equal(found.out, expected.out));
  EXPECT_TRUE(at::equal(found.dq, expected.dq));
  EXPECT_TRUE(at::equal(found.dk, expected.dk));
  EXPECT_TRUE(at::equal(found.dv, expected.dv));
}

Function attention(bool causal, std::optional<double> scale = {}) {
  return [=](const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
    return lora::attention(q, k, v, causal, scale);
  };
}

Function behind(int64_t past, std::optional<double> scale = {}) {
  return [=](const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
    return lora::attention(q, k, v, /*is_causal=*/true, scale, past);
  };
}

Function libtorch(bool causal, std::optional<double> scale = {}) {
  return [=](const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
    return at::scaled_dot_product_attention(q, k, v, {}, 0, causal, scale);
  };
}

void check(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& dout) {
  for (const bool causal : {false, true}) {
    SCOPED_TRACE(causal ? "causal" : "all keys");
    const auto found = run(attention(causal), q, k, v, dout);
    for (const auto& x : {found.out, found.dq, found.dk, found.dv}) EXPECT_EQ(x.scalar_type(), q.scalar_type());
    expect_near(found, Oracle(q, k, v, dout, causal));
    EXPECT_TRUE(at::equal(lora::attention(q, k, v, causal), found.out));
  }
}

struct Shape {
  int64_t batch, heads, queries, keys, size;

  at::Tensor of_queries(uint64_t seed, at::ScalarType dtype) const {
    return harness::normal({batch, heads, queries, size}, seed, dtype);
  }
  at::Tensor of_keys(uint64_t seed, at::ScalarType dtype) const {
    return harness::normal({batch, heads, keys, size}, seed, dtype);
  }
  std::string name() const {
    std::string result;
    for (const auto x : {batch, heads, queries, keys, size}) result += std::to_string(x) + " ";
    return result;
  }
};

TEST(Attention, OracleIsTheDefinition) {
  const Shape shape{2, 3, 9, 5, 7};
  const auto q = shape.of_queries(1, at::kDouble), k = shape.of_keys(2, at::kDouble), v = shape.of_keys(3, at::kDouble),
             dout = shape.of_queries(4, at::kDouble);
  for (const bool causal : {false, true}) {
    const auto found = run(
        [&](const at::Tensor& a, const at::Tensor& b, const at::Tensor& c) {
          return std::get<0>(at::_scaled_dot_product_attention_math(a, b, c, {}, 0, causal, {}, 0.3));
        },
        q, k, v, dout);
    const auto expected = Oracle(q, k, v, dout, causal, 0.3).value;
    for (const auto& difference :
         {found.out - expected.out, found.dq - expected.dq, found.dk - expected.dk, found.dv - expected.dv}) {
      EXPECT_LE(harness::largest(difference), 1e-13);
    }
  }
}

// Around the sizes of vectors, tiles and blocks, more queries than keys and fewer.
TEST(Attention, IsWithinItsBoundAtEveryShape) {
  for (const auto dtype : kDtypes) {
    for (const auto& shape : std::vector<Shape>{{1, 1, 1, 1, 1},
                                                {2, 3, 5, 7, 3},
                                                {1, 2, 17, 33, 20},
                                                {2, 2, 64, 64, 64},
                                                {1, 2, 63, 130, 80},
                                                {3, 1, 130, 66, 64},
                                                {1, 1, 9, 1, 16},
                                                {1, 1, 1, 9, 15},
                                                {1, 1, 33, 31, 257},
                                                {1, 1, 1000, 1000, 64},
                                                {1, 1, 20, 1100, 16},
                                                {1, 1, 1100, 20, 16}}) {
      SCOPED_TRACE(shape.name() + c10::toString(dtype));
      check(shape.of_queries(1, dtype), shape.of_keys(2, dtype), shape.of_keys(3, dtype), shape.of_queries(4, dtype));
    }
  }
}

TEST(Attention, TakesAScale) {
  const Shape shape{1, 2, 30, 40, 24};
  for (const double scale : {1.0, 0.01, -0.5}) {
    const auto q = shape.of_queries(1, at::kFloat), k = shape.of_keys(2, at::kFloat), v = shape.of_keys(3, at::kFloat),
               dout = shape.of_queries(4, at::kFloat);
    expect_near(run(attention(true, scale), q, k, v, dout), Oracle(q, k, v, dout, true, scale));
  }
}

TEST(Attention, TakesEveryLayout) {
  const auto fused = [](at::ScalarType dtype) { return harness::normal({2, 10, 3, 4, 8}, 1, dtype); };
  for (const auto dtype : kDtypes) {
    SCOPED_TRACE(c10::toString(dtype));
    const auto qkv = fused(dtype).permute({2, 0, 3, 1, 4}).unbind(0);
    const auto q = qkv[0], k = qkv[1], v = qkv[2], dout = harness::normal({2, 4, 10, 8}, 2, dtype);
    check(q, k, v, dout);
    check(q, k, v, harness::normal({2, 10, 4, 8}, 2, dtype).transpose(1, 2));
    check(q, k, v, harness::normal({}, 2, dtype).expand({2, 4, 10, 8}));
    check(q.contiguous(), k.transpose(-2, -1).contiguous().transpose(-2, -1), v.slice(-1, 0, 8, 2).repeat({1, 1, 1, 2}),
          dout.transpose(-2, -1).contiguous().transpose(-2, -1));
    check(q, k.narrow(1, 0, 1).expand({2, 4, 10, 8}), v.narrow(0, 1, 1).expand({2, 4, 10, 8}), dout);
    check(q[0], k[0], v[0], dout[0]);
    check(q[0][1], k[0][1], v[0][1], dout[0][1]);
    check(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), dout.unsqueeze(1));
  }
}

// The heads of a token side by side, so that joining them copies nothing.
TEST(Attention, WritesHeadsSideBySide) {
  const Shape shape{2, 3, 5, 7, 4};
  const auto found = run(attention(false), shape.of_queries(1, at::kFloat), shape.of_keys(2, at::kFloat),
                         shape.of_keys(3, at::kFloat), shape.of_queries(4, at::kFloat));
  for (const auto& x : {found.out, found.dq, found.dk, found.dv}) EXPECT_TRUE(x.transpose(1, 2).is_contiguous());
}

/// Attention and its gradients by the call itself, to which the instruction set is given.
Result call(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& dout, bool causal,
            int64_t past, lora::detail::InstructionSet set) {
  lora::detail::AttentionCall call{
      q,
      k,
      v,
      at::empty_like(q),
      at::empty({q.numel() / q.size(-1), 2}),
      c10::make_intrusive<lora::detail::AttentionOptions>(std::vector<int64_t>{0, q.size(-2)},
                                                          std::vector<int64_t>{0, k.size(-2)}, causal, 0.2, past),
      set};
  call.forward();
  Result found{call.out, at::empty_like(q), at::empty_like(k), at::empty_like(v)};
  call.backward(dout, found.dq, found.dk, found.dv);
  return found;
}

TEST(Attention, IsWithinItsBoundInEveryInstructionSet) {
  for (const auto dtype : kDtypes) {
    for (const auto& shape : std::vector<Shape>{{1, 1, 5, 3, 3}, {1, 2, 37, 150, 20}, {1, 2, 150, 37, 64}}) {
      const auto q = shape.of_queries(1, dtype), k = shape.of_keys(2, dtype), v = shape.of_keys(3, dtype),
                 dout = shape.of_queries(4, dtype);
      for (const auto set : harness::instruction_sets()) {
        for (const bool causal : {false, true}) {
          SCOPED_TRACE(shape.name() + std::to_string(static_cast<int>(set)) + " " + c10::toString(dtype));
          expect_near(call(q, k, v, dout, causal, /*past=*/0, set), Oracle(q, k, v, dout, causal, 0.2));
        }
      }
    }
  }
}

// A block of keys or a tile of queries in which only the later queries see any, and pasts that fill blocks or do not.
TEST(Attention, LetsCausalQueriesSeeAPast) {
  for (const auto dtype : kDtypes) {
    for (const auto& shape : std::vector<Shape>{{1, 1, 1, 9, 15},
                                                {2, 3, 5, 7, 3},
                                                {1, 2, 17, 33, 20},
                                                {1, 2, 60, 200, 64},
                                                {1, 1, 200, 190, 16},
                                                {1, 1, 530, 540, 24}}) {
      const auto q = shape.of_queries(1, dtype), k = shape.of_keys(2, dtype), v = shape.of_keys(3, dtype),
                 dout = shape.of_queries(4, dtype);
      for (const int64_t past : {int64_t{1}, int64_t{3}, int64_t{8}, int64_t{70}, shape.keys - 1, shape.keys + 5}) {
        SCOPED_TRACE(shape.name() + c10::toString(dtype) + " behind " + std::to_string(past));
        expect_near(run(behind(past, 0.2), q, k, v, dout), Oracle(q, k, v, dout, /*causal=*/true, 0.2, past));
        for (const auto set : harness::instruction_sets()) {
          expect_near(call(q, k, v, dout, /*causal=*/true, past, set), Oracle(q, k, v, dout, true, 0.2, past));
        }
      }
    }
  }
}

// Far larger than all others, as not even the maximum of a row may know of it.
TEST(Attention, KeepsWhatIsBehindAQueryFromIt) {
  const Shape shape{1, 1, 40, 560, 16};
  const auto q = shape.of_queries(1, at::kFloat), k = shape.of_keys(2, at::kFloat), v = shape.of_keys(3, at::kFloat);
  const int64_t past = 505;
  const auto expected = lora::attention(q, k, v, true, {}, past);
  for (int64_t key = past + 1; key < shape.keys; ++key) {
    auto loud = k.clone();
    loud.select(2, key).fill_(kInfinity);
    const auto seeing = std::min(shape.queries, std::max<int64_t>(0, key - past));
    const auto found = lora::attention(q, loud, v, true, {}, past);
    EXPECT_TRUE(at::equal(found.narrow(2, 0, seeing), expected.narrow(2, 0, seeing))) << key;
  }
}

TEST(Attention, OfNoPastIsTheCausalOne) {
  const Shape shape{1, 2, 70, 90, 16};
  const auto q = shape.of_queries(1, at::kFloat), k = shape.of_keys(2, at::kFloat), v = shape.of_keys(3, at::kFloat),
             dout = shape.of_queries(4, at::kFloat);
  expect_equal(run(behind(0), q, k, v, dout), run(attention(true), q, k, v, dout));
  EXPECT_TRUE(at::equal(lora::attention(q, k, v, /*is_causal=*/false, {}, 7), lora::attention(q, k, v)));
  const auto message = harness::message_of<c10::ValueError>([&] { lora::attention(q, k, v, true, {}, -1); });
  EXPECT_NE(message.find("[lora::attention] found past = -1, expected 0 or more"), std::string::npos) << message;
}

// One head is divided among threads, many are not.
TEST(Attention, IsTheSameOnAnyNumberOfThreads) {
  for (const auto& shape : std::vector<Shape>{{1, 1, 300, 500, 16}, {1, 2, 200, 170, 64}, {3, 4, 20, 20, 8}}) {
    for (const bool causal : {false, true}) {
      std::vector<Result> results, behind_a_past;
      for (const int threads : {1, 2, 3, 8}) {
        SCOPED_TRACE(shape.name() + std::to_string(threads));
        const harness::NumThreads guard(threads);
        results.push_back(run(attention(causal), shape.of_queries(1, at::kBFloat16), shape.of_keys(2, at::kBFloat16),
                              shape.of_keys(3, at::kBFloat16), shape.of_queries(4, at::kBFloat16)));
        expect_equal(results.back(), results.front());
        behind_a_past.push_back(run(behind(21), shape.of_queries(1, at::kFloat), shape.of_keys(2, at::kFloat),
                                    shape.of_keys(3, at::kFloat), shape.of_queries(4, at::kFloat)));
        expect_equal(behind_a_past.back(), behind_a_past.front());
      }
    }
  }
}

TEST(Attention, KnowsTheEnds) {
  const auto ones = at::ones({1, 1, 3, 2});
  const auto rows = [](double a, double b, double c) {
    return at::tensor({a, b, c}, at::kFloat).reshape({1, 1, 3, 1}).expand({1, 1, 3, 2});
  };
  const auto keys = rows(1e30, -1e30, 1e30), values = rows(1, 5, 3);
  // Scores of ±2e30: the first and the last key share the weight. Of −∞: the key has none.
  const auto far = run(attention(false), ones, keys, values, ones);
  EXPECT_TRUE(at::equal(far.out, at::full({1, 1, 3, 2}, 2.0)));
  EXPECT_TRUE(at::equal(far.dv, rows(1.5, 0, 1.5)));
  const auto infinite = lora::attention(ones, rows(1e30, -kInfinity, 1e30), values, false, 1.0);
  EXPECT_TRUE(at::equal(infinite, at::full({1, 1, 3, 2}, 2.0))) << infinite;
  auto broken = at::zeros({1, 1, 3, 2});
  broken[0][0][2][0] = std::nan("");
  const auto out = lora::attention(ones, broken, values, true);
  EXPECT_TRUE(at::equal(out.isnan().all(-1).flatten().to(at::kLong), at::tensor({0, 0, 1}, at::kLong))) << out;
}

// LibTorch's kernel divides by the number of heads.
TEST(Attention, TakesNothing) {
  for (const auto& shape : std::vector<Shape>{{0, 2, 3, 3, 4}, {1, 0, 3, 3, 4}, {1, 2, 0, 3, 4}, {1, 2, 3, 0, 4}}) {
    SCOPED_TRACE(shape.name());
    const auto q = shape.of_queries(1, at::kFloat), k = shape.of_keys(2, at::kFloat);
    expect_equal(run(attention(false), q, k, k, q),
                 {at::zeros_like(q), at::zeros_like(q), at::zeros_like(k), at::zeros_like(k)});
  }
}

TEST(Attention, ComputesTheGradientsThatAreWanted) {
  const Shape shape{1, 2, 20, 30, 8};
  const auto q = shape.of_queries(1, at::kFloat), k = shape.of_keys(2, at::kFloat), v = shape.of_keys(3, at::kFloat),
             dout = shape.of_queries(4, at::kFloat);
  const auto all = run(attention(true), q, k, v, dout);
  const std::vector<at::Tensor> expected{all.dq, all.dk, all.dv};
  for (size_t wanted = 1; wanted < 8; ++wanted) {
    std::vector<at::Tensor> arguments{q.clone(), k.clone(), v.clone()}, leaves, of_leaves;
    for (size_t i = 0; i < 3; ++i) {
      if ((wanted >> i & 1U) == 0) continue;
      leaves.push_back(arguments[i].requires_grad_(true));
      of_leaves.push_back(expected[i]);
    }
    const auto out = lora::attention(arguments[0], arguments[1], arguments[2], true);
    const auto found = torch::autograd::grad({out}, leaves, {dout});
    for (size_t i = 0; i < leaves.size(); ++i) EXPECT_TRUE(at::equal(found[i], of_leaves[i])) << wanted << " " << i;
  }
  EXPECT_FALSE(lora::attention(q, k, v).requires_grad());
}

TEST(Attention, RefusesASecondDerivative) {
  const Shape shape{1, 2, 5, 6, 8};
  const auto q = shape.of_queries(1, at::kFloat).requires_grad_(true), k = shape.of_keys(2, at::kFloat);
  const auto expected = run(attention(false), q, k, k, at::ones_like(q)).dq;
  const auto first =
      torch::autograd::grad({lora::attention(q, k, k).sum()}, {q}, {}, c10::nullopt, /*create_graph=*/true)[0];
  EXPECT_TRUE(at::equal(first, expected));
  const auto message = harness::message_of([&] { torch::autograd::grad({first.sum()}, {q}); });
  EXPECT_NE(message.find("[lora::attention] found a second derivative"), std::string::npos) << message;
}

TEST(Attention, NoticesThatWhatItSavedWasOverwritten) {
  const auto q = harness::normal({1, 1, 4, 8}, 1, at::kFloat).requires_grad_(true);
  const auto h = q * 1;
  const auto out = lora::attention(h, h, h);
  h.detach().add_(1);
  EXPECT_THROW(torch::autograd::grad({out.sum()}, {q}), c10::Error);
}

// Saved for the backward and made by it: tensors of [*, L, E] and two numbers a query.
TEST(Attention, MakesNoMatrixOfScores) {
  const Shape shape{1, 2, 300, 200, 8};
  const auto q = shape.of_queries(1, at::kFloat), k = shape.of_keys(2, at::kFloat);
  const harness::OperatorRecorder recorder;
  run(attention(true), q, k, k, q);
  EXPECT_TRUE(recorder.makers_of({300, 200}, {}).empty());
  for (const auto& name : recorder.names()) EXPECT_EQ(name.find("scaled_dot_product"), std::string::npos) << name;
}

TEST(Attention, CastsAsAutocastDoes) {
  const Shape shape{1, 2, 20, 20, 8};
  const auto q = shape.of_queries(1, at::kFloat), k = shape.of_keys(2, at::kFloat), v = shape.of_keys(3, at::kFloat),
             dout = shape.of_queries(4, at::kBFloat16);
  const auto cast = [](const at::Tensor& x) { return x.to(at::kBFloat16); };
  const auto expected = run(attention(true), cast(q), cast(k), cast(v), dout);
  at::autocast::set_autocast_enabled(at::kCPU, true);
  const auto found = run(attention(true), q, cast(k), v, dout), libtorchs = run(libtorch(true), q, cast(k), v, dout);
  const auto packed = lora::packed_attention(q[0].transpose(0, 1), k[0].transpose(0, 1), v[0].transpose(0, 1),
                                             at::tensor({0, 20}, at::kLong), true);
  at::autocast::set_autocast_enabled(at::kCPU, false);
  at::autocast::clear_cache();
  EXPECT_EQ(found.out.scalar_type(), libtorchs.out.scalar_type());
  EXPECT_TRUE(at::equal(found.out, expected.out));
  EXPECT_TRUE(at::equal(packed.transpose(0, 1), expected.out[0]));
  EXPECT_EQ(found.dq.scalar_type(), at::kFloat);
  EXPECT_EQ(found.dk.scalar_type(), at::kBFloat16);
  EXPECT_TRUE(at::equal(found.dq, expected.dq.to(at::kFloat)));
}

TEST(Attention, LeavesTheRestToLibTorch) {
  const Shape shape{1, 2, 6, 9, 8};
  const auto q = shape.of_queries(1, at::kFloat), k = shape.of_keys(2, at::kFloat), v = shape.of_keys(3, at::kFloat);
  const auto check_same = [](const at::Tensor& a, const at::Tensor& b, const at::Tensor& c) {
    const auto dout = at::ones_like(at::scaled_dot_product_attention(a, b, c));
    expect_equal(run(attention(true, 0.3), a, b, c, dout), run(libtorch(true, 0.3), a, b, c, dout));
  };
  check_same(wide(q), wide(k), wide(v));
  check_same(q, k, harness::normal({1, 2, 9, 5}, 3, at::kFloat));
  expect_near(run(behind(3, 0.3), wide(q), wide(k), wide(v), wide(q)),
              Oracle(wide(q), wide(k), wide(v), wide(q), true, 0.3, /*past=*/3));
  EXPECT_THROW(lora::attention(q, k, wide(v)), c10::Error);
  EXPECT_THROW(lora::attention(q, shape.of_keys(1, at::kFloat).narrow(3, 0, 5), v), c10::Error);
  EXPECT_THROW(lora::attention(q[0][0][0], k[0][0][0], v[0][0][0]), c10::Error);
}

// Sequences of 0 tokens stand at the beginning, in the middle and at the end.
TEST(PackedAttention, IsThatOfEachSequence) {
  const std::vector<int64_t> ends{0, 0, 1, 40, 40, 57, 200, 200};
  for (const auto dtype : {at::kFloat, at::kBFloat16, at::kDouble}) {
    for (const bool causal : {false, true}) {
      const auto qkv = harness::normal({200, 3, 4, 16}, 1, dtype), dout = harness::normal({200, 4, 16}, 2, dtype);
      const auto found = run(
          [&](const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
            return lora::packed_attention(q, k, v, at::tensor(ends, at::kLong), causal, 0.2);
          },
          qkv.select(1, 0), qkv.select(1, 1), qkv.select(1, 2), dout);
      EXPECT_TRUE(found.out.is_contiguous());
      for (size_t i = 1; i < ends.size(); ++i) {
        SCOPED_TRACE(std::string(c10::toString(dtype)) + " " + std::to_string(i));
        const auto of = [&](const at::Tensor& x) {
          return x.narrow(0, ends[i - 1], ends[i] - ends[i - 1]).unsqueeze(0).transpose(1, 2);
        };
        const auto expected =
            run(attention(causal, 0.2), of(qkv.select(1, 0)), of(qkv.select(1, 1)), of(qkv.select(1, 2)), of(dout));
        expect_equal({of(found.out), of(found.dq), of(found.dk), of(found.dv)}, expected);
      }
    }
  }
}

TEST(PackedAttention, TakesNoTokens) {
  const auto x = at::ones({0, 2, 4}).requires_grad_(true);
  const auto out = lora::packed_attention(x, x, x, at::tensor({0, 0}, at::kLong));
  EXPECT_EQ(out.sizes(), x.sizes());
  EXPECT_EQ(torch::autograd::grad({out.sum()}, {x})[0].sizes(), x.sizes());
}

TEST(PackedAttention, SaysWhatDoesNotFit) {
  const auto x = at::ones({5, 2, 4});
  const auto offsets = at::tensor({0, 3, 5}, at::kLong);
  const auto message = [&](const at::Tensor& q, const at::Tensor& v, const at::Tensor& of) {
    return harness::message_of<c10::ValueError>([&] { lora::packed_attention(q, x, v, of); });
  };
  const auto contains = [](const std::string& text, const std::string& part) {
    return text.find("[lora::packed_attention] found ") == 0 && text.find(part) != std::string::npos;
  };
  EXPECT_PRED2(contains, message(x[0], x, offsets), "expected [tokens, heads, E]");
  EXPECT_PRED2(contains, message(at::ones({5, 1, 4}), x, offsets), "expected [tokens, heads, E]");
  EXPECT_PRED2(contains, message(x, at::ones({4, 2, 4}), offsets), "expected [tokens, heads, E]");
  EXPECT_PRED2(contains, message(x, x, offsets.to(at::kInt)), "expected int64 [sequences + 1]");
  EXPECT_PRED2(contains, message(x, x, at::tensor({0}, at::kLong)), "expected int64 [sequences + 1]");
  EXPECT_PRED2(contains, message(x, x, at::tensor({1, 5}, at::kLong)),
               "expected ascending ones from 0 to the 5 tokens");
  EXPECT_PRED2(contains, message(x, x, at::tensor({0, 4}, at::kLong)), "found offsets [0, 4]");
  EXPECT_PRED2(contains, message(x, x, at::tensor({0, 4, 2, 5}, at::kLong)), "expected ascending ones");
}

}  // namespace
}  // namespace attention_test
