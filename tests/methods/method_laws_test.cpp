// The laws for every method on every kind of layer, against W′ formed densely in float64 by the method's formula.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/lora.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/linear.h>

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "harness/dense_oracle.h"
#include "harness/message_of.h"
#include "harness/methods.h"
#include "harness/models.h"
#include "harness/temp_folder.h"
#include "harness/values.h"

namespace method_laws_test {
namespace {

using harness::MethodOnHost;
using harness::relative_error;
using harness::Tensors;
using ::testing::IsEmpty;

/// The plain model with W0 + Σ (W′ − W0) in place of its weights, all in float64.
class Oracle {
 public:
  Oracle(const MethodOnHost& tested, at::ScalarType dtype, const lora::Adapters& adapters,
         const std::vector<std::string>& names = {"default"})
      : subject_(tested.host.make()) {
    subject_.module->to(dtype);
    subject_.module->to(at::kDouble);
    const auto parameters = subject_.module->named_parameters();
    for (const auto& name : names) {
      Tensors tensors, shared;
      for (const auto& [path, tensor] : adapters.named_tensors(name)) {
        const auto local = path.substr(path.rfind('.') + 1);
        tensors[path] = tensor.detach().to(at::kDouble).clone();
        const bool is_start = local == "lora_A_start" || local == "lora_B_start";
        if (local == "vera_A" || local == "vera_B") {
          shared[local] = tensors[path];
        } else if (!is_start) {
          trained_[path] = tensors[path].requires_grad_(true);
        }
      }
      for (const auto& rows : tested.host.rows) add(tested.method, rows, name, tensors, shared, parameters);
    }
    const at::NoGradGuard no_grad;
    for (const auto& change : changes_) {
      auto target = change.matrix(parameters[change.parameter]).narrow(0, change.begin, change.value.size(0));
      target.add_(change.value);
    }
  }

  at::Tensor forward(const at::Tensor& x) const { return subject_.forward(x.detach().to(at::kDouble)).detach(); }

  at::Tensor parameter(const std::string& name) const { return subject_.module->named_parameters()[name].detach(); }
  const std::vector<std::string>& changed() const { return changed_; }

  /// Gradients of (y·g).sum() by x ("x") and by every trained tensor.
  Tensors gradients(const at::Tensor& x, const at::Tensor& g) const {
    std::vector<at::Tensor> inputs{x.detach().to(at::kDouble).requires_grad_(true)};
    for (const auto& name : changed_) inputs.push_back(subject_.module->named_parameters()[name]);
    const auto found = torch::autograd::grad({(subject_.forward(inputs[0]) * g).sum()}, inputs);
    at::Tensor sum = at::zeros({}, at::kDouble);
    for (const auto& change : changes_) {
      const auto index =
          static_cast<size_t>(std::find(changed_.begin(), changed_.end(), change.parameter) - changed_.begin());
      const auto d = change.matrix(found[index + 1]).narrow(0, change.begin, change.value.size(0));
      sum = sum + (d * change.value).sum();
    }
    std::vector<at::Tensor> leaves;
    for (const auto& [name, tensor] : trained_) leaves.push_back(tensor);
    const auto by_leaf = torch::autograd::grad({sum}, leaves);
    Tensors result{{"x", found[0]}};
    size_t next = 0;
    for (const auto& [name, tensor] : trained_) result[name] = by_leaf[next++];
    return result;
  }

 private:
  struct Change {
    std::string parameter;
    int64_t begin;
    at::Tensor value;  // W′ − W0 of some rows, or b′ − b
    harness::AdaptedRows rows;
    bool is_bias;

    at::Tensor matrix(const at::Tensor& stored) const { return is_bias ? stored : rows.matrix(stored); }
  };

