// lora::FastOperators: which operators run by our kernels in a model that knows nothing of them, where and how long.
#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>
#include <lora/lora.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/jit/api/compilation_unit.h>
#include <torch/jit.h>

#include <algorithm>
#include <string>
#include <thread>
#include <vector>

#include "examples/models/gpt2.h"
#include "harness/dense_oracle.h"
#include "harness/operators.h"
#include "harness/values.h"

namespace fast_operators_test {
namespace {

constexpr const char* kFlash = "aten::_scaled_dot_product_flash_attention_for_cpu";

at::Tensor leaf(at::IntArrayRef sizes, uint64_t seed, at::ScalarType dtype = at::kFloat) {
  return harness::normal(sizes, seed, dtype).requires_grad_(true);
}

/// Whether GELU on this thread now has the gradient of ours.
bool is_on() { return at::gelu(leaf({3}, 1), "tanh").grad_fn()->name().find("GeluTanhFunction") != std::string::npos; }

bool ran(const harness::OperatorRecorder& recorder, const std::string& name) {
  return std::count(recorder.names().begin(), recorder.names().end(), name) > 0;
}

GPT2LMHeadModel make_gpt2() {
  GPT2Config config;
  config.vocab_size = 50;
  config.n_positions = 40;
  config.n_embd = 48;
  config.n_layer = 2;
  config.n_head = 3;
  GPT2LMHeadModel model(config);
  const at::NoGradGuard no_grad;
  uint64_t seed = 1;
  for (auto& parameter : model->parameters()) parameter.copy_(harness::normal(parameter.sizes(), seed++) * 0.1);
  return model;
}

at::Tensor token_ids() { return (harness::normal({2, 40}, 9) * 1e6).to(at::kLong).remainder(50); }

/// Logits and the gradients of all trainable parameters.
std::vector<at::Tensor> step(GPT2LMHeadModel& model) {
  std::vector<at::Tensor> parameters;
  for (const auto& parameter : model->parameters()) {
    if (parameter.requires_grad()) parameters.push_back(parameter);
  }
  const auto logits = model->forward(token_ids());
  auto results = torch::autograd::grad({at::log_softmax(logits, -1).select(-1, 3).sum()}, parameters);
  results.push_back(logits);
  return results;
}

TEST(FastOperators, RunOurKernels) {
  const auto x = leaf({2, 3, 20, 8}, 1);
  const auto gelu = lora::gelu(x, "tanh"), attended = lora::attention(x, x, x, true, 0.2);
  const lora::FastOperators fast;
  const auto found = at::gelu(x, "tanh");
  EXPECT_TRUE(at::equal(found, gelu));
  EXPECT_EQ(found.grad_fn()->name(), gelu.grad_fn()->name());
  const harness::OperatorRecorder recorder;
  const auto mixed = at::scaled_dot_product_attention(x, x, x, {}, 0, true, 0.2);
  EXPECT_TRUE(at::equal(mixed, attended));
  EXPECT_EQ(mixed.grad_fn()->name(), attended.grad_fn()->name());
  EXPECT_FALSE(ran(recorder, kFlash));
  const c10::InferenceMode inference;
  EXPECT_TRUE(at::equal(at::gelu(x, "tanh"), gelu));
}

TEST(FastOperators, LeaveTheRestToLibTorch) {
  const auto x = leaf({2, 3, 20, 8}, 1), few = leaf({2, 1, 20, 8}, 2), wide = leaf({2, 3, 20, 8}, 3, at::kDouble);
  const auto mask = at::ones({20, 20}, at::kBool).tril().triu(-5);
  const auto run = [&] {
    at::manual_seed(1);
    auto own = x.detach().clone();
    return std::vector<at::Tensor>{
        at::gelu(x),
        at::gelu(wide, "tanh"),
        at::gelu_(own, "tanh"),
        at::scaled_dot_product_attention(x, x, x, mask),
        at::scaled_dot_product_attention(x, x, x, {}, /*dropout_p=*/0.5),
        at::scaled_dot_product_attention(x, few, few, {}, 0, false, {}, /*enable_gqa=*/true),
        at::scaled_dot_product_attention(wide, wide, wide),
        at::softmax(x, -1) + 1,
    };
  };
  const auto expected = run();
  const lora::FastOperators fast;
  const auto found = run();
  for (size_t i = 0; i < found.size(); ++i) {
    EXPECT_TRUE(at::equal(found[i], expected[i])) << i;
    if (!expected[i].requires_grad()) continue;
    EXPECT_EQ(found[i].grad_fn()->name(), expected[i].grad_fn()->name());
  }
}

// By a mask, as LibTorch has no other way to say that keys of a past stand in front.
TEST(FastOperators, RunAttentionBehindAPast) {
  const auto q = leaf({2, 3, 20, 8}, 1), k = leaf({2, 3, 27, 8}, 2), v = leaf({2, 3, 27, 8}, 3);
  const auto mask = at::ones({20, 27}, at::kBool).tril(7), shorter = at::ones({20, 27}, at::kBool).tril(4);
  const auto all = at::ones({20, 27}, at::kBool), wide = at::ones({20, 40}, at::kBool).tril(7).narrow(1, 0, 27);
  const auto expected = lora::attention(q, k, v, /*is_causal=*/true, 0.2, /*past=*/7),
             near = lora::attention(q, k, v, /*is_causal=*/true, 0.2, /*past=*/4),
             whole = lora::attention(q, k, v, /*is_causal=*/false, 0.2);
  const lora::FastOperators fast;
  const harness::OperatorRecorder recorder;
  const auto run = [&](const at::Tensor& of) { return at::scaled_dot_product_attention(q, k, v, of, 0, false, 0.2); };
  for (const auto& form : {mask, wide, mask.unsqueeze(0), mask.expand({2, 1, 20, 27}), mask.expand({2, 3, 20, 27})}) {
    const auto found = run(form);
    EXPECT_TRUE(at::equal(found, expected));
    EXPECT_EQ(found.grad_fn()->name(), expected.grad_fn()->name());
  }
  EXPECT_TRUE(at::equal(run(shorter), near));
  EXPECT_TRUE(at::equal(run(all), whole));
  EXPECT_FALSE(ran(recorder, kFlash));
}

TEST(FastOperators, LeaveOtherMasksToLibTorch) {
  const auto q = leaf({2, 3, 20, 8}, 1), k = leaf({2, 3, 27, 8}, 2), v = leaf({2, 3, 27, 8}, 3);
  const auto mask = at::ones({20, 27}, at::kBool).tril(7);
  auto holed = mask.clone(), opened = mask.clone(), of_heads = mask.expand({2, 3, 20, 27}).clone();
  holed[19][13].fill_(false);
  opened[0][26].fill_(true);
  of_heads[1][2][5][0].fill_(false);
  const std::vector<at::Tensor> masks{holed,
                                      opened,
                                      of_heads,
                                      mask.clone().fill_(false).fill_diagonal_(true),
                                      at::zeros({20, 27}).masked_fill(mask.logical_not(), -1e4),
                                      mask.narrow(0, 19, 1),
                                      mask.narrow(0, 0, 1),
                                      mask.t().contiguous().t()};
  const auto run = [&](const at::Tensor& of) { return at::scaled_dot_product_attention(q, k, v, of); };
  for (size_t i = 0; i < masks.size(); ++i) {
    const auto expected = run(masks[i]);
    const lora::FastOperators fast;
    const auto found = run(masks[i]);
    EXPECT_TRUE(at::equal(found, expected)) << i;
    EXPECT_EQ(found.grad_fn()->name(), expected.grad_fn()->name()) << i;
  }
  // Combined by LibTorch up to 2.11, refused by 2.15.
  const auto both = [&]() -> std::string {
    try {
      return at::scaled_dot_product_attention(q, k, v, mask, 0, /*is_causal=*/true).grad_fn()->name();
    } catch (const c10::Error&) {
      return "refused";
    }
  };
  const auto expected = both();
  const lora::FastOperators fast;
  EXPECT_EQ(both(), expected);
}

/// Each is off from float64 by the same kind of roundings, of other sums: by at most three times as much.
void expect_agreement(GPT2LMHeadModel& model) {
  const auto plain = step(model);
  const auto found = [&] {
    const lora::FastOperators fast;
    const harness::OperatorRecorder recorder;
    auto results = step(model);
    EXPECT_FALSE(ran(recorder, kFlash));
    EXPECT_FALSE(ran(recorder, "aten::gelu_backward"));
    return results;
  }();
  model->to(at::kDouble);
  const auto expected = step(model);
  for (size_t i = 0; i < found.size(); ++i) {
    const auto bound = 3 * harness::relative_error(plain[i], expected[i]);
    EXPECT_LE(harness::relative_error(found[i], expected[i]), bound) << i;
  }
}

TEST(FastOperators, AgreeInAModelThatKnowsNothingOfThem) {
  auto model = make_gpt2();
  expect_agreement(model);
}

TEST(FastOperators, AgreeInAnAdaptedModel) {
  auto model = make_gpt2();
  auto adapters = lora::inject(*model, lora::LoraConfig().r(2).target_modules({"c_attn[q,v]", "c_proj"}));
  harness::fill(adapters);
  for (auto& [name, tensor] : adapters.named_tensors("default")) tensor.detach().mul_(0.3);
  expect_agreement(model);
}

TEST(FastOperators, NeedNoGuardInTheBackward) {
  auto model = make_gpt2();
  const auto gradients_of = [&](const at::Tensor& loss) {
    return torch::autograd::grad({loss}, {model->transformer->wte->weight})[0];
  };
  const auto loss = [&] {
    const lora::FastOperators fast;
    return model->forward(token_ids()).square().sum();
  };
  const auto expected = gradients_of(loss()), plain = gradients_of(model->forward(token_ids()).square().sum());
  const auto later = model->forward(token_ids()).square().sum();
  const lora::FastOperators fast;
  EXPECT_TRUE(at::equal(gradients_of(loss()), expected));
  EXPECT_TRUE(at::equal(gradients_of(later), plain));
}

TEST(FastOperators, NestAndEnd) {
  EXPECT_FALSE(is_on());
  {
    const lora::FastOperators outer;
    {
      const lora::FastOperators inner;
      EXPECT_TRUE(is_on());
    }
    EXPECT_TRUE(is_on());
  }
  EXPECT_FALSE(is_on());
  try {
    const lora::FastOperators fast;
    at::scaled_dot_product_attention(at::ones({1, 1, 2, 3}), at::ones({1, 1, 2, 4}), at::ones({1, 1, 2, 4}));
    ADD_FAILURE() << "rows of unequal length were taken";
  } catch (const c10::Error&) {
  }
  EXPECT_FALSE(is_on());
}

TEST(FastOperators, AreTheirThreadsOwn) {
  const lora::FastOperators fast;
  bool other = true;
  std::thread([&] { other = is_on(); }).join();
  EXPECT_FALSE(other);
  EXPECT_TRUE(is_on());
}

// The dtypes and values of the plain operators: attention in autocast's dtype, GELU in that of its input.
TEST(FastOperators, FollowAutocast) {
  const auto x = leaf({1, 2, 20, 8}, 1), narrow = leaf({1, 2, 20, 8}, 1, at::kBFloat16);
  at::autocast::set_autocast_enabled(at::kCPU, true);
  const auto run = [&] {
    return std::vector<at::Tensor>{at::scaled_dot_product_attention(x, x, x, {}, 0, true),
                                   at::scaled_dot_product_attention(x, narrow, x), at::gelu(x, "tanh"),
                                   at::gelu(narrow, "tanh")};
  };
  const auto expected = run();
  const auto found = [&] {
    const lora::FastOperators fast;
    return run();
  }();
  at::autocast::set_autocast_enabled(at::kCPU, false);
  at::autocast::clear_cache();
  for (size_t i = 0; i < found.size(); ++i) {
    EXPECT_EQ(found[i].scalar_type(), expected[i].scalar_type()) << i;
    EXPECT_LE(harness::relative_error(found[i], expected[i]), i == 2 ? 1e-6 : 2 * harness::epsilon(at::kBFloat16)) << i;
  }
}

TEST(FastOperators, ReachTorchScript) {
  const auto unit = torch::jit::compile("def f(x):\n  return torch.gelu(x, approximate='tanh')\n");
  const auto x = leaf({1000}, 1);
  const lora::FastOperators fast;
  for (int i = 0; i < 3; ++i) {
    EXPECT_TRUE(at::equal(unit->run_method("f", x).toTensor(), lora::gelu(x, "tanh"))) << i;
  }
}

}  // namespace
}  // namespace fast_operators_test
