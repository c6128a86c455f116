#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>
#include <lora/config/lora_config.h>
#include <lora/detail/content_hash.h>
#include <lora/inject/incremental_pca.h>
#include <lora/inject/inject_options.h>
#include <lora/inject/model_adapters.h>
#include <lora/methods/lora.h>
#include <lora/methods/method.h>
#include <lora/version.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// ΔW = 0 that keeps the inputs it is multiplied with.
class RecordingUpdate final : public Update {
 public:
  RecordingUpdate(int64_t in, int64_t out) : in_(in), out_(out) {}

  int64_t in_features() const override { return in_; }
  int64_t out_features() const override { return out_; }
  std::vector<UpdateTensor> tensors() const override { return {}; }
  Factors factors(const BaseRows& /*base*/) const override { return {}; }
  bool is_factored() const override { return false; }
  bool has_product() const override { return true; }
  at::Tensor product(const at::Tensor& x) const override {
    inputs_.push_back(x.detach().reshape({-1, in_}));
    auto sizes = x.sizes().vec();
    sizes.back() = out_;
    return at::zeros(sizes, x.options());
  }
  at::Tensor dense(const BaseRows& base) const override { return at::zeros_like(base.matrix()); }
  std::shared_ptr<Update> clone(const TensorCopier& /*copy*/) const override {
    return std::make_shared<RecordingUpdate>(in_, out_);
  }

  /// The rows [n, in] since the last call; undefined: none.
  at::Tensor take() const {
    const auto rows = std::exchange(inputs_, {});
    return rows.empty() ? at::Tensor() : at::cat(rows);
  }

 private:
  int64_t in_;
  int64_t out_;
  mutable std::vector<at::Tensor> inputs_;
};

/// Updates that record, where LoRA's are to be.
class Recording final : public Method {
 public:
  explicit Recording(LoraConfig config) : lora_(std::move(config)) {
    targeting_ = lora_.targeting();
    targeting_.update_bias = false;
    targeting_.bias = BiasCopies::kNone;
    targeting_.modules_to_save.clear();
    targeting_.tokens = TokenIndices();
  }

  const char* peft_type() const override { return "RECORDING"; }
  const char* prefix() const override { return "recording_"; }
  const Targeting& targeting() const override { return targeting_; }
  std::string refusal(const UpdateSpec& spec, bool is_part) const override { return lora_.refusal(spec, is_part); }
  double dropout() const override { return 0; }
  at::ScalarType tensor_dtype(at::ScalarType base) const override { return base; }
  std::shared_ptr<Update> create(const UpdateSpec& spec) const override {
    return std::make_shared<RecordingUpdate>(spec.in_features, spec.out_features);
  }

 private:
  LoRA lora_;
  Targeting targeting_;
};

/// A of every layer by the user's data, and the ranks that their variances want (Paischer et al. 2024, arXiv
/// 2410.07170, algorithm 1): the right singular vectors of the layer's inputs, of which those that explain most are
/// kept over all layers together.
class EvaStart {
 public:
  /// Throws c10::ValueError where there are no data.
  EvaStart(const LoraConfig& config, InjectOptions::RunBatch data)
      : config_(config), method_(config), data_(std::move(data)) {
    TORCH_CHECK_VALUE(data_,
                      "[lora::inject] found the start EVA without data, expected InjectOptions().data: a function that "
                      "runs the model on a batch");
  }

  /// Runs the data through the model, which is as before then. Throws c10::ValueError where they are not enough.
  void compute(ModelAdapters& adapters) {
    const auto active = adapters.active(), merged = adapters.merged();
    adapters.add(std::make_shared<const Recording>(config_), kRecorder);
    const auto take_out = [&] {
      adapters.install(active, merged, adapters.merged_weights());
      adapters.detach(kRecorder);
      adapters.install(active, merged, adapters.merged_weights());  // what has no adapter any more becomes plain
      if (adapters.adapters().empty()) adapters.restore_flags();
    };
    try {
      auto with_recorder = active;
      with_recorder.push_back(kRecorder);
      adapters.install(with_recorder, merged, adapters.merged_weights());
      find_layers(adapters);
      const c10::NoGradGuard no_grad;
      run();
    } catch (...) {
      take_out();
      throw;
    }
    take_out();
  }