  void add(const harness::MethodCase& method, const harness::AdaptedRows& rows, const std::string& name,
           const Tensors& tensors, const Tensors& shared,
           const torch::OrderedDict<std::string, at::Tensor>& parameters) {
    auto path = rows.tensors;
    path.replace(path.find('*'), 1, "lora_" + name);
    auto local = shared;
    for (const auto& [full, tensor] : tensors) {
      if (full.rfind(path + ".", 0) == 0 && full.find('.', path.size() + 1) == std::string::npos) {
        local[full.substr(path.size() + 1)] = tensor;
      }
    }
    const auto matrix = rows.matrix(parameters[rows.parameter].detach().clone());
    const auto last = path.substr(path.rfind('.') + 1);
    const auto size = last == "q" || last == "v" ? matrix.size(0) / 3 : matrix.size(0);
    const auto W0 = matrix.narrow(0, rows.row, size);
    note(rows.parameter);
    changes_.push_back({rows.parameter, rows.row, method.weight(W0, local) - W0, rows, false});

    auto bias = rows.parameter;
    auto begin = rows.row;
    const auto at = bias.rfind("weight");
    if (!method.bias || at == std::string::npos) return;
    bias.replace(at, 6, "bias");
    for (const auto& [name_of_weight, third] :
         {std::pair{"attn.q_proj_bias", 0}, {"attn.k_proj_bias", 1}, {"attn.v_proj_bias", 2}}) {
      if (bias != name_of_weight) continue;
      begin = third * size;
      bias = "attn.in_proj_bias";
    }
    if (!parameters.contains(bias)) return;
    const auto b = parameters[bias].detach().clone().narrow(0, begin, size);
    note(bias);
    changes_.push_back({bias, begin, method.bias(b, local) - b, rows, true});
  }

  void note(const std::string& parameter) {
    if (std::find(changed_.begin(), changed_.end(), parameter) == changed_.end()) changed_.push_back(parameter);
  }

