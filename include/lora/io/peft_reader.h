#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/ops/count_nonzero.h>
#include <ATen/ops/equal.h>
#include <c10/core/GradMode.h>
#include <lora/detail/error.h>
#include <lora/detail/finite.h>
#include <lora/inject/model_adapters.h>
#include <lora/inject/prepare.h>
#include <lora/io/adapter_files.h>
#include <lora/io/load_options.h>
#include <lora/io/lora_config_json.h>
#include <lora/io/loralib_layout.h>
#include <lora/io/peft_layout.h>
#include <lora/methods/lora.h>
#include <lora/version.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// Makes an adapter for a model out of what lies on disk; all mismatches are one FormatError, and the model is not
/// touched.
class PeftReader {
 public:
  /// `problems`: what was found wrong with the files where the caller has read them.
  PeftReader(const ModelAdapters& adapters, std::string name, LoadOptions options,
             std::vector<std::string> problems = {})
      : adapters_(adapters), name_(std::move(name)), options_(std::move(options)), problems_(std::move(problems)) {
    adapters_.check_name(name_);
  }

  /// A PEFT directory.
  PreparedAdapter read(const std::string& directory) {
    return read(read_peft_directory(directory, options_, problems_));
  }
  PreparedAdapter read(AdapterFiles files) {
    files_ = std::move(files);
    stored_ = read_method(files_.config, files_.config_path);
    check_scaling();
    auto config = stored_->config();
    const auto own = files_.metadata.find(kOwnConfig);
    if (own != files_.metadata.end()) {
      config = read_method(parse_object(own->second, files_.tensor_path), files_.tensor_path)->config();
      config.lora_dropout(stored_->config().lora_dropout());  // which a user may edit beside the tensors
    }
    if (files_.tensors_choose || !options_.key_mapping().empty()) choose_by_tensors(config);
    return prepare(config);
  }

  /// A file of tensors alone, by the caller's configuration.
  PreparedAdapter read(const std::string& path, const LoraConfig& config) {
    return read(read_adapter_file(path, options_, problems_), config);
  }
  PreparedAdapter read(AdapterFiles files, const LoraConfig& config) {
    stored_ = std::make_shared<const LoRA>(config);
    files_ = std::move(files);
    return prepare(config);
  }

 private:
  PreparedAdapter prepare(LoraConfig config) {
    if (files_.is_loralib) rename_loralib_embeddings(files_, adapters_.sites());
    complete(config);
    method_ = std::make_shared<const LoRA>(config);

    plan_ = make_plan();
    leave_out_partners();
    add_saved_embeddings();
    for (const auto& planned : plan_.sites) {
      if (files_.is_loralib) {
        const auto& updated = site(planned.site);
        convert_loralib_layer(files_, updated, planned.parts, stored_->rank({peft_module(updated)}));
      }
      check_updates(planned);
    }
    check_copies();
    plan_.notes.insert(plan_.notes.end(), files_.notes.begin(), files_.notes.end());
    for (const auto& [key, tensor] : files_.tensors) {
      if (tensor.used || ignored(key)) continue;
      problems_.push_back("found the tensor " + tensor.key + ", expected none: " + why_unexpected(key));
    }
    finish();  // before memory is taken by what the file claims
    auto prepared = AdapterMaker(adapters_.sites(), method_, name_, plan_, /*initialise=*/false).make();
    const c10::NoGradGuard no_grad;
    for (auto& [index, adapter] : prepared.sites) fill(adapters_.sites()[index], *adapter);
    finish();
    return prepared;
  }

  void finish() const {
    if (!problems_.empty()) throw FormatError(files_.place, problems_);
  }

  const Site& site(size_t index) const { return adapters_.sites()[index]; }

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
  void check_scaling() {
    const auto written = files_.metadata.find(kScalingConfig);
    if (written == files_.metadata.end()) return;
    const auto json = parse_object(written->second, files_.tensor_path);
    for (const auto* key : kScalingKeys) {
      // Without the order of keys, which a tool that formats the file may change.
      const auto value = [key](const Json& in) {
        return in.contains(key) ? nlohmann::json(in.at(key)) : nlohmann::json();
      };
      if (value(files_.config) == value(json)) continue;
      problems_.push_back("found " + std::string(key) + " = " + value(files_.config).dump() + " in " + kConfigFile +
                          ", expected " + value(json).dump() + " as when " + kTensorFile +
                          " was saved: the two files do not belong together; save the adapter again");
    }
  }

