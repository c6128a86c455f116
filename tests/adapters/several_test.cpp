// Several named adapters on one model: adding, switching, training, disabling and removing them.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/lora.h>

#include <functional>
#include <map>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "harness/dense_oracle.h"
#include "harness/models.h"
#include "harness/temp_folder.h"
#include "harness/values.h"

namespace several_test {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::ThrowsMessage;

/// An Mlp in float64 with "default" (r 2, alpha 3, both layers), active, and "other" (r 3, alpha -4, only down).
struct TwoAdapters {
  TwoAdapters() {
    adapters.add(lora::LoraConfig().r(3).lora_alpha(-4).target_modules({"down"}), "other");
    harness::fill(adapters);
    harness::fill(adapters, "other", 70);
  }
  at::Tensor expected(const std::vector<std::string>& names) const {
    std::vector<std::pair<std::string, double>> scalings;
    for (const auto& name : names) scalings.emplace_back(name, name == "default" ? 3.0 / 2 : -4.0 / 3);
    return harness::DenseOracle(harness::host_cases().front(), at::kDouble, adapters, scalings).forward(x);
  }
  double error(const std::vector<std::string>& names) const {
    return harness::relative_error(subject.forward(x), expected(names));
  }
  bool is_plain() const {
    const auto plain = harness::host_cases().front().make();
    plain.module->to(at::kDouble);
    return at::equal(subject.forward(x), plain.forward(x));
  }

