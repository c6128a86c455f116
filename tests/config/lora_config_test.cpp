// Values of a configuration that are out of range, and names that an adapter may not have.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/lora.h>

#include <functional>
#include <limits>
#include <string>

#include "oracles/models.h"

namespace lora_config_test {
namespace {

using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

struct BadConfig {
  std::string found;
  std::function<lora::LoraConfig()> make;
};

TEST(LoraConfig, RefusesValuesOutOfRangeAndChangesNothing) {
  const auto targeted = [] { return lora::LoraConfig().target_modules({"up"}); };
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (const auto& bad : {
           BadConfig{"r = 0", [&] { return targeted().r(0); }},
           BadConfig{"r = -1", [&] { return targeted().r(-1); }},
           BadConfig{"lora_dropout = 1.5", [&] { return targeted().lora_dropout(1.5); }},
           BadConfig{"lora_dropout = 1", [&] { return targeted().lora_dropout(1); }},
           BadConfig{"lora_dropout = -0.1", [&] { return targeted().lora_dropout(-0.1); }},
           BadConfig{"lora_dropout = nan", [&] { return targeted().lora_dropout(nan); }},
           BadConfig{"lora_alpha = nan", [&] { return targeted().lora_alpha(nan); }},
           BadConfig{"lora_alpha = inf",
                     [&] { return targeted().lora_alpha(std::numeric_limits<double>::infinity()); }},
           BadConfig{"lora_alpha = 0", [&] { return targeted().lora_alpha(0); }},
           BadConfig{"rank_pattern[\"up\"] = 0",
                     [&] {
                       return targeted().rank_pattern({{"up", 0}});
                     }},
           BadConfig{"alpha_pattern[\"up\"] = 0",
                     [&] {
                       return targeted().alpha_pattern({{"up", 0}});
                     }},
           BadConfig{"no parts", [&] { return targeted().fused_parts("up", {}); }},
           BadConfig{"the part {\"q\", 0}",
                     [&] {
                       return targeted().fused_parts("up", {{"q", 0}});
                     }},
           BadConfig{"the part {\"a.b\", 2}",
                     [&] {
                       return targeted().fused_parts("up", {{"a.b", 2}});
                     }},
           BadConfig{"the part \"q\" twice",
                     [&] {
                       return targeted().fused_parts("up", {{"q", 4}, {"q", 4}, {"v", 12}});
                     }},
           BadConfig{"parts in exclude_modules, \"up[q]\"", [&] { return targeted().exclude_modules({"up[q]"}); }},
           BadConfig{"no module for \"dwn\" in exclude_modules", [&] { return targeted().exclude_modules({"dwn"}); }},
           BadConfig{"an empty name", [] { return lora::LoraConfig().target_modules({""}); }},
           BadConfig{"an empty part", [] { return lora::LoraConfig().target_modules({"up[q,]"}); }},
           BadConfig{"\"up\" twice in rank_pattern",
                     [] {
                       return lora::LoraConfig().target_modules({"up"}).rank_pattern({{"up", 2}, {"up", 4}});
                     }},
           BadConfig{"\"up\" twice in alpha_pattern",
                     [] {
                       return lora::LoraConfig().target_modules({"up"}).alpha_pattern({{"up", 2}, {"up", 4}});
                     }},
           BadConfig{"the part q twice", [] { return lora::LoraConfig().target_modules({"up[q,q]"}); }},
       }) {
    Mlp model;
    EXPECT_THAT([&] { lora::inject(*model, bad.make()); },
                ThrowsMessage<c10::ValueError>(HasSubstr("found " + bad.found)))
        << bad.found;
    EXPECT_EQ(model->named_modules().size(), 3U);
    EXPECT_TRUE(model->up->weight.requires_grad());
  }
}

TEST(LoraConfig, DefaultsArePeftsDefaults) {
  const lora::LoraConfig config;
  EXPECT_EQ(config.r(), 8);
  EXPECT_EQ(config.lora_alpha(), 8);
  EXPECT_EQ(config.lora_dropout(), 0);
  EXPECT_FALSE(config.use_rslora());
  EXPECT_EQ(config.init_lora_weights(), lora::LoraInit::kKaiming);
  EXPECT_TRUE(config.target_modules().empty());
}

TEST(AdapterName, IsOneThatPeftCanLoad) {
  // PEFT takes the adapter's name out of "lora_A.NAME.weight" by text: a name contained in "lora_" breaks it.
  for (const std::string name : {"", "a.b", "a/b", "a", "l", "lora", "lora_", "_", "ora"}) {
    Mlp model;
    EXPECT_THAT([&] { lora::inject(*model, lora::LoraConfig().target_modules({"up"}), name); },
                ThrowsMessage<c10::ValueError>(HasSubstr("found the adapter name \"" + name + "\"")));
  }
  Mlp model;
  EXPECT_EQ(lora::inject(*model, lora::LoraConfig().target_modules({"up"}), "e2e-v2").names().front(), "e2e-v2");
}

}  // namespace
}  // namespace lora_config_test
