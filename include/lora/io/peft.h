#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/count_nonzero.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/zeros.h>
#include <lora/detail/atomic_file.h>
#include <lora/detail/error.h>
#include <lora/inject/model_adapters.h>
#include <lora/io/lora_config_json.h>
#include <lora/io/safetensors.h>
#include <lora/methods/lora.h>
#include <lora/version.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

constexpr const char* kPeftPrefix = "base_model.model.";
constexpr const char* kKeyOfA = "lora_A.weight";
constexpr const char* kKeyOfB = "lora_B.weight";
constexpr const char* kConfigFile = "adapter_config.json";
constexpr const char* kTensorFile = "adapter_model.safetensors";
/// Metadata of the tensor file with our own configuration, where PEFT's cannot say all: parts of fused projections.
constexpr const char* kOwnConfig = "lora.config";
/// Metadata of the tensor file with what of PEFT's configuration the tensors' meaning depends on: a save that was
/// interrupted between the two files is found by it.
constexpr const char* kScalingConfig = "lora.scaling";
constexpr const char* kScalingKeys[] = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"};

/// An adapter on one module as PEFT stores it: ΔW = s·B·A over the whole weight, s by rank and alpha.
struct StoredFactors {
  const Site* site = nullptr;
  const WeightAdapter* updates = nullptr;
  int64_t rank = 0;
  double alpha = 0;
};

/// Whether two scalings are equal but for the rounding of their computation.
inline bool same(double a, double b) { return std::abs(a - b) <= 1e-12 * std::abs(a); }

inline int64_t total_rank(const WeightAdapter& adapter) {
  int64_t rank = 0;
  for (const auto& part : adapter.parts) rank += static_cast<const LoraUpdate&>(*part.update).rank();
  return rank;
}

/// The parts' factors as one pair of the given rank: A stacked by rows, B with a block a part and zeros elsewhere, so
/// that B·A is the same ΔW exactly.
inline std::pair<at::Tensor, at::Tensor> stack_parts(const WeightAdapter& adapter, int64_t rows, int64_t rank) {
  const auto first = adapter.parts.front().update->low_rank();
  auto A = at::zeros({rank, first.A.size(1)}, first.A.options().requires_grad(false));
  auto B = at::zeros({rows, rank}, first.B.options().requires_grad(false));
  int64_t done = 0;
  for (const auto& part : adapter.parts) {
    const auto factors = part.update->low_rank();
    const auto r = factors.A.size(0);
    A.narrow(0, done, r).copy_(factors.A.detach());
    B.narrow(0, part.begin, factors.B.size(0)).narrow(1, done, r).copy_(factors.B.detach());
    done += r;
  }
  return {A, B};
}

/// Writes one adapter as a PEFT directory.
class PeftWriter {
 public:
  PeftWriter(const ModelAdapters& adapters, const std::string& name)
      : adapters_(adapters),
        name_(name),
        method_(std::dynamic_pointer_cast<const LoRA>(adapters.adapter(name).method)) {
    TORCH_CHECK_VALUE(method_ != nullptr, "[lora::save] found an adapter of type ",
                      adapters.adapter(name).method->peft_type(), ", expected LORA");
    collect();
  }

  void write(const std::string& directory) const {
    std::error_code error;
    std::filesystem::create_directories(directory, error);
    if (error) throw FormatError(directory, {"cannot make the directory: " + error.message()});

    const c10::NoGradGuard no_grad;
    std::map<std::string, torch::Tensor> tensors;
    for (const auto& factors : stored_) {
      const auto [A, B] = stack_parts(*factors.updates, factors.site->base_matrix().size(0), factors.rank);
      tensors[kPeftPrefix + join_path(factors.site->file_path, kKeyOfA)] = A;
      tensors[kPeftPrefix + join_path(factors.site->file_path, kKeyOfB)] = B;
    }
    std::map<std::string, std::string> metadata{{"format", "pt"}};
    const auto config = this->config();
    if (needs_own_config_) metadata[kOwnConfig] = own_config().dump();
    auto scaling = Json::object();
    for (const auto* key : kScalingKeys) scaling[key] = config[key];
    metadata[kScalingConfig] = scaling.dump();

    AtomicFile tensor_file(directory + "/" + kTensorFile), config_file(directory + "/" + kConfigFile);
    write_safetensors(tensor_file, tensors, metadata);
    config_file.write(config.dump(2) + "\n");
    tensor_file.sync();
    config_file.sync();
    tensor_file.commit();
    config_file.commit();
  }