  at::Tensor x = harness::normal({5, 12}, 3);
  harness::Subject subject = [] {
    auto made = harness::host_cases().front().make();
    made.module->to(at::kDouble);
    return made;
  }();
  lora::Adapters adapters =
      lora::inject(*subject.module, lora::LoraConfig().r(2).lora_alpha(3).target_modules({"up", "down"}));
};

std::vector<std::string> names_of(const std::vector<std::pair<std::string, at::Tensor>>& named) {
  std::vector<std::string> names;
  for (const auto& [name, tensor] : named) names.push_back(name);
  return names;
}

TEST(Several, HaveTheirOwnTargetsRanksAndScalings) {
  const TwoAdapters two;
  EXPECT_THAT(two.adapters.names(), ElementsAre("default", "other"));
  EXPECT_THAT(two.adapters.active(), ElementsAre("default"));
  EXPECT_THAT(two.adapters.trainable(), ElementsAre("default"));
  EXPECT_THAT(names_of(two.adapters.named_tensors("other")),
              ElementsAre("down.lora_other.lora_A", "down.lora_other.lora_B"));
  EXPECT_EQ(two.adapters.named_tensors("other")[0].second.sizes(), (std::vector<int64_t>{3, 20}));
  EXPECT_EQ(two.adapters.named_tensors("other")[1].second.sizes(), (std::vector<int64_t>{8, 3}));
  EXPECT_THAT(names_of(two.adapters.named_parameters()),
              ElementsAre("up.lora_default.lora_A", "up.lora_default.lora_B", "down.lora_default.lora_A",
                          "down.lora_default.lora_B"));
}

TEST(Several, SwitchAndSum) {
  TwoAdapters two;
  EXPECT_LT(two.error({"default"}), 1e-13);
  for (const std::vector<std::string>& names :
       {std::vector<std::string>{"other"}, {"default", "other"}, {"other", "default"}, {"default"}}) {
    two.adapters.set_active(names);
    EXPECT_EQ(two.adapters.active(), names);
    EXPECT_LT(two.error(names), 1e-13);
  }
  two.adapters.set_active({});
  EXPECT_TRUE(two.is_plain());
}

TEST(Several, SwitchByName) {
  TwoAdapters two;
  EXPECT_THAT([&] { two.adapters.set_active({"othr"}); },
              ThrowsMessage<c10::ValueError>(AllOf(HasSubstr("\"othr\""), HasSubstr("default, other"))));
  EXPECT_THROW(two.adapters.set_active({"other", "other"}), c10::ValueError);
  EXPECT_THROW(two.adapters.set_trainable({"othr"}), c10::ValueError);
  EXPECT_THROW(two.adapters.named_tensors("othr"), c10::ValueError);
  EXPECT_THAT(two.adapters.active(), ElementsAre("default"));
  EXPECT_THAT(two.adapters.trainable(), ElementsAre("default"));
}

/// The adapters whose tensors have a gradient after a backward.
std::set<std::string> trained(const TwoAdapters& two) {
  two.subject.module->zero_grad();
  const auto loss = two.subject.forward(two.x).sum();
  if (loss.requires_grad()) loss.backward();
  std::set<std::string> result;
  for (const auto& name : two.adapters.names()) {
    for (const auto& [path, tensor] : two.adapters.named_tensors(name)) {
      if (tensor.grad().defined() && harness::largest(tensor.grad()) > 0) result.insert(name);
    }
  }
  return result;
}

TEST(Several, TrainApartFromBeingActive) {
  TwoAdapters two;
  EXPECT_THAT(trained(two), ElementsAre("default"));
  two.adapters.set_active({"default", "other"});
  EXPECT_THAT(trained(two), ElementsAre("default"));
  two.adapters.set_trainable({"other"});
  EXPECT_THAT(trained(two), ElementsAre("other"));
  EXPECT_THAT(two.adapters.trainable(), ElementsAre("other"));
  EXPECT_EQ(two.adapters.parameters().size(), 2u);
  two.adapters.set_trainable({"default", "other"});
  EXPECT_THAT(trained(two), ElementsAre("default", "other"));
  two.adapters.set_active({"other"});
  EXPECT_THAT(trained(two), ElementsAre("other"));
  two.adapters.set_trainable({});
  EXPECT_THAT(trained(two), IsEmpty());
  EXPECT_THAT(two.adapters.parameters(), IsEmpty());
}

TEST(Several, StayApartInNames) {
  TwoAdapters two;
  for (const std::string name : {"", "a", "l", "lora", "lora_", "_", "x.y", "x/y", "."}) {
    EXPECT_THROW(two.adapters.add(lora::LoraConfig().target_modules({"up"}), name), c10::ValueError) << name;
  }
  EXPECT_THAT([&] { two.adapters.add(lora::LoraConfig().target_modules({"up"}), "other"); },
              ThrowsMessage<c10::ValueError>(HasSubstr("\"other\"")));
  EXPECT_THAT(two.adapters.names(), ElementsAre("default", "other"));
  two.adapters.add(lora::LoraConfig().target_modules({"up"}), "b");
  EXPECT_THAT(two.adapters.names(), ElementsAre("default", "other", "b"));
}

TEST(Several, LeaveNothingOfAFailedAddition) {
  TwoAdapters two;
  const auto before = harness::parameter_state(*two.subject.module);
  EXPECT_THROW(two.adapters.add(lora::LoraConfig().target_modules({"up", "dwn"}), "third"), c10::ValueError);
  EXPECT_THROW(two.adapters.add(lora::LoraConfig().r(0).target_modules({"up"}), "third"), c10::ValueError);
  EXPECT_EQ(harness::parameter_state(*two.subject.module), before);
  EXPECT_THAT(two.adapters.names(), ElementsAre("default", "other"));
  EXPECT_NO_THROW(two.adapters.add(lora::LoraConfig().target_modules({"up"}), "third"));
}

TEST(Several, AreAddedAndLoadedWhileOthersAreMerged) {
  const TempFolder folder;
  TwoAdapters source;
  source.adapters.save(folder.path().string(), "other");
  for (const std::vector<std::string>& merged : {std::vector<std::string>{"default"}, {"default", "other"}}) {
    TwoAdapters two;
    two.adapters.set_active({"default", "other"});
    two.adapters.merge(merged);
    two.adapters.add(lora::LoraConfig().r(5).target_modules({"up"}), "added");
    two.adapters.load(folder.path().string(), "loaded");
    EXPECT_THAT(two.adapters.active(), ElementsAre("default", "other"));
    EXPECT_EQ(two.adapters.merged(), merged);
    EXPECT_LT(two.error({"default", "other"}), 1e-13);
    two.adapters.set_active({"loaded"});
    EXPECT_LT(harness::relative_error(two.subject.forward(two.x), two.expected({"other"})), 1e-13);
  }
}

TEST(Removing, AnActiveAdapterDeactivatesIt) {
  TwoAdapters two;
  two.adapters.set_active({"default", "other"});
  two.adapters.remove("default");
  EXPECT_THAT(two.adapters.names(), ElementsAre("other"));
  EXPECT_THAT(two.adapters.active(), ElementsAre("other"));
  EXPECT_LT(two.error({"other"}), 1e-13);
  for (const auto& named : two.subject.module->named_parameters()) {
    EXPECT_EQ(named.key().find("lora_default"), std::string::npos) << named.key();
  }
}

TEST(Removing, AMergedAdapterTakesItOutOfTheWeights) {
  TwoAdapters two;
  two.adapters.set_active({"default", "other"});
  two.adapters.merge();
  two.adapters.remove("default");
  EXPECT_THAT(two.adapters.merged(), ElementsAre("other"));
  EXPECT_LT(two.error({"other"}), 1e-13);
  two.adapters.unmerge();
  EXPECT_LT(two.error({"other"}), 1e-13);
}

TEST(Removing, AnInactiveAdapterLeavesTheMergedOnes) {
  TwoAdapters two;
  two.adapters.merge();
  two.adapters.remove("other");
  EXPECT_THAT(two.adapters.merged(), ElementsAre("default"));
  EXPECT_LT(two.error({"default"}), 1e-13);
}

TEST(Removing, TheOnlyMergedOneOfTwoActive) {
  TwoAdapters two;
  two.adapters.set_active({"default", "other"});
  two.adapters.merge({"default"});
  two.adapters.remove("default");
  EXPECT_THAT(two.adapters.merged(), IsEmpty());
  EXPECT_LT(two.error({"other"}), 1e-13);
}

TEST(Removing, TheLastAdapterUnloads) {
  TwoAdapters two;
  two.adapters.remove("other");
  two.adapters.remove("default");
  EXPECT_TRUE(two.is_plain());
  EXPECT_THAT(two.adapters.names(), IsEmpty());
  EXPECT_THROW(two.adapters.set_active({}), lora::StateError);
  EXPECT_THROW(lora::adapters_of(*two.subject.module), lora::StateError);
  EXPECT_NO_THROW(lora::inject(*two.subject.module, lora::LoraConfig().target_modules({"up"})));
}

TEST(Removing, AndAddingAgainStartsAnew) {
  TwoAdapters two;
  two.adapters.remove("other");
  two.adapters.add(lora::LoraConfig().r(5).target_modules({"up"}), "other");
  EXPECT_THAT(names_of(two.adapters.named_tensors("other")),
              ElementsAre("up.lora_other.lora_A", "up.lora_other.lora_B"));
  EXPECT_EQ(harness::largest(two.adapters.named_tensors("other")[1].second), 0);
}

TEST(Disabling, IsNestedAndEndsWithAnException) {
  TwoAdapters two;
  {
    const lora::DisableAdapters guard(two.adapters);
    EXPECT_TRUE(two.is_plain());
    {
      const lora::DisableAdapters inner(two.adapters);
      EXPECT_TRUE(two.is_plain());
    }
    EXPECT_TRUE(two.is_plain());
  }
  EXPECT_LT(two.error({"default"}), 1e-13);
  try {
    const lora::DisableAdapters guard(two.adapters);
    two.subject.forward(at::ones({2, 2}, at::kDouble));
    FAIL();
  } catch (const c10::Error&) {
  }
  EXPECT_LT(two.error({"default"}), 1e-13);
}

TEST(Disabling, IsOfItsThreadAndModel) {
  TwoAdapters two, others;
  const lora::DisableAdapters guard(two.adapters);
  EXPECT_TRUE(two.is_plain());
  EXPECT_LT(others.error({"default"}), 1e-13);
  double elsewhere = 1;
  std::thread([&] { elsewhere = two.error({"default"}); }).join();
  EXPECT_LT(elsewhere, 1e-13);
}

TEST(Disabling, LastsThroughASwitch) {
  TwoAdapters two;
  {
    const lora::DisableAdapters guard(two.adapters);
    two.adapters.set_active({"other"});
    EXPECT_TRUE(two.is_plain());
  }
  EXPECT_LT(two.error({"other"}), 1e-13);
}

}  // namespace
}  // namespace several_test
