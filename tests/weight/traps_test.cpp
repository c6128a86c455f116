// What LibTorch can do to a weight behind a library's back: every trap is an error that says what to do, or works.
#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <c10/core/InferenceMode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/lora.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/jit/serialization/pickle.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/linear.h>
#include <torch/optim/sgd.h>
#include <torch/serialize.h>

#include <array>
#include <functional>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "harness/dense_oracle.h"
#include "harness/models.h"
#include "harness/values.h"

namespace traps_test {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::ThrowsMessage;

lora::LoraConfig config() { return lora::LoraConfig().r(2).lora_alpha(3).target_modules({"up", "down"}); }

/// An Mlp in float32 with one filled adapter.
class AdaptedMlp {
 public:
  AdaptedMlp() { harness::fill(adapters); }
  explicit AdaptedMlp(at::ScalarType dtype) : AdaptedMlp() { model->to(dtype); }

  at::Tensor weight() const { return model->up->weight; }
  at::Tensor base() const { return model->up->named_parameters(/*recurse=*/false)["weight"]; }

  Mlp model = (torch::manual_seed(7), Mlp());
  lora::Adapters adapters = lora::inject(*model, config());
};

at::Tensor input(at::ScalarType dtype = at::kFloat) { return harness::normal({5, 12}, 3, dtype); }

/// The dense sum of the only adapter, in float64.
at::Tensor expected_output(const AdaptedMlp& adapted, const at::Tensor& x) {
  const auto& host = harness::host_cases().front();
  const auto dtype = adapted.base().scalar_type();
  return harness::DenseOracle(host, dtype, adapted.adapters, {{"default", 1.5}}).forward(x);
}

class Autocast {
 public:
  Autocast() {
    at::autocast::set_autocast_enabled(at::kCPU, true);
    at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
    at::autocast::increment_nesting();
  }
  ~Autocast() {
    if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
    at::autocast::set_autocast_enabled(at::kCPU, false);
  }
};

TEST(Autocast, RunsInBFloat16AsThePlainModelWithGradientsInFloat32) {
  Mlp plain = (torch::manual_seed(7), Mlp());
  for (auto& parameter : plain->parameters()) parameter.set_requires_grad(false);
  Mlp model = (torch::manual_seed(7), Mlp());
  const auto adapters = lora::inject(*model, config());
  for (const auto& x : {input(), input().view({1, 5, 12}), input().select(0, 0)}) {
    const Autocast autocast;
    const auto y = model->forward(x);
    EXPECT_EQ(y.scalar_type(), at::kBFloat16);
    EXPECT_TRUE(at::equal(y, plain->forward(x)));
  }
  harness::fill(adapters);
  const auto full = model->forward(input()).detach();
  const Autocast autocast;
  const auto y = model->forward(input());
  EXPECT_LT(harness::relative_error(y, full), 0.05);
  EXPECT_GT(harness::relative_error(plain->forward(input()), full), 0.1) << "the adapter is to matter";
  y.sum().backward();
  for (const auto& [name, tensor] : adapters.named_parameters()) {
    ASSERT_TRUE(tensor.grad().defined()) << name;
    EXPECT_EQ(tensor.grad().scalar_type(), at::kFloat) << name;
    EXPECT_GT(harness::largest(tensor.grad()), 0) << name;
  }
}

TEST(Autocast, LeavesTheDenseWeightOfAFallbackInItsDtype) {
  const AdaptedMlp adapted;
  const auto expected = adapted.weight().clone();
  const Autocast autocast;
  EXPECT_TRUE(at::equal(adapted.weight().clone(), expected));
}

TEST(NoGrad, GivesTheSameOutput) {
  AdaptedMlp adapted;
  const auto expected = adapted.model->forward(input()).detach();
  const at::NoGradGuard no_grad;
  const auto y = adapted.model->forward(input());
  EXPECT_TRUE(at::equal(y, expected));
  EXPECT_FALSE(y.requires_grad());
}

TEST(InferenceMode, RefusesToMakeAdapters) {
  Mlp model;
  {
    const c10::InferenceMode inference;
    EXPECT_THAT([&] { lora::inject(*model, config()); }, ThrowsMessage<lora::StateError>(HasSubstr("InferenceMode")));
  }
  auto adapters = lora::inject(*model, config());
  const c10::InferenceMode inference;
  EXPECT_THROW(adapters.add(config(), "other"), lora::StateError);
}

TEST(InferenceMode, RefusesAModelThatWasMadeInIt) {
  std::unique_ptr<Mlp> model;
  {
    const c10::InferenceMode inference;
    model = std::make_unique<Mlp>();
  }
  EXPECT_THAT(
      [&] { lora::inject(**model, config()); },
      ThrowsMessage<c10::ValueError>(::testing::AllOf(HasSubstr("InferenceMode"), HasSubstr("up"), HasSubstr("down"))));
}

TEST(InferenceMode, ComputesTheSame) {
  AdaptedMlp adapted;
  const auto expected = adapted.model->forward(input()).detach();
  const c10::InferenceMode inference;
  EXPECT_TRUE(at::equal(adapted.model->forward(input()), expected));
}

TEST(InferenceMode, MayChangeAdaptersThatTrainOutsideOfIt) {
  const std::map<std::string, std::function<void(lora::Adapters&)>> changes{
      {"set_active",
       [](auto& a) {
         a.set_active({"other", "default"});
       }},
      {"merge", [](auto& a) { a.merge(); }},
      {"merge and unmerge",
       [](auto& a) {
         a.merge();
         a.unmerge();
       }},
      {"merge one of two",
       [](auto& a) {
         a.set_active({"default", "other"});
         a.merge({"other"});
       }},
      {"remove", [](auto& a) { a.remove("other"); }},
  };
  for (const auto& [name, change] : changes) {
    AdaptedMlp adapted;
    adapted.adapters.add(config(), "other");
    {
      const c10::InferenceMode inference;
      change(adapted.adapters);
      adapted.model->forward(input());
    }
    const auto x = input().requires_grad_();
    ASSERT_NO_THROW(adapted.model->forward(x).sum().backward()) << name;
    EXPECT_TRUE(x.grad().defined()) << name;
    if (!adapted.adapters.merged().empty() && adapted.adapters.active().size() == 1) continue;
    for (const auto& [path, tensor] : adapted.adapters.named_parameters()) EXPECT_TRUE(tensor.grad().defined()) << name;
  }
}

TEST(DirectAccess, IsAnErrorWithAHint) {
  const AdaptedMlp adapted;
  auto W = adapted.weight();
  auto plain = at::zeros({20, 12});
  const std::map<std::string, std::function<void()>> accesses{
      {"storage", [&] { W.storage(); }},
      {"data", [&] { W.data(); }},
      {"tensor_data", [&] { W.tensor_data(); }},
      {"variable_data", [&] { W.variable_data(); }},
      {"data_ptr", [&] { W.data_ptr<float>(); }},
      {"const_data_ptr", [&] { W.const_data_ptr(); }},
      {"accessor", [&] { W.accessor<float, 2>(); }},
      {"packed_accessor", [&] { W.packed_accessor64<float, 2>(); }},
      {"set_data of the weight", [&] { W.set_data(plain); }},
      {"set_data to the weight", [&] { plain.set_data(W); }},
      {"is_alias_of", [&] { W.is_alias_of(plain); }},
      {"torch::save",
       [&] {
         std::ostringstream out;
         torch::save(W, out);
       }},
      {"pickle_save", [&] { torch::jit::pickle_save(W); }},
      {"shallow copy", [&] { W.unsafeGetTensorImpl()->shallow_copy_and_detach(c10::VariableVersion(), true); }},
      {"shallow copy of a slice",
       [&] { W.narrow(0, 0, 2).unsafeGetTensorImpl()->shallow_copy_from(plain.getIntrusivePtr()); }},
  };
  for (const auto& [name, access] : accesses) {
    try {
      access();
      ADD_FAILURE() << name << " was silent";
    } catch (const c10::Error& error) {
      EXPECT_THAT(std::string(error.what_without_backtrace()),
                  ::testing::AnyOf(HasSubstr("unload()"), HasSubstr("storage")))
          << name;
    }
  }
  EXPECT_EQ(plain.sizes(), adapted.base().sizes());
  EXPECT_TRUE(at::equal(plain, at::zeros({20, 12})));
}

/// Another library's tensor on the same dispatch key.
class ForeignImpl final : public c10::TensorImpl {
 public:
  ForeignImpl()
      : c10::TensorImpl(c10::DispatchKeySet(lora::detail::kAdaptedWeightKey), caffe2::TypeMeta::Make<float>(),
                        c10::Device(at::kCPU)) {
    const std::array<int64_t, 2> sizes{20, 12};
    set_sizes_contiguous(c10::IntArrayRef(sizes));
  }
};

TEST(ForeignTensors, OnTheSameKeyAreAnErrorThatSaysSo) {
  const AdaptedMlp adapted;
  const auto foreign = at::detail::make_tensor<ForeignImpl>();
  const std::map<std::string, std::function<void()>> uses{
      {"linear", [&] { at::linear(input(), foreign); }},
      {"matmul", [&] { at::matmul(input(), foreign); }},
      {"t", [&] { foreign.t(); }},
      {"narrow", [&] { foreign.narrow(0, 0, 2); }},
      {"relu", [&] { foreign.relu(); }},
      {"stack",
       [&] {
         at::stack({adapted.weight(), foreign});
       }},
  };
  for (const auto& [name, use] : uses) {
    EXPECT_THAT(use, ThrowsMessage<lora::StateError>(HasSubstr("the two libraries cannot work in one process")))
        << name;
  }
}

/// The member is no parameter: what an optimizer does to it is lost, as guide.md says.
TEST(Optimizer, OverTheMemberChangesNothing) {
  AdaptedMlp adapted;
  const auto before = harness::base_bytes(*adapted.model);
  const auto expected = adapted.model->forward(input()).detach();
  torch::optim::SGD optimizer(std::vector<at::Tensor>{adapted.weight()}, torch::optim::SGDOptions(1));
  adapted.model->forward(input()).sum().backward();
  optimizer.step();
  EXPECT_EQ(harness::base_bytes(*adapted.model), before);
  EXPECT_TRUE(at::equal(adapted.model->forward(input()), expected));
}

TEST(DirectAccess, ReadsTheDenseWeightByOperators) {
  const AdaptedMlp adapted;
  const auto W = adapted.weight();
  const harness::DenseOracle oracle(harness::host_cases().front(), at::kFloat, adapted.adapters, {{"default", 1.5}});
  const auto expected = oracle.weights().at("up.weight").value.to(at::kFloat);
  for (const auto& read :
       {W.clone(), W.view({20, 12}), W.permute({1, 0}).t(), W.detach(), W.to(at::kDouble).to(at::kFloat),
        W.contiguous().clone(), W.reshape({240}).reshape({20, 12})}) {
    EXPECT_LT(harness::relative_error(read, expected), 1e-6);
  }
  EXPECT_FALSE(W.detach().requires_grad());
  EXPECT_TRUE(W.clone().requires_grad());
  EXPECT_NEAR(W.select(0, 3).select(0, 4).item<float>(), expected[3][4].item<float>(), 1e-6);
  std::ostringstream printed;
  printed << W;
  EXPECT_THAT(printed.str(), HasSubstr("20,12"));
}

TEST(To, MovesTheBaseAndKeepsTheAdaptersInFloat32OnAHalfBase) {
  for (const auto dtype : {at::kBFloat16, at::kHalf, at::kDouble, at::kFloat}) {
    AdaptedMlp adapted;
    const auto registered = adapted.base();
    adapted.model->to(dtype);
    EXPECT_EQ(adapted.weight().scalar_type(), dtype) << "announced at once, before any forward";
    EXPECT_EQ(adapted.weight().t().scalar_type(), dtype);
    EXPECT_EQ(adapted.base().scalar_type(), dtype);
    EXPECT_TRUE(adapted.base().is_same(registered));
    for (const auto& [name, tensor] : adapted.adapters.named_parameters()) {
      EXPECT_EQ(tensor.scalar_type(), dtype == at::kDouble ? at::kDouble : at::kFloat) << name;
    }
    const auto x = input(dtype);
    const auto y = adapted.model->forward(x);
    EXPECT_EQ(y.scalar_type(), dtype);
    EXPECT_LT(harness::relative_error(y, expected_output(adapted, x)), 64 * harness::epsilon(dtype));
    y.sum().backward();
    EXPECT_LT(harness::relative_error(adapted.weight().clone(), adapted.base()), 10) << "the fallback follows";
  }
}

TEST(To, LeavesAdaptersInTheBasesDtypeWhenAskedTo) {
  Mlp model;
  model->to(at::kBFloat16);
  const auto adapters = lora::inject(*model, config().autocast_adapter_dtype(false));
  for (const auto& [name, tensor] : adapters.named_parameters()) EXPECT_EQ(tensor.scalar_type(), at::kBFloat16) << name;
  model->to(at::kHalf);
  for (const auto& [name, tensor] : adapters.named_parameters()) EXPECT_EQ(tensor.scalar_type(), at::kHalf) << name;
}

TEST(To, FollowsADeviceAndTheSameTensorStays) {
  AdaptedMlp adapted;
  const auto before = adapted.adapters.parameters();
  const auto expected = adapted.model->forward(input());
  adapted.model->to(torch::Device(at::kCPU));
  adapted.model->to(torch::Device(at::kCPU), at::kFloat);
  EXPECT_TRUE(at::equal(adapted.model->forward(input()), expected));
  const auto after = adapted.adapters.parameters();
  for (size_t i = 0; i < before.size(); ++i) EXPECT_TRUE(before[i].is_same(after[i]));
}

TEST(To, MovesAMergedModel) {
  AdaptedMlp adapted;
  adapted.adapters.merge();
  const auto merged = adapted.weight();
  adapted.model->to(at::kBFloat16);
  EXPECT_TRUE(at::equal(adapted.weight(), merged.to(at::kBFloat16)));
  EXPECT_NO_THROW(adapted.model->forward(input(at::kBFloat16)));
  const auto registered = adapted.base();
  adapted.adapters.unmerge();
  EXPECT_EQ(harness::bytes_of(registered),
            harness::bytes_of((torch::manual_seed(7), Mlp())->up->weight.to(at::kBFloat16)));
  EXPECT_EQ(adapted.model->forward(input(at::kBFloat16)).scalar_type(), at::kBFloat16);
}

TEST(To, MovesAPartlyMergedModel) {
  AdaptedMlp adapted;
  adapted.adapters.add(config(), "other");
  harness::fill(adapted.adapters, "other", 70);
  adapted.adapters.set_active({"default", "other"});
  adapted.adapters.merge({"other"});
  adapted.model->to(at::kDouble);
  EXPECT_EQ(adapted.weight().scalar_type(), at::kDouble);
  const harness::DenseOracle oracle(harness::host_cases().front(), at::kFloat, adapted.adapters,
                                    {{"default", 1.5}, {"other", 1.5}});
  EXPECT_LT(harness::relative_error(adapted.model->forward(input(at::kDouble)), oracle.forward(input())), 1e-6);
}

TEST(SetData, OfEveryParameterInALoopIsFollowed) {
  AdaptedMlp adapted;
  for (auto& parameter : adapted.model->parameters()) parameter.set_data(parameter.data().to(at::kDouble));
  for (int pass = 0; pass < 2; ++pass) {
    const auto x = input(at::kDouble);
    EXPECT_LT(harness::relative_error(adapted.model->forward(x), expected_output(adapted, x)), 1e-12);
    EXPECT_EQ(adapted.weight().scalar_type(), at::kDouble) << "after a forward";
  }
}

TEST(Modes, ReachTheAdapters) {
  AdaptedMlp adapted;
  adapted.model->forward(input()).sum().backward();
  adapted.model->zero_grad();
  for (const auto& tensor : adapted.adapters.parameters()) {
    EXPECT_TRUE(!tensor.grad().defined() || harness::largest(tensor.grad()) == 0);
  }
  adapted.model->eval();
  for (const auto& module : adapted.model->modules()) EXPECT_FALSE(module->is_training());
  adapted.model->train();
  for (const auto& module : adapted.model->modules()) EXPECT_TRUE(module->is_training());
  EXPECT_EQ(adapted.model->parameters().size(), 3u + 4u);
}

std::string archived(const std::function<void(torch::serialize::OutputArchive&)>& write) {
  torch::serialize::OutputArchive archive;
  write(archive);
  std::ostringstream out;
  archive.save_to(out);
  return out.str();
}

void load_archive(torch::nn::Module& model, const std::string& bytes) {
  std::istringstream in(bytes);
  torch::serialize::InputArchive archive;
  archive.load_from(in);
  model.load(archive);
}

TEST(Archives, OfThePlainModelLoadIntoTheInjectedOneAndBack) {
  Mlp plain = (torch::manual_seed(1), Mlp());
  const auto plain_archive = archived([&](auto& archive) { plain->save(archive); });

  AdaptedMlp adapted;
  const auto registered = adapted.base();
  load_archive(*adapted.model, plain_archive);
  EXPECT_TRUE(at::equal(adapted.base(), plain->up->weight));
  EXPECT_TRUE(adapted.base().is_same(registered));
  EXPECT_FALSE(adapted.base().requires_grad());
  adapted.adapters.set_active({});
  EXPECT_TRUE(at::equal(adapted.model->forward(input()), plain->forward(input())));
  adapted.adapters.set_active({"default"});

  for (const bool merged : {false, true}) {
    if (merged) adapted.adapters.merge();
    Mlp other = (torch::manual_seed(2), Mlp());
    load_archive(*other, archived([&](auto& archive) { adapted.model->save(archive); }));
    EXPECT_TRUE(at::equal(other->forward(input()), plain->forward(input()))) << "merged: " << merged;
  }
  Mlp last = (torch::manual_seed(3), Mlp());
  adapted.adapters.merge_and_unload();
  load_archive(*last, archived([&](auto& archive) { adapted.model->save(archive); }));
  EXPECT_TRUE(at::equal(last->forward(input()), adapted.model->forward(input())));
}

TEST(Gradients, ReachAnUnfrozenBaseToo) {
  AdaptedMlp adapted;
  adapted.base().set_requires_grad(true);
  adapted.model->forward(input()).sum().backward();
  ASSERT_TRUE(adapted.base().grad().defined());
  EXPECT_EQ(adapted.base().grad().sizes(), adapted.base().sizes());
}

TEST(Gradients, AreDifferentiableAgain) {
  AdaptedMlp adapted(at::kDouble);
  const auto x = input(at::kDouble).requires_grad_();
  const auto parameters = adapted.adapters.parameters();
  const auto first = torch::autograd::grad({adapted.model->forward(x).pow(2).sum()}, {x}, {}, /*retain_graph=*/true,
                                           /*create_graph=*/true);
  const auto second = torch::autograd::grad({first[0].pow(2).sum()}, parameters);
  for (const auto& gradient : second) EXPECT_GT(harness::largest(gradient), 0);
}

TEST(Bases, MayBeStridedOrEmpty) {
  torch::nn::Sequential model(torch::nn::Linear(12, 20));
  auto& linear = *model[0]->as<torch::nn::Linear>();
  linear.weight.set_data(harness::normal({12, 20}, 4, at::kFloat).t());
  ASSERT_FALSE(linear.weight.is_contiguous());
  const auto base = linear.weight;
  auto adapters = lora::inject(*model, lora::LoraConfig().r(2).lora_alpha(3).target_modules({"0"}));
  harness::fill(adapters);
  const auto tensors = adapters.named_tensors("default");
  const auto dense = base.detach() + 1.5 * tensors[1].second.mm(tensors[0].second);
  const auto expected = at::linear(input(), dense, linear.bias);
  EXPECT_LT(harness::relative_error(model->forward(input()), expected), 1e-5);
  adapters.merge();
  EXPECT_LT(harness::relative_error(model->forward(input()), expected), 1e-5);
  adapters.merge_and_unload();
  EXPECT_LT(harness::relative_error(linear.weight, dense), 1e-6);
  EXPECT_TRUE(linear.weight.is_same(base));

  for (const auto& [in, out] : std::vector<std::pair<int64_t, int64_t>>{{0, 3}, {3, 0}, {1, 1}}) {
    torch::nn::Sequential small(harness::Projection(in, out));
    const auto plain = small->forward(at::ones({2, in}));
    auto edge = lora::inject(*small, lora::LoraConfig().r(2).target_modules({"0"}));
    EXPECT_TRUE(at::equal(small->forward(at::ones({2, in})), plain)) << in << " to " << out;
    edge.merge();
    EXPECT_TRUE(at::equal(small->forward(at::ones({2, in})), plain)) << in << " to " << out;
    edge.unload();
  }
}

}  // namespace
}  // namespace traps_test
