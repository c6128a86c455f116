#pragma once

#include <lora/inject/site.h>
#include <lora/version.h>
#include <lora/weight/host.h>
#include <torch/nn/module.h>
#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/instancenorm.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/modules/normalization.h>
#include <torch/nn/modules/rnn.h>

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// Where a module type keeps a parameter that its forward reads.
struct HostWeight {
  std::string name;       // appended to the module's path: "in_proj"; empty for a module with one weight
  std::string parameter;  // the registered name: "weight"
  std::function<at::Tensor&(torch::nn::Module&)> member;
  WeightLayout layout = WeightLayout::kRows;
  bool is_linear = false;
  std::vector<FusedPart> parts = {};
  std::string file_name = "";  // appended to the module's path in PEFT's files
  bool is_buffer = false;
  std::string refusal = "";  // why no update can live in it; empty: one can
  bool transposed_convolution = false;
};

/// The parameters of a module of a known type; none for another type.
using HostType = std::function<std::vector<HostWeight>(torch::nn::Module&)>;

template <class M>
std::function<at::Tensor&(torch::nn::Module&)> member_of(at::Tensor M::*member) {
  return [member](torch::nn::Module& module) -> at::Tensor& { return dynamic_cast<M&>(module).*member; };
}

/// A parameter that takes copies of an adapter's own and no update.
template <class M>
HostWeight plain_parameter(const std::string& name, at::Tensor M::*member) {
  return {name, name, member_of(member), WeightLayout::kPlain, false, {}, name};
}

template <class M>
HostWeight plain_buffer(const std::string& name, at::Tensor M::*member) {
  auto buffer = plain_parameter(name, member);
  buffer.is_buffer = true;
  return buffer;
}

/// A type with a weight of the given layout and a bias.
template <class M, WeightLayout layout>
std::vector<HostWeight> weight_and_bias_host(torch::nn::Module& module) {
  if (dynamic_cast<M*>(&module) == nullptr) return {};
  const bool plain = layout == WeightLayout::kPlain;
  const std::string name = plain ? "weight" : "";
  HostWeight weight{name, "weight", member_of<M>(&M::weight), layout, layout == WeightLayout::kRows, {}, name};
  weight.transposed_convolution = std::is_same_v<M, torch::nn::ConvTranspose1dImpl> ||
                                  std::is_same_v<M, torch::nn::ConvTranspose2dImpl> ||
                                  std::is_same_v<M, torch::nn::ConvTranspose3dImpl>;
  return {std::move(weight), plain_parameter<M>("bias", &M::bias)};
}

template <class M>
std::vector<HostWeight> running_norm_host(torch::nn::Module& module) {
  auto weights = weight_and_bias_host<M, WeightLayout::kPlain>(module);
  if (weights.empty()) return {};
  weights.push_back(plain_buffer<M>("running_mean", &M::running_mean));
  weights.push_back(plain_buffer<M>("running_var", &M::running_var));
  weights.push_back(plain_buffer<M>("num_batches_tracked", &M::num_batches_tracked));
  return weights;
}

inline std::vector<HostWeight> embedding_host(torch::nn::Module& module) {
  using Embedding = torch::nn::EmbeddingImpl;
  auto* embedding = dynamic_cast<Embedding*>(&module);
  if (embedding == nullptr) return {};
  return {{"",
           "weight",
           member_of(&Embedding::weight),
           WeightLayout::kTable,
           false,
           {},
           "",
           false,
           embedding->options.max_norm() ? kMaxNormRefusal : ""}};
}

