// Small TorchScript models, one for each way in which a script multiplies with a weight, and their dense oracle.
#pragma once

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <lora/adapters.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/jit/api/module.h>

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "harness/script.h"
#include "harness/values.h"

namespace harness {

/// The rows of a slot from `row` on that one pair A, B acts on; "*" in `tensors` stands for the adapter's name.
struct ScriptRows {
  std::string tensors;    // "body.up.lora_*"
  std::string module;     // "body.up"; empty: the root
  std::string attribute;  // "weight"
  int64_t row = 0;
  bool transposed = false;  // the slot holds [in, out], or a table's [entries, out]
  bool table = false;
};

struct ScriptCase {
  std::string name;
  std::function<torch::jit::Module()> make;  // in float64, the same values every time
  std::vector<int64_t> input;
  lora::TargetModules targets;
  std::vector<std::string> sites;  // as the report names them, in order
  std::vector<ScriptRows> rows;
};

inline void PrintTo(const ScriptCase& script, std::ostream* out) { *out << script.name; }
inline std::string script_case_name(const ::testing::TestParamInfo<ScriptCase>& info) { return info.param.name; }

inline void add_parameter(torch::jit::Module& module, const std::string& name, at::IntArrayRef sizes, uint64_t seed) {
  module.register_parameter(name, (normal(sizes, seed) * 0.4).requires_grad_(true), /*is_buffer=*/false);
}

inline torch::jit::Module script_linear(int64_t in, int64_t out, bool bias, uint64_t seed) {
  torch::jit::Module linear("Linear");
  add_parameter(linear, "weight", {out, in}, seed);
  if (bias) add_parameter(linear, "bias", {out}, seed + 1);
  linear.register_attribute("training", c10::BoolType::get(), true);
  linear.define(bias ? "def forward(self, x):\n  return torch.linear(x, self.weight, self.bias)\n"
                     : "def forward(self, x):\n  return torch.linear(x, self.weight)\n");
  return linear;
}

/// Linear layers below a submodule, with a dropout of the model's own that is off in eval.
inline torch::jit::Module script_layers() {
  torch::jit::Module body("Body");
  body.register_module("up", script_linear(12, 20, true, 1));
  body.register_module("down", script_linear(20, 8, false, 3));
  body.register_attribute("training", c10::BoolType::get(), true);
  body.define("def forward(self, x):\n  return self.down.forward(torch.tanh(self.up.forward(x)))\n");
  torch::jit::Module root("Root");
  root.register_module("body", body);
  add_parameter(root, "scale", {8}, 5);
  root.register_attribute("training", c10::BoolType::get(), true);
  root.define("def forward(self, x):\n  return self.body.forward(x) * self.scale\n");
  return root;
}

/// One Linear under two names, run twice.
inline torch::jit::Module script_twice() {
  const auto linear = script_linear(12, 9, true, 11);
  torch::jit::Module root("Root");
  root.register_module("first", linear);
  root.register_module("again", linear);
  root.define("def forward(self, x):\n  return self.first.forward(x) + torch.tanh(self.again.forward(x * 0.5))\n");
  return root;
}

/// A forward that reads its child's weight by itself.
inline torch::jit::Module script_functional() {
  torch::jit::Module child("Weights");
  add_parameter(child, "weight", {9, 12}, 21);
  torch::jit::Module root("Root");
  root.register_module("child", child);
  root.define("def forward(self, x):\n  return torch.tanh(torch.linear(x, self.child.weight))\n");
  return root;
}

/// Products by matmul, mm and addmm with weights held either way, one of them in a method that gets it as an argument.
inline torch::jit::Module script_products() {
  torch::jit::Module root("Root");
  add_parameter(root, "turned", {10, 12}, 31);
  add_parameter(root, "straight", {10, 7}, 32);
  add_parameter(root, "conv1d", {7, 6}, 33);
  add_parameter(root, "passed", {5, 6}, 34);
  add_parameter(root, "bias", {6}, 35);
  root.define(R"(
def project(self, x, w):
  return torch.matmul(x, w.transpose(0, 1))
def forward(self, x):
  h = torch.tanh(torch.matmul(x, self.turned.t()))
  h = torch.tanh(torch.mm(h, self.straight))
  return self.project(torch.tanh(torch.addmm(self.bias, h, self.conv1d)), self.passed)
)");
  return root;
}

/// A fused projection used as a whole and in slices.
inline torch::jit::Module script_fused() {
  torch::jit::Module root("Root");
  add_parameter(root, "in_proj_weight", {30, 12}, 41);
  root.define(R"(
def forward(self, x):
  q, k, v = torch.chunk(torch.linear(x, self.in_proj_weight), 3, -1)
  again = torch.linear(x, self.in_proj_weight[10:20])
  return torch.tanh(q) * k + v * again
)");
  return root;
}

inline torch::jit::Module script_layer(const std::string& type, at::IntArrayRef sizes, uint64_t seed) {
  torch::jit::Module layer(type);
  add_parameter(layer, "weight", sizes, seed);
  layer.register_attribute("training", c10::BoolType::get(), true);
  return layer;
}

/// Rows of a table, chosen by the order of x's values.
inline torch::jit::Module script_lookup() {
  auto table = script_layer("Embedding", {11, 6}, 51);
  table.define("def forward(self, ids):\n  return torch.embedding(self.weight, ids, 4)\n");
  torch::jit::Module root("Root");
  root.register_module("wte", table);
  root.define(R"(
def forward(self, x):
  ids = torch.argsort(x.detach(), stable=True, dim=-1)
  return torch.tanh(self.wte.forward(ids) * x.unsqueeze(-1))
)");
  return root;
}

/// Convolutions as a script calls them and as a trace records them, one with groups.
inline torch::jit::Module script_convolutions() {
  auto called = script_layer("Conv2d", {4, 3, 3, 2}, 61);
  called.define("def forward(self, x):\n  return torch.conv2d(x, self.weight, None, [1, 2], [1, 0], [1, 1], 1)\n");
  auto recorded = script_layer("Conv2d", {10, 2, 2, 2}, 62);
  recorded.define(
      "def forward(self, x):\n  return torch._convolution(x, self.weight, None, [1, 1], [0, 0], [2, 1], False, [0, 0], "
      "2, "
      "False, False, True, True)\n");
  torch::jit::Module root("Root");
  root.register_module("called", called);
  root.register_module("recorded", recorded);
  root.define("def forward(self, x):\n  return self.recorded.forward(torch.tanh(self.called.forward(x)))\n");
  return root;
}

inline const std::vector<ScriptCase>& script_cases() {
  static const std::vector<ScriptCase> cases{
      {"Layers",
       &script_layers,
       {5, 12},
       {"up", "body.down"},
       {"body.up", "body.down"},
       {{"body.up.lora_*", "body.up", "weight"}, {"body.down.lora_*", "body.down", "weight"}}},
      {"LayersOf3dInput",
       &script_layers,
       {2, 3, 12},
       "all-linear",
       {"body.up", "body.down"},
       {{"body.up.lora_*", "body.up", "weight"}, {"body.down.lora_*", "body.down", "weight"}}},
      {"Twice", &script_twice, {4, 12}, {"again"}, {"first"}, {{"first.lora_*", "first", "weight"}}},
      {"Functional", &script_functional, {4, 12}, {"child"}, {"child"}, {{"child.lora_*", "child", "weight"}}},
      {"Products",
       &script_products,
       {4, 12},
       "all-linear",
       {"turned", "straight", "conv1d", "passed"},
       {{"lora_*.turned", "", "turned"},
        {"lora_*.straight", "", "straight", 0, true},
        {"lora_*.conv1d", "", "conv1d", 0, true},
        {"lora_*.passed", "", "passed"}}},
      {"FusedParts",
       &script_fused,
       {4, 12},
       {"in_proj_weight[q,v]"},
       {"in_proj_weight"},
       {{"lora_*.q", "", "in_proj_weight", 0}, {"lora_*.v", "", "in_proj_weight", 20}}},
      {"Lookup", &script_lookup, {3, 9}, {"wte"}, {"wte"}, {{"wte.lora_*", "wte", "weight", 0, true, true}}},
      {"Convolutions",
       &script_convolutions,
       {2, 3, 5, 7},
       {"called", "recorded"},
       {"called", "recorded"},
       {{"called.lora_*", "called", "weight"}, {"recorded.lora_*", "recorded", "weight"}}},
      {"PartsOfColumns",
       &script_products,
       {4, 12},
       {"conv1d[q,v]"},
       {"conv1d"},
       {{"lora_*.q", "", "conv1d", 0, true}, {"lora_*.v", "", "conv1d", 4, true}}},
  };
  return cases;
}

/// A twin of the model whose slots hold W0 + Σ s·B·A, for the executor an unknown model that is not optimised.
class ScriptOracle {
 public:
  ScriptOracle(const ScriptCase& script, const lora::Adapters& adapters,
               const std::vector<std::pair<std::string, double>>& scalings)
      : module_(script.make()) {
    const at::NoGradGuard no_grad;
    for (const auto& parameter : module_.parameters()) parameter.set_requires_grad(false);
    for (const auto& [adapter, scaling] : scalings) {
      std::map<std::string, at::Tensor> tensors;
      for (const auto& [name, tensor] : adapters.named_tensors(adapter)) tensors[name] = tensor;
      for (const auto& rows : script.rows) {
        auto path = rows.tensors;
        path.replace(path.find('*'), 1, adapter);
        const std::string A = rows.table ? "lora_embedding_A" : "lora_A",
                          B = rows.table ? "lora_embedding_B" : "lora_B";
        if (tensors.count(path + "." + A) == 0) continue;  // this adapter has other targets
        const Pair pair{
            {path, tensors[path + "." + A].detach().clone(), tensors[path + "." + B].detach().clone(), scaling, A, B},
            rows};
        block(slot(rows), rows, pair.B.size(0)).add_(at::mm(pair.B, pair.A), scaling);
        pairs_.push_back(pair);
      }
    }
  }

