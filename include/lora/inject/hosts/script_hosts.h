#pragma once

#include <c10/core/GradMode.h>
#include <lora/detail/error.h>
#include <lora/inject/hosts/script_object.h>
#include <lora/inject/site.h>
#include <lora/version.h>
#include <lora/weight/host.h>
#include <torch/csrc/jit/api/function_impl.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>
#include <torch/csrc/jit/passes/inliner.h>
#include <torch/csrc/jit/runtime/interpreter.h>

#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// A weight attribute of a TorchScript module. It has one slot and the module takes no C++ child: the carrier stands in
/// the slot itself.
class ScriptHost final : public Host {
 public:
  ScriptHost(const torch::jit::Module& module, std::string attribute)
      : object_(module), attribute_(std::move(attribute)) {}

  torch::jit::Module module() const { return object_.module(); }
  bool alive() const override { return object_.alive(); }
  void hold(const std::set<const void*>& alive) override { object_.hold(alive); }
  void let_go() override {
    // A carrier that somebody else holds, as a copy of the module does, may run when the object is gone.
    if (object_.alive()) {
      const auto slot = weight();
      if (as_carrier(slot) != nullptr && slot.use_count() > 2) return;
    }
    object_.let_go();
  }
  bool training() const override { return object_.flag("training"); }
  at::Tensor weight() const override { return module().attr(attribute_).toTensor(); }
  void set_weight(const at::Tensor& weight) override { module().setattr(attribute_, weight); }
  void set_parameter(const at::Tensor& tensor) override { set_weight(tensor); }
  bool takes_nodes() const override { return false; }
  void attach(const std::string&, const std::shared_ptr<torch::nn::Module>&) override {}
  void detach(const std::string&) override {}

  /// An optimised plan detaches its inputs. Those of the adapted model are thrown away, that of a model around it is
  /// not known here.
  void check_detached() const override {
    if (!c10::GradMode::is_enabled() || torch::jit::currentCallstack().empty()) return;
    throw StateError(
        "[lora::weight] found TorchScript detaching the adapted weight " + attribute_ +
        ", expected none: the adapters would get no gradient; the model around the adapted one was "
        "optimised before: inject into the module whose forward is called, or call that one under NoGradGuard");
  }

 private:
  ScriptObject object_;
  std::string attribute_;
};

/// Collects the sites of a TorchScript model: the weights of modules whose class is Linear or MultiheadAttention, and
/// every other 2-D attribute that a method's graph multiplies with.
class ScriptWalk {
 public:
  ModelSites walk(const torch::jit::Module& root) {
    collect(root, "");
    for (const auto& [path, module] : modules_) find_multiplied(module);
    for (const auto& [path, module] : modules_) add_sites(path, module);
    for (auto& site : found_.sites) find_tie(site);
    if (!frozen_.empty()) {
      found_.unreachable = "found " + std::to_string(frozen_.size()) +
                           " weights frozen into constants of the graph (torch.jit.freeze), expected attributes of a "
                           "module, which an adapter can stand in for; save the model without freezing it";
    }
    return std::move(found_);
  }

 private:
  using Object = const c10::ivalue::Object*;
  using Place = std::pair<Object, std::string>;

  void collect(const torch::jit::Module& module, const std::string& path) {
    const Object object = module._ivalue().get();
    if (!seen_.insert(object).second) {
      aliases_[object].push_back(path);
    } else {
      modules_.emplace_back(path, module);
      for (const auto& parameter : module.named_parameters(/*recurse=*/false)) {
        owners_[memory(parameter.value)].push_back(join_path(path, parameter.name));
        parameters_.emplace(object, parameter.name);
      }
      if (is_embedding(module)) embeddings_.push_back(path);
    }
    for (const auto& child : module.named_children()) collect(child.value, join_path(path, child.name));
  }

  /// Tied parameters of a loaded archive are tensors of their own on one storage.
  static const void* memory(const at::Tensor& tensor) {
    return tensor.defined() && tensor.has_storage() && tensor.numel() > 0 ? tensor.const_data_ptr() : nullptr;
  }

  static std::string class_name(const torch::jit::Module& module) {
    const auto name = module.type()->name();
    return name ? name->name() : "";
  }

  static bool is_embedding(const torch::jit::Module& module) {
    const auto type = class_name(module);
    return type == "Embedding" || type == "EmbeddingBag";
  }

  static bool is_matrix(const torch::jit::Module& module, const std::string& attribute) {
    if (!module.hasattr(attribute)) return false;
    const auto value = module.attr(attribute);
    return value.isTensor() && value.toTensor().defined() && value.toTensor().dim() == 2 &&
           value.toTensor().is_floating_point();
  }