inline std::vector<HostWeight> attention_host(torch::nn::Module& module) {
  using Attention = torch::nn::MultiheadAttentionImpl;
  auto* attention = dynamic_cast<Attention*>(&module);
  if (attention == nullptr) return {};
  std::vector<HostWeight> weights;
  if (attention->_qkv_same_embed_dim) {
    const auto rows = attention->options.embed_dim();
    weights.push_back({"in_proj",
                       "in_proj_weight",
                       member_of(&Attention::in_proj_weight),
                       WeightLayout::kRows,
                       true,
                       {{"q", rows}, {"k", rows}, {"v", rows}}});
  } else {
    const auto add = [&](const std::string& name, at::Tensor Attention::*member) {
      weights.push_back({name, name + "_weight", member_of(member), WeightLayout::kRows, true, {}, name});
    };
    add("q_proj", &Attention::q_proj_weight);
    add("k_proj", &Attention::k_proj_weight);
    add("v_proj", &Attention::v_proj_weight);
  }
  weights.push_back(plain_parameter("in_proj_bias", &Attention::in_proj_bias));
  weights.push_back(plain_parameter("bias_k", &Attention::bias_k));
  weights.push_back(plain_parameter("bias_v", &Attention::bias_v));
  return weights;
}

template <class M>
std::vector<HostWeight> weight_only_host(torch::nn::Module& module) {
  if (dynamic_cast<M*>(&module) == nullptr) return {};
  return {plain_parameter<M>("weight", &M::weight)};
}

inline std::vector<HostType>& host_types() {
  using Layout = WeightLayout;
  static std::vector<HostType> types{
      weight_and_bias_host<torch::nn::LinearImpl, Layout::kRows>,
      attention_host,
      embedding_host,
      weight_and_bias_host<torch::nn::Conv1dImpl, Layout::kKernel>,
      weight_and_bias_host<torch::nn::Conv2dImpl, Layout::kKernel>,
      weight_and_bias_host<torch::nn::Conv3dImpl, Layout::kKernel>,
      weight_and_bias_host<torch::nn::ConvTranspose1dImpl, Layout::kKernel>,
      weight_and_bias_host<torch::nn::ConvTranspose2dImpl, Layout::kKernel>,
      weight_and_bias_host<torch::nn::ConvTranspose3dImpl, Layout::kKernel>,
      weight_and_bias_host<torch::nn::BilinearImpl, Layout::kKernel>,
      weight_and_bias_host<torch::nn::LayerNormImpl, Layout::kPlain>,
      weight_and_bias_host<torch::nn::GroupNormImpl, Layout::kPlain>,
      running_norm_host<torch::nn::BatchNorm1dImpl>,
      running_norm_host<torch::nn::BatchNorm2dImpl>,
      running_norm_host<torch::nn::BatchNorm3dImpl>,
      running_norm_host<torch::nn::InstanceNorm1dImpl>,
      running_norm_host<torch::nn::InstanceNorm2dImpl>,
      running_norm_host<torch::nn::InstanceNorm3dImpl>,
      weight_only_host<torch::nn::EmbeddingBagImpl>,
      weight_only_host<torch::nn::PReLUImpl>,
  };
  return types;
}

/// Parameters that a type has beside those of host_types().
inline std::vector<HostType>& parameter_types() {
  static std::vector<HostType> types;
  return types;
}

/// The name under which a module of type M has registered a member; empty for another type.
template <class M>
std::string registered_name(torch::nn::Module& module, at::Tensor M::*member, const char* function) {
  auto* typed = dynamic_cast<M*>(&module);
  if (typed == nullptr) return "";
  for (const auto& parameter : module.named_parameters(/*recurse=*/false)) {
    if (parameter.value().is_same(typed->*member)) return parameter.key();
  }
  TORCH_CHECK_VALUE(false, "[lora::", function, "] found a ", module.name(),
                    " whose member is no registered parameter, expected register_parameter to have been called");
}

