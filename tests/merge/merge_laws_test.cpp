// Merging a model's adapters: one rounding, one pass from W0, nothing changed by an error.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/lora.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/linear.h>

#include <cmath>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "harness/dense_oracle.h"
#include "harness/models.h"
#include "harness/values.h"

namespace merge_laws_test {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using ::testing::ThrowsMessage;

const harness::HostCase& fused_host() {
  static const harness::HostCase host{
      "Fused",
      harness::maker<harness::Fused>(),
      {9, 12},
      {"c_attn"},
      {{"c_attn.*", "c_attn.weight"}, {"c_attn.*.q", "c_attn.weight", 0}, {"c_attn.*.v", "c_attn.weight", 20}}};
  return host;
}

/// One Linear [30, 12] with two filled adapters, "default" on the whole weight and "parts" on q and v.
class AdaptedFused {
 public:
  explicit AdaptedFused(at::ScalarType base_dtype)
      : dtype(base_dtype),
        subject(fused_host().make()),
        adapters((subject.module->to(dtype),
                  lora::inject(*subject.module, lora::LoraConfig().r(4).lora_alpha(6).target_modules({"c_attn"})))) {
    adapters.add(lora::LoraConfig().r(3).lora_alpha(-2).target_modules({"c_attn[q,v]"}), "parts");
    harness::fill(adapters);
    harness::fill(adapters, "parts", 70);
  }

  harness::DenseOracle oracle(const std::vector<std::string>& names) const {
    std::vector<std::pair<std::string, double>> scalings;
    for (const auto& name : names) scalings.emplace_back(name, name == "default" ? 6.0 / 4 : -2.0 / 3);
    return {fused_host(), dtype, adapters, scalings};
  }
  at::Tensor weight() const { return subject.module->named_children()["c_attn"]->as<torch::nn::Linear>()->weight; }
  at::Tensor base() const { return subject.module->named_parameters()["c_attn.weight"]; }
  at::Tensor x() const { return harness::normal(fused_host().input, 3, dtype); }

