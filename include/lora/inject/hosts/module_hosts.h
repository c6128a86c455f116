#pragma once

#include <lora/inject/site.h>
#include <lora/version.h>
#include <lora/weight/host.h>
#include <torch/nn/module.h>
#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// Where a module type keeps a weight that an adapter can live in.
struct HostWeight {
  std::string name;       // appended to the module's path: "in_proj"; empty for a module with one weight
  std::string parameter;  // the registered name: "weight"
  std::function<at::Tensor&(torch::nn::Module&)> member;
  std::vector<FusedPart> parts;
  bool is_linear = true;
  std::string file_name;  // appended to the module's path in PEFT's files
};

/// The weights of a module of a known type; none for another type.
using HostType = std::function<std::vector<HostWeight>(torch::nn::Module&)>;

template <class M>
std::function<at::Tensor&(torch::nn::Module&)> member_of(at::Tensor M::*member) {
  return [member](torch::nn::Module& module) -> at::Tensor& { return dynamic_cast<M&>(module).*member; };
}

inline std::vector<HostWeight> linear_host(torch::nn::Module& module) {
  if (dynamic_cast<torch::nn::LinearImpl*>(&module) == nullptr) return {};
  return {{"", "weight", member_of(&torch::nn::LinearImpl::weight), {}, true, ""}};
}

inline std::vector<HostWeight> attention_host(torch::nn::Module& module) {
  using Attention = torch::nn::MultiheadAttentionImpl;
  auto* attention = dynamic_cast<Attention*>(&module);
  if (attention == nullptr) return {};
  if (attention->_qkv_same_embed_dim) {
    const auto rows = attention->options.embed_dim();
    return {{"in_proj",
             "in_proj_weight",
             member_of(&Attention::in_proj_weight),
             {{"q", rows}, {"k", rows}, {"v", rows}},
             true,
             ""}};
  }
  return {{"q_proj", "q_proj_weight", member_of(&Attention::q_proj_weight), {}, true, "q_proj"},
          {"k_proj", "k_proj_weight", member_of(&Attention::k_proj_weight), {}, true, "k_proj"},
          {"v_proj", "v_proj_weight", member_of(&Attention::v_proj_weight), {}, true, "v_proj"}};
}

inline std::vector<HostType>& host_types() {
  static std::vector<HostType> types{linear_host, attention_host};
  return types;
}

/// A weight member of a C++ module beside its registered parameter.
class ModuleHost final : public Host {
 public:
  ModuleHost(const std::shared_ptr<torch::nn::Module>& module, HostWeight weight)
      : module_(module), weight_(std::move(weight)) {}

  bool alive() const override { return !module_.expired(); }
  bool training() const override {
    const auto module = module_.lock();
    return module != nullptr && module->is_training();
  }
  at::Tensor weight() const override { return weight_.member(*module()); }
  void set_weight(const at::Tensor& weight) override { weight_.member(*module()) = weight; }
  void set_parameter(const at::Tensor& tensor) override { registry(*module())[weight_.parameter] = tensor; }
  bool takes_nodes() const override { return true; }
  void attach(const std::string& name, const std::shared_ptr<torch::nn::Module>& node) override {
    const auto host = module();
    node->train(host->is_training());
    host->register_module(name, node);
  }
  void detach(const std::string& name) override { module()->unregister_module(name); }

 private:
  // LibTorch has no call to exchange a registered parameter; its registry is open to derived classes.
  static torch::OrderedDict<std::string, at::Tensor>& registry(torch::nn::Module& module) {
    struct Access : torch::nn::Module {
      static auto parameters() { return &Access::parameters_; }
    };
    return module.*Access::parameters();
  }

  std::shared_ptr<torch::nn::Module> module() const {
    auto module = module_.lock();
    if (module == nullptr) throw StateError("[lora::adapters] found the model destroyed, expected it alive");
    return module;
  }

  std::weak_ptr<torch::nn::Module> module_;
  HostWeight weight_;
};

/// Collects the sites of a C++ model in the order of named_modules(), each module once.
class ModuleWalk {
 public:
  ModelSites walk(torch::nn::Module& root) {
    // A root may stand on the stack, and an adapter needs a module that outlives the call by a name.
    TORCH_CHECK_VALUE(weights_of(root).empty(), "[lora::inject] found a ", root.name(),
                      " as the model itself, expected a module that holds it; register it in a module, as in a "
                      "Sequential, or use LoRALinear for a single Linear");
    for (const auto& parameter : root.named_parameters(/*recurse=*/false)) note_parameter("", parameter);
    children(root, "");
    for (auto& site : found_.sites) find_tie(site);
    return std::move(found_);
  }