  FileTensor* find(const std::string& key) {
    const auto found = files_.tensors.find(key);
    return found == files_.tensors.end() ? nullptr : &found->second;
  }

  bool has_below(const std::string& module) const {
    return std::any_of(files_.tensors.begin(), files_.tensors.end(), [&](const auto& tensor) {
      const auto& key = tensor.first;
      const auto dot = key.rfind('.');
      return dot != std::string::npos && saves(module, key.substr(0, dot));
    });
  }

  /// What the tensors say and the configuration does not.
  void complete(LoraConfig& config) {
    // PEFT has copies of a classifier's head in these tasks, whatever modules_to_save says.
    const bool classifies = config.task_type() == "SEQ_CLS" || config.task_type() == "TOKEN_CLS";
    for (const auto* head : {"classifier", "score"}) {
      auto& saved = config.modules_to_save();
      const bool known = std::find(saved.begin(), saved.end(), head) != saved.end();
      if (classifies && !known && has_below(head)) saved.push_back(head);
    }
    const auto& tokens = config.trainable_token_indices();
    if (tokens.is_list() && !tokens.empty()) {
      std::vector<std::pair<std::string, TokenIndices::Tokens>> embeddings;
      const std::string end = ".token_adapter.trainable_tokens_delta";
      for (const auto& [key, tensor] : files_.tensors) {
        if (key.size() <= end.size() || key.compare(key.size() - end.size(), end.size(), end) != 0) continue;
        embeddings.emplace_back(key.substr(0, key.size() - end.size()), tokens.embeddings().front().second);
      }
      if (embeddings.size() == 1) resolved_tokens_ = embeddings;
    }
  }

  /// Names in a configuration are those of the file's model: with a mapping, the modules that the tensors name are the
  /// targets, each with the rank and alpha of its old name.
  void choose_by_tensors(LoraConfig& config) {
    std::vector<std::string> paths;
    Pattern<int64_t> ranks;
    Pattern<double> alphas;
    for (const auto& target : adapters_.sites()) {
      const auto* A = target.takes_updates() ? find(PeftKeys::A(target)) : nullptr;
      if (A == nullptr) continue;
      paths.push_back(target.path);
      auto old_name = A->key.substr(std::string(kPeftPrefix).size());
      old_name.resize(old_name.rfind(".lora_"));
      const auto attention = old_name.rfind(".base_layer.");
      if (attention != std::string::npos) old_name.resize(attention);
      const auto pattern = "^" + escaped(peft_module(target));
      ranks.emplace_back(pattern, stored_->rank({old_name}));
      alphas.emplace_back(pattern, stored_->alpha({old_name}));
    }
    config.target_modules(paths).exclude_modules({}).layers_to_transform({}).layers_pattern({});
    config.rank_pattern(ranks).alpha_pattern(alphas);
    stored_ = std::make_shared<const LoRA>(config);
  }

  Plan make_plan() {
    try {
      auto targeting = method_->targeting();
      if (!resolved_tokens_.empty()) targeting.tokens = resolved_tokens_;
      return adapters_.plan(*method_, targeting, name_, Unmatched::kNote);
    } catch (const c10::ValueError& error) {
      problems_.push_back(error.what_without_backtrace());
      finish();
      throw;
    }
  }

  bool has_factors(const Site& site) const {
    return files_.tensors.count(PeftKeys::A(site)) != 0 || files_.tensors.count(PeftKeys::B(site)) != 0;
  }

  /// PEFT names a MultiheadAttention as a whole; a file with one of its two weights adapts that one.
  void leave_out_partners() {
    const auto left_out = [&](size_t index) {
      if (has_factors(site(index))) return false;
      return std::any_of(plan_.sites.begin(), plan_.sites.end(), [&](const PlannedSite& other) {
        return other.site != index && peft_module(site(other.site)) == peft_module(site(index)) &&
               has_factors(site(other.site));
      });
    };
    std::vector<PlannedSite> kept;
    for (auto& planned : plan_.sites) {
      if (!left_out(planned.site)) kept.push_back(planned);
    }
    for (auto& entry : plan_.entries) {
      entry.sites.erase(std::remove_if(entry.sites.begin(), entry.sites.end(), left_out), entry.sites.end());
    }
    plan_.sites = std::move(kept);
  }

  PeftKeys keys() const {
    std::vector<const Site*> updated;
    for (const auto& planned : plan_.sites) updated.push_back(&site(planned.site));
    return PeftKeys(updated);
  }

