#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/equal.h>
#include <lora/base/weight_layout.h>
#include <lora/inject/site.h>
#include <lora/version.h>
#include <lora/weight/host.h>

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// What an adapter's file says about the tensors of a checkpoint, which hold neither the types of their layers nor the
/// layouts of their matrices.
struct CheckpointHints {
  struct Factors {
    std::vector<int64_t> A;  // sizes [r, in, ...]; empty: not in the file
    std::vector<int64_t> B;  // sizes [out, r, ...]; empty: not in the file
    bool embedding = false;
    bool bias = false;       // B has a bias
    int64_t parameters = 0;  // of all tensors for the weight
  };

  std::map<std::string, Factors> factors;    // by the weight's path in PEFT's files
  std::map<std::string, at::Tensor> copies;  // what the adapter has whole, by the checkpoint's names
  std::set<std::string> tables;              // paths of embeddings that the adapter has rows of
  bool fan_in_fan_out = false;               // square matrices are [in, out]
};

/// A checkpoint's tensor where a model has a module's parameter.
class CheckpointHost final : public Host {
 public:
  explicit CheckpointHost(at::Tensor tensor) : tensor_(std::move(tensor)) {}

  bool alive() const override { return true; }
  bool training() const override { return false; }
  at::Tensor weight() const override { return tensor_; }
  void set_weight(const at::Tensor& weight) override { tensor_ = weight; }
  void set_parameter(const at::Tensor& tensor) override { tensor_ = tensor; }
  bool takes_nodes() const override { return false; }
  void attach(const std::string&, const std::shared_ptr<torch::nn::Module>&) override {}
  void detach(const std::string&) override {}

 private:
  at::Tensor tensor_;
};

/// The sites of a checkpoint for one adapter.
struct CheckpointSites {
  ModelSites model;
  std::vector<std::string> unplaced;  // paths of factors whose matrix the checkpoint lacks
  std::vector<std::string> added;     // tensors that the adapter has whole and the checkpoint lacks
  std::vector<std::string> square;    // paths of matrices whose layout nothing but fan_in_fan_out says
  std::string rows, columns;          // paths of matrices whose shape says that they are [out, in], or [in, out]
};

/// Makes sites of a checkpoint's tensors, in the order of their names. A matrix takes updates where the file has
/// factors for it: the tensors decide. All other tensors can be copied.
class CheckpointWalk {
 public:
  using Tensors = std::map<std::string, at::Tensor>;

  CheckpointWalk(const Tensors& tensors, const CheckpointHints& hints) : tensors_(tensors), hints_(hints) {}

  CheckpointSites walk() {
    for (const auto& [name, tensor] : tensors_) {
      if (tensor.numel() > 0) owners_[tensor.const_data_ptr()].push_back(name);
    }
    find_tied_heads();
    for (const auto& [name, tensor] : tensors_) add(name, tensor);
    add_absent_copies();
    for (const auto& [path, factors] : hints_.factors) {
      if (placed_.count(path) == 0) found_.unplaced.push_back(path);
    }
    return std::move(found_);
  }

 private:
  /// How a tensor is named and held.
  struct Kind {
    std::string name;       // appended to the module's path
    std::string file_name;  // appended to the module's path in PEFT's files
    WeightLayout layout = WeightLayout::kPlain;
    std::vector<FusedPart> parts = {};
  };

  static std::pair<std::string, std::string> split(const std::string& name) {
    const auto dot = name.rfind('.');
    return dot == std::string::npos ? std::pair{std::string(), name}
                                    : std::pair{name.substr(0, dot), name.substr(dot + 1)};
  }

  bool has(const std::string& module, const std::string& parameter) const {
    return tensors_.count(join_path(module, parameter)) != 0;
  }

  /// Whether the names below a module are those of a torch.nn.MultiheadAttention.
  bool is_attention(const std::string& module) const {
    return has(module, "in_proj_weight") ||
           (has(module, "q_proj_weight") && has(module, "k_proj_weight") && has(module, "v_proj_weight"));
  }

  /// PEFT wraps a MultiheadAttention as a whole and keeps its out_proj below `base_layer`.
  std::string file_path(const std::string& module) const {
    const auto [parent, child] = split(module);
    return !parent.empty() && is_attention(parent) ? join_path(parent, "base_layer." + child) : module;
  }

  Kind kind_of(const std::string& module, const std::string& parameter, const at::Tensor& tensor) {
    const bool attention = is_attention(module);
    Kind kind{parameter, parameter};
    if (parameter == "weight") {
      kind = {"", ""};
    } else if (attention && parameter == "in_proj_weight") {
      const auto rows = tensor.dim() == 2 ? tensor.size(0) / 3 : 0;
      kind = {"in_proj", "", WeightLayout::kPlain, {{"q", rows}, {"k", rows}, {"v", rows}}};
    } else if (attention &&
               (parameter == "q_proj_weight" || parameter == "k_proj_weight" || parameter == "v_proj_weight")) {
      kind.name = kind.file_name = parameter.substr(0, parameter.rfind('_'));
    }
    const auto path = join_path(file_path(module), kind.file_name);
    const auto factors = hints_.factors.find(path);
    if (!module.empty() && tensor.dim() >= 2 && factors != hints_.factors.end()) {
      placed_.insert(path);
      const bool by_pytorch = attention || file_path(module) != module;
      kind.layout = layout_of(path, tensor, factors->second, by_pytorch);
    } else if (tensor.dim() == 2 && kind.name.empty() && is_table(module)) {
      kind.layout = WeightLayout::kTable;
    } else if (tied_heads_.count(join_path(module, parameter)) != 0) {
      kind.layout = WeightLayout::kRows;
    } else {
      kind = {parameter, parameter};
    }
    return kind;
  }