/// Types whose weights cannot be reached, with the reason.
inline std::string refused_type(const torch::nn::Module& module) {
  const bool recurrent = dynamic_cast<const torch::nn::LSTMImpl*>(&module) != nullptr ||
                         dynamic_cast<const torch::nn::GRUImpl*>(&module) != nullptr ||
                         dynamic_cast<const torch::nn::RNNImpl*>(&module) != nullptr;
  return recurrent ? "which keeps its weights in a list of its own that no adapter can stand in; adapt another layer, "
                     "or build it of cells"
                   : "";
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
    const auto weights = weights_of(root);
    const bool adaptable = std::any_of(weights.begin(), weights.end(),
                                       [](const HostWeight& weight) { return weight.layout != WeightLayout::kPlain; });
    TORCH_CHECK_VALUE(!adaptable, "[lora::inject] found a ", root.name(),
                      " as the model itself, expected a module that holds it; register it in a module, as in a "
                      "Sequential, or use LoRALinear for a single Linear");
    for (const auto& parameter : root.named_parameters(/*recurse=*/false)) {
      note_parameter("", parameter);
      found_.hidden.push_back(parameter.key());
    }
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
    if (dynamic_cast<HostNode*>(module.get()) != nullptr) return;
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

    const auto weights = weights_of(*module);
    for (const auto& parameter : parameters) {
      const bool known = std::any_of(weights.begin(), weights.end(),
                                     [&](const HostWeight& weight) { return weight.parameter == parameter.key(); });
      if (!known) found_.hidden.push_back(join_path(path, parameter.key()));
    }
    std::string reason = refused_type(*module);
    bool takes_updates = false;
    for (const auto& weight : weights) {
      add_site(module, path, file_path, weight);
      takes_updates = takes_updates || found_.sites.back().takes_updates();
    }
    if (!takes_updates) found_.others.push_back({path, module->name(), !parameters.is_empty(), reason});
    children(*module, path);
  }

  void add_site(const std::shared_ptr<torch::nn::Module>& module, const std::string& path, const std::string& file_path,
                const HostWeight& weight) {
    Site site;
    site.path = join_path(path, weight.name);
    site.file_path = join_path(file_path, weight.file_name);
    site.module_path = path;
    site.module_file_path = file_path;
    site.parameter = weight.parameter;
    site.parts = weight.parts;
    site.is_linear = weight.is_linear;
    site.is_buffer = weight.is_buffer;
    site.layout = weight.layout;
    site.refusal = weight.refusal;
    site.transposed_convolution = weight.transposed_convolution;
    site.host = std::make_shared<ModuleHost>(module, weight);
    site.predicate = [weak = std::weak_ptr<torch::nn::Module>(module)](const Targeting& targeting,
                                                                       const std::string& name) {
      const auto locked = weak.lock();
      return targeting.predicate && locked != nullptr && targeting.predicate(name, *locked);
    };
    found_.sites.push_back(std::move(site));
  }

  /// What the newest type that knows the module says, with the parameters that register_parameter adds.
  static std::vector<HostWeight> weights_of(torch::nn::Module& module) {
    std::vector<HostWeight> weights;
    for (auto type = host_types().rbegin(); type != host_types().rend() && weights.empty(); ++type) {
      weights = (*type)(module);
    }
    for (const auto& type : parameter_types()) {
      for (auto& weight : type(module)) weights.push_back(std::move(weight));
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
/// `member` is the Tensor [out, in] or [out, ...] that the type's forward reads and has registered as a parameter.
/// Adapters reach it by name or target_if; "all-linear" stays with Linear and MultiheadAttention. Call it before
/// inject, from one thread.
template <class M>
void register_host(at::Tensor M::*member) {
  detail::host_types().push_back([member](torch::nn::Module& module) -> std::vector<detail::HostWeight> {
    const auto name = detail::registered_name(module, member, "register_host");
    if (name.empty()) return {};
    const bool matrix = (dynamic_cast<M&>(module).*member).dim() == 2;
    const auto layout = matrix ? detail::WeightLayout::kRows : detail::WeightLayout::kKernel;
    return {{"", name, detail::member_of(member), layout}};
  });
}

/// Makes another parameter of an own module type known, as a bias or a gain:
/// `register_parameter<MyNorm>(&MyNorm::gain)`.
///
/// It takes no update; modules_to_save and bias reach it. Call it before inject, from one thread.
template <class M>
void register_parameter(at::Tensor M::*member) {
  detail::parameter_types().push_back([member](torch::nn::Module& module) -> std::vector<detail::HostWeight> {
    const auto name = detail::registered_name(module, member, "register_parameter");
    if (name.empty()) return {};
    return {detail::plain_parameter(name, member)};
  });
}

LORA_NAMESPACE_END
