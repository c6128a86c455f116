#pragma once

#include <lora/inject/site.h>
#include <lora/version.h>
#include <lora/weight/host.h>
#include <torch/csrc/jit/api/function_impl.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

#include <map>
#include <memory>
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
      : object_(module._ivalue()), attribute_(std::move(attribute)) {}

  bool alive() const override { return !object_.expired(); }
  bool training() const override {
    const auto module = this->module();
    return module.hasattr("training") && module.is_training();
  }
  at::Tensor weight() const override { return module().attr(attribute_).toTensor(); }
  void set_weight(const at::Tensor& weight) override { module().setattr(attribute_, weight); }
  void set_parameter(const at::Tensor& tensor) override { set_weight(tensor); }
  bool takes_nodes() const override { return false; }
  void attach(const std::string&, const std::shared_ptr<torch::nn::Module>&) override {}
  void detach(const std::string&) override {}

 private:
  torch::jit::Module module() const {
    auto object = object_.lock();
    if (!object) throw StateError("[lora::adapters] found the TorchScript module destroyed, expected it alive");
    return torch::jit::Module(std::move(object));
  }

  c10::weak_intrusive_ptr<c10::ivalue::Object> object_;
  std::string attribute_;
};

/// Collects the sites of a TorchScript model: the weights of modules whose class is Linear or MultiheadAttention, and
/// every other 2-D attribute that a method's graph multiplies with.
class ScriptWalk {
 public:
  ModelSites walk(const torch::jit::Module& root) {
    collect(root, "");
    for (const auto& [path, module] : modules_) find_multiplied(path, module);
    for (const auto& [path, module] : modules_) add_sites(path, module);
    for (auto& site : found_.sites) find_tie(site);
    return std::move(found_);
  }

 private:
  using Place = std::pair<const c10::ivalue::Object*, std::string>;

  void collect(const torch::jit::Module& module, const std::string& path) {
    const auto* object = module._ivalue().get();
    const auto seen = first_path_.find(object);
    if (seen != first_path_.end()) {
      aliases_[object].push_back(path);
      return;
    }
    first_path_.emplace(object, path);
    modules_.emplace_back(path, module);
    for (const auto& parameter : module.named_parameters(/*recurse=*/false)) {
      owners_[parameter.value.unsafeGetTensorImpl()].push_back(join_path(path, parameter.name));
    }
    if (class_name(module) == "Embedding") embeddings_.push_back(path);
    for (const auto& child : module.named_children()) collect(child.value, join_path(path, child.name));
  }

  static std::string class_name(const torch::jit::Module& module) {
    const auto name = module.type()->name();
    return name ? name->name() : "";
  }

  static bool is_matrix(const torch::jit::Module& module, const std::string& attribute) {
    if (!module.hasattr(attribute)) return false;
    const auto value = module.attr(attribute);
    return value.isTensor() && value.toTensor().defined() && value.toTensor().dim() == 2 &&
           value.toTensor().is_floating_point();
  }

  void find_multiplied(const std::string& path, const torch::jit::Module& module) {
    for (const auto& method : module.get_methods()) {
      if (!method.function().isGraphFunction()) continue;
      const auto graph = torch::jit::toGraphFunction(method.function()).graph();
      if (graph->inputs().empty()) continue;
      find_multiplied(path, module, graph->inputs()[0], graph->block());
    }
  }

  void find_multiplied(const std::string& path, const torch::jit::Module& module, const torch::jit::Value* self,
                       const torch::jit::Block* block) {
    static const std::map<std::string, size_t> operands{
        {"aten::linear", 1}, {"aten::matmul", 1}, {"aten::mm", 1}, {"aten::addmm", 2}};
    for (const auto* node : block->nodes()) {
      for (const auto* inner : node->blocks()) find_multiplied(path, module, self, inner);
      const auto operand = operands.find(node->kind().toQualString());
      if (operand == operands.end()) continue;
      const auto* value = node->input(operand->second);
      const std::string kind = value->node()->kind().toQualString();
      if (kind == "aten::t" || kind == "aten::numpy_T" || kind == "aten::transpose") value = value->node()->input(0);
      note_attribute(module, self, value);
    }
  }