  void find_multiplied(const torch::jit::Module& module) {
    for (const auto& method : module.get_methods()) {
      if (!method.function().isGraphFunction()) continue;
      const auto graph = torch::jit::toGraphFunction(method.function()).graph()->copy();
      if (graph->inputs().empty()) continue;
      torch::jit::Inline(*graph);
      find_multiplied(module, graph->inputs()[0], graph->block());
    }
  }

  void find_multiplied(const torch::jit::Module& module, const torch::jit::Value* self,
                       const torch::jit::Block* block) {
    static const std::map<std::string, size_t> operands{
        {"aten::linear", 1}, {"aten::matmul", 1}, {"aten::mm", 1}, {"aten::addmm", 2}};
    for (const auto* node : block->nodes()) {
      for (const auto* inner : node->blocks()) find_multiplied(module, self, inner);
      const std::string kind = node->kind().toQualString();
      if (kind == "aten::embedding_renorm_") {
        if (const auto place = attribute_of(module, self, node->input(0))) renormalised_.insert(*place);
      }
      const auto operand = operands.find(kind);
      if (operand == operands.end()) continue;
      // linear(x, W) takes [out, in]; the products take [in, out].
      bool transposed = kind != "aten::linear";
      const auto* weight = origin(node->input(operand->second), transposed);
      note_constant(weight);
      note_attribute(module, self, weight, transposed);
    }
  }

  /// The tensor that `value` is a transpose or a block of.
  static const torch::jit::Value* origin(const torch::jit::Value* value, bool& transposed) {
    static const std::set<std::string> blocks{"aten::slice", "aten::narrow",           "aten::chunk",
                                              "aten::split", "aten::split_with_sizes", "prim::ListUnpack"};
    for (;; value = value->node()->input(0)) {
      const std::string kind = value->node()->kind().toQualString();
      if (kind == "aten::t" || kind == "aten::numpy_T" || kind == "aten::transpose") {
        transposed = !transposed;
      } else if (blocks.count(kind) == 0) {
        return value;
      }
    }
  }

  void note_constant(const torch::jit::Value* value) {
    if (value->node()->kind() != c10::prim::Constant || !value->node()->hasAttribute(c10::attr::value)) return;
    if (value->node()->kindOf(c10::attr::value) != torch::jit::AttributeKind::t) return;
    const auto tensor = value->node()->t(c10::attr::value);
    if (tensor.dim() == 2 && tensor.is_floating_point()) frozen_.insert(memory(tensor));
  }

  /// The module and attribute that `value` reads, if it follows a chain of attributes from `self`.
  static std::optional<std::pair<torch::jit::Module, std::string>> followed(const torch::jit::Module& module,
                                                                            const torch::jit::Value* self,
                                                                            const torch::jit::Value* value) {
    std::vector<std::string> names;
    while (value != self) {
      if (value->node()->kind() == c10::Symbol::fromQualString("aten::detach")) {
        value = value->node()->input(0);
        continue;
      }
      if (value->node()->kind() != c10::prim::GetAttr) return std::nullopt;
      names.push_back(value->node()->s(c10::attr::name));
      value = value->node()->input(0);
    }
    if (names.empty()) return std::nullopt;
    auto owner = module;
    for (auto name = names.rbegin(); name + 1 != names.rend(); ++name) {
      const auto child = owner.attr(*name);
      if (!child.isModule()) return std::nullopt;
      owner = child.toModule();
    }
    return std::make_pair(owner, names.front());
  }

  static std::optional<Place> attribute_of(const torch::jit::Module& module, const torch::jit::Value* self,
                                           const torch::jit::Value* value) {
    const auto found = followed(module, self, value);
    return found ? std::optional<Place>({found->first._ivalue().get(), found->second}) : std::nullopt;
  }

  void note_attribute(const torch::jit::Module& module, const torch::jit::Value* self, const torch::jit::Value* value,
                      bool transposed) {
    const auto found = followed(module, self, value);
    if (!found || !is_matrix(found->first, found->second)) return;
    const Place place(found->first._ivalue().get(), found->second);
    // A lookup table is no matrix of a product, though a tied head multiplies with it.
    if (is_embedding(found->first)) {
      multiplied_tables_.insert(place);
      return;
    }
    auto& as_stored = multiplied_.emplace(place, transposed).first->second;
    as_stored = as_stored && transposed;
  }

  void add_sites(const std::string& path, const torch::jit::Module& module) {
    const auto type = class_name(module);
    bool takes_updates = false;
    for (const auto& attribute : module.named_attributes(/*recurse=*/false)) {
      if (!attribute.value.isTensor() || !attribute.value.toTensor().defined()) continue;
      add(path, module, attribute.name, kind_of(module, type, attribute.name, attribute.value.toTensor()));
      takes_updates = takes_updates || found_.sites.back().takes_updates();
    }
    if (takes_updates) return;
    const bool recurrent = type == "LSTM" || type == "GRU" || type == "RNN";
    found_.others.push_back(
        {path, type, module.named_parameters(/*recurse=*/false).size() != 0,
         recurrent ? "whose weights are used as a list; adapt another layer, or build it of cells" : ""});
  }

