// Operators on an adapted weight: values and gradients against autograd through a dense weight, low-rank or by the
// fallback.
#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/lora.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/nn/functional/linear.h>
#include <torch/nn/init.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/linear.h>

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "harness/dense_oracle.h"
#include "harness/values.h"

namespace kernels_test {
namespace {

namespace F = torch::nn::functional;
using at::indexing::Slice;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Pair;
using ::testing::ThrowsMessage;
using ::testing::UnorderedElementsAre;

constexpr int64_t kRows = 21;  // q, k, v: 7 each
constexpr int64_t kColumns = 12;

/// A Linear [21, 12] in float64 with two active adapters: one on all rows, one on the parts q and v.
class AdaptedLinear {
 public:
  AdaptedLinear() : AdaptedLinear(lora::LoraConfig().r(2).lora_alpha(3)) {}
  explicit AdaptedLinear(lora::LoraConfig config)
      : adapters((model->to(at::kDouble), lora::inject(*model, config.target_modules({"0"})))) {
    adapters.add(lora::LoraConfig().r(3).lora_alpha(-2).target_modules({"0[q,v]"}), "parts");
    harness::fill(adapters);
    harness::fill(adapters, "parts", 70);
    adapters.set_active({"default", "parts"});
    adapters.set_trainable({"default", "parts"});
  }

  at::Tensor weight() const { return linear->weight; }

  /// The same weight as a dense tensor, with leaves of its own in `leaves` by the names of named_parameters().
  at::Tensor dense(std::map<std::string, at::Tensor>& leaves) const {
    for (const auto& [name, tensor] : adapters.named_parameters())
      leaves[name] = tensor.detach().clone().requires_grad_();
    const auto update = [&](const std::string& path, double s, int64_t row) {
      const auto dW = s * at::mm(leaves.at(path + ".lora_B"), leaves.at(path + ".lora_A"));
      return at::constant_pad_nd(dW, {0, 0, row, kRows - row - dW.size(0)});
    };
    return linear->named_parameters()["weight"].detach() + update("0.lora_default", 3.0 / 2.0, 0) +
           update("0.lora_parts.q", -2.0 / 3.0, 0) + update("0.lora_parts.v", -2.0 / 3.0, 14);
  }

