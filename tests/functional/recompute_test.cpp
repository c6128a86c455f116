// Activation recomputation: bit for bit what the function gives without it, with nothing of it in memory meanwhile.
#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <c10/util/intrusive_ptr.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/lora.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/nn/modules/dropout.h>
#include <torch/nn/modules/linear.h>

#include <cmath>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "harness/message_of.h"
#include "harness/values.h"

namespace recompute_test {
namespace {

using harness::message_of;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using Tensors = std::vector<at::Tensor>;

/// Two layers with dropout of the model and, once adapted, of LoRA.
struct Model : torch::nn::Module {
  Model()
      : up(register_module("up", torch::nn::Linear(6, 12))),
        drop(register_module("drop", torch::nn::Dropout(0.3))),
        down(register_module("down", torch::nn::Linear(12, 6))) {}
  at::Tensor forward(const at::Tensor& x) { return x + down(at::relu(drop(up(x)))); }
  torch::nn::Linear up;
  torch::nn::Dropout drop;
  torch::nn::Linear down;
};

class Recompute : public ::testing::Test {
 protected:
  Recompute()
      : model_((torch::manual_seed(3), std::make_shared<Model>())),
        adapters_(lora::inject(*model_, lora::LoraConfig().r(2).lora_dropout(0.4).target_modules("all-linear"))) {
    harness::fill(adapters_);
  }

  std::function<at::Tensor(const at::Tensor&)> layer() const {
    return [this](const at::Tensor& x) { return ++runs_, model_->forward(x); };
  }

  Tensors parameters() const {
    Tensors result;
    for (const auto& [name, tensor] : adapters_.named_parameters()) result.push_back(tensor);
    return result;
  }

  /// The output, the gradients of x and of the adapters, and a number drawn after the backward.
  Tensors results(const std::function<at::Tensor(const at::Tensor&)>& forward) const {
    torch::manual_seed(7);
    auto inputs = parameters();
    inputs.push_back(x_);
    const auto y = forward(x_);
    auto result = torch::autograd::grad({y.square().sum()}, inputs);
    result.push_back(y.detach());
    result.push_back(at::rand({1}));
    return result;
  }

  static void expect_equal(const Tensors& found, const Tensors& expected) {
    ASSERT_EQ(found.size(), expected.size());
    for (size_t i = 0; i < found.size(); ++i) EXPECT_TRUE(at::equal(found[i], expected[i])) << i;
  }