  /// The configuration with the ranks that were found, for the layers that have any.
  LoraConfig config() const {
    std::vector<std::string> targets;
    Pattern<int64_t> ranks;
    Pattern<double> alphas;
    for (const auto& layer : layers_) {
      if (layer.rank == 0) continue;
      targets.push_back(layer.target);
      const auto pattern = "^" + escaped(layer.path);
      const auto ratio = static_cast<double>(layer.rank) / static_cast<double>(layer.asked);
      const auto alpha = method_.alpha(layer.names) * (config_.eva().adjust_scaling_factors() ? ratio : 1);
      ranks.emplace_back(pattern, layer.rank);
      alphas.emplace_back(pattern, alpha);
    }
    auto config = config_;
    config.target_modules(targets).exclude_modules({}).layers_to_transform({}).layers_pattern({}).target_if({});
    return config.target_script_if({}).rank_pattern(ranks).alpha_pattern(alphas);
  }

  /// Puts A into the adapter that was made by config().
  void fill(ModelAdapters& adapters, const std::string& name) const {
    const c10::NoGradGuard no_grad;
    for (const auto& site : adapters.sites()) {
      const auto* adapter = site.find(name);
      if (adapter == nullptr) continue;
      for (const auto& part : adapter->parts) {
        const auto& layer = *std::find_if(layers_.begin(), layers_.end(),
                                          [&](const Layer& candidate) { return candidate.path == site.path; });
        const auto& pca = layers_[layer.leader].pca;
        auto A = pca.components().narrow(0, 0, layer.rank);
        if (config_.eva().whiten()) A = A / pca.singular_values().narrow(0, 0, layer.rank).sqrt().unsqueeze(1);
        lora_update(part).low_rank().A.copy_(A);
      }
    }
  }

 private:
  struct Layer {
    std::string path;
    std::string target;  // as in target_modules
    std::vector<std::string> names;
    const RecordingUpdate* recorder;
    int64_t asked;        // the configuration's rank
    int64_t rank;         // what it becomes
    size_t leader;        // the first layer with the same inputs, whose components it has
    int64_t settled = 0;  // how many components of a leader stay as they are
    IncrementalPca pca;
  };

  void find_layers(const ModelAdapters& adapters) {
    for (const auto& site : adapters.sites()) {
      const auto* adapter = site.find(kRecorder);
      if (adapter == nullptr) continue;
      const auto names = names_of(site);
      const auto rank = method_.rank(names);
      const auto components = static_cast<int64_t>(std::lround(static_cast<double>(rank) * config_.eva().rho()));
      const auto& recorder = static_cast<const RecordingUpdate&>(*adapter->parts.front().update);
      layers_.push_back({site.path, target_of(site, *adapter), names, &recorder, rank, rank, layers_.size(), 0,
                         IncrementalPca(std::min(components, recorder.in_features()))});
    }
  }

  void run() {
    int64_t batch = 0;
    for (int64_t run = 0; run < config_.eva().max_batches(); ++run) {
      if (!data_(batch)) {
        TORCH_CHECK_VALUE(batch > 0, "[lora::inject] found no batch for the start EVA, expected at least one");
        batch = 0;
        TORCH_CHECK_VALUE(data_(batch), "[lora::inject] found no batch 0 a second time, expected the same data again");
      }
      ++batch;
      const bool first = run == 0;
      look(first);
      const auto ready = std::all_of(layers_.begin(), layers_.end(), [&](const Layer& layer) {
        return layers_[layer.leader].pca.components().defined();
      });
      if (!ready) continue;
      share_ranks();
      const bool settled = std::all_of(layers_.begin(), layers_.end(),
                                       [&](const Layer& layer) { return layers_[layer.leader].settled >= layer.rank; });
      if (settled) return;
    }
    TORCH_CHECK_VALUE(false, "[lora::inject] found components that still change after ", config_.eva().max_batches(),
                      " batches for the start EVA, expected them to stay; give batches of more rows than r * rho, or "
                      "raise max_batches");
  }

