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
#include <lora/io/loralib_layout.h>
#include <lora/io/method_registry.h>
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
    const auto config = read_config(files_.config, files_.config_path);
    set_stored(config);
    check_scaling();
    auto own = config->copy();
    const auto metadata = files_.metadata.find(kOwnConfig);
    if (metadata != files_.metadata.end()) {
      auto json = parse_object(metadata->second, files_.tensor_path);
      for (const auto& [key, value] : files_.config.items()) {  // a user may edit these beside the tensors
        if (json.contains(key) && key.find("dropout") != std::string::npos) json[key] = value;
      }
      own = read_config(json, files_.tensor_path);
    }
    if (files_.tensors_choose || !options_.key_mapping().empty()) choose_by_tensors(*own);
    auto* lora = dynamic_cast<TypedConfig<LoraConfig>*>(own.get());
    if (lora == nullptr || metadata != files_.metadata.end() || !lora->config.starts_from_base()) return prepare(*own);
    // PEFT's factors over a base that it has taken the start out of: here they are beside it.
    const auto started = std::make_shared<const LoRA>(lora->config);
    lora->config.init_lora_weights(LoraInit::kKaiming);
    return with_start(prepare(*own), started);
  }

  /// A file of tensors alone, by the caller's configuration.
  PreparedAdapter read(const std::string& path, const LoraConfig& config) {
    return read(read_adapter_file(path, options_, problems_), config);
  }
  PreparedAdapter read(AdapterFiles files, const LoraConfig& config) {
    files_ = std::move(files);
    TypedConfig<LoraConfig> typed(config);
    set_stored(typed.copy());
    return prepare(typed);
  }

 private:
  PreparedAdapter with_start(PreparedAdapter prepared, const std::shared_ptr<const LoRA>& started) const {
    const c10::NoGradGuard no_grad;
    for (auto& [index, adapter] : prepared.sites) {
      for (auto& part : adapter->parts) {
        const auto rows = part.update->out_features();
        const auto spec = update_spec(site(index), *started, part.begin, rows, /*initialise=*/true);
        const auto made = started->create(spec);
        const auto start = static_cast<const StartedLoraUpdate&>(*made).start();
        const auto own = lora_update(part).low_rank();
        part.update = std::make_shared<StartedLoraUpdate>(own.A, own.B, start.A, start.B, own.scaling, spec.embedding);
      }
    }
    prepared.method = started;
    return prepared;
  }

  void set_stored(const std::shared_ptr<AnyConfig>& config) {
    stored_ = config->method();
    stored_lora_ = dynamic_cast<const LoRA*>(stored_.get());
  }

  PreparedAdapter prepare(AnyConfig& config) {
    if (files_.is_loralib) rename_loralib_embeddings(files_, adapters_.sites());
    complete(config.options());
    method_ = config.method();
    find_tokens();

    plan_ = make_plan();
    leave_out_partners();
    add_saved_embeddings();
    const auto expected = make_updates(adapters_.sites(), *method_, plan_, /*initialise=*/false, at::kMeta);
    for (const auto& planned : plan_.sites) {
      if (files_.is_loralib) {
        const auto& updated = site(planned.site);
        convert_loralib_layer(files_, updated, planned.parts, stored_lora_->rank({peft_module(updated)}));
      }
      check_updates(planned, expected.at(planned.site));
    }
    if (!plan_.sites.empty()) check_shared(*expected.begin()->second.front().update);
    check_copies();
    plan_.notes.insert(plan_.notes.end(), files_.notes.begin(), files_.notes.end());
    for (const auto& [key, tensor] : files_.tensors) {
      if (tensor.used || ignored(key)) continue;
      problems_.push_back("found the tensor " + tensor.key + ", expected none: " + why_unexpected(key));
    }
    finish();  // before memory is taken by what the file claims
    auto prepared = AdapterMaker(adapters_.sites(), method_, name_, plan_, /*initialise=*/false).make();
    const c10::NoGradGuard no_grad;
    bool shared = false;
    for (auto& [index, adapter] : prepared.sites) {
      if (!adapter->parts.empty() && !std::exchange(shared, true)) fill_shared(*adapter->parts.front().update);
      fill(adapters_.sites()[index], *adapter);
    }
    finish();
    return prepared;
  }

  void finish() const {
    if (!problems_.empty()) throw FormatError(files_.place, problems_);
  }

  const Site& site(size_t index) const { return adapters_.sites()[index]; }

  static std::shared_ptr<AnyConfig> read_config(const Json& json, const std::string& path) {
    std::vector<std::string> problems;
    auto config = read_any_config(json, problems);
    try {
      if (problems.empty()) config->method();
    } catch (const c10::ValueError& error) {
      problems.push_back(error.what_without_backtrace());
    }
    if (!problems.empty()) throw FormatError(path, problems);
    return config;
  }

  /// Whether the two files were written together, where the tensor file says with what.
  void check_scaling() {
    const auto written = files_.metadata.find(kScalingConfig);
    if (written == files_.metadata.end()) return;
    const auto json = parse_object(written->second, files_.tensor_path);
    for (const auto* key : kScalingKeys) {
      if (!json.contains(key)) continue;
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
  void complete(AdapterOptions& config) {
    // PEFT has copies of a classifier's head in these tasks, whatever modules_to_save says.
    const bool classifies = config.task_type() == "SEQ_CLS" || config.task_type() == "TOKEN_CLS";
    for (const auto* head : {"classifier", "score"}) {
      auto& saved = config.modules_to_save();
      const bool known = std::find(saved.begin(), saved.end(), head) != saved.end();
      if (classifies && !known && has_below(head)) saved.push_back(head);
    }
  }

  /// The embedding whose rows the file has, where the configuration does not name it.
  void find_tokens() {
    const auto& tokens = method_->targeting().tokens;
    if (!tokens.is_list() || tokens.empty()) return;
    std::vector<std::pair<std::string, TokenIndices::Tokens>> embeddings;
    const std::string end = ".token_adapter.trainable_tokens_delta";
    for (const auto& [key, tensor] : files_.tensors) {
      if (key.size() <= end.size() || key.compare(key.size() - end.size(), end.size(), end) != 0) continue;
      embeddings.emplace_back(key.substr(0, key.size() - end.size()), tokens.embeddings().front().second);
    }
    if (embeddings.size() == 1) resolved_tokens_ = embeddings;
  }

  /// Names in a configuration are those of the file's model: with a mapping, the modules that the tensors name are the
  /// targets, each with the rank and alpha of its old name.
  void choose_by_tensors(AnyConfig& config) {
    std::vector<std::string> paths;
    Pattern<int64_t> ranks;
    Pattern<double> alphas;
    for (const auto& target : adapters_.sites()) {
      const auto* tensor = target.takes_updates() ? first_tensor(target) : nullptr;
      if (tensor == nullptr) continue;
      paths.push_back(target.path);
      if (stored_lora_ == nullptr) continue;
      auto old_name = tensor->key.substr(std::string(kPeftPrefix).size());
      old_name.resize(old_name.rfind(".lora_"));
      const auto attention = old_name.rfind(".base_layer.");
      if (attention != std::string::npos) old_name.resize(attention);
      const auto pattern = "^" + escaped(peft_module(target));
      ranks.emplace_back(pattern, stored_lora_->rank({old_name}));
      alphas.emplace_back(pattern, stored_lora_->alpha({old_name}));
    }
    auto& options = config.options();
    options.target_modules() = paths;
    options.exclude_modules() = {};
    options.layers_to_transform() = {};
    options.layers_pattern() = {};
    if (auto* lora = dynamic_cast<TypedConfig<LoraConfig>*>(&config)) {
      lora->config.rank_pattern(ranks).alpha_pattern(alphas);
    }
    set_stored(config.copy());
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

  /// The first of the method's tensors that the file has for a weight; null: it has none.
  const FileTensor* first_tensor(const Site& site) const {
    const auto start = join_path(site.file_path, stored_->prefix());
    const auto found = files_.tensors.lower_bound(start);
    const bool here = found != files_.tensors.end() && found->first.compare(0, start.size(), start) == 0;
    return here ? &found->second : nullptr;
  }

  /// PEFT names a MultiheadAttention as a whole; a file with one of its two weights adapts that one.
  void leave_out_partners() {
    const auto left_out = [&](size_t index) {
      if (first_tensor(site(index)) != nullptr) return false;
      return std::any_of(plan_.sites.begin(), plan_.sites.end(), [&](const PlannedSite& other) {
        return other.site != index && peft_module(site(other.site)) == peft_module(site(index)) &&
               first_tensor(site(other.site)) != nullptr;
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
    if (twice && method_->targeting().bias == BiasCopies::kAll) return true;
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
      const auto start = join_path(site.file_path, method_->prefix());
      if (site.takes_updates() && key.compare(0, start.size(), start) == 0) {
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
        const auto prefix = key.compare(0, std::string(kModelPrefix).size(), kModelPrefix) == 0 ? "" : kPeftPrefix;
        problems_.push_back("found no tensor " + (prefix + key) + ", expected " + text(sizes));
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

  /// How the file has the tensors of a weight with these updates.
  StoredWeight weight_of(const Site& updated, const std::vector<UpdatePart>& parts) const {
    auto weight = stored_weight(updated);
    if (stored_lora_ == nullptr || files_.is_loralib) return weight;
    int64_t own = 0;
    for (const auto& part : parts) own += lora_update(part).rank();
    const auto rank = stored_lora_->rank({peft_module(updated)});
    if (rank != own) weight.rank = rank;
    return weight;
  }

  /// Whether the file's tensors for one weight have the shapes that both configurations give them.
  void check_updates(const PlannedSite& planned, const std::vector<UpdatePart>& parts) {
    const auto& updated = site(planned.site);
    bool complete = true;
    for (const auto& [name, tensor] : method_->store(parts, weight_of(updated, parts))) {
      names_[&updated].push_back(name);
      complete = check(join_path(updated.file_path, name), tensor.sizes()) && complete;
    }
    if (!complete || files_.is_loralib || stored_lora_ == nullptr) return;
    const auto& own = static_cast<const LoRA&>(*method_);
    const auto names = std::vector<std::string>{peft_module(updated)};
    const auto rank = stored_lora_->rank(names);
    const auto scaling = stored_lora_->scaling(names);
    const bool too_small = own.rank(names_of(updated)) > rank / static_cast<int64_t>(parts.size());
    if (too_small || !same(own.scaling(names_of(updated)), scaling)) {
      problems_.push_back("found rank " + std::to_string(rank) + " and scaling " + std::to_string(scaling) + " in " +
                          kConfigFile + ", expected what the " + kOwnConfig + " metadata of " + kTensorFile +
                          " says for " + updated.file_path + "; save the adapter again");
    }
  }

  void check_shared(const Update& update) {
    for (const auto& [key, tensor] : method_->store_shared(update)) {
      if (find(key) != nullptr || !method_->may_lack_shared()) check(key, tensor.sizes());
    }
  }

  void fill_shared(const Update& update) {
    for (const auto& [key, tensor] : method_->store_shared(update)) {
      if (const auto* found = find(key)) copy_finite(tensor, found->tensor, key, problems_);
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

  void fill(const Site& target, WeightAdapter& adapter) {
    if (!adapter.parts.empty()) fill_updates(target, adapter);
    const auto put = [&](const at::Tensor& to, const std::string& key) {
      if (const auto* found = find(key)) copy_finite(to, found->tensor, kPeftPrefix + key, problems_);
    };
    if (adapter.copy.defined()) put(adapter.copy, keys().copy(target));
    if (adapter.rows.defined() && !adapter.rows_tied) put(adapter.rows.values, PeftKeys::rows(target));
    for (auto& offset : adapter.offsets) {
      for (const auto& planned : plan_.offsets) {
        const auto& weight = site(planned.weight);
        if (&site(planned.site) != &target || planned.begin != offset.begin) continue;
        const auto* found = find(PeftKeys::bias_of_B(weight));
        if (found == nullptr) continue;
        copy_finite(offset.values, found->tensor.narrow(0, offset.begin, offset.values.size(0)),
                    kPeftPrefix + PeftKeys::bias_of_B(weight), problems_);
      }
    }
  }

  void fill_updates(const Site& target, WeightAdapter& adapter) {
    const auto weight = weight_of(target, adapter.parts);
    std::map<std::string, at::Tensor> stored;
    bool complete = true;
    for (const auto& name : names_.at(&target)) {
      const auto* found = find(join_path(target.file_path, name));
      complete = complete && found != nullptr;
      if (found != nullptr) stored.emplace(name, found->tensor);
    }
    if (complete) {
      for (auto& problem : method_->restore(adapter.parts, weight, stored)) problems_.push_back(std::move(problem));
      return;
    }
    for (auto& part : adapter.parts) {  // allowed by name
      const auto rows = part.update->out_features();
      part.update = method_->create(update_spec(target, *method_, part.begin, rows, /*initialise=*/true));
    }
  }

  const ModelAdapters& adapters_;
  std::string name_;
  LoadOptions options_;
  AdapterFiles files_;
  std::shared_ptr<const Method> stored_;  // as the configuration file says
  const LoRA* stored_lora_ = nullptr;     // the same where it is LoRA
  std::shared_ptr<const Method> method_;  // as the adapter is to be here
  std::vector<std::pair<std::string, TokenIndices::Tokens>> resolved_tokens_;
  Plan plan_;
  std::map<const Site*, std::vector<std::string>> names_;  // of the tensors that the file is to have for each weight
  std::vector<std::string> problems_;
};

}  // namespace detail
LORA_NAMESPACE_END