  std::shared_ptr<Model> model_;
  lora::Adapters adapters_;
  at::Tensor x_ = harness::normal({5, 6}, 1, at::kFloat).requires_grad_();
  mutable int runs_ = 0;
};

TEST_F(Recompute, GivesTheSameBitsWithDropoutAndLeavesTheGeneratorsAlike) {
  const auto expected = results(layer());
  runs_ = 0;
  expect_equal(results([&](const at::Tensor& x) { return lora::recompute(layer(), x); }), expected);
  EXPECT_EQ(runs_, 2);
}

TEST_F(Recompute, Nests) {
  const auto twice = [&](const at::Tensor& x) { return layer()(layer()(x)); };
  const auto expected = results(twice);
  runs_ = 0;
  expect_equal(results([&](const at::Tensor& x) {
                 return lora::recompute(
                     [&](const at::Tensor& outer) { return lora::recompute(layer(), lora::recompute(layer(), outer)); },
                     x);
               }),
               expected);
  EXPECT_EQ(runs_, 6) << "forward, again for the outer one, again for each inner one";
}

TEST_F(Recompute, GivesParametersTheirGradientsWhereNoInputNeedsOne) {
  torch::manual_seed(7);
  const auto expected = torch::autograd::grad({layer()(x_.detach()).sum()}, parameters());
  torch::manual_seed(7);
  const auto y = lora::recompute(layer(), x_.detach());
  ASSERT_TRUE(y.requires_grad());
  expect_equal(torch::autograd::grad({y.sum()}, parameters()), expected);
}

TEST_F(Recompute, ShowsHooksOneGradientAndOptimizersTheirs) {
  std::map<size_t, int> calls;
  const auto tensors = parameters();
  for (size_t i = 0; i < tensors.size(); ++i) {
    tensors[i].register_hook([&calls, i](const at::Tensor& gradient) { return ++calls[i], gradient * 2; });
  }
  lora::recompute(layer(), x_).sum().backward();
  for (size_t i = 0; i < tensors.size(); ++i) {
    EXPECT_EQ(calls[i], 1);
    EXPECT_TRUE(tensors[i].grad().defined());
  }
}

TEST_F(Recompute, KeepsNoIntermediateResultBetweenForwardAndBackward) {
  c10::weak_intrusive_ptr<c10::StorageImpl> kept(x_.storage().getWeakStorageImpl());
  const auto watched = [&](const at::Tensor& x) {
    const auto hidden = at::relu(model_->up(x));
    kept = hidden.storage().getWeakStorageImpl();
    return model_->down(hidden);
  };
  const auto plain = watched(x_);
  EXPECT_FALSE(kept.expired()) << "the test sees what the graph keeps";
  const auto y = lora::recompute(watched, x_);
  EXPECT_TRUE(kept.expired());
  y.sum().backward();
  EXPECT_TRUE(kept.expired());
}

TEST_F(Recompute, RunsTheFunctionAloneWithoutGradMode) {
  const at::NoGradGuard no_grad;
  EXPECT_FALSE(lora::recompute(layer(), x_).requires_grad());
  EXPECT_EQ(runs_, 1);
}

TEST_F(Recompute, RestoresAutocast) {
  model_->eval();
  const auto run = [&](const std::function<at::Tensor(const at::Tensor&)>& forward) {
    at::autocast::set_autocast_enabled(at::kCPU, true);
    const auto before = at::autocast::get_autocast_dtype(at::kCPU);
    at::autocast::set_autocast_dtype(at::kCPU, at::kHalf);
    const auto y = forward(x_);
    at::autocast::set_autocast_enabled(at::kCPU, false);
    at::autocast::clear_cache();
    at::autocast::set_autocast_dtype(at::kCPU, before);
    auto result = torch::autograd::grad({y.sum()}, parameters());
    result.push_back(y.detach());
    return result;
  };
  const auto inner = [&](const at::Tensor& x) { return model_->down(model_->up(x)); };
  const auto expected = run(inner);
  EXPECT_EQ(expected.back().scalar_type(), at::kHalf);
  expect_equal(run([&](const at::Tensor& x) { return lora::recompute(inner, x); }), expected);
  EXPECT_FALSE(at::autocast::is_autocast_enabled(at::kCPU));
}

TEST(RecomputeTensors, TakesSeveralInputsAndOutputsOfAnyKind) {
  const auto a = harness::normal({3, 2}, 1).requires_grad_(), b = harness::normal({3, 2}, 2).requires_grad_(),
             constant = harness::normal({3, 2}, 3), outer = harness::normal({2}, 4).requires_grad_();
  const auto captured = outer * 2;
  const auto fn = [captured](const Tensors& inputs) -> Tensors {
    return {inputs[0] * inputs[2] + captured,
            inputs[3].defined() ? inputs[3] : at::Tensor(),
            inputs[0],
            inputs[2] + 1,
            captured,
            inputs[0].sum()};
  };
  const Tensors given{a, b, constant, at::Tensor()};
  const auto loss = [](const Tensors& outputs) {
    EXPECT_FALSE(outputs[1].defined());
    EXPECT_FALSE(outputs[3].requires_grad());
    return (outputs[0] * outputs[3]).sum() + outputs[2].square().sum() + outputs[4].pow(3).sum();  // not outputs[5]
  };
  const auto gradients = [&](const Tensors& outputs) {
    return torch::autograd::grad({loss(outputs)}, {a, b, outer}, {}, {}, false, /*allow_unused=*/true);
  };
  const auto expected = gradients(fn(given)), found = gradients(lora::recompute(fn, given));
  EXPECT_TRUE(at::equal(found[0], expected[0]));
  EXPECT_FALSE(found[1].defined()) << "nothing comes from it";
  EXPECT_TRUE(at::equal(found[2], expected[2]));
}

TEST(RecomputeTensors, IsAConstantWhereNothingNeedsAGradient) {
  const auto y = lora::recompute([](const at::Tensor& x) { return x * 2; }, at::ones({2}));
  EXPECT_FALSE(y.requires_grad());
}

TEST(RecomputeTensors, CanRunBackwardTwiceIfRetained) {
  const auto x = at::ones({2}, at::kDouble).requires_grad_();
  const auto y = lora::recompute([](const at::Tensor& t) { return t.exp(); }, x).sum();
  const auto first = torch::autograd::grad({y}, {x}, {}, /*retain_graph=*/true)[0];
  EXPECT_TRUE(at::equal(torch::autograd::grad({y}, {x})[0], first));
  EXPECT_THAT(message_of([&] { torch::autograd::grad({y}, {x}); }),
              HasSubstr("[lora::recompute] found a second backward"));
}

TEST(RecomputeTensors, IsDifferentiableOnce) {
  const auto x = at::ones({2}, at::kDouble).requires_grad_();
  const auto y = lora::recompute([](const at::Tensor& t) { return t.exp(); }, x).sum();
  const auto first = torch::autograd::grad({y}, {x}, {}, {}, /*create_graph=*/true)[0];
  EXPECT_THAT(message_of([&] { first.sum().backward(); }), HasSubstr("[lora::recompute] found a second derivative"));
}

TEST_F(Recompute, RefusesAnotherSecondRun) {
  model_->eval();
  const auto y = lora::recompute(layer(), x_);
  adapters_.set_active(std::vector<std::string>());
  EXPECT_THAT(message_of<lora::StateError>([&] { y.sum().backward(); }),
              HasSubstr("[lora::recompute] found a computation that starts from other tensors"));
  adapters_.set_active({"default"});
  int run = 0;
  const auto z = lora::recompute([&](const at::Tensor& x) { return ++run > 1 ? x.detach() : x * 2; }, x_);
  EXPECT_THAT(message_of<lora::StateError>([&] { z.sum().backward(); }), HasSubstr("found other outputs"));
}

TEST_F(Recompute, RefusesAnInputThatHasBeenWrittenTo) {
  const auto hidden = x_ * 2;
  const auto y = lora::recompute(layer(), hidden);
  hidden.add_(1);
  EXPECT_THAT(message_of([&] { y.sum().backward(); }), HasSubstr("modified by an inplace operation"));
}

TEST(RecomputeTensors, RefusesAFunctionThatWritesToItsInput) {
  const auto weight = at::ones({2}).requires_grad_(), x = at::ones({2});
  const auto y = lora::recompute([weight](const at::Tensor& t) { return t.add_(1) * weight; }, x);
  EXPECT_THAT(message_of([&] { y.sum().backward(); }), HasSubstr("modified by an inplace operation"));
}

TEST(RecomputeTensors, HasGradientsOfScalars) {
  const auto x = at::ones({2}, at::kDouble).requires_grad_(), gate = at::full({}, 3.0, at::kDouble).requires_grad_();
  const auto y = lora::recompute([gate](const at::Tensor& t) { return t * gate; }, x);
  const auto z = lora::recompute([](const at::Tensor& t) { return t.exp(); }, gate);
  const auto gradients = torch::autograd::grad({y.sum() + z}, {x, gate});
  EXPECT_TRUE(at::equal(gradients[0], at::full_like(x, 3)));
  EXPECT_NEAR(gradients[1].item<double>(), 2 + std::exp(3.0), 1e-12);
}

TEST(RecomputeTensors, LeavesTheCallersGradientAlone) {
  const auto x = at::ones({2}).requires_grad_();
  const auto dy = at::ones({2}).requires_grad_();
  const auto y = lora::recompute([](const at::Tensor& t) { return t + 1; }, x);
  const auto dx = torch::autograd::grad({y}, {x}, {dy}, true, /*create_graph=*/true)[0];
  EXPECT_TRUE(dy.is_leaf());
  EXPECT_FALSE(dx.is_same(dy));
}

TEST(RecomputeTensors, LeavesGeneratorsAloneThatItDidNotUse) {
  const auto x = at::ones({2}).requires_grad_();
  const auto y = lora::recompute([](const at::Tensor& t) { return t * 2; }, x);
  torch::manual_seed(1);
  const auto expected = at::rand({2});
  torch::manual_seed(1);
  at::Tensor drawn;
  x.register_hook([&](const at::Tensor& dx) { drawn = at::rand({1}), static_cast<void>(dx); });
  y.sum().backward();
  EXPECT_EQ(drawn.item<float>(), expected[0].item<float>());
  EXPECT_EQ(at::rand({1}).item<float>(), expected[1].item<float>());
}

TEST_F(Recompute, RefusesAnEmptyFunction) {
  EXPECT_THAT(message_of<c10::ValueError>([&] { lora::recompute(std::function<at::Tensor(const at::Tensor&)>(), x_); }),
              HasSubstr("[lora::recompute] found an empty function"));
}

}  // namespace
}  // namespace recompute_test