 private:
  void collect() {
    for (const auto& site : adapters_.sites()) {
      const auto* updates = site.find(name_);
      if (updates == nullptr) continue;
      const auto rank = total_rank(*updates);
      stored_.push_back({&site, updates, rank, 0});
      needs_own_config_ = needs_own_config_ || !updates->parts.front().name.empty();
    }
    // PEFT has one rank for both weights of a MultiheadAttention: the smaller one is filled up with zeros.
    for (auto& factors : stored_) {
      for (const auto& other : stored_) {
        if (peft_module(*other.site) == peft_module(*factors.site)) factors.rank = std::max(factors.rank, other.rank);
      }
      factors.alpha = alpha_for(factors);
      needs_own_config_ = needs_own_config_ || factors.rank != total_rank(*factors.updates);
    }
    for (const auto& factors : stored_) {
      for (const auto& other : stored_) {
        const auto module = peft_module(*factors.site);
        TORCH_CHECK_VALUE(peft_module(*other.site) != module || same(other.alpha, factors.alpha),
                          "[lora::save] found "
                          "different scalings on the weights of ",
                          module,
                          ", expected one: PEFT has one rank and one "
                          "alpha for a MultiheadAttention; choose alpha_pattern so that alpha / rank are equal");
      }
    }
  }

  /// The alpha that gives the update's scaling at the stored rank.
  double alpha_for(const StoredFactors& factors) const {
    const auto& update = static_cast<const LoraUpdate&>(*factors.updates->parts.front().update);
    const auto names = names_of(*factors.site);
    const auto divisor = [&](int64_t rank) {
      return method_->config().use_rslora() ? std::sqrt(static_cast<double>(rank)) : static_cast<double>(rank);
    };
    // Modules written with LoRALinear may have other configurations than the first one of the name.
    const bool as_configured = update.rank() == method_->rank(names) && update.scaling() == method_->scaling(names);
    const double alpha = as_configured ? method_->alpha(names) : update.scaling() * divisor(update.rank());
    return factors.rank == update.rank() ? alpha : alpha * divisor(factors.rank) / divisor(update.rank());
  }

  Json config() const {
    auto json = lora_config_json(method_->config());
    json.erase("fused_parts");
    json["r"] = stored_.front().rank;
    json["lora_alpha"] = number(stored_.front().alpha);
    json["rank_pattern"] = pattern([](const StoredFactors& f) { return static_cast<double>(f.rank); });
    json["alpha_pattern"] = pattern([](const StoredFactors& f) { return f.alpha; });
    if (names_fit()) {
      if (method_->config().target_modules().kind() == TargetModules::Kind::kList) {
        json["target_modules"] = Json::array();
        for (const auto& entry : method_->config().target_modules().entries())
          json["target_modules"].push_back(entry.name);
      }
    } else {
      json["exclude_modules"] = nullptr;
      json["target_modules"] = Json::array();
      for (const auto& factors : stored_) {
        const auto module = peft_module(*factors.site);
        auto& list = json["target_modules"];
        if (std::find(list.begin(), list.end(), module) == list.end()) list.push_back(module);
      }
    }
    return json;
  }

