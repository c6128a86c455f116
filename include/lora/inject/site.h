#pragma once

#include <ATen/core/Tensor.h>
#include <lora/config/targets.h>
#include <lora/version.h>
#include <lora/weight/adapted_weight.h>
#include <lora/weight/adapter_node.h>
#include <lora/weight/host.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// A parameter of a model that its module's forward reads out of a member or slot, and what adapters live in it.
/// Updates go into matrices; copies of an adapter's own can stand for any.
struct Site {
  struct Adapter {
    std::shared_ptr<const WeightAdapter> updates;
    std::weak_ptr<AdapterNode> node;  // expired in TorchScript, which takes no child
  };

  std::string path;                  // "h.0.attn.c_attn", "layers.0.self_attn.in_proj"
  std::vector<std::string> aliases;  // other paths of the same module
  std::string file_path;             // the weight's path in PEFT's files
  std::string module_path;           // the path of the module that the host stands in
  std::string module_file_path;      // that path in PEFT's files
  std::string parameter;             // the weight's registered name in that module
  std::vector<FusedPart> parts;      // row ranges that the module's type knows: q, k, v
  std::string tied_to;               // another parameter on the same memory; empty: none known
  bool may_be_tied = true;           // false: the walk saw the whole model, and no other parameter on the same memory
  bool tied_to_embedding = false;
  bool is_linear = false;  // belongs to "all-linear"
  bool is_buffer = false;
  bool transposed_convolution = false;  // the rows of its kernel are inputs
  WeightLayout layout = WeightLayout::kRows;
  bool is_multiplied = false;  // an embedding's weight that the model is known to multiply with, too
  std::string refusal;         // why no update can live in the weight; empty: one can
  std::shared_ptr<Host> host;
  std::function<bool(const Targeting&, const std::string& path)> predicate;  // target_if on this module

  std::shared_ptr<AdaptedWeight> weight;  // null until an adapter goes in or the model is accelerated
  std::vector<Adapter> adapters;          // by the order of their injection
  std::weak_ptr<HostNode> acceleration;   // expired where the model is not accelerated, and in TorchScript

  /// Whether targets can name the site.
  bool takes_updates() const { return layout != WeightLayout::kPlain; }
  /// Whether the weight is a matrix that the model multiplies with.
  bool is_multiplied_matrix() const { return layout == WeightLayout::kRows || layout == WeightLayout::kColumns; }
  /// The parameter as the model holds it; undefined for the bias of a layer without one.
  at::Tensor base() const {
    if (weight == nullptr) return host->weight();
    return weight->absent() ? at::Tensor() : weight->base();
  }
  /// The parameter's values as [out, in], the way in which updates are counted.
  at::Tensor base_matrix() const { return as_matrix(base().detach(), layout); }

  /// The name of the weight inside its module, empty for a module with one weight.
  std::string local_name() const { return path == module_path ? "" : path.substr(path.rfind('.') + 1); }
  /// The parameter's path in the model: "h.0.ln_1.bias".
  std::string parameter_path() const { return module_path.empty() ? parameter : module_path + "." + parameter; }

  /// Whether an adapter makes the weight's lookups and products differ.
  bool splits_uses(const WeightAdapter& adapter) const {
    return weight != nullptr && weight->multiplied() && (!adapter.parts.empty() || adapter.copy.defined());
  }

  const WeightAdapter* find(const std::string& adapter) const {
    for (const auto& candidate : adapters) {
      if (candidate.updates->adapter == adapter) return candidate.updates.get();
    }
    return nullptr;
  }
};

/// What PEFT's target_modules call the site: a MultiheadAttention as a whole, any other module by its own path.
inline std::string peft_module(const Site& site) {
  const auto base_layer = site.file_path.rfind(".base_layer.");
  return base_layer == std::string::npos ? site.file_path : site.file_path.substr(0, base_layer);
}

/// Every name that a pattern of a configuration may know the site by.
inline std::vector<std::string> names_of(const Site& site) {
  auto names = site.aliases;
  names.insert(names.begin(), {site.path, site.file_path, peft_module(site)});
  return names;
}

/// A site with the parts that an adapter has of it as an entry of target_modules: "h.3.attn.c_attn[q,v]".
inline std::string target_of(const Site& site, const WeightAdapter& adapter) {
  std::string parts;
  for (const auto& part : adapter.parts) {
    if (!part.name.empty()) parts += (parts.empty() ? "[" : ",") + part.name;
  }
  return site.path + (parts.empty() ? "" : parts + "]");
}

inline constexpr const char* kMaxNormRefusal =
    "whose max_norm writes to the weight at each lookup, which a weight with an adapter does not allow; build it "
    "without max_norm";

/// A module that cannot take an adapter, kept to say so by name.
struct OtherModule {
  std::string path;
  std::string type;
  bool has_parameters = false;
  std::string reason;  // why no update can live in it; empty: its type is not known
};

/// Everything that the walk over a model found.
struct ModelSites {
  std::vector<Site> sites;
  std::vector<OtherModule> others;
  std::vector<std::string> hidden;  // paths of parameters that no member is known for
  std::string unreachable;  // weights that no host can stand for, as a problem of an injection that fails; empty: none
};

inline std::string join_path(const std::string& prefix, const std::string& name) {
  if (prefix.empty()) return name;
  return name.empty() ? prefix : prefix + "." + name;
}

}  // namespace detail
LORA_NAMESPACE_END
