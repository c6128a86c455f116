// The head-and-loss function on adapted heads, against the dense formula and LibTorch's operators on the carrier.
#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <ATen/record_function.h>
#include <c10/core/InferenceMode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/lora.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/nn/modules/linear.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "functional/dense_loss.h"
#include "harness/models.h"
#include "harness/operators.h"
#include "harness/values.h"

namespace adapted_head_test {
namespace {

using dense_loss::Answer;
using dense_loss::kIgnored;
using dense_loss::Problem;
using harness::epsilon;
using lora::linear_cross_entropy;
using lora::LinearCrossEntropyOptions;
using ::testing::IsEmpty;

/// Hidden states of a small model with a head, in float64.
struct HeadImpl : torch::nn::Module {
  HeadImpl() : lm_head(register_module("lm_head", torch::nn::Linear(kWidth, kClasses))) { to(at::kDouble); }
  static constexpr int64_t kWidth = 8, kClasses = 50;
  torch::nn::Linear lm_head;
};

lora::LoraConfig head_config() { return lora::LoraConfig().r(3).lora_alpha(2).target_modules({"lm_head"}); }

class AdaptedHead : public ::testing::Test {
 protected:
  explicit AdaptedHead(const lora::LoraConfig& config = head_config())
      : base_((torch::manual_seed(5), std::make_shared<HeadImpl>())), adapters_(lora::inject(*base_, config)) {
    harness::fill(adapters_);
  }

  at::Tensor loss(int64_t chunk_rows = 5, at::ScalarType dtype = at::kDouble) const {
    return linear_cross_entropy(hidden_.to(dtype), head()->weight, labels_,
                                LinearCrossEntropyOptions()
                                    .bias(head()->bias)
                                    .chunk_rows(chunk_rows)
                                    .label_smoothing(0.1)
                                    .reduction(torch::kSum));
  }

  /// The same by LibTorch's operators on the carrier.
  at::Tensor expected_loss() const {
    const auto rows = (labels_ != kIgnored).nonzero().flatten();
    const auto logits = at::linear(hidden_.index_select(0, rows), head()->weight, head()->bias);
    return at::cross_entropy_loss(logits, labels_.index_select(0, rows), {}, at::Reduction::Sum, kIgnored, 0.1);
  }

  std::map<std::string, at::Tensor> inputs() const {
    std::map<std::string, at::Tensor> result;
    if (hidden_.requires_grad()) result["hidden"] = hidden_;
    for (const auto& [name, tensor] : adapters_.named_parameters()) result[name] = tensor;
    return result;
  }

  std::map<std::string, at::Tensor> gradients(const at::Tensor& loss) const {
    std::vector<at::Tensor> tensors;
    for (const auto& [name, tensor] : inputs()) tensors.push_back(tensor);
    const auto found = torch::autograd::grad({loss}, tensors, {}, /*retain_graph=*/true, false, /*allow_unused=*/true);
    std::map<std::string, at::Tensor> result;
    size_t i = 0;
    for (const auto& [name, tensor] : inputs()) result[name] = found[i++];
    return result;
  }

  void expect_equal() const {
    const auto found = loss(), expected = expected_loss();
    EXPECT_NEAR(found.item<double>(), expected.item<double>(), 1e-11);
    const auto wanted = gradients(expected);
    for (const auto& [name, gradient] : gradients(found)) {
      ASSERT_EQ(gradient.defined(), wanted.at(name).defined()) << name;
      if (!gradient.defined()) continue;
      EXPECT_LT(harness::relative_error(gradient, wanted.at(name)), 1e-12) << name;
    }
    EXPECT_THAT(adapters_.fallbacks(), IsEmpty());
  }

  torch::nn::Linear& head() const { return base_->lm_head; }