  Json own_config() const {
    auto json = lora_config_json(method_->config());
    if (method_->config().target_if() || method_->config().target_script_if()) {
      // A predicate cannot be written down: the modules that it chose can.
      json["target_modules"] = Json::array();
      for (const auto& factors : stored_) {
        std::string parts;
        for (const auto& part : factors.updates->parts) parts += (parts.empty() ? "" : ",") + part.name;
        json["target_modules"].push_back(factors.site->path + (parts.empty() ? "" : "[" + parts + "]"));
      }
    }
    return json;
  }

  /// Whether the user's target_modules choose exactly the adapted modules, read by PEFT's rules.
  bool names_fit() const {
    const auto& config = method_->config();
    const auto& targets = config.target_modules();
    if (config.target_if() || config.target_script_if() || targets.empty() ||
        targets.kind() == TargetModules::Kind::kAllLinear) {
      return false;
    }
    for (const auto& site : adapters_.sites()) {
      const auto named = [&](const TargetModules& modules) {
        return std::any_of(modules.entries().begin(), modules.entries().end(),
                           [&](const auto& entry) { return modules.matches(entry, peft_module(site)); });
      };
      if ((site.find(name_) != nullptr) != (named(targets) && !named(config.exclude_modules()))) return false;
    }
    return true;
  }

  /// The entries of rank_pattern or alpha_pattern for the modules that differ from the first one.
  template <class Value>
  Json pattern(const Value& value) const {
    auto json = Json::object();
    const auto common = value(stored_.front());
    for (const auto& factors : stored_) {
      const auto module = peft_module(*factors.site);
      const auto last = module.substr(module.rfind('.') + 1);
      bool uniform = true;
      for (const auto& other : stored_) {
        const auto other_module = peft_module(*other.site);
        const bool same_name = other_module.substr(other_module.rfind('.') + 1) == last;
        uniform = uniform && (!same_name || value(other) == value(factors));
      }
      if (value(factors) != common) json[uniform ? escaped(last) : "^" + escaped(module)] = number(value(factors));
    }
    return json;
  }

  static std::string escaped(const std::string& path) {
    std::string result;
    for (const char c : path)
      result += (std::isalnum(static_cast<unsigned char>(c)) || c == '_' ? "" : "\\") + std::string(1, c);
    return result;
  }

  const ModelAdapters& adapters_;
  std::string name_;
  std::shared_ptr<const LoRA> method_;
  std::vector<StoredFactors> stored_;
  bool needs_own_config_ = false;
};

/// Reads a PEFT directory into an adapter for a model; all mismatches are one FormatError, and the model is not
/// touched.
class PeftReader {
 public:
  PeftReader(const ModelAdapters& adapters, std::string directory, std::string name)
      : adapters_(adapters), directory_(std::move(directory)), name_(std::move(name)) {}

  PreparedAdapter read() {
    adapters_.check_name(name_);
    const auto config_path = directory_ + "/" + kConfigFile, tensor_path = directory_ + "/" + kTensorFile;
    const auto stored_json = parse(read_text(config_path), config_path);
    const auto stored_config = read_config(stored_json, config_path);
    const auto file = load_safetensors_with_metadata(tensor_path);
    check_scaling(stored_json, file.metadata);
    auto config = stored_config;
    const auto own = file.metadata.find(kOwnConfig);
    if (own != file.metadata.end()) {
      config = read_config(parse(own->second, tensor_path), tensor_path).lora_dropout(stored_config.lora_dropout());
    }

    collect(file.tensors);
    const auto method = std::make_shared<const LoRA>(config);
    auto plan = make_plan(*method);
    leave_out_partners(plan);
    const LoRA stored(stored_config);
    for (const auto& planned : plan.sites) check(planned, *method, stored);
    for (const auto& [path, factors] : factors_) {
      if (!factors.used) problems_.push_back("found tensors for " + path + ", expected none: " + why_unexpected(path));
    }
    finish();  // before memory is taken by what the file claims
    auto prepared = adapters_.prepare(method, name_, plan, /*initialise=*/false);
    for (auto& [index, updates] : prepared.updates) {
      const auto& site = adapters_.sites()[index];
      split(site, *updates, factors_.at(site.file_path));
    }
    finish();
    return prepared;
  }