  /// The adapter has rows of it, or has it whole and without a bias, as embeddings and heads that PEFT saves unasked.
  bool is_table(const std::string& module) const {
    return hints_.tables.count(module) != 0 ||
           (hints_.copies.count(join_path(module, "weight")) != 0 && !has(module, "bias"));
  }

  WeightLayout layout_of(const std::string& path, const at::Tensor& tensor, const CheckpointHints::Factors& factors,
                         bool by_pytorch) {
    if (factors.embedding) return WeightLayout::kTable;
    if (tensor.dim() > 2) return WeightLayout::kKernel;
    if (by_pytorch) return WeightLayout::kRows;
    const auto otherwise = hints_.fan_in_fan_out ? WeightLayout::kColumns : WeightLayout::kRows;
    const auto first = tensor.size(0), second = tensor.size(1);
    if (first == second) {
      found_.square.push_back(path);
      return otherwise;
    }
    const auto is = [&](int64_t out, int64_t in) {
      return factors.A.empty() ? !factors.B.empty() && factors.B[0] == out : factors.A.size() > 1 && factors.A[1] == in;
    };
    const bool rows = is(first, second);
    if (!rows && !is(second, first)) return otherwise;  // of neither shape: a problem of the reader's
    (rows ? found_.rows : found_.columns) = path;
    return rows ? WeightLayout::kRows : WeightLayout::kColumns;
  }

  void add(const std::string& name, const at::Tensor& tensor) {
    const auto [module, parameter] = split(name);
    const auto kind = kind_of(module, parameter, tensor);
    const auto head = tied_heads_.find(name);
    const bool is_tied_head = head != tied_heads_.end();
    auto& site = add_site(module, parameter, kind, is_tied_head ? head->second : tensor);
    // A mask that is kept as a buffer, as GPT-2's attn.bias, is none of a layer's biases.
    site.is_buffer = !tensor.is_floating_point() || parameter == "running_mean" || parameter == "running_var" ||
                     (parameter == "bias" && tensor.dim() != 1);
    site.is_linear = !is_tied_head && (kind.layout == WeightLayout::kRows || kind.layout == WeightLayout::kColumns);
    if (tensor.numel() > 0) {
      for (const auto& other : owners_.at(tensor.const_data_ptr())) {
        if (other != name && tensors_.at(other).sizes() == tensor.sizes()) site.tied_to = other;
      }
    }
    const auto factors = hints_.factors.find(site.file_path);
    if (site.takes_updates() && factors != hints_.factors.end() && factors->second.bias) add_absent_bias(site);
  }

  Site& add_site(const std::string& module, const std::string& parameter, const Kind& kind, const at::Tensor& tensor) {
    Site site;
    site.path = join_path(module, kind.name);
    site.module_path = module;
    site.module_file_path = file_path(module);
    site.file_path = join_path(site.module_file_path, kind.file_name);
    site.parameter = parameter;
    site.parts = kind.parts;
    site.layout = kind.layout;
    site.host = std::make_shared<CheckpointHost>(tensor);
    found_.model.sites.push_back(std::move(site));
    return found_.model.sites.back();
  }

  /// A layer without a bias can have the bias of a B all the same.
  void add_absent_bias(const Site& weight) {
    const auto module = weight.module_path;
    const std::string bias = weight.parameter == "in_proj_weight" ? "in_proj_bias" : "bias";
    if (!has(module, bias)) add_site(module, bias, {bias, bias}, at::Tensor());
  }

  /// Copies of layers that the checkpoint lacks as a whole, as a classifier's head that the adapter was trained with. A
  /// bias alone is of a layer that should be there.
  void add_absent_copies() {
    std::set<std::string> known, whole;
    for (const auto& [name, tensor] : tensors_) known.insert(split(name).first);
    for (const auto& [name, tensor] : hints_.copies) {
      if (split(name).second != "bias") whole.insert(split(name).first);
    }
    for (const auto& [name, tensor] : hints_.copies) {
      const auto [module, parameter] = split(name);
      if (known.count(module) != 0 || whole.count(module) == 0) continue;
      add_site(module, parameter, {parameter, parameter}, tensor).is_buffer = !tensor.is_floating_point();
      found_.added.push_back(name);
    }
  }

  /// Files without a shared storage have a tied head as an equal tensor.
  void find_tied_heads() {
    for (const auto& path : hints_.tables) {
      const auto table = tensors_.find(join_path(path, "weight"));
      if (table == tensors_.end() || table->second.dim() != 2) continue;
      for (const auto& [name, tensor] : tensors_) {
        const auto [module, parameter] = split(name);
        const auto& values = table->second;
        const bool is_known = hints_.factors.count(module) != 0 || hints_.tables.count(module) != 0;
        if (is_known || parameter != "weight" || tensor.scalar_type() != values.scalar_type()) continue;
        if (at::equal(tensor, values)) tied_heads_[name] = values;
      }
    }
  }

  const Tensors& tensors_;
  const CheckpointHints& hints_;
  CheckpointSites found_;
  std::set<std::string> placed_;
  std::map<const void*, std::vector<std::string>> owners_;
  Tensors tied_heads_;  // with the embedding's tensor in place of their own
};

}  // namespace detail
LORA_NAMESPACE_END
