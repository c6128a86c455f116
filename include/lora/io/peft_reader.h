#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/ops/count_nonzero.h>
#include <ATen/ops/isfinite.h>
#include <lora/detail/error.h>
#include <lora/inject/model_adapters.h>
#include <lora/inject/prepare.h>
#include <lora/io/lora_config_json.h>
#include <lora/io/peft_layout.h>
#include <lora/io/safetensors.h>
#include <lora/methods/lora.h>
#include <lora/version.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// Reads a PEFT directory into an adapter for a model; all mismatches are one FormatError, and the model is not
/// touched.
class PeftReader {
 public:
  PeftReader(const ModelAdapters& adapters, std::string directory, std::string name)
      : adapters_(adapters), directory_(std::move(directory)), name_(std::move(name)) {}

  PreparedAdapter read() {
    adapters_.check_name(name_);
    const auto config_path = directory_ + "/" + kConfigFile, tensor_path = directory_ + "/" + kTensorFile;
    const auto stored_json = parse_object(read_text(config_path), config_path);
    const auto stored = read_method(stored_json, config_path);
    const auto file = load_safetensors_with_metadata(tensor_path);
    check_scaling(stored_json, file.metadata);
    auto method = stored;
    const auto own = file.metadata.find(kOwnConfig);
    if (own != file.metadata.end()) {
      auto own_json = parse_object(own->second, tensor_path);
      own_json["lora_dropout"] = stored->config().lora_dropout();  // which a user may edit beside the tensors
      method = read_method(own_json, tensor_path);
    }

    collect(file.tensors);
    auto plan = make_plan(*method);
    leave_out_partners(plan);
    for (const auto& planned : plan.sites) check(planned, *method, *stored);
    for (const auto& [path, factors] : factors_) {
      if (!factors.used) problems_.push_back("found tensors for " + path + ", expected none: " + why_unexpected(path));
    }
    finish();  // before memory is taken by what the file claims
    auto prepared = prepare(adapters_.sites(), method, name_, plan, /*initialise=*/false);
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

  static std::shared_ptr<const LoRA> read_method(const Json& json, const std::string& path) {
    std::vector<std::string> problems;
    const auto config = LoraConfigReader(json, problems).read();
    try {
      if (problems.empty()) return std::make_shared<const LoRA>(config);
    } catch (const c10::ValueError& error) {
      problems.push_back(error.what_without_backtrace());
    }
    throw FormatError(path, problems);
  }

  /// Whether the two files were written together, where the tensor file says with what.
  void check_scaling(const Json& stored, const std::map<std::string, std::string>& metadata) {
    const auto written = metadata.find(kScalingConfig);
    if (written == metadata.end()) return;
    const auto json = parse_object(written->second, directory_ + "/" + kTensorFile);
    for (const auto* key : kScalingKeys) {
      // Without the order of keys, which a tool that formats the file may change.
      const auto value = [key](const Json& in) {
        return in.contains(key) ? nlohmann::json(in.at(key)) : nlohmann::json();
      };
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
      const auto type = tensor.scalar_type();
      if (type != at::kFloat && type != at::kDouble && type != at::kHalf && type != at::kBFloat16) {
        problems_.push_back("found the type " + std::string(c10::toString(type)) +
                            ", expected F64, F32, F16 or BF16 in " + key);
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
      if (!at::isfinite(own.A).all().item<bool>() || !at::isfinite(own.B).all().item<bool>()) {
        problems_.push_back("found values beyond the range of " + std::string(c10::toString(own.A.scalar_type())) +
                            ", expected ones that the adapter's type holds at " + site.file_path);
      }
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

}  // namespace detail
LORA_NAMESPACE_END