 private:
  struct Factors {
    at::Tensor A;
    at::Tensor B;
    bool used = false;
  };

  void finish() const {
    if (!problems_.empty()) throw FormatError(directory_, problems_);
  }

  static std::string read_text(const std::string& path) {
    std::ifstream stream(path, std::ios::binary);
    if (!stream) throw FormatError(path, {std::string("cannot be read: ") + std::strerror(errno)});
    return {std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
  }

  static Json parse(const std::string& text, const std::string& path) {
    auto json = Json::parse(text, nullptr, /*allow_exceptions=*/false);
    if (!json.is_object()) throw FormatError(path, {"found no JSON object, expected an adapter's configuration"});
    return json;
  }

  static LoraConfig read_config(const Json& json, const std::string& path) {
    std::vector<std::string> problems;
    auto config = LoraConfigReader(json, problems).read();
    if (!problems.empty()) throw FormatError(path, problems);
    return config;
  }

  /// Whether the two files were written together, where the tensor file says with what.
  void check_scaling(const Json& stored, const std::map<std::string, std::string>& metadata) {
    const auto written = metadata.find(kScalingConfig);
    if (written == metadata.end()) return;
    const auto json = parse(written->second, directory_ + "/" + kTensorFile);
    for (const auto* key : kScalingKeys) {
      const auto value = [key](const Json& in) { return in.contains(key) ? in.at(key) : Json(); };
      if (value(stored) == value(json)) continue;
      problems_.push_back("found " + std::string(key) + " = " + value(stored).dump() + " in " + kConfigFile +
                          ", expected " + value(json).dump() + " as when " + kTensorFile +
                          " was saved: the two files do not belong together; save the adapter again");
    }
  }

  /// Sorts the file's tensors by module.
  void collect(const std::map<std::string, torch::Tensor>& tensors) {
    for (const auto& [key, tensor] : tensors) {
      const std::string prefix = kPeftPrefix;
      const auto name = key.compare(0, prefix.size(), prefix) == 0 ? key.substr(prefix.size()) : std::string();
      const bool is_a = TargetModules::is_path_or_suffix(kKeyOfA, name);
      if (!is_a && !TargetModules::is_path_or_suffix(kKeyOfB, name)) {
        problems_.push_back("found the tensor " + key + ", expected names of the form " + prefix +
                            "<module>.lora_A.weight and lora_B.weight");
        continue;
      }
      if (!tensor.is_floating_point()) {
        problems_.push_back("found the type " + std::string(c10::toString(tensor.scalar_type())) +
                            ", expected floating-point numbers in " + key);
      } else if (!at::isfinite(tensor).all().item<bool>()) {
        problems_.push_back("found NaN or infinite values, expected finite ones in " + key);
      }
      const auto last = std::string(kKeyOfA).size() + 1;  // with the dot in front
      auto& factors = factors_[name.size() < last ? std::string() : name.substr(0, name.size() - last)];
      (is_a ? factors.A : factors.B) = tensor;
    }
  }

  Plan make_plan(const LoRA& method) {
    try {
      return adapters_.plan(method, name_, Unmatched::kNote);
    } catch (const c10::ValueError& error) {
      problems_.push_back(error.what_without_backtrace());
      finish();
      throw;
    }
  }

  /// PEFT names a MultiheadAttention as a whole; a file with one of its two weights adapts that one.
  void leave_out_partners(Plan& plan) {
    const auto& sites = adapters_.sites();
    const auto left_out = [&](size_t index) {
      if (factors_.count(sites[index].file_path) != 0) return false;
      return std::any_of(plan.sites.begin(), plan.sites.end(), [&](const PlannedSite& other) {
        return peft_module(sites[other.site]) == peft_module(sites[index]) &&
               factors_.count(sites[other.site].file_path) != 0;
      });
    };
    std::vector<PlannedSite> kept;
    for (auto& planned : plan.sites) {
      if (!left_out(planned.site)) kept.push_back(planned);
    }
    for (auto& entry : plan.entries) {
      entry.sites.erase(std::remove_if(entry.sites.begin(), entry.sites.end(), left_out), entry.sites.end());
    }
    plan.sites = std::move(kept);
  }

  std::string why_unexpected(const std::string& path) const {
    for (const auto& site : adapters_.sites()) {
      if (site.file_path == path) return "target_modules do not choose the module";
    }
    return "the model has no such Linear, MultiheadAttention or registered host";
  }

  static std::string shape(const at::Tensor& tensor) {
    if (!tensor.defined()) return "nothing";
    std::string text;
    for (const auto size : tensor.sizes()) text += (text.empty() ? "" : ", ") + std::to_string(size);
    return "[" + text + "]";
  }

  /// Whether the file's factors for one module have the shapes that both configurations give them.
  void check(const PlannedSite& planned, const LoRA& method, const LoRA& stored) {
    const auto& site = adapters_.sites()[planned.site];
    const auto found = factors_.find(site.file_path);
    if (found == factors_.end()) {
      problems_.push_back("found no tensors, expected lora_A and lora_B for " + site.file_path);
      return;
    }
    auto& factors = found->second;
    factors.used = true;
    const auto base = site.base_matrix();
    const auto rank = stored.rank({peft_module(site)});
    const auto in_order = [&](const at::Tensor& tensor, int64_t rows, int64_t columns, const char* name) {
      const bool fits = tensor.defined() && tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns;
      if (!fits) {
        problems_.push_back("found " + shape(tensor) + ", expected [" + std::to_string(rows) + ", " +
                            std::to_string(columns) + "] for " + name + " of " + site.file_path);
      }
      return fits;
    };
    const bool a_fits = in_order(factors.A, rank, base.size(1), "lora_A");
    if (!in_order(factors.B, base.size(0), rank, "lora_B") || !a_fits) return;
    const auto parts = static_cast<int64_t>(planned.parts.size());
    const auto scaling = stored.scaling({peft_module(site)});
    if (method.rank(names_of(site)) > rank / parts || !same(method.scaling(names_of(site)), scaling)) {
      problems_.push_back("found rank " + std::to_string(rank) + " and scaling " + std::to_string(scaling) + " in " +
                          kConfigFile + ", expected what the " + kOwnConfig + " metadata of " + kTensorFile +
                          " says for " + site.file_path + "; save the adapter again");
    }
  }

  /// Takes the stacked factors of stack_parts apart again.
  void split(const Site& site, WeightAdapter& adapter, const Factors& factors) {
    const c10::NoGradGuard no_grad;
    auto rest = factors.B.clone();
    int64_t done = 0;
    for (const auto& part : adapter.parts) {
      auto own = part.update->low_rank();
      const auto r = own.A.size(0);
      own.A.copy_(factors.A.narrow(0, done, r));
      auto block = rest.narrow(0, part.begin, own.B.size(0)).narrow(1, done, r);
      own.B.copy_(block);
      block.zero_();
      done += r;
    }
    if (at::count_nonzero(rest).item<int64_t>() != 0) {
      problems_.push_back("found values outside of the parts' blocks in lora_B, expected zeros at " + site.file_path);
    }
  }

  const ModelAdapters& adapters_;
  std::string directory_;
  std::string name_;
  std::map<std::string, Factors> factors_;
  std::vector<std::string> problems_;
};

inline void write_adapter(const ModelAdapters& adapters, const std::string& name, const std::string& directory) {
  PeftWriter(adapters, name).write(directory);
}

inline PreparedAdapter read_adapter(const ModelAdapters& adapters, const std::string& directory,
                                    const std::string& name) {
  return PeftReader(adapters, directory, name).read();
}

}  // namespace detail
LORA_NAMESPACE_END