  /// Takes the inputs of one batch.
  void look(bool first) {
    std::map<std::string, size_t> known;
    for (size_t i = 0; i < layers_.size(); ++i) {
      auto& layer = layers_[i];
      const auto rows = layer.recorder->take();
      TORCH_CHECK_VALUE(rows.defined(), "[lora::inject] found no input of ", layer.path,
                        " for the start EVA, expected the data to run through it");
      if (first) {
        ContentHash hash;
        hash.add(rows);
        layer.leader = known.emplace(hash.text(), i).first->second;
      }
      const bool enough = rows.size(0) >= std::min(layer.pca.count(), layer.recorder->in_features());
      if (layer.leader != i || layer.settled >= largest_rank(i) || !enough) continue;
      const auto before = layer.pca.components();
      layer.pca.add(rows);
      layer.settled = before.defined() ? settled_rows(before, layer.pca.components()) : 0;
    }
  }

  int64_t largest_rank(size_t leader) const {
    int64_t rank = 1;
    for (const auto& layer : layers_) rank = layer.leader == leader ? std::max(rank, layer.rank) : rank;
    return rank;
  }

  /// How many components from the first on have kept their direction.
  int64_t settled_rows(const at::Tensor& before, const at::Tensor& after) const {
    const auto count = std::min(before.size(0), after.size(0));
    const auto cosines = (before.narrow(0, 0, count) * after.narrow(0, 0, count)).sum(1);
    int64_t settled = 0;
    while (settled < count && cosines[settled].item<double>() >= config_.eva().tau()) ++settled;
    return settled;
  }

  /// As many components as the configured ranks are together go to the layers where they explain most.
  void share_ranks() {
    std::vector<std::pair<double, size_t>> shares;
    int64_t budget = 0;
    for (size_t i = 0; i < layers_.size(); ++i) {
      budget += layers_[i].asked;
      layers_[i].rank = 0;
      const auto ratios = layers_[layers_[i].leader].pca.explained_variance_ratio();
      const auto most = std::min(ratios.size(0), layers_[i].pca.count());
      for (int64_t k = 0; k < most; ++k) shares.emplace_back(ratios[k].item<double>(), i);
    }
    std::stable_sort(shares.begin(), shares.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
    shares.resize(std::min(shares.size(), static_cast<size_t>(budget)));
    for (const auto& [share, layer] : shares) ++layers_[layer].rank;
  }

  static constexpr const char* kRecorder = "eva start";

  const LoraConfig& config_;
  LoRA method_;
  InjectOptions::RunBatch data_;
  std::vector<Layer> layers_;
};

/// Makes a new adapter and puts it into the model, neither active nor trainable.
template <class Config>
void add_adapter(ModelAdapters& adapters, const Config& config, const std::string& name, const InjectOptions&) {
  adapters.add(std::make_shared<const typename Config::Method>(config), name);
}

/// The same for LoRA, whose start may come from data.
inline void add_adapter(ModelAdapters& adapters, const LoraConfig& config, const std::string& name,
                        const InjectOptions& options) {
  if (config.init_lora_weights() != LoraInit::kEva) {
    adapters.add(std::make_shared<const LoRA>(config), name);
    return;
  }
  adapters.check_name(name);
  EvaStart start(config, options.data());
  start.compute(adapters);
  adapters.add(std::make_shared<const LoRA>(start.config()), name);
  start.fill(adapters, name);
}

}  // namespace detail
LORA_NAMESPACE_END