  /// Follows a chain of attributes from `self` to the weight that `value` reads, if it is one.
  void note_attribute(const torch::jit::Module& module, const torch::jit::Value* self, const torch::jit::Value* value) {
    std::vector<std::string> names;
    while (value != self) {
      if (value->node()->kind() != c10::prim::GetAttr) return;
      names.push_back(value->node()->s(c10::attr::name));
      value = value->node()->input(0);
    }
    if (names.empty()) return;
    auto owner = module;
    for (auto name = names.rbegin(); name + 1 != names.rend(); ++name) {
      const auto child = owner.attr(*name);
      if (!child.isModule()) return;
      owner = child.toModule();
    }
    if (is_matrix(owner, names.front())) multiplied_.emplace(owner._ivalue().get(), names.front());
  }

  void add_sites(const std::string& path, const torch::jit::Module& module) {
    const auto type = class_name(module);
    const auto count = found_.sites.size();
    if (type == "MultiheadAttention" && is_matrix(module, "in_proj_weight")) {
      const auto rows = module.attr("in_proj_weight").toTensor().size(0) / 3;
      add(path, module, "in_proj", "in_proj_weight", "", {{"q", rows}, {"k", rows}, {"v", rows}});
    }
    if ((type == "Linear" || type == "NonDynamicallyQuantizableLinear") && is_matrix(module, "weight")) {
      multiplied_.emplace(module._ivalue().get(), "weight");
    }
    for (const auto& attribute : module.named_attributes(/*recurse=*/false)) {
      if (attribute.name == "in_proj_weight" || multiplied_.count({module._ivalue().get(), attribute.name}) == 0)
        continue;
      const auto name = attribute.name == "weight" ? "" : attribute.name;
      add(path, module, name, attribute.name, name, {});
    }
    if (count == found_.sites.size()) {
      found_.others.push_back({path, type, !module.named_parameters(/*recurse=*/false).size() == 0});
    }
  }

  void add(const std::string& path, const torch::jit::Module& module, const std::string& name,
           const std::string& attribute, const std::string& file_name, std::vector<FusedPart> parts) {
    Site site;
    site.path = join_path(path, name);
    for (const auto& alias : aliases_[module._ivalue().get()]) site.aliases.push_back(join_path(alias, name));
    site.file_path = join_path(file_path(path), file_name);
    site.module_path = path;
    site.parameter = attribute;
    site.parts = std::move(parts);
    site.is_linear = true;
    site.host = std::make_shared<ScriptHost>(module, attribute);
    site.predicate = [object = c10::weak_intrusive_ptr<c10::ivalue::Object>(module._ivalue())](
                         const Targeting& targeting, const std::string& full_name) {
      auto locked = object.lock();
      return targeting.script_predicate && locked &&
             targeting.script_predicate(full_name, torch::jit::Module(std::move(locked)));
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
    const auto owners = owners_.find(site.host->weight().unsafeGetTensorImpl());
    if (owners == owners_.end()) return;
    for (const auto& name : owners->second) {
      if (name == join_path(site.module_path, site.parameter)) continue;
      site.tied_to = name;
      for (const auto& embedding : embeddings_) site.tied_to_embedding |= name == embedding + ".weight";
    }
  }

  ModelSites found_;
  std::vector<std::pair<std::string, torch::jit::Module>> modules_;
  std::map<const c10::ivalue::Object*, std::string> first_path_;
  std::map<const c10::ivalue::Object*, std::vector<std::string>> aliases_;
  std::map<const c10::TensorImpl*, std::vector<std::string>> owners_;
  std::vector<std::string> embeddings_;
  std::set<Place> multiplied_;
};

}  // namespace detail
LORA_NAMESPACE_END
