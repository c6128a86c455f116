// What a new method takes: its configuration and its update, as a user would write them; and LoRALinear of every
// method.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/lora.h>
#include <torch/optim/adamw.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "harness/dense_oracle.h"
#include "harness/temp_folder.h"
#include "harness/values.h"
#include "oracles/models.h"

namespace own_method_test {
namespace {

class Hadamard;

struct HadamardConfig : lora::AdapterConfig<HadamardConfig> {
  using Method = Hadamard;
  static constexpr const char* kPeftType = "HADAMARD";
  static constexpr const char* kPrefix = "hadamard_";

  TORCH_ARG(int64_t, r) = 4;

 public:
  template <class Config, class Visitor>
  static void visit(Config& config, Visitor& visit) {
    visit_options(config, visit);
    visit("r", config.r());
  }
  void validate() const { validate_options("HadamardConfig"); }
};

/// ΔW = W0 ⊙ (B·A).
class HadamardUpdate final : public lora::Update {
 public:
  HadamardUpdate(at::Tensor A, at::Tensor B) : A_(std::move(A)), B_(std::move(B)) {}
  int64_t in_features() const override { return A_.size(1); }
  int64_t out_features() const override { return B_.size(0); }
  std::vector<lora::UpdateTensor> tensors() const override {
    return {{"hadamard_A", A_, lora::TensorRole::kInput}, {"hadamard_B", B_, lora::TensorRole::kOutput}};
  }
  lora::Factors factors(const lora::BaseRows&) const override { return {}; }
  bool is_factored() const override { return false; }
  at::Tensor dense(const lora::BaseRows& base) const override { return base.matrix() * at::mm(B_, A_); }
  std::shared_ptr<lora::Update> clone(const lora::TensorCopier& copy) const override {
    return std::make_shared<HadamardUpdate>(copy(A_), copy(B_));
  }

 private:
  at::Tensor A_, B_;
};

class Hadamard final : public lora::ConfiguredMethod<HadamardConfig> {
 public:
  using ConfiguredMethod::ConfiguredMethod;
  std::shared_ptr<lora::Update> create(const lora::UpdateSpec& spec) const override {
    auto A = at::randn({config().r(), spec.in_features}, spec.options);
    return std::make_shared<HadamardUpdate>(A, at::zeros({spec.out_features, config().r()}, spec.options));
  }
};

TEST(OwnMethod, IsTrainedMergedSavedAndLoadedAsTheLibrarysOwn) {
  lora::register_method<HadamardConfig>();
  torch::manual_seed(7);
  Mlp model, again;
  {
    const at::NoGradGuard no_grad;
    for (auto& named : again->named_parameters()) named.value().copy_(model->named_parameters()[named.key()]);
  }
  const auto x = harness::normal({5, 12}, 3, at::kFloat);
  auto adapters = lora::inject(*model, HadamardConfig().r(3).target_modules({"up", "down"}));
  torch::optim::AdamW optimizer(lora::param_groups(adapters, torch::optim::AdamWOptions(0.05)));
  double first = 0, last = 0;
  for (int step = 0; step < 20; ++step) {
    optimizer.zero_grad();
    const auto loss = (model->forward(x) - 1).square().mean();
    loss.backward();
    optimizer.step();
    (step == 0 ? first : last) = loss.item<double>();
  }
  EXPECT_LT(last, first / 2);
  const auto y = model->forward(x).detach();
  const TempFolder folder;
  adapters.save(folder / "own");
  lora::load(*again, folder / "own");
  EXPECT_TRUE(at::equal(again->forward(x), y));
  adapters.merge();
  EXPECT_LT(harness::relative_error(model->forward(x), y), 1e-5);
}

/// LoRALinear and inject with the same configuration: outputs and gradients, bit for bit.
template <class Config>
void expect_equal(Config config) {
  const auto x = harness::normal({5, 12}, 3, at::kFloat);
  const auto train = [&](const lora::Adapters& adapters, const std::function<at::Tensor(const at::Tensor&)>& forward) {
    harness::fill(adapters);
    std::vector<at::Tensor> results{forward(x).detach()};
    (forward(x) * 2).sum().backward();
    for (const auto& tensor : adapters.parameters()) results.push_back(tensor.grad());
    return results;
  };
  torch::manual_seed(7);
  Mlp injected;
  const auto expected = train(lora::inject(*injected, config.target_modules({"up"})),
                              [&](const at::Tensor& input) { return injected->up->forward(input); });
  torch::manual_seed(7);
  Mlp written;
  lora::LoRALinear<typename Config::Method> linear(written->up, config);
  const auto found = train(lora::adapters_of(*linear), [&](const at::Tensor& input) { return linear->forward(input); });
  ASSERT_EQ(found.size(), expected.size());
  for (size_t i = 0; i < found.size(); ++i) EXPECT_TRUE(at::equal(found[i], expected[i])) << i;
}

TEST(LoRALinear, OfEveryMethodIsBitwiseWhatInjectGives) {
  expect_equal(lora::LoraConfig().r(4));
  expect_equal(lora::LoraConfig().r(4).use_dora(true));
  expect_equal(lora::LoraConfig().r(4).init_lora_weights(lora::LoraInit::kPissa));
  expect_equal(lora::VeraConfig().r(4));
  expect_equal(lora::IA3Config());
  expect_equal(lora::MissConfig().r(4));
  expect_equal(lora::MoraConfig().r(4).mora_type(1));
  expect_equal(lora::MoraConfig().r(4).mora_type(6));
}

}  // namespace
}  // namespace own_method_test