  /// PEFT saves embeddings and heads whole where they are targets or were resized. One that equals the base is passed
  /// over, another becomes a copy.
  void add_saved_embeddings() {
    const auto names = keys();
    for (size_t i = 0; i < adapters_.sites().size(); ++i) {
      const auto& candidate = site(i);
      const bool head = candidate.is_linear && (candidate.tied_to_embedding ||
                                                TargetModules::is_path_or_suffix("lm_head", candidate.module_path));
      const bool planned = std::find(plan_.copies.begin(), plan_.copies.end(), i) != plan_.copies.end();
      if (planned || (candidate.layout != WeightLayout::kTable && !head)) continue;
      auto* tensor = find(names.copy(candidate));
      if (tensor == nullptr) continue;
      const auto base = candidate.base().detach();
      if (base.sizes() == tensor->tensor.sizes() && at::equal(base, tensor->tensor.to(base.options()))) {
        tensor->used = true;
        plan_.notes.push_back(candidate.path + " is in the file as it is in the base: passed over");
        continue;
      }
      plan_.copies.push_back(i);
      plan_.entries.push_back({"saved embedding \"" + candidate.path + "\"", {i}});
    }
  }

  bool ignored(const std::string& key) {
    // Beside a module's copies PEFT's bias "all" holds their biases again, and the base's.
    const bool twice =
        key.find(".original_module.") != std::string::npos || key.find(".modules_to_save.") != std::string::npos;
    if (twice && method_->config().bias() == BiasCopies::kAll) return true;
    return named_in(options_.may_ignore(), key);
  }

  static bool named_in(const TargetModules& modules, const std::string& key) {
    for (auto dot = key.rfind('.'); dot != std::string::npos && dot > 0; dot = key.rfind('.', dot - 1)) {
      const auto path = key.substr(0, dot);
      const auto& entries = modules.entries();
      const auto names = [&](const auto& entry) { return modules.matches(entry, path); };
      if (std::any_of(entries.begin(), entries.end(), names)) return true;
    }
    return false;
  }

  std::string why_unexpected(const std::string& key) const {
    for (const auto& site : adapters_.sites()) {
      if (site.takes_updates() && (key == PeftKeys::A(site) || key == PeftKeys::B(site))) {
        return "target_modules do not choose the module";
      }
    }
    for (const auto& site : adapters_.sites()) {
      if (key == site.parameter_path()) return "neither modules_to_save nor bias choose it";
    }
    return "the model has no such layer of a known type";
  }

  static std::string text(at::IntArrayRef sizes) {
    std::string result;
    for (const auto size : sizes) result += (result.empty() ? "" : ", ") + std::to_string(size);
    return "[" + result + "]";
  }

  /// Marks a tensor as used; whether it is there, of the given shape and of a type that fits.
  bool check(const std::string& key, at::IntArrayRef sizes, bool floating = true) {
    auto* found = find(key);
    if (found == nullptr) {
      if (!named_in(options_.may_lack(), key)) {
        problems_.push_back("found no tensor " + std::string(kPeftPrefix) + key + ", expected " + text(sizes));
      }
      return false;
    }
    found->used = true;
    if (found->tensor.sizes() != sizes) {
      problems_.push_back("found " + text(found->tensor.sizes()) + ", expected " + text(sizes) + " for " + found->key +
                          hint(found->tensor.sizes(), sizes));
    } else if (is_adapter_type(found->tensor.scalar_type()) && found->tensor.is_floating_point() != floating) {
      problems_.push_back("found the type " + std::string(c10::toString(found->tensor.scalar_type())) + ", expected " +
                          (floating ? "F64, F32, F16 or BF16" : "I64") + " in " + found->key);
    }
    return true;
  }

  /// PEFT's adapter of a convolution with groups mixes them: no update of the weight does.
  static std::string hint(at::IntArrayRef found, at::IntArrayRef expected) {
    const bool kernels = found.size() > 2 && found.size() == expected.size();
    if (!kernels || expected[1] <= 0 || found[1] <= expected[1] || found[1] % expected[1] != 0) return "";
    return ": PEFT's form for a convolution with " + std::to_string(found[1] / expected[1]) +
           " groups, whose update mixes the groups and is none of the weight";
  }

