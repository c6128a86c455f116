// lora::clone: what Module::clone cannot copy.
#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/lora.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/modules/linear.h>

#include <memory>
#include <string>

#include "harness/values.h"

namespace clone_test {
namespace {

using ::testing::ElementsAre;

struct NetImpl : torch::nn::Cloneable<NetImpl> {
  NetImpl() { reset(); }
  void reset() override {
    up = register_module("up", torch::nn::Linear(6, 9));
    down = register_module("down", torch::nn::Linear(9, 4));
  }
  at::Tensor forward(const at::Tensor& x) { return down(at::tanh(up(x))); }
  torch::nn::Linear up{nullptr}, down{nullptr};
};

struct Cloned {
  Cloned() {
    net->down->bias.set_requires_grad(false);
    adapters =
        std::make_shared<lora::Adapters>(lora::inject(*net, lora::LoraConfig().r(2).target_modules({"up[q,v]"})));
    adapters->add(lora::LoraConfig().r(3).target_modules({"down"}), "other");
    adapters->set_active({"default", "other"});
    adapters->set_trainable({"other"});
    harness::fill(*adapters);
    harness::fill(*adapters, "other", 50);
    copy = lora::clone(*net);
  }
  std::shared_ptr<NetImpl> net = std::make_shared<NetImpl>();
  std::shared_ptr<lora::Adapters> adapters;
  std::shared_ptr<NetImpl> copy;
  at::Tensor x = harness::normal({5, 6}, 1, at::kFloat);
};

TEST(Clone, ComputesTheSameFromTensorsOfItsOwn) {
  Cloned cloned;
  const auto before = cloned.net->forward(cloned.x);
  EXPECT_TRUE(at::equal(cloned.copy->forward(cloned.x), before));
  harness::fill(lora::adapters_of(*cloned.copy), "default", 900);
  EXPECT_FALSE(at::equal(cloned.copy->forward(cloned.x), before));
  EXPECT_TRUE(at::equal(cloned.net->forward(cloned.x), before));
}

TEST(Clone, KeepsTheChoicesAndFlags) {
  Cloned cloned;
  auto copied = lora::adapters_of(*cloned.copy);
  EXPECT_THAT(copied.names(), ElementsAre("default", "other"));
  EXPECT_THAT(copied.active(), ElementsAre("default", "other"));
  EXPECT_THAT(copied.trainable(), ElementsAre("other"));
  copied.unload();
  EXPECT_TRUE(cloned.copy->up->weight.requires_grad());
  EXPECT_FALSE(cloned.copy->down->bias.requires_grad());
}

TEST(Clone, LeavesTheOriginalAsItWas) {
  Cloned cloned;
  EXPECT_TRUE(lora::adapters_of(*cloned.net) == *cloned.adapters);
  const auto y = cloned.net->forward(cloned.x);
  y.sum().backward();
  for (const auto& [name, tensor] : cloned.adapters->named_parameters()) EXPECT_TRUE(tensor.grad().defined()) << name;
  EXPECT_TRUE(cloned.adapters->fallbacks().empty());
  cloned.adapters->unload();
  EXPECT_EQ(cloned.net->named_modules().size(), 3U);
}

TEST(Clone, RefusesMergedAdapters) {
  Cloned cloned;
  cloned.adapters->merge();
  EXPECT_THROW(lora::clone(*cloned.net), lora::StateError);
}

TEST(Clone, OfAPartOfAnAdaptedModelIsRefused) {
  struct AroundImpl : torch::nn::Module {
    std::shared_ptr<NetImpl> inner = register_module("inner", std::make_shared<NetImpl>());
    torch::nn::Linear outer = register_module("outer", torch::nn::Linear(4, 4));
  } around;
  const auto adapters = lora::inject(around, lora::LoraConfig().target_modules("all-linear"));
  EXPECT_THAT([&] { lora::clone(*around.inner); },
              ::testing::ThrowsMessage<lora::StateError>(::testing::HasSubstr("outside of the given model")));
}

TEST(Clone, RefusesInferenceMode) {
  Cloned cloned;
  const c10::InferenceMode inference;
  EXPECT_THAT([&] { lora::clone(*cloned.net); },
              ::testing::ThrowsMessage<lora::StateError>(::testing::HasSubstr("[lora::clone] found InferenceMode")));
}

TEST(Clone, OfLibTorchStillThrowsOnAHost) {
  // The reason for lora::clone: should LibTorch learn it, ours can go.
  Cloned cloned;
  EXPECT_THROW(cloned.net->up->clone(), c10::Error);
}

}  // namespace
}  // namespace clone_test