  at::ScalarType dtype;
  harness::Subject subject;
  lora::Adapters adapters;
};

class MergeDtype : public ::testing::TestWithParam<at::ScalarType> {};

TEST_P(MergeDtype, RoundsTheWeightOnceAndTheOutputStays) {
  for (const std::vector<std::string>& names :
       {std::vector<std::string>{"default"}, {"parts"}, {"default", "parts"}, {"parts", "default"}}) {
    AdaptedFused model(GetParam());
    model.adapters.set_active(names);
    const auto oracle = model.oracle(names);
    const auto& expected = oracle.weights().at("c_attn.weight");
    const auto y = oracle.forward(model.x());
    const auto bound = harness::output_bound(expected, model.base(), model.x(), GetParam());
    EXPECT_LE(harness::excess(model.subject.forward(model.x()), y, bound), 0) << "unmerged";
    EXPECT_EQ(model.adapters.merge().weights, 1);
    EXPECT_LE(harness::excess(model.weight(), expected.value, harness::weight_bound(expected, GetParam())), 0);
    EXPECT_LE(harness::excess(model.subject.forward(model.x()), y, bound), 0) << "merged";
  }
}

TEST_P(MergeDtype, OfSomeAdaptersKeepsTheOthers) {
  for (const auto& merged : {"default", "parts"}) {
    AdaptedFused model(GetParam());
    model.adapters.set_active({"default", "parts"});
    const auto oracle = model.oracle({"default", "parts"});
    model.adapters.merge({merged});
    EXPECT_THAT(model.adapters.merged(), ElementsAre(merged));
    const auto bound = harness::output_bound(oracle.weights().at("c_attn.weight"), model.base(), model.x(), GetParam());
    EXPECT_LE(harness::excess(model.subject.forward(model.x()), oracle.forward(model.x()), bound), 0);
    model.adapters.unmerge();
    EXPECT_THAT(model.adapters.merged(), IsEmpty());
  }
}

TEST_P(MergeDtype, SwitchesInOnePassFromTheBase) {
  AdaptedFused model(GetParam());
  model.adapters.merge();
  model.adapters.set_active({"parts"});
  EXPECT_THAT(model.adapters.merged(), ElementsAre("parts"));
  const auto switched = model.weight().clone();
  model.adapters.set_active({"parts", "default"});
  const auto both = model.weight().clone();

  AdaptedFused fresh(GetParam());
  fresh.adapters.set_active({"parts"});
  fresh.adapters.merge();
  EXPECT_TRUE(at::equal(switched, fresh.weight()));
  fresh.adapters.unmerge();
  fresh.adapters.set_active({"parts", "default"});
  fresh.adapters.merge();
  EXPECT_TRUE(at::equal(both, fresh.weight()));
}

TEST_P(MergeDtype, TrainsAnotherAdapterOnTopOfAMergedOne) {
  AdaptedFused model(GetParam());
  model.adapters.set_active({"default", "parts"});
  model.adapters.set_trainable({"parts"});
  model.adapters.merge({"default"});
  model.subject.forward(model.x()).sum().backward();
  for (const auto& [name, tensor] : model.adapters.named_tensors("parts")) {
    ASSERT_TRUE(tensor.grad().defined()) << name;
    EXPECT_GT(harness::largest(tensor.grad()), 0) << name;
  }
  for (const auto& [name, tensor] : model.adapters.named_tensors("default"))
    EXPECT_FALSE(tensor.grad().defined()) << name;
}

TEST_P(MergeDtype, NamesEveryWeightThatIsNotFiniteAndChangesNothing) {
  for (const std::string place : {"weight", "lora_A", "lora_B"}) {
    for (const double value : {std::nan(""), std::numeric_limits<double>::infinity()}) {
      const auto subject = harness::make_sequential();
      subject.module->to(GetParam());
      auto adapters = lora::inject(*subject.module, lora::LoraConfig().r(2).lora_alpha(3).target_modules({"0", "2"}));
      harness::fill(adapters);
      {
        const at::NoGradGuard no_grad;
        for (auto& parameter : subject.module->named_parameters()) {
          const auto& name = parameter.key();
          if (name[0] == '2' && name.size() >= place.size() &&
              name.compare(name.size() - place.size(), place.size(), place) == 0) {
            parameter.value()[1][1] = value;
          }
        }
      }
      const auto before = harness::base_bytes(*subject.module);
      const auto weight = subject.module->named_children()["0"]->as<torch::nn::Linear>()->weight;
      const auto expect_refused = [&](const std::function<void()>& change) {
        EXPECT_THAT(change, ThrowsMessage<c10::ValueError>(AllOf(HasSubstr("at 2"), Not(HasSubstr("at 0"))))) << place;
        EXPECT_EQ(harness::base_bytes(*subject.module), before);
        EXPECT_TRUE(subject.module->named_children()["0"]->as<torch::nn::Linear>()->weight.is_same(weight));
        EXPECT_THAT(adapters.merged(), IsEmpty());
        EXPECT_THAT(adapters.active(), ElementsAre("default"));
      };
      expect_refused([&] { adapters.merge(); });
      expect_refused([&] { adapters.merge_and_unload(); });
      EXPECT_NO_THROW(adapters.unload()) << "after the refusal";
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Laws, MergeDtype, ::testing::Values(at::kDouble, at::kFloat, at::kBFloat16, at::kHalf),
                         [](const auto& tested) { return std::string(c10::toString(tested.param)); });

TEST(Merge, RefusesAnOverflowOfHalfPrecision) {
  AdaptedFused model(at::kHalf);
  {
    const at::NoGradGuard no_grad;
    for (auto& [name, tensor] : model.adapters.named_tensors("default")) tensor.fill_(300);  // 1.5 · 4 · 300² > 65504
  }
  const auto base = harness::bytes_of(model.base());
  EXPECT_THAT([&] { model.adapters.merge(); },
              ThrowsMessage<c10::ValueError>(AllOf(HasSubstr("c_attn"), HasSubstr("nothing was changed"))));
  EXPECT_EQ(harness::bytes_of(model.base()), base);
  EXPECT_THAT(model.adapters.merged(), IsEmpty());
}

TEST(Merge, ASwitchToANonFiniteAdapterLeavesTheMergedOne) {
  AdaptedFused model(at::kFloat);
  model.adapters.merge();
  const auto merged = model.weight();
  {
    const at::NoGradGuard no_grad;
    model.adapters.named_tensors("parts")[0].second[0][0] = std::nan("");
  }
  EXPECT_THROW(model.adapters.set_active({"parts"}), c10::ValueError);
  EXPECT_THAT(model.adapters.active(), ElementsAre("default"));
  EXPECT_TRUE(model.weight().is_same(merged));
}

TEST(Merge, ReportsTheBytesOfItsCopies) {
  for (const auto& [dtype, size] : {std::pair<at::ScalarType, int64_t>{at::kFloat, 4}, {at::kBFloat16, 2}}) {
    const auto subject = harness::make_sequential();
    subject.module->to(dtype);
    auto adapters = lora::inject(*subject.module, lora::LoraConfig().target_modules({"0", "2"}));
    const auto report = adapters.merge();
    EXPECT_EQ(report.weights, 2);
    EXPECT_EQ(report.bytes, (12 * 20 + 20 * 8) * size);
  }
}

TEST(Merge, FollowsWhatWasTrainedAfterAnUnmerge) {
  AdaptedFused model(at::kDouble);
  for (int round = 0; round < 3; ++round) {
    harness::fill(model.adapters, "default", 100 + static_cast<uint64_t>(round));
    const auto expected = model.oracle({"default"}).weights().at("c_attn.weight").value;
    model.adapters.merge();
    EXPECT_LT(harness::relative_error(model.weight(), expected), 1e-14);
    model.adapters.unmerge();
  }
}

TEST(Merge, IsAnErrorWhereItMakesNoSense) {
  AdaptedFused model(at::kFloat);
  EXPECT_THROW(model.adapters.unmerge(), lora::StateError);
  EXPECT_THAT([&] { model.adapters.merge({"parts"}); },
              ThrowsMessage<lora::StateError>(HasSubstr("\"parts\" inactive")));
  EXPECT_THAT([&] { model.adapters.merge({"prats"}); },
              ThrowsMessage<c10::ValueError>(AllOf(HasSubstr("\"prats\""), HasSubstr("default, parts"))));
  EXPECT_THROW(model.adapters.merge({"default", "default"}), c10::ValueError);
  {
    const lora::DisableAdapters guard(model.adapters);
    EXPECT_THROW(model.adapters.merge(), lora::StateError);
  }
  model.adapters.set_active({});
  EXPECT_THROW(model.adapters.merge(), lora::StateError);
  model.adapters.set_active({"default"});
  model.adapters.merge();
  EXPECT_THROW(lora::DisableAdapters guard(model.adapters), lora::StateError);
  EXPECT_THROW(model.adapters.verify([&] { return model.subject.forward(model.x()); }), lora::StateError);
}

/// The same weight in an embedding and a head: the head is untied by merging for good, the embedding keeps W0.
TEST(MergeAndUnload, UntiesWhatItMerges) {
  torch::manual_seed(7);
  harness::Tied model;
  const auto base = model->wte->weight;
  const auto bytes = harness::bytes_of(base);
  const auto ids = at::arange(5);
  auto adapters = lora::inject(*model, lora::LoraConfig().r(2).lora_alpha(3).target_modules({"head"}));
  harness::fill(adapters);
  const auto tensors = adapters.named_tensors("default");
  const auto expected = base.detach() + 1.5 * tensors[1].second.mm(tensors[0].second).detach();
  const auto unmerged = model->forward(ids).detach();
  adapters.merge_and_unload();
  EXPECT_TRUE(model->wte->weight.is_same(base));
  EXPECT_EQ(harness::bytes_of(model->wte->weight), bytes);
  EXPECT_TRUE(base.requires_grad());
  const auto head = model->named_parameters()["head.weight"];
  EXPECT_FALSE(head.is_same(base));
  EXPECT_TRUE(head.is_same(model->head->weight));
  EXPECT_TRUE(head.requires_grad());
  EXPECT_LT(harness::relative_error(head, expected), 1e-6);
  EXPECT_LT(harness::relative_error(model->forward(ids), unmerged), 1e-5);
}

TEST(MergeAndUnload, KeepsATieThatItDoesNotTouch) {
  torch::manual_seed(7);
  harness::Tied model;
  auto adapters = lora::inject(*model, lora::LoraConfig().target_modules({"mix"}));
  harness::fill(adapters);
  adapters.merge_and_unload();
  EXPECT_TRUE(model->head->weight.is_same(model->wte->weight));
  EXPECT_TRUE(model->named_parameters()["head.weight"].is_same(model->wte->weight));
  EXPECT_TRUE(model->wte->weight.requires_grad());
}

TEST(MergeAndUnload, WritesTheRegisteredTensorItself) {
  AdaptedFused model(at::kFloat);
  const auto registered = model.base();
  const auto expected = model.oracle({"default"}).weights().at("c_attn.weight");
  model.adapters.merge_and_unload();
  EXPECT_TRUE(model.base().is_same(registered));
  EXPECT_TRUE(model.weight().is_same(registered));
  EXPECT_TRUE(registered.requires_grad());
  EXPECT_LE(harness::excess(registered, expected.value, harness::weight_bound(expected, at::kFloat)), 0);
  EXPECT_THROW(model.adapters.merge(), lora::StateError);
  EXPECT_EQ(model.subject.module->named_children()["c_attn"]->children().size(), 0u);
}

}  // namespace
}  // namespace merge_laws_test
