// Adapters on disk, on every kind of host: what is saved comes back bit for bit.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/lora.h>

#include <string>
#include <tuple>
#include <vector>

#include "harness/models.h"
#include "harness/temp_folder.h"
#include "harness/values.h"

namespace files_test {
namespace {

using harness::HostCase;
using ::testing::ElementsAre;

class SavedHost : public ::testing::TestWithParam<std::tuple<HostCase, at::ScalarType>> {
 protected:
  const HostCase& host() const { return std::get<0>(GetParam()); }
  harness::Subject subject() const {
    auto made = host().make();
    made.module->to(std::get<1>(GetParam()));
    return made;
  }
  at::Tensor x() const { return harness::normal(host().input, 3, std::get<1>(GetParam())); }
};

TEST_P(SavedHost, ComesBackBitForBit) {
  const TempFolder folder;
  const auto model = subject();
  auto adapters = lora::inject(*model.module, lora::LoraConfig().r(3).lora_alpha(7).target_modules(host().targets));
  adapters.add(lora::LoraConfig().r(2).lora_alpha(5).use_rslora(true).target_modules(host().targets), "other");
  harness::fill(adapters);
  harness::fill(adapters, "other", 70);
  adapters.save(folder.path().string());

  const auto fresh = subject();
  auto loaded = lora::load(*fresh.module, folder.path().string());
  loaded.load(folder / "other", "other");
  EXPECT_THAT(loaded.active(), ElementsAre("default"));
  for (const std::string name : {"default", "other"}) {
    const auto expected = adapters.named_tensors(name);
    const auto found = loaded.named_tensors(name);
    ASSERT_EQ(found.size(), expected.size());
    for (size_t i = 0; i < found.size(); ++i) {
      EXPECT_EQ(found[i].first, expected[i].first);
      EXPECT_EQ(harness::bytes_of(found[i].second), harness::bytes_of(expected[i].second)) << found[i].first;
    }
    adapters.set_active({name});
    loaded.set_active({name});
    EXPECT_TRUE(at::equal(fresh.forward(x()), model.forward(x()))) << name;
  }
}

INSTANTIATE_TEST_SUITE_P(Laws, SavedHost,
                         ::testing::Combine(::testing::ValuesIn(harness::host_cases()),
                                            ::testing::Values(at::kFloat, at::kBFloat16)),
                         [](const auto& tested) {
                           return std::get<0>(tested.param).name + "_" + c10::toString(std::get<1>(tested.param));
                         });

}  // namespace
}  // namespace files_test