  /// Whether the file's factors for one weight have the shapes that both configurations give them.
  void check_updates(const PlannedSite& planned) {
    const auto& updated = site(planned.site);
    const auto parts = static_cast<int64_t>(planned.parts.size());
    const auto rank = stored_->rank({peft_module(updated)}) * (files_.is_loralib ? parts : 1);
    const bool has_A = check(PeftKeys::A(updated), PeftKeys::sizes_of_A(updated, rank));
    const bool has_B = check(PeftKeys::B(updated), PeftKeys::sizes_of_B(updated, rank));
    if (!has_A || !has_B || files_.is_loralib) return;
    const auto scaling = stored_->scaling({peft_module(updated)});
    if (method_->rank(names_of(updated)) > rank / parts || !same(method_->scaling(names_of(updated)), scaling)) {
      problems_.push_back("found rank " + std::to_string(rank) + " and scaling " + std::to_string(scaling) + " in " +
                          kConfigFile + ", expected what the " + kOwnConfig + " metadata of " + kTensorFile +
                          " says for " + updated.file_path + "; save the adapter again");
    }
  }

  void check_copies() {
    const auto names = keys();
    for (const auto index : plan_.copies) {
      const auto& copied = site(index);
      const auto base = copied.base();
      check(names.copy(copied), base.sizes(), base.is_floating_point());
    }
    for (const auto& planned : plan_.rows) {
      check(PeftKeys::rows(site(planned.site)),
            {static_cast<int64_t>(planned.ids.size()), site(planned.site).base().size(1)});
    }
    for (const auto& planned : plan_.offsets) {
      const auto& weight = site(planned.weight);
      check(PeftKeys::bias_of_B(weight), {weight.base_matrix().size(0)});
    }
  }

  /// Copies a tensor of the file, where it has one, and finds what the adapter's type cannot hold.
  void copy(const at::Tensor& to, const at::Tensor& from, const std::string& key) {
    to.copy_(from);
    if (all_finite(to)) return;
    problems_.push_back("found values beyond the range of " + std::string(c10::toString(to.scalar_type())) +
                        ", expected ones that the adapter's type holds in " + std::string(kPeftPrefix) + key);
  }

  void fill(const Site& target, WeightAdapter& adapter) {
    if (!adapter.parts.empty()) fill_updates(target, adapter);
    const auto put = [&](const at::Tensor& to, const std::string& key) {
      if (const auto* found = find(key)) copy(to, found->tensor, key);
    };
    if (adapter.copy.defined()) put(adapter.copy, keys().copy(target));
    if (adapter.rows.defined() && !adapter.rows_tied) put(adapter.rows.values, PeftKeys::rows(target));
    for (auto& offset : adapter.offsets) {
      for (const auto& planned : plan_.offsets) {
        const auto& weight = site(planned.weight);
        if (&site(planned.site) != &target || planned.begin != offset.begin) continue;
        const auto* found = find(PeftKeys::bias_of_B(weight));
        if (found == nullptr) continue;
        copy(offset.values, found->tensor.narrow(0, offset.begin, offset.values.size(0)), PeftKeys::bias_of_B(weight));
      }
    }
  }

  /// Takes the stacked factors of stack_parts apart again.
  void fill_updates(const Site& target, WeightAdapter& adapter) {
    const auto *A = find(PeftKeys::A(target)), *B = find(PeftKeys::B(target));
    if (A == nullptr || B == nullptr) {  // allowed by name
      const auto base = target.base_matrix();
      for (auto& part : adapter.parts) {
        const auto options = part.update->low_rank().A.options().requires_grad(false);
        part.update = method_->create({names_of(target), base.size(1), part.update->out_features(), options,
                                       /*initialise=*/true, target.layout == WeightLayout::kTable});
      }
      return;
    }
    const auto rows = A->tensor.flatten(1);
    auto rest = B->tensor.flatten(1).clone();
    int64_t done = 0;
    for (const auto& part : adapter.parts) {
      auto own = part.update->low_rank();
      const auto r = own.A.size(0);
      auto block = rest.narrow(0, part.begin, own.B.size(0)).narrow(1, done, r);
      copy(own.A, rows.narrow(0, done, r), PeftKeys::A(target));
      copy(own.B, block, PeftKeys::B(target));
      block.zero_();
      done += r;
    }
    if (at::count_nonzero(rest).item<int64_t>() != 0) {
      problems_.push_back("found values outside of the parts' blocks in lora_B, expected zeros at " + target.file_path);
    }
  }

  const ModelAdapters& adapters_;
  std::string name_;
  LoadOptions options_;
  AdapterFiles files_;
  std::shared_ptr<const LoRA> stored_;  // as the configuration file says
  std::shared_ptr<const LoRA> method_;  // as the adapter is to be here
  std::vector<std::pair<std::string, TokenIndices::Tokens>> resolved_tokens_;
  Plan plan_;
  std::vector<std::string> problems_;
};

}  // namespace detail
LORA_NAMESPACE_END
