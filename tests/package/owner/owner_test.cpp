// A dispatch key that is taken: an error where it is needed, and everything stays as it was.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/lora.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/linear.h>

#include "harness/values.h"
#include "tests/package/owner/other_owner.h"

namespace {

TEST(KeyOwner, ThatIsNotThisLibraryIsAnErrorAtInjection) {
  torch::nn::Sequential model(torch::nn::Linear(3, 2));
  const auto before = harness::parameter_state(*model);
  EXPECT_THAT([&] { lora::inject(*model, lora::LoraConfig().target_modules({"0"})); },
              testing::ThrowsMessage<lora::StateError>(testing::HasSubstr(other_owner::expected_error())));
  EXPECT_EQ(harness::parameter_state(*model), before);
  EXPECT_NO_THROW(model->forward(at::ones({1, 3})));
}

TEST(KeyOwner, ThatIsNotThisLibraryIsAnErrorOfFastOperators) {
  EXPECT_THAT([] { const lora::FastOperators fast; },
              testing::ThrowsMessage<lora::StateError>(testing::HasSubstr(other_owner::expected_error())));
  EXPECT_NO_THROW(at::gelu(at::ones({3}), "tanh"));
}

}  // namespace