  at::Tensor forward(const at::Tensor& x) { return run(module_, x.detach()).detach(); }

  /// Gradients of (y·g).sum() by x ("x") and by every A and B.
  std::map<std::string, at::Tensor> gradients(const at::Tensor& x, const at::Tensor& g) {
    std::vector<at::Tensor> inputs{x.detach().clone().requires_grad_(true)};
    for (const auto& pair : pairs_) inputs.push_back(slot(pair.rows).requires_grad_(true));
    const auto found = torch::autograd::grad({run(module_, inputs[0])}, inputs, {g});
    std::map<std::string, at::Tensor> result{{"x", found[0]}};
    for (size_t i = 0; i < pairs_.size(); ++i) {
      const auto& pair = pairs_[i];
      const auto dW = block(found[i + 1], pair.rows, pair.B.size(0));
      pair.add_gradients(dW, result);
    }
    return result;
  }

 private:
  struct Pair : Factors {
    ScriptRows rows;
  };

  at::Tensor slot(const ScriptRows& rows) const {
    return submodule(module_, rows.module).attr(rows.attribute).toTensor();
  }

  static at::Tensor block(const at::Tensor& slot, const ScriptRows& rows, int64_t count) {
    return (rows.transposed ? slot.t() : slot.flatten(1)).narrow(0, rows.row, count);
  }

  torch::jit::Module module_;
  std::vector<Pair> pairs_;
};

}  // namespace harness
