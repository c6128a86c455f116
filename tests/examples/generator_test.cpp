#include "examples/text/generator.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>
#include <string>
#include <vector>

#include "examples/finetune/data.h"

namespace generator_test {
namespace {

using testing::HasSubstr;
using testing::Not;

std::vector<GeneratorDomain> all_domains() {
  auto domains = generator_base_domains();
  domains.push_back(generator_new_domain());
  return domains;
}

TEST(Generator, SaysEveryValueOfItsInput) {
  for (const auto& domain : all_domains()) {
    std::set<std::string> taken;
    for (const auto& pair : PairGenerator(domain, 3).draw(300, taken)) {
      EXPECT_EQ(e2e_detail::input_problem(pair.input), "");
      EXPECT_THAT(pair.text, Not(testing::ContainsRegex("[{}<>|]|  | \\."))) << domain.name;
      for (std::size_t begin = 0; begin < pair.input.size();) {
        const auto end = std::min(pair.input.find(" | ", begin), pair.input.size());
        const auto field = pair.input.substr(begin, end - begin);
        EXPECT_THAT(pair.text, HasSubstr(field.substr(field.find(" : ") + 3))) << pair.input;
        begin = end + 3;
      }
    }
  }
}

TEST(Generator, IsSetByItsSeed) {
  const auto draw = [](std::uint64_t seed) {
    std::set<std::string> taken;
    return PairGenerator(generator_new_domain(), seed).draw(20, taken);
  };
  const auto first = draw(5), again = draw(5), other = draw(6);
  for (std::size_t i = 0; i < first.size(); ++i) {
    EXPECT_EQ(first[i].input, again[i].input);
    EXPECT_EQ(first[i].text, again[i].text);
  }
  EXPECT_NE(first.front().input, other.front().input);
}

TEST(Generator, SharesNoInputBetweenTrainAndDev) {
  const auto pairs = draw_pairs(generator_new_domain(), 500, 100);
  std::set<std::string> inputs;
  for (const auto& pair : pairs.train) EXPECT_TRUE(inputs.insert(pair.input).second);
  for (const auto& pair : pairs.dev) EXPECT_TRUE(inputs.insert(pair.input).second);
}

TEST(Generator, KeepsTheNewDomainOutOfTheBase) {
  for (const auto& domain : generator_base_domains()) {
    EXPECT_NE(domain.name, generator_new_domain().name);
    EXPECT_NE(domain.slots.front().name, generator_new_domain().slots.front().name);
    for (const auto& sentence : domain.openings)
      EXPECT_THAT(generator_new_domain().openings, Not(testing::Contains(sentence)));
  }
}

}  // namespace
}  // namespace generator_test