  std::shared_ptr<HeadImpl> base_;
  lora::Adapters adapters_;
  at::Tensor hidden_ = harness::normal({21, HeadImpl::kWidth}, 3).requires_grad_();
  at::Tensor labels_ = at::arange(21, at::kLong)
                           .mul(7)
                           .remainder(HeadImpl::kClasses)
                           .masked_fill(at::arange(21).remainder(4) == 2, kIgnored);
};

TEST_F(AdaptedHead, EqualsTheDenseFormula) {
  std::map<std::string, at::Tensor> tensors;
  for (const auto& [name, tensor] : adapters_.named_tensors("default")) tensors[name] = tensor.detach();
  harness::Factors factors{"lm_head.lora_default", tensors.at("lm_head.lora_default.lora_A"),
                           tensors.at("lm_head.lora_default.lora_B"), 2.0 / 3.0};
  Problem dense({"", {21}, HeadImpl::kWidth, HeadImpl::kClasses, "all", 5, 0.1, true}, at::kDouble);
  dense.hidden = hidden_;
  dense.labels = labels_;
  dense.weight = head()->named_parameters()["weight"].detach() + factors.scaling * at::mm(factors.B, factors.A);
  dense.options.bias(head()->bias.detach());
  const Answer answer(dense);
  const auto found = loss();
  EXPECT_LT(harness::relative_error(found, answer.loss.value), 1e-13);
  auto gradients = this->gradients(found);
  std::map<std::string, at::Tensor> expected{{"hidden", answer.hidden.value}};
  factors.add_gradients(answer.weight.value, expected);
  ASSERT_EQ(gradients.size(), expected.size());
  for (const auto& [name, gradient] : expected) {
    EXPECT_LT(harness::relative_error(gradients.at(name), gradient), 1e-12) << name;
  }
}

TEST_F(AdaptedHead, EqualsLibTorchsOperatorsOnTheCarrier) {
  expect_equal();
  hidden_.requires_grad_(false);
  expect_equal();
}

TEST_F(AdaptedHead, SumsTwoAdaptersAndParts) {
  adapters_.add(head_config().r(2).lora_alpha(-3), "other");
  harness::fill(adapters_, "other", 40);
  adapters_.set_active({"default", "other"});
  adapters_.set_trainable({"default", "other"});
  EXPECT_EQ(inputs().size(), 5U);
  expect_equal();
  adapters_.set_trainable({"other"});
  EXPECT_EQ(inputs().size(), 3U);
  expect_equal();
}

TEST_F(AdaptedHead, IsPlainWhereTheAdaptersAreOffMergedOrUnloaded) {
  {
    const lora::DisableAdapters guard(adapters_);
    expect_equal();
    EXPECT_FALSE(linear_cross_entropy(hidden_.detach(), head()->weight, labels_).requires_grad());
  }
  const auto adapted = loss().item<double>();
  adapters_.merge();
  EXPECT_NEAR(loss().item<double>(), adapted, 1e-11);
  expect_equal();
  adapters_.unload();
  EXPECT_LT(harness::relative_error(loss(), expected_loss()), 1e-13);
}

TEST_F(AdaptedHead, ShowsHooksOneGradientAndOptimizersTheirs) {
  const auto tensors = inputs();
  std::map<std::string, int> calls;
  for (const auto& entry : tensors) {
    const auto name = entry.first;
    entry.second.register_hook([&calls, name](const at::Tensor& gradient) { return ++calls[name], gradient * 2; });
  }
  const auto once = loss();
  EXPECT_THAT(calls, IsEmpty()) << "hooks run in backward";
  for (const auto& [name, tensor] : tensors) EXPECT_FALSE(tensor.grad().defined()) << name;
  once.backward();
  const auto expected = gradients(expected_loss());
  for (const auto& [name, tensor] : tensors) {
    EXPECT_EQ(calls[name], 2) << "one each for backward and grad: " << name;
    EXPECT_LT(harness::relative_error(tensor.grad(), expected.at(name)), 1e-12) << name;
  }
}

TEST_F(AdaptedHead, SumsGradientsInFloat32OnAHalfPrecisionBase) {
  base_->to(at::kBFloat16);
  const auto whole = gradients(loss(100, at::kBFloat16)), parts = gradients(loss(1, at::kBFloat16));
  for (const auto& [name, tensor] : adapters_.named_parameters()) {
    EXPECT_EQ(parts.at(name).scalar_type(), at::kFloat);
    // Of rows of one, A's and B's products have no sum to round but the library's own; what is left is the rounding of
    // the products' operands to bfloat16.
    EXPECT_LT(harness::relative_error(parts.at(name), whole.at(name)), 4 * epsilon(at::kBFloat16)) << name;
  }
}

TEST_F(AdaptedHead, DrawsDropoutForEachChunkAndDifferentiatesTheSame) {
  auto config = head_config().lora_dropout(0.5);
  adapters_.unload();
  adapters_ = lora::inject(*base_, config);
  harness::fill(adapters_);
  base_->train();
  torch::manual_seed(9);
  const auto found = loss(100);
  torch::manual_seed(9);
  const auto expected = expected_loss();
  EXPECT_NEAR(found.item<double>(), expected.item<double>(), 1e-11);
  const auto wanted = gradients(expected);
  for (const auto& [name, gradient] : gradients(found)) {
    EXPECT_LT(harness::relative_error(gradient, wanted.at(name)), 1e-12) << name;
  }
}

TEST_F(AdaptedHead, MakesNeitherAllLogitsNorADenseWeight) {
  const std::set<const void*> base{head()->named_parameters()["weight"].storage().data()};
  const harness::OperatorRecorder recorder;
  loss().backward();
  EXPECT_THAT(recorder.makers_of({16, HeadImpl::kClasses}, {}), IsEmpty());
  EXPECT_THAT(recorder.makers_of({HeadImpl::kClasses, HeadImpl::kWidth}, base), IsEmpty());
  EXPECT_FALSE(recorder.makers_of({5, HeadImpl::kClasses}, {}).empty()) << "the recorder sees a chunk";
}

TEST_F(AdaptedHead, RunsWithoutGradModeAndInInferenceMode) {
  const auto expected = loss().item<double>();
  const at::NoGradGuard no_grad;
  EXPECT_FALSE(loss().requires_grad());
  EXPECT_EQ(loss().item<double>(), expected);
  const c10::InferenceMode inference;
  EXPECT_EQ(loss().item<double>(), expected);
}

/// Calls a function before every aten::index_select of this thread: the rows of a chunk are gathered by it, outside of
/// the carrier's kernels.
class BeforeIndexSelect {
 public:
  explicit BeforeIndexSelect(std::function<void()> call) {
    current() = std::move(call);
    handle_ = at::addThreadLocalCallback(at::RecordFunctionCallback([](const at::RecordFunction& function) {
      if (std::string(function.name()) == "aten::index_select") current()();
      return std::unique_ptr<at::ObserverContext>();
    }));
  }
  BeforeIndexSelect(const BeforeIndexSelect&) = delete;
  BeforeIndexSelect& operator=(const BeforeIndexSelect&) = delete;
  ~BeforeIndexSelect() { at::removeCallback(handle_); }