  harness::Subject subject_;
  Tensors trained_;
  std::vector<Change> changes_;
  std::vector<std::string> changed_;
};

class MethodLaws : public ::testing::TestWithParam<MethodOnHost> {
 protected:
  harness::Subject subject(at::ScalarType dtype = at::kDouble) const {
    auto subject = GetParam().host.make();
    subject.module->to(dtype);
    return subject;
  }
  lora::Adapters inject(const harness::Subject& model) const {
    return GetParam().method.inject(*model.module, GetParam().host.targets);
  }
  lora::Adapters filled(const harness::Subject& model) const {
    auto adapters = inject(model);
    harness::fill(adapters);
    return adapters;
  }
  at::Tensor x(at::ScalarType dtype = at::kDouble) const { return harness::normal(GetParam().host.input, 3, dtype); }
};

TEST_P(MethodLaws, StartsAtTheModelsOutputWithTheFormulasNumberOfParameters) {
  const auto model = subject();
  const auto adapters = inject(model);
  EXPECT_LT(relative_error(model.forward(x()), subject().forward(x())), 1e-13);
  int64_t expected = 0;
  for (const auto& rows : GetParam().host.rows) {
    const auto parameter = model.module->named_parameters()[rows.parameter];
    const auto matrix = rows.matrix(parameter.detach());
    const auto last = rows.tensors.substr(rows.tensors.rfind('.') + 1);
    const auto out = last == "q" || last == "v" ? matrix.size(0) / 3 : matrix.size(0);
    const auto kernel = parameter.dim() > 2 ? matrix.size(1) / parameter.size(1) : 1;
    expected += GetParam().method.parameters({out, matrix.size(1), kernel});
  }
  int64_t found = 0;
  for (const auto& tensor : adapters.parameters()) found += tensor.numel();
  EXPECT_EQ(found, expected);
  EXPECT_EQ(adapters.report().trainable_parameters, expected);
}

TEST_P(MethodLaws, ComputesTheFormulaWithItsGradients) {
  const auto model = subject();
  const auto adapters = filled(model);
  const Oracle oracle(GetParam(), at::kDouble, adapters);
  const auto input = x().requires_grad_(true);
  const auto y = model.forward(input);
  EXPECT_LT(relative_error(y, oracle.forward(x())), 1e-12);
  EXPECT_GT(relative_error(subject().forward(x()), oracle.forward(x())), 1e-3) << "the adapter is to matter";
  const auto g = harness::normal(y.sizes(), 5);
  (y * g).sum().backward();
  auto expected = oracle.gradients(x(), g);
  EXPECT_LT(relative_error(input.grad(), expected.at("x")), 1e-11);
  for (const auto& [name, tensor] : adapters.named_parameters()) {
    ASSERT_TRUE(tensor.grad().defined()) << name;
    EXPECT_LT(relative_error(tensor.grad(), expected.at(name)), 1e-11) << name;
  }
  const at::NoGradGuard no_grad;
  EXPECT_LT(relative_error(model.forward(x()), oracle.forward(x())), 1e-12) << "by what is kept for inference";
  EXPECT_LT(relative_error(model.forward(x()), oracle.forward(x())), 1e-12) << "a second time";
  harness::fill(adapters, "default", 400);
  EXPECT_LT(relative_error(model.forward(x()), Oracle(GetParam(), at::kDouble, adapters).forward(x())), 1e-12)
      << "after a change";
}

TEST_P(MethodLaws, KeepsTheWeightFactored) {
  const auto model = subject();
  const auto adapters = filled(model);
  model.forward(x().requires_grad_(true)).sum().backward();
  if (GetParam().method.forms_dense || !GetParam().host.dense_operator.empty()) {
    EXPECT_FALSE(adapters.fallbacks().empty());
  } else {
    EXPECT_THAT(adapters.fallbacks(), IsEmpty());
  }
}

TEST_P(MethodLaws, MergesAndUnmerges) {
  const auto model = subject();
  auto adapters = filled(model);
  const Oracle oracle(GetParam(), at::kDouble, adapters);
  const auto unmerged = model.forward(x());
  const auto before = harness::parameter_state(*model.module);
  for (int cycle = 0; cycle < 3; ++cycle) {
    adapters.merge();
    EXPECT_LT(relative_error(model.forward(x()), oracle.forward(x())), 1e-12);
    adapters.unmerge();
  }
  EXPECT_EQ(harness::parameter_state(*model.module), before);
  EXPECT_TRUE(at::equal(model.forward(x()), unmerged));
  adapters.merge_and_unload();
  const auto parameters = model.module->named_parameters();
  for (const auto& name : oracle.changed()) {
    EXPECT_LT(relative_error(parameters[name], oracle.parameter(name)), 1e-13) << name;
  }
  EXPECT_LT(relative_error(model.forward(x()), oracle.forward(x())), 1e-12);
}

TEST_P(MethodLaws, MergesWithoutTheBaseToTheSameBits) {
  const auto at_once = subject(), one_by_one = subject();
  filled(at_once).merge_and_unload();
  filled(one_by_one).merge(lora::MergeOptions().keep_base(false));
  EXPECT_EQ(harness::base_bytes(*one_by_one.module), harness::base_bytes(*at_once.module));
  EXPECT_NE(harness::base_bytes(*one_by_one.module), harness::base_bytes(*subject().module));
}

TEST_P(MethodLaws, IsClonedWithTensorsOfItsOwn) {
  if (GetParam().host.name != "Sequential") return;  // the others have no clone()
  const auto model = subject();
  const auto adapters = filled(model);
  const auto sequential = std::dynamic_pointer_cast<torch::nn::SequentialImpl>(model.module);
  ASSERT_NE(sequential, nullptr);
  const auto y = model.forward(x());
  const auto copy = lora::clone(*sequential);
  EXPECT_TRUE(at::equal(copy->forward(x()), y));
  harness::fill(lora::adapters_of(*copy), "default", 500);
  EXPECT_FALSE(at::equal(copy->forward(x()), y));
  EXPECT_TRUE(at::equal(model.forward(x()), y));
}

TEST_P(MethodLaws, SumsSeveralMergedOrNot) {
  const auto model = subject();
  auto adapters = filled(model);
  GetParam().method.add(adapters, GetParam().host.targets, "other");
  harness::fill(adapters, "other", 70);
  adapters.set_active({"default", "other"});
  const Oracle oracle(GetParam(), at::kDouble, adapters, {"default", "other"});
  const auto expected = oracle.forward(x());
  EXPECT_LT(relative_error(model.forward(x()), expected), 1e-12);
  adapters.merge({"other"});
  EXPECT_LT(relative_error(model.forward(x()), expected), 1e-12) << "partly merged";
  adapters.merge();
  EXPECT_LT(relative_error(model.forward(x()), expected), 1e-12) << "merged";
}

TEST_P(MethodLaws, IsLoadedAsItWasSaved) {
  const TempFolder folder;
  const auto model = subject();
  const auto adapters = filled(model);
  const auto y = model.forward(x());
  adapters.save(folder / "adapter");
  const auto again = subject();
  const auto loaded = lora::load(*again.module, folder / "adapter");
  const auto expected = adapters.named_tensors("default"), found = loaded.named_tensors("default");
  ASSERT_EQ(found.size(), expected.size());
  for (size_t i = 0; i < found.size(); ++i) {
    EXPECT_EQ(found[i].first, expected[i].first);
    EXPECT_TRUE(at::equal(found[i].second, expected[i].second)) << found[i].first;
  }
  EXPECT_TRUE(at::equal(again.forward(x()), y));
}

TEST_P(MethodLaws, HoldsInLowerPrecision) {
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const auto model = subject(dtype);
    auto adapters = filled(model);
    const Oracle oracle(GetParam(), dtype, adapters);
    const auto expected = oracle.forward(x(dtype));
    const double rounding = 24 * harness::epsilon(dtype);
    const auto y = model.forward(x(dtype));
    EXPECT_LT(relative_error(y, expected), rounding) << dtype;
    EXPECT_EQ(y.scalar_type(), dtype);
    const auto g = harness::normal(y.sizes(), 5, dtype);
    (y * g).sum().backward();
    const auto gradients = oracle.gradients(x(dtype), g.to(at::kDouble));
    for (const auto& [name, tensor] : adapters.named_parameters()) {
      EXPECT_EQ(tensor.scalar_type(), at::kFloat) << name;
      if (dtype != at::kFloat) continue;  // bfloat16's rounding of what lies between is as large as some gradients
      EXPECT_LT(relative_error(tensor.grad(), gradients.at(name)), 2 * rounding) << name;
    }
    adapters.merge();
    EXPECT_LT(relative_error(model.forward(x(dtype)), expected), rounding) << dtype << " merged";
  }
}

INSTANTIATE_TEST_SUITE_P(Methods, MethodLaws, ::testing::ValuesIn(harness::methods_on_hosts(true)),
                         harness::method_on_host_name);

class MethodRefusals : public ::testing::TestWithParam<MethodOnHost> {};

TEST_P(MethodRefusals, AreToldByNameAndChangeNothing) {
  const auto model = GetParam().host.make();
  const auto before = harness::parameter_state(*model.module);
  const auto message = harness::message_of([&] { GetParam().method.inject(*model.module, GetParam().host.targets); });
  EXPECT_THAT(message, ::testing::HasSubstr("[lora::inject] found "));
  EXPECT_THAT(message, ::testing::HasSubstr(", expected "));
  EXPECT_EQ(harness::parameter_state(*model.module), before);
}

INSTANTIATE_TEST_SUITE_P(Methods, MethodRefusals, ::testing::ValuesIn(harness::methods_on_hosts(false)),
                         harness::method_on_host_name);

}  // namespace
}  // namespace method_laws_test