  /// How a weight is named and held.
  struct Kind {
    WeightLayout layout = WeightLayout::kPlain;
    std::string name;       // appended to the module's path
    std::string file_name;  // appended to the module's path in PEFT's files
    bool is_linear = false;
    std::vector<FusedPart> parts = {};
  };

  Kind kind_of(const torch::jit::Module& module, const std::string& type, const std::string& name,
               const at::Tensor& value) const {
    static const std::set<std::string> kernels{"Conv1d",          "Conv2d",          "Conv3d",  "ConvTranspose1d",
                                               "ConvTranspose2d", "ConvTranspose3d", "Bilinear"};
    const Kind plain{WeightLayout::kPlain, name, name};
    if (!value.is_floating_point()) return plain;
    if (name == "weight" && type == "Embedding") return {WeightLayout::kTable, "", ""};
    if (name == "weight" && kernels.count(type) != 0) return {WeightLayout::kKernel, "", ""};
    if (value.dim() != 2) return plain;
    const bool linear = type == "Linear" || type == "NonDynamicallyQuantizableLinear";
    if (linear && name == "weight") return {WeightLayout::kRows, "", "", true};
    if (type == "MultiheadAttention" && name == "in_proj_weight") {
      const auto rows = value.size(0) / 3;
      return {WeightLayout::kRows, "in_proj", "", true, {{"q", rows}, {"k", rows}, {"v", rows}}};
    }
    if (type == "MultiheadAttention" &&
        (name == "q_proj_weight" || name == "k_proj_weight" || name == "v_proj_weight")) {
      const auto local = name.substr(0, name.rfind('_'));
      return {WeightLayout::kRows, local, local, true};
    }
    const Place place(module._ivalue().get(), name);
    const auto multiplied = multiplied_.find(place);
    if (multiplied == multiplied_.end()) return plain;
    const auto local = name == "weight" ? "" : name;
    return {multiplied->second ? WeightLayout::kColumns : WeightLayout::kRows, local, local,
            parameters_.count(place) != 0};
  }

  void add(const std::string& path, const torch::jit::Module& module, const std::string& attribute, Kind kind) {
    Site site;
    const Object object = module._ivalue().get();
    site.path = join_path(path, kind.name);
    for (const auto& alias : aliases_[object]) site.aliases.push_back(join_path(alias, kind.name));
    site.module_path = path;
    site.module_file_path = file_path(path);
    site.file_path = join_path(site.module_file_path, kind.file_name);
    site.parameter = attribute;
    site.parts = std::move(kind.parts);
    site.is_linear = kind.is_linear;
    site.is_buffer = parameters_.count({object, attribute}) == 0;
    site.layout = kind.layout;
    site.transposed_convolution = class_name(module).rfind("ConvTranspose", 0) == 0;
    if (renormalised_.count({object, attribute}) != 0) site.refusal = kMaxNormRefusal;
    site.is_multiplied = multiplied_tables_.count({object, attribute}) != 0;
    const auto host = std::make_shared<ScriptHost>(module, attribute);
    site.host = host;
    site.predicate = [host](const Targeting& targeting, const std::string& full_name) {
      return targeting.script_predicate && host->alive() && targeting.script_predicate(full_name, host->module());
    };
    found_.sites.push_back(std::move(site));
  }

  /// As PEFT names it: below `base_layer` inside a MultiheadAttention.
  std::string file_path(const std::string& path) const {
    const auto dot = path.rfind('.');
    const auto parent = dot == std::string::npos ? std::string() : path.substr(0, dot);
    for (const auto& [name, module] : modules_) {
      if (dot != std::string::npos && name == parent && class_name(module) == "MultiheadAttention") {
        return parent + ".base_layer" + path.substr(dot);
      }
    }
    return path;
  }

  void find_tie(Site& site) const {
    const auto owners = owners_.find(memory(site.host->weight()));
    if (owners == owners_.end() || owners->first == nullptr) return;
    for (const auto& name : owners->second) {
      if (name == join_path(site.module_path, site.parameter)) continue;
      site.tied_to = name;
      for (const auto& embedding : embeddings_) site.tied_to_embedding |= name == embedding + ".weight";
    }
  }

  ModelSites found_;
  std::vector<std::pair<std::string, torch::jit::Module>> modules_;
  std::set<Object> seen_;
  std::map<Object, std::vector<std::string>> aliases_;
  std::map<const void*, std::vector<std::string>> owners_;
  std::vector<std::string> embeddings_;
  std::set<Place> parameters_;
  std::set<Place> renormalised_;
  std::set<Place> multiplied_tables_;
  std::map<Place, bool> multiplied_;  // whether the product reads it as [in, out]
  std::set<const void*> frozen_;
};

}  // namespace detail
LORA_NAMESPACE_END