 private:
  static std::function<void()>& current() {
    static std::function<void()> call;
    return call;
  }
  at::CallbackHandle handle_;
};

TEST_F(AdaptedHead, RefusesAChangeOfTheAdaptersBetweenChunks) {
  int refused = 0;
  {
    const BeforeIndexSelect change([&] {
      try {
        adapters_.set_active(std::vector<std::string>());
      } catch (const lora::StateError&) {
        ++refused;
      }
    });
    loss();
  }
  EXPECT_EQ(refused, 2 * 4) << "labels and rows of each chunk";
  expect_equal();
}

/// A head that is trained as a whole beside an adapted layer.
struct CopiedHead : torch::nn::Module {
  CopiedHead()
      : mix(register_module("mix", torch::nn::Linear(8, 8))),
        lm_head(register_module("lm_head", torch::nn::Linear(8, 50))) {}
  static lora::LoraConfig config() {
    return lora::LoraConfig().r(2).target_modules({"mix"}).modules_to_save({"lm_head"});
  }
  torch::nn::Linear mix, lm_head;
};

TEST(AdaptedHeadOfCopies, TrainsACopyOfTheHeadAndItsBias) {
  CopiedHead model;
  model.to(at::kDouble);
  const auto adapters = lora::inject(model, CopiedHead::config());
  harness::fill(adapters);
  const auto hidden = harness::normal({9, 8}, 3);
  const auto labels = at::arange(9, at::kLong);
  const auto found = linear_cross_entropy(hidden, model.lm_head->weight, labels,
                                          LinearCrossEntropyOptions().bias(model.lm_head->bias).chunk_rows(4));
  const auto expected = at::cross_entropy_loss(at::linear(hidden, model.lm_head->weight, model.lm_head->bias), labels);
  EXPECT_NEAR(found.item<double>(), expected.item<double>(), 1e-13);
  for (const auto& [name, tensor] : adapters.named_parameters()) {
    if (name.find("lm_head") == std::string::npos) continue;
    const auto wanted = torch::autograd::grad({expected}, {tensor}, {}, true)[0];
    EXPECT_LT(harness::relative_error(torch::autograd::grad({found}, {tensor}, {}, true)[0], wanted), 1e-12) << name;
  }
}

TEST(AdaptedHeadOfAnEmbedding, ReadsTheEmbeddingsBase) {
  torch::manual_seed(7);
  harness::Tied model;
  model->to(at::kDouble);
  auto adapters = lora::inject(*model, lora::LoraConfig().r(2).target_modules({"wte"}));
  harness::fill(adapters);
  const auto hidden = harness::normal({9, 6}, 3).requires_grad_();
  const auto labels = at::arange(9, at::kLong);
  const auto found = linear_cross_entropy(hidden, model->wte->weight, labels);
  const auto expected = at::cross_entropy_loss(at::linear(hidden, model->wte->weight), labels);
  EXPECT_NEAR(found.item<double>(), expected.item<double>(), 1e-13);
  EXPECT_LT(harness::relative_error(torch::autograd::grad({found}, {hidden})[0],
                                    torch::autograd::grad({expected}, {hidden})[0]),
            1e-12);
  EXPECT_FALSE(linear_cross_entropy(hidden.detach(), model->wte->weight, labels).requires_grad());
}

// Autocast.

class Autocast {
 public:
  Autocast() {
    at::autocast::set_autocast_enabled(at::kCPU, true);
    at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
  }
  Autocast(const Autocast&) = delete;
  Autocast& operator=(const Autocast&) = delete;
  ~Autocast() {
    at::autocast::set_autocast_enabled(at::kCPU, false);
    at::autocast::clear_cache();
  }
};

TEST_F(AdaptedHead, ComputesUnderAutocastAsLinearAndCrossEntropyDo) {
  base_->to(at::kFloat);
  hidden_ = hidden_.detach().to(at::kFloat).requires_grad_();
  const Autocast autocast;
  const auto A = adapters_.named_parameters()[0].second;
  for (const bool plain : {false, true}) {
    if (plain) {
      adapters_.unload();
      head()->weight.requires_grad_();
    }
    const auto found = loss(100, at::kFloat), expected = expected_loss();
    EXPECT_EQ(found.scalar_type(), at::kFloat);
    EXPECT_LT(harness::relative_error(found, expected), 1e-5);
    std::vector<at::Tensor> tensors{hidden_};
    if (plain) {
      tensors.push_back(head()->weight);
    } else {
      for (const auto& [name, tensor] : adapters_.named_parameters()) tensors.push_back(tensor);
    }
    const auto gradients = torch::autograd::grad({found}, tensors), wanted = torch::autograd::grad({expected}, tensors);
    for (size_t i = 0; i < tensors.size(); ++i) {
      EXPECT_EQ(gradients[i].scalar_type(), at::kFloat);
      EXPECT_LT(harness::relative_error(gradients[i], wanted[i]), 2 * epsilon(at::kBFloat16)) << i;
    }
  }
}

TEST(AdaptedHeadOfCopies, LeavesNothingInAutocastsCache) {
  CopiedHead model;
  const auto adapters = lora::inject(model, CopiedHead::config());
  const Autocast autocast;
  const auto hidden = at::ones({6, 8});
  linear_cross_entropy(hidden, model.lm_head->weight, at::arange(6, at::kLong),
                       LinearCrossEntropyOptions().chunk_rows(2));
  EXPECT_TRUE(at::autocast::is_autocast_cache_enabled());
  at::linear(hidden, model.lm_head->weight).sum().backward();
  for (const auto& [name, tensor] : adapters.named_parameters()) {
    if (name != "lm_head.lora_default.weight") continue;
    EXPECT_TRUE(at::equal(tensor.grad(), at::full_like(tensor, 6)));
  }
}

}  // namespace
}  // namespace adapted_head_test