  /// The sites of one layer, at the given path.
  ModelSites layer(const std::shared_ptr<torch::nn::Module>& module, const std::string& path,
                   const std::string& file_path) {
    visit(module, path, file_path);
    return std::move(found_);
  }

 private:
  void visit(const std::shared_ptr<torch::nn::Module>& module, const std::string& path, const std::string& file_path) {
    if (dynamic_cast<AdapterNode*>(module.get()) != nullptr) return;
    const auto seen = first_path_.find(module.get());
    if (seen != first_path_.end()) {
      for (auto& site : found_.sites) {
        if (site.module_path == seen->second) site.aliases.push_back(path + site.path.substr(seen->second.size()));
      }
      return;
    }
    first_path_.emplace(module.get(), path);
    const auto parameters = module->named_parameters(/*recurse=*/false);
    for (const auto& parameter : parameters) note_parameter(path, parameter);
    if (dynamic_cast<torch::nn::EmbeddingImpl*>(module.get()) != nullptr) embeddings_.push_back(path);

    auto weights = weights_of(*module);
    if (weights.empty()) found_.others.push_back({path, module->name(), !parameters.is_empty()});
    for (auto& weight : weights) {
      Site site;
      site.path = join_path(path, weight.name);
      site.file_path = join_path(file_path, weight.file_name);
      site.module_path = path;
      site.parameter = weight.parameter;
      site.parts = weight.parts;
      site.is_linear = weight.is_linear;
      site.host = std::make_shared<ModuleHost>(module, weight);
      site.predicate = [weak = std::weak_ptr<torch::nn::Module>(module)](const Targeting& targeting,
                                                                         const std::string& name) {
        const auto locked = weak.lock();
        return targeting.predicate && locked != nullptr && targeting.predicate(name, *locked);
      };
      found_.sites.push_back(std::move(site));
    }
    children(*module, path);
  }

  static std::vector<HostWeight> weights_of(torch::nn::Module& module) {
    std::vector<HostWeight> weights;
    for (auto type = host_types().rbegin(); type != host_types().rend() && weights.empty(); ++type) {
      weights = (*type)(module);
    }
    return weights;
  }

  void children(const torch::nn::Module& module, const std::string& path) {
    // PEFT wraps a MultiheadAttention as a whole and keeps its out_proj below `base_layer`.
    const bool attention = dynamic_cast<const torch::nn::MultiheadAttentionImpl*>(&module) != nullptr;
    for (const auto& child : module.named_children()) {
      const auto child_path = join_path(path, child.key());
      visit(child.value(), child_path, attention ? join_path(path, "base_layer." + child.key()) : child_path);
    }
  }

  void note_parameter(const std::string& path, const torch::OrderedDict<std::string, at::Tensor>::Item& parameter) {
    if (parameter.value().defined()) {
      owners_[parameter.value().unsafeGetTensorImpl()].push_back(join_path(path, parameter.key()));
    }
  }

  void find_tie(Site& site) const {
    site.may_be_tied = false;
    const auto owners = owners_.find(site.host->weight().unsafeGetTensorImpl());
    if (owners == owners_.end()) return;
    for (const auto& name : owners->second) {
      if (name == join_path(site.module_path, site.parameter)) continue;
      site.tied_to = name;
      site.may_be_tied = true;
      for (const auto& embedding : embeddings_) site.tied_to_embedding |= name == embedding + ".weight";
    }
  }

  ModelSites found_;
  std::map<const torch::nn::Module*, std::string> first_path_;
  std::map<const c10::TensorImpl*, std::vector<std::string>> owners_;
  std::vector<std::string> embeddings_;
};

}  // namespace detail

/// Makes the weight of an own module type known: `register_host<MyProjection>(&MyProjection::weight)`.
///
/// `member` is the Tensor [out, in] that the type's forward reads and has registered as a parameter. Adapters reach it
/// by name or target_if; "all-linear" stays with Linear and MultiheadAttention. Call it before inject, from one thread.
template <class M>
void register_host(at::Tensor M::*member) {
  detail::host_types().push_back([member](torch::nn::Module& module) -> std::vector<detail::HostWeight> {
    auto* typed = dynamic_cast<M*>(&module);
    if (typed == nullptr) return {};
    for (const auto& parameter : module.named_parameters(/*recurse=*/false)) {
      if (parameter.value().is_same(typed->*member)) {
        return {{"", parameter.key(), detail::member_of(member), {}, false, ""}};
      }
    }
    TORCH_CHECK_VALUE(false, "[lora::register_host] found a ", module.name(),
                      " whose member is no registered parameter, expected register_parameter to have been called");
  });
}

LORA_NAMESPACE_END