  torch::nn::Linear linear{torch::nn::LinearOptions(kColumns, kRows)};
  torch::nn::Sequential model{linear};
  lora::Adapters adapters;
};

struct OperatorCase {
  std::string name;
  std::vector<int64_t> x;
  std::function<at::Tensor(const at::Tensor& x, const at::Tensor& W)> run;
  std::vector<std::string> fallbacks;  // operators that form the dense weight
};

void PrintTo(const OperatorCase& tested, std::ostream* out) { *out << tested.name; }

class OperatorTest : public ::testing::TestWithParam<OperatorCase> {};

TEST_P(OperatorTest, EqualsTheDenseWeight) {
  const AdaptedLinear adapted;
  std::map<std::string, at::Tensor> leaves;
  const auto dense = adapted.dense(leaves);
  const auto x = harness::normal(GetParam().x, 3).requires_grad_();
  const auto wide = x.detach().clone().requires_grad_();

  const auto y = GetParam().run(x, adapted.weight());
  const auto expected = GetParam().run(wide, dense);
  ASSERT_EQ(y.sizes(), expected.sizes());
  if (y.numel() > 0) {
    EXPECT_LT(harness::relative_error(y, expected), 1e-13);
  }

  const auto g = harness::normal(y.sizes(), 5);
  (y * g).sum().backward();
  (expected * g).sum().backward();
  const auto zeros = [](const at::Tensor& t) { return t.grad().defined() ? t.grad() : at::zeros_like(t); };
  EXPECT_LT(harness::largest(zeros(x) - zeros(wide)), 1e-12);
  for (const auto& [name, tensor] : adapted.adapters.named_parameters()) {
    EXPECT_LT(harness::largest(zeros(tensor) - zeros(leaves.at(name))), 1e-12) << name;
  }

  std::vector<std::string> counted;
  for (const auto& [name, count] : adapted.adapters.fallbacks()) counted.push_back(name);
  EXPECT_EQ(counted, GetParam().fallbacks);
}

const std::vector<OperatorCase> kLowRank{
    {"linear", {5, 12}, [](auto& x, auto& W) { return at::linear(x, W); }, {}},
    {"linear_bias", {5, 12}, [](auto& x, auto& W) { return at::linear(x, W, at::ones({kRows}, at::kDouble)); }, {}},
    {"linear_3d", {2, 3, 12}, [](auto& x, auto& W) { return at::linear(x, W); }, {}},
    {"linear_1d", {12}, [](auto& x, auto& W) { return at::linear(x, W); }, {}},
    {"linear_no_rows", {0, 12}, [](auto& x, auto& W) { return at::linear(x, W); }, {}},
    {"linear_no_rows_3d", {2, 0, 12}, [](auto& x, auto& W) { return at::linear(x, W); }, {}},
    {"linear_folds_strided_input", {12, 5}, [](auto& x, auto& W) { return at::linear(x.t(), W); }, {}},
    {"functional_linear",
     {5, 12},
     [](auto& x, auto& W) { return F::linear(x, W, at::ones({kRows}, at::kDouble)); },
     {}},
    {"functional_linear_3d", {2, 3, 12}, [](auto& x, auto& W) { return F::linear(x, W); }, {}},
    {"matmul_t", {5, 12}, [](auto& x, auto& W) { return x.matmul(W.t()); }, {}},
    {"matmul_1d", {12}, [](auto& x, auto& W) { return x.matmul(W.t()); }, {}},
    {"matmul_4d", {2, 1, 3, 12}, [](auto& x, auto& W) { return x.matmul(W.t()); }, {}},
    {"matmul_transposed_product", {5, 21}, [](auto& x, auto& W) { return x.matmul(W); }, {}},
    {"matmul_transposed_product_3d", {2, 3, 21}, [](auto& x, auto& W) { return x.matmul(W); }, {}},
    {"matmul_transposed_product_1d", {21}, [](auto& x, auto& W) { return x.matmul(W); }, {}},
    {"linear_of_t", {5, 21}, [](auto& x, auto& W) { return at::linear(x, W.t()); }, {}},
    {"mm", {5, 12}, [](auto& x, auto& W) { return x.mm(W.t()); }, {}},
    {"mm_transposed_product", {5, 21}, [](auto& x, auto& W) { return x.mm(W); }, {}},
    {"addmm",
     {5, 12},
     [](auto& x, auto& W) { return at::addmm(at::ones({kRows}, at::kDouble), x, W.t(), 0.5, -3); },
     {}},
    {"addmm_beta_zero",
     {5, 12},
     [](auto& x, auto& W) { return at::addmm(at::full({kRows}, NAN, at::kDouble), x, W.t(), 0, 2); },
     {}},
    {"addmm_integer_scalars",
     {5, 21},
     [](auto& x, auto& W) { return at::addmm(x.narrow(1, 0, kColumns), x, W, 2, 3); },
     {}},
    {"numpy_T", {5, 12}, [](auto& x, auto& W) { return x.mm(W.numpy_T()); }, {}},
    {"transpose", {5, 12}, [](auto& x, auto& W) { return x.mm(W.transpose(0, 1)); }, {}},
    {"transpose_negative", {5, 12}, [](auto& x, auto& W) { return x.mm(W.transpose(-1, -2)); }, {}},
    {"transpose_same", {5, 21}, [](auto& x, auto& W) { return x.mm(W.transpose(1, -1)); }, {}},
    {"t_t", {5, 21}, [](auto& x, auto& W) { return x.mm(W.t().t()); }, {}},
    {"narrow_rows", {5, 12}, [](auto& x, auto& W) { return at::linear(x, W.narrow(0, 5, 11)); }, {}},
    {"narrow_rows_between_parts", {5, 12}, [](auto& x, auto& W) { return at::linear(x, W.narrow(0, 8, 4)); }, {}},
    {"narrow_columns", {5, 4}, [](auto& x, auto& W) { return at::linear(x, W.narrow(1, 3, 4)); }, {}},
    {"narrow_negative", {5, 12}, [](auto& x, auto& W) { return at::linear(x, W.narrow(-2, -9, 5)); }, {}},
    {"narrow_nothing", {5, 12}, [](auto& x, auto& W) { return at::linear(x, W.narrow(0, 4, 0)); }, {}},
    {"narrow_of_t", {5, 12}, [](auto& x, auto& W) { return x.mm(W.t().narrow(1, 5, 11)); }, {}},
    {"narrow_of_t_transposed_product", {5, 11}, [](auto& x, auto& W) { return x.mm(W.narrow(0, 5, 11).t().t()); }, {}},
    {"rows_and_columns",
     {5, 4},
     [](auto& x, auto& W) {
       return at::linear(x, W.narrow(0, 3, 15).narrow(1, 2, 6).narrow(0, 1, 12).narrow(1, 1, 4));
     },
     {}},
    {"rows_and_columns_transposed_product",
     {5, 12},
     [](auto& x, auto& W) { return x.matmul(W.narrow(0, 4, 12).narrow(1, 2, 6)); },
     {}},
    {"rows_without_update_transposed_product",
     {5, 4},
     [](auto& x, auto& W) { return x.matmul(W.narrow(0, 8, 4)); },
     {}},
    {"slice", {5, 12}, [](auto& x, auto& W) { return at::linear(x, at::slice(W, 0, 2, 17)); }, {}},
    {"slice_negative", {5, 12}, [](auto& x, auto& W) { return at::linear(x, at::slice(W, -2, -20, -3)); }, {}},
    {"slice_beyond", {5, 12}, [](auto& x, auto& W) { return at::linear(x, at::slice(W, 0, -99, 99)); }, {}},
    {"slice_empty", {5, 12}, [](auto& x, auto& W) { return at::linear(x, at::slice(W, 0, 9, 4)); }, {}},
    {"slice_open", {5, 12}, [](auto& x, auto& W) { return at::linear(x, at::slice(W, 0, 9)); }, {}},
    {"index_slices",
     {5, 7},
     [](auto& x, auto& W) {
       return at::linear(x, W.index({Slice(3, -2), Slice(5)}));
     },
     {}},
    {"chunk",
     {5, 12},
     [](auto& x, auto& W) { return at::linear(x, W.chunk(3)[1]) * at::linear(x, W.chunk(3)[2]); },
     {}},
    {"chunk_uneven", {5, 12}, [](auto& x, auto& W) { return at::linear(x, W.chunk(4, 0)[3]); }, {}},
    {"chunk_columns", {5, 4}, [](auto& x, auto& W) { return at::linear(x, W.chunk(3, -1)[2]); }, {}},
    {"split", {5, 12}, [](auto& x, auto& W) { return at::linear(x, W.split(8)[2]); }, {}},
    {"split_columns", {5, 2}, [](auto& x, auto& W) { return at::linear(x, W.split(5, 1)[2]); }, {}},
    {"split_sizes",
     {5, 12},
     [](auto& x, auto& W) {
       return at::linear(x, W.split({14, 7})[1]);
     },
     {}},
    {"split_with_sizes",
     {5, 12},
     [](auto& x, auto& W) {
       const auto parts = W.split_with_sizes({6, 5, 10});
       return at::linear(x, parts[2]) + at::linear(x, parts[0]).sum() + at::linear(x, parts[1]).sum();
     },
     {}},
};

const std::vector<OperatorCase> kFallback{
    {"einsum_list",
     {5, 12},
     [](auto& x, auto& W) {
       return at::einsum("bi,oi->bo", {x, W});
     },
     {"aten::einsum"}},
    {"cat_of_two",
     {5, 12},
     [](auto& x, auto& W) {
       return at::linear(x, at::cat({W, W.narrow(0, 3, 4)}));
     },
     {"aten::cat"}},
    {"stack",
     {5, 12},
     [](auto& x, auto& W) {
       return at::matmul(x, at::stack({W, W}).transpose(1, 2));
     },
     {"aten::stack"}},
    {"slice_step", {5, 12}, [](auto& x, auto& W) { return at::linear(x, at::slice(W, 0, 1, 20, 3)); }, {"aten::slice"}},
    {"select", {12}, [](auto& x, auto& W) { return x.dot(W.select(0, 4)); }, {"aten::select.int"}},
    {"left_operand", {12, 5}, [](auto& x, auto& W) { return at::matmul(W, x); }, {"aten::matmul"}},
    {"left_operand_mm", {12, 5}, [](auto& x, auto& W) { return at::mm(W, x); }, {"aten::mm"}},
    {"left_operand_mv", {12}, [](auto& x, auto& W) { return at::mv(W, x); }, {"aten::mv"}},
    {"input_and_weight", {1}, [](auto& x, auto& W) { return x * at::linear(W, W); }, {"aten::linear"}},
    {"bias_of_addmm", {21, 21}, [](auto& x, auto& W) { return at::addmm(W, x, W); }, {"aten::addmm"}},
    {"bilinear",
     {5, 7},
     [](auto& x, auto& W) {
       return F::bilinear(x, x.narrow(1, 0, 3), W.view({12, 7, 3}), {});
     },
     {"aten::view"}},
    {"square", {1}, [](auto& x, auto& W) { return x * W.pow(2).sum(); }, {"aten::pow.Tensor_Scalar"}},
    {"index_list",
     {2},
     [](auto& x, auto& W) {
       return x * W.index({at::tensor({3, 20}), at::tensor({0, 11})});
     },
     {"aten::index.Tensor"}},
};

std::string operator_name(const ::testing::TestParamInfo<OperatorCase>& tested) { return tested.param.name; }
INSTANTIATE_TEST_SUITE_P(LowRank, OperatorTest, ::testing::ValuesIn(kLowRank), operator_name);
INSTANTIATE_TEST_SUITE_P(Fallback, OperatorTest, ::testing::ValuesIn(kFallback), operator_name);

TEST(Kernels, RefuseWhatAPlainWeightRefuses) {
  const AdaptedLinear adapted;
  const auto W = adapted.weight();
  const auto x = harness::normal({5, 12}, 3);
  EXPECT_THROW(at::linear(harness::normal({5, 11}, 3), W), c10::Error);
  EXPECT_THROW(at::linear(x.to(at::kFloat), W), c10::Error);
  EXPECT_THROW(W.narrow(0, 20, 2), c10::Error);
  EXPECT_THROW(W.narrow(0, 3, -1), c10::Error);
  EXPECT_THROW(W.narrow(2, 0, 1), c10::Error);
  EXPECT_THROW(W.transpose(0, 2), c10::Error);
  EXPECT_THROW(W.split_with_sizes({10, 10}), c10::Error);
  EXPECT_THROW(W.split(0), c10::Error);
  EXPECT_THROW(W.chunk(0), c10::Error);
  EXPECT_THROW(at::slice(W, 0, 0, 9, -1), c10::Error);
}

TEST(Kernels, AnnounceWhatTheWeightIs) {
  const AdaptedLinear adapted;
  const auto W = adapted.weight();
  EXPECT_EQ(W.sizes(), (std::vector<int64_t>{21, 12}));
  EXPECT_EQ(W.t().narrow(1, 3, 5).sizes(), (std::vector<int64_t>{12, 5}));
  EXPECT_EQ(W.scalar_type(), at::kDouble);
  EXPECT_EQ(W.device(), at::kCPU);
  EXPECT_TRUE(W.is_floating_point());
}

TEST(Fallback, IsToldOnceAnOperatorAndCountedAlways) {
  struct Heard final : c10::WarningHandler {
    void process(const c10::Warning& warning) override { messages.push_back(warning.msg()); }
    std::vector<std::string> messages;
  } heard;
  const c10::WarningUtils::WarningHandlerGuard guard(&heard);
  const AdaptedLinear adapted;
  for (int i = 0; i < 3; ++i) adapted.weight().pow(2);
  adapted.weight().abs();
  EXPECT_THAT(adapted.adapters.fallbacks(),
              UnorderedElementsAre(Pair("aten::pow.Tensor_Scalar", 3), Pair("aten::abs", 1)));
  EXPECT_THAT(heard.messages, ::testing::ElementsAre(HasSubstr("aten::pow.Tensor_Scalar"), HasSubstr("aten::abs")));
}

TEST(Fallback, RefusesEveryWrite) {
  const AdaptedLinear adapted;
  const auto W = adapted.weight();
  const auto base = harness::bytes_of(adapted.linear->named_parameters()["weight"]);
  const auto value = at::zeros({21, 12}, at::kDouble);
  const auto wide = harness::normal({21, 21}, 4);
  auto target = adapted.weight();
  const std::map<std::string, std::function<void()>> writes{
      {"copy_", [&] { target.copy_(value); }},
      {"mul_", [&] { target.mul_(2); }},
      {"zero_", [&] { target.zero_(); }},
      {"fill of a slice", [&] { W.narrow(0, 0, 3).fill_(1); }},
      {"fill of the transpose", [&] { W.t().fill_(1); }},
      {"index_put_", [&] { target.index_put_({at::tensor({1})}, at::ones({12}, at::kDouble)); }},
      {"set_", [&] { target.set_(value); }},
      {"resize_",
       [&] {
         target.resize_({4, 4});
       }},
      {"out=", [&] { at::mm_out(target, wide, value); }},
      {"foreach list", [&] { at::_foreach_mul_(std::vector<at::Tensor>{target}, 2); }},
      {"init", [&] { torch::nn::init::xavier_uniform_(target); }},
      {"reset_parameters", [&] { adapted.linear.ptr()->reset_parameters(); }},
  };
  for (const auto& [name, write] : writes) {
    EXPECT_THAT(write, ThrowsMessage<lora::StateError>(HasSubstr("writing to an adapted weight"))) << name;
  }
  EXPECT_EQ(harness::bytes_of(adapted.linear->named_parameters()["weight"]), base);
  EXPECT_THAT(adapted.adapters.fallbacks(), IsEmpty());
}

TEST(Fallback, SeesWhatIsActiveAndDisabled) {
  AdaptedLinear adapted;
  const auto base = adapted.linear->named_parameters()["weight"].detach();
  {
    const lora::DisableAdapters guard(adapted.adapters);
    EXPECT_TRUE(at::equal(adapted.weight().abs(), base.abs()));
  }
  EXPECT_FALSE(at::equal(adapted.weight().abs(), base.abs()));
  adapted.adapters.set_active({});
  EXPECT_TRUE(at::equal(adapted.weight().abs(), base.abs()));
}

TEST(Dropout, IsActiveInTrainingOnly) {
  AdaptedLinear adapted(lora::LoraConfig().r(2).lora_alpha(3).lora_dropout(0.5));
  const auto x = harness::normal({64, 12}, 3);
  const auto run = [&] { return adapted.model->forward(x); };
  adapted.model->eval();
  const auto expected = run();
  EXPECT_TRUE(at::equal(run(), expected));
  adapted.model->train();
  torch::manual_seed(1);
  const auto first = run();
  EXPECT_FALSE(at::equal(first, expected));
  EXPECT_FALSE(at::equal(run(), first));
  torch::manual_seed(1);
  EXPECT_TRUE(at::equal(run(), first)) << "the same seed";
}

TEST(Dropout, DropsInputsOfTheUpdateAndKeepsItsMean) {
  AdaptedLinear adapted(lora::LoraConfig().r(2).lora_alpha(3).lora_dropout(0.25));
  adapted.adapters.set_active({"default"});
  adapted.model->eval();
  const auto x = at::ones({1, 12}, at::kDouble);
  const auto expected = adapted.model->forward(x);
  adapted.model->train();
  torch::manual_seed(3);
  auto sum = at::zeros_like(expected);
  constexpr int kDraws = 4000;
  for (int i = 0; i < kDraws; ++i) sum += adapted.model->forward(x);
  const auto dW = [&] {
    const auto tensors = adapted.adapters.named_tensors("default");
    return 1.5 * at::mm(tensors[1].second, tensors[0].second);
  }();
  // Var of Σ dW·x·mask/(1−p) is p/(1−p)·Σ dW²; five standard deviations of the mean.
  const auto limit = 5 * (dW.pow(2).sum(1) * (0.25 / 0.75) / kDraws).sqrt();
  EXPECT_TRUE(((sum / kDraws - expected).abs().squeeze(0) < limit).all().item<bool>());
}

TEST(Scaling, LeavesTheBaseOutputAndBiasAlone) {
  AdaptedLinear adapted(lora::LoraConfig().r(4).lora_alpha(40));
  adapted.adapters.set_active({"default"});
  const auto x = harness::normal({5, 12}, 3);
  const auto tensors = adapted.adapters.named_tensors("default");
  const auto base = adapted.linear->named_parameters();
  const auto expected =
      F::linear(x, base["weight"], base["bias"]) + 10 * x.mm(tensors[0].second.t()).mm(tensors[1].second.t());
  EXPECT_LT(harness::relative_error(adapted.model->forward(x), expected), 1e-13);
}

}  // namespace
}  // namespace kernels_test
