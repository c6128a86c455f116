// Models that one part of the program adapts and another one runs. Built twice: with the plugin as a second translation
// unit, and with the plugin as a shared library of hidden symbols, which has a copy of every variable of its own.
#include <gtest/gtest.h>
#include <lora/lora.h>
#include <torch/types.h>
#include <unistd.h>

#include <filesystem>
#include <string>
#include <vector>

#include "tests/package/units/plugin.h"

namespace {

lora::Adapters adapt_here(plugin::Net& net) {
  return lora::inject(net, lora::LoraConfig().r(2).lora_alpha(8).target_modules({"fc"}));
}

at::Tensor run_here(plugin::Net& net, const at::Tensor& x) { return net.forward(x); }

struct Way {
  const char* name;
  lora::Adapters (*adapt)(plugin::Net&);
  at::Tensor (*run)(plugin::Net&, const at::Tensor&);
};

class Units : public testing::TestWithParam<Way> {};

TEST_P(Units, AdaptedModelIsRightInEveryPart) {
  torch::manual_seed(1);
  plugin::Net net;
  const at::Tensor x = torch::randn({3, 6});
  const at::Tensor w0 = net.fc->weight.detach().clone();
  const at::Tensor bias = net.fc->bias.detach().clone();
  lora::Adapters adapters = GetParam().adapt(net);

  const std::vector<at::Tensor> parameters = adapters.parameters();
  ASSERT_EQ(parameters.size(), 2U);
  const bool a_first = parameters[0].size(0) == 2;
  const at::Tensor a = parameters[a_first ? 0 : 1];
  const at::Tensor b = parameters[a_first ? 1 : 0];
  {
    at::NoGradGuard guard;
    b.normal_();
  }
  const at::Tensor dense = w0 + 4 * b.detach().mm(a.detach());
  const at::Tensor expected = x.mm(dense.t()) + bias;
  const at::Tensor y = GetParam().run(net, x);
  EXPECT_TRUE(torch::allclose(y, expected, 1e-5, 1e-6)) << y << expected;

  y.sum().backward();
  const at::Tensor column_sums = x.sum(0, /*keepdim=*/true).expand({4, 6});
  EXPECT_TRUE(torch::allclose(b.grad(), 4 * column_sums.mm(a.detach().t()), 1e-5, 1e-5));
  EXPECT_TRUE(torch::allclose(a.grad(), 4 * b.detach().t().mm(column_sums), 1e-5, 1e-5));

  lora::adapters_of(net).merge();
  EXPECT_TRUE(torch::allclose(GetParam().run(net, x), expected, 1e-5, 1e-6));
  adapters.unmerge();
  EXPECT_TRUE(torch::equal(net.named_parameters()["fc.weight"].detach(), w0));
  adapters.unload();
  EXPECT_TRUE(torch::equal(GetParam().run(net, x), torch::nn::functional::linear(x, w0, bias)));
}

INSTANTIATE_TEST_SUITE_P(Parts, Units,
                         testing::Values(Way{"here_here", adapt_here, run_here},
                                         Way{"here_there", adapt_here, plugin::run},
                                         Way{"there_here", plugin::adapt, run_here},
                                         Way{"there_there", plugin::adapt, plugin::run}),
                         [](const auto& way) { return std::string(way.param.name); });

// LibTorch exports parts of another version of the standard library.
TEST(StandardLibrary, IsTheProgramsOwn) {
  const std::filesystem::path folder = std::filesystem::path(testing::TempDir()) / ("lora" + std::to_string(getpid()));
  std::filesystem::create_directories(folder / "inner");
  EXPECT_EQ(std::filesystem::remove_all(folder), 2U);
}

}  // namespace
