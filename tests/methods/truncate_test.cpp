// Adapters of a smaller rank: against the SVD of the dense ΔW.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/lora.h>

#include <map>
#include <string>

#include "harness/dense_oracle.h"
#include "harness/message_of.h"
#include "harness/models.h"
#include "harness/temp_folder.h"
#include "harness/values.h"

namespace truncate_test {
namespace {

using harness::relative_error;

Mlp make() {
  torch::manual_seed(7);
  Mlp model;
  model->to(at::kDouble);
  return model;
}

/// ΔW of each layer as the merged weights show it.
std::map<std::string, at::Tensor> deltas(lora::Adapters adapters, const Mlp& model) {
  std::map<std::string, at::Tensor> result;
  const auto up = model->up->named_parameters()["weight"].detach(),
             down = model->down->named_parameters()["weight"].detach();
  adapters.merge();
  result["up"] = model->up->weight.detach() - up;
  result["down"] = model->down->weight.detach() - down;
  adapters.unmerge();
  return result;
}

template <class Config>
lora::Adapters filled(Mlp& model, Config config) {
  auto adapters = lora::inject(*model, config.target_modules({"up", "down"}));
  harness::fill(adapters);
  return adapters;
}

double length(const at::Tensor& tensor) { return tensor.norm().item<double>(); }

TEST(Truncate, KeepsTheNearestMatrixOfItsRank) {
  auto model = make();
  auto adapters = filled(model, lora::LoraConfig().r(5).lora_alpha(-4));
  const auto before = deltas(adapters, model);
  const auto report = adapters.truncate("default", lora::Truncation::rank(2));
  const auto after = deltas(adapters, model);
  ASSERT_EQ(report.weights.size(), 2U);
  double all = 0, lost = 0;
  for (const auto& weight : report.weights) {
    const auto& dW = before.at(weight.path);
    const auto [U, S, V] = at::linalg_svd(dW, /*full_matrices=*/false);
    const auto nearest = at::mm(U.narrow(1, 0, 2) * S.narrow(0, 0, 2), V.narrow(0, 0, 2));
    EXPECT_LT(relative_error(after.at(weight.path), nearest), 1e-12) << weight.path;
    EXPECT_NEAR(weight.error, length(dW - nearest) / length(dW), 1e-12);
    EXPECT_GT(weight.error, 0.01);
    EXPECT_EQ(weight.before, 5);
    EXPECT_EQ(weight.after, 2);
    all += length(dW) * length(dW);
    lost += length(dW - nearest) * length(dW - nearest);
  }
  EXPECT_NEAR(report.error, std::sqrt(lost / all), 1e-12);
  for (const auto& [name, tensor] : adapters.named_parameters()) {
    EXPECT_TRUE(tensor.requires_grad()) << name;
    EXPECT_EQ(name.find("lora_A") == std::string::npos ? tensor.size(1) : tensor.size(0), 2) << name;
  }
  EXPECT_EQ(adapters.active(), std::vector<std::string>{"default"});
  EXPECT_EQ(adapters.report().trainable_parameters, 2 * (12 + 20) + 2 * (20 + 8));
}

TEST(Truncate, KeepsTheShareOfTheEnergyThatIsAskedFor) {
  auto model = make();
  auto adapters = filled(model, lora::LoraConfig().r(5).lora_alpha(3));
  const auto before = deltas(adapters, model);
  const auto report = adapters.truncate("default", lora::Truncation::energy(0.8));
  for (const auto& weight : report.weights) {
    const auto S = std::get<1>(at::linalg_svd(before.at(weight.path), false)).square();
    const auto total = S.sum().item<double>();
    EXPECT_GE(S.narrow(0, 0, weight.after).sum().item<double>(), 0.8 * total) << weight.path;
    EXPECT_LT(S.narrow(0, 0, weight.after - 1).sum().item<double>(), 0.8 * total) << weight.path;
    EXPECT_NEAR(weight.error * weight.error, 1 - S.narrow(0, 0, weight.after).sum().item<double>() / total, 1e-12);
  }
  // What it is now, ranks that differ, is saved and loaded.
  const TempFolder folder;
  adapters.save(folder / "small");
  auto again = make();
  lora::load(*again, folder / "small");
  const auto x = harness::normal({5, 12}, 3);
  EXPECT_TRUE(at::equal(again->forward(x), model->forward(x)));
}

TEST(Truncate, LosesNothingWithAllOfTheEnergy) {
  auto model = make();
  auto adapters = filled(model, lora::LoraConfig().r(4).lora_alpha(3).init_lora_weights(lora::LoraInit::kPissa));
  const auto x = harness::normal({5, 12}, 3);
  const auto y = model->forward(x).detach();
  const auto report = adapters.truncate("default", lora::Truncation::energy(1));
  EXPECT_LT(report.error, 1e-7);
  EXPECT_LT(relative_error(model->forward(x), y), 1e-12);
  for (const auto& weight : report.weights) EXPECT_EQ(weight.after, 8) << "the factors and those of the start";
}

TEST(Truncate, MakesLoraOfMethodsWhoseUpdateIsASum) {
  auto model = make();
  auto adapters = filled(model, lora::VeraConfig().r(6));
  const auto before = deltas(adapters, model);
  adapters.truncate("default", lora::Truncation::rank(6));
  const auto after = deltas(adapters, model);
  for (const auto& [path, dW] : before) EXPECT_LT(relative_error(after.at(path), dW), 1e-12) << path;
  const TempFolder folder;
  adapters.save(folder / "lora");
  EXPECT_EQ(lora::describe_adapter(folder / "lora").method, "LORA");
}

TEST(Truncate, OfPartsAndAmongOthersKeepsTheirOrder) {
  torch::manual_seed(7);
  harness::Fused model;
  model->to(at::kDouble);
  const auto config = lora::LoraConfig().r(4).lora_alpha(3).target_modules({"c_attn[q,v]"});
  auto adapters = lora::inject(*model, config);
  adapters.add(config, "other");
  harness::fill(adapters);
  harness::fill(adapters, "other", 70);
  adapters.set_active({"default", "other"});
  const auto x = harness::normal({5, 12}, 3);
  const auto y = model->forward(x).detach();
  const auto report = adapters.truncate("default", lora::Truncation::rank(4));
  EXPECT_EQ(report.weights.size(), 2U);
  EXPECT_EQ(adapters.names(), (std::vector<std::string>{"default", "other"}));
  EXPECT_EQ(adapters.active(), (std::vector<std::string>{"default", "other"}));
  EXPECT_LT(relative_error(model->forward(x), y), 1e-12);
}

TEST(Truncate, RefusesWhatItCannotMakeSmaller) {
  using ::testing::HasSubstr;
  auto model = make();
  auto adapters = filled(model, lora::LoraConfig().r(4).use_dora(true));
  const auto before = harness::parameter_state(*model);
  const auto message = [&] {
    return harness::message_of([&] { adapters.truncate("default", lora::Truncation::rank(2)); });
  };
  EXPECT_THAT(message(), HasSubstr("no sum of products"));
  EXPECT_EQ(harness::parameter_state(*model), before);
  EXPECT_THAT(harness::message_of([] { lora::Truncation::rank(0); }), HasSubstr("rank = 0"));
  EXPECT_THAT(harness::message_of([] { lora::Truncation::energy(1.5); }), HasSubstr("energy = 1.5"));
  adapters.unload();
  auto plain = filled(model, lora::LoraConfig().r(4));
  plain.merge();
  EXPECT_THROW(plain.truncate("default", lora::Truncation::rank(2)), lora::StateError);
}

}  // namespace
}  // namespace truncate_test
