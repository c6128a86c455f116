#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/index_copy.h>
#include <ATen/ops/isfinite.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <lora/detail/error.h>
#include <lora/inject/model_adapters.h>
#include <lora/merge/merge.h>
#include <lora/version.h>

#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// Computes W′ of every site that one of the named adapters lives in, each from W0, or from the copy that an adapter
/// has in its place; throws before anything is changed.
class SiteMerger {
 public:
  /// `for_good`: W′ is to stand in place of W0, for every use of the weight.
  SiteMerger(const std::vector<Site>& sites, const Names& names, const Names& active, bool for_good = false)
      : sites_(sites), names_(names), active_(active), for_good_(for_good) {}

  /// W′ of every site, all in one threaded pass.
  std::map<size_t, at::Tensor> merge() {
    const c10::InferenceMode no_inference(false);  // W′ made in it could not be saved for a backward outside of it
    const c10::NoGradGuard no_grad;
    for (size_t i = 0; i < sites_.size(); ++i) add(i);
    return run();
  }

  /// W′ of the sites one after the other, each given to `use(site, W′)` before the next is computed.
  template <class Use>
  void merge_each(const Use& use) {
    const c10::InferenceMode no_inference(false);
    const c10::NoGradGuard no_grad;
    for (size_t i = 0; i < sites_.size(); ++i) {
      add(i);
      for (auto& [site, weight] : run()) use(site, std::move(weight));
    }
  }

  /// Throws what merge_each would throw on its way.
  void check_each() {
    merge_each([](size_t, const at::Tensor&) {});
  }

  /// What merging takes, told beforehand.
  MergeReport cost(bool keep_base) const {
    MergeReport report;
    for (const auto& site : sites_) {
      bool changed = false, computed = false;
      for (const auto& name : names_) {
        const auto* adapter = site.find(name);
        changed = changed || adapter != nullptr;
        if (adapter == nullptr) continue;
        const bool cast = adapter->copy.defined() && adapter->copy.scalar_type() != site.weight->base().scalar_type();
        computed = computed || cast || adapter->forms_dense() || adapter->changes_bias();
      }
      if (!changed) continue;
      ++report.weights;
      const auto bytes = computed ? static_cast<int64_t>(site.weight->base().nbytes()) : 0;
      report.bytes = keep_base ? report.bytes + bytes : std::max(report.bytes, bytes);
    }
    return report;
  }

 private:
  /// Merges what was added and leaves nothing behind.
  std::map<size_t, at::Tensor> run() {
    if (!problems_.empty()) throw StateError(problems_);
    merge_weights(jobs_);
    for (size_t k = 0; k < jobs_.size(); ++k) {
      const auto base = sites_[indices_[k]].base();
      auto& merged = jobs_[k]->merged;
      if (base.dim() > 2) {  // in the strides of W0, which the operators choose their kernels by
        merged = merged.view(base.sizes());
        if (!base.is_contiguous()) merged = at::empty_like(base).copy_(merged);
      }
      weights_.emplace(indices_[k], std::move(merged));
    }
    jobs_.clear();
    indices_.clear();
    return std::exchange(weights_, {});
  }

  void add(size_t index) {
    const auto& site = sites_[index];
    if (site.weight == nullptr) return;
    auto values = site.weight->base().detach();
    auto job = std::make_unique<MergeJob>();
    bool changed = false;
    for (const auto& name : names_) {
      const auto* adapter = site.find(name);
      if (adapter == nullptr) continue;
      changed = true;
      if (adapter->copy.defined()) values = adapter->copy.detach().to(values.scalar_type());
    }
    if (!changed) return;
    check_partners(site);
    check_uses(site);
    for (const auto& name : names_) {
      if (const auto* adapter = site.find(name)) add_updates(*job, site, *adapter);
    }
    values = with_rows_and_offsets(site, values);
    if (job->updates.empty() && job->dense.empty()) {
      check_finite(site, values);
      // An alias: the adapter's copy itself stays what it is, whatever is done to the model's weight.
      weights_.emplace(index, values.detach());
      return;
    }
    job->path = site.path;
    job->transposed = site.weight->transposed();
    job->base = values.dim() > 2 ? values.flatten(1) : values;
    jobs_.push_back(std::move(job));
    indices_.push_back(index);
  }

  static void add_updates(MergeJob& job, const Site& site, const WeightAdapter& adapter) {
    for (const auto& part : adapter.parts) {
      const auto base = part.base(site.weight->base().detach(), site.layout);
      auto factors = part.update->is_factored() ? part.update->factors(base) : Factors();
      if (!part.update->is_factored() || !factors.is_sum()) {
        job.dense.push_back({part.begin, part.update, base});
        continue;
      }
      for (auto& term : factors.terms) job.updates.emplace_back(part.begin, std::move(term));
    }
  }

  at::Tensor with_rows_and_offsets(const Site& site, at::Tensor values) const {
    const auto dtype = values.scalar_type();
    for (const auto& name : names_) {
      const auto* adapter = site.find(name);
      if (adapter == nullptr) continue;
      if (adapter->rows.defined()) {
        values = values.index_copy(0, adapter->rows.index(), adapter->rows.values.detach().to(dtype));
      }
      if (!adapter->changes_bias()) continue;
      values = values.to(accumulation_dtype(dtype), /*non_blocking=*/false, /*copy=*/true);
      adapter->change_bias(site.weight->base().detach(), values);
    }
    return values.to(dtype);
  }

  /// A copy stands in place of the base below every update: it cannot stay behind when some of them are merged.
  void check_partners(const Site& site) {
    for (const auto& name : active_) {
      const auto* adapter = site.find(name);
      if (adapter == nullptr || contains(names_, name)) continue;
      if (!adapter->copy.defined() && !adapter->rows.defined()) continue;
      problems_ += (problems_.empty() ? "" : "\n") + ("[lora::merge] found \"" + name) +
                   "\" unmerged with a copy in place of the base, expected it merged with the others at " +
                   site.parameter_path() + "; merge it too";
    }
  }

  /// Of a weight that is looked up and multiplied with, an adapter changes the lookups alone.
  void check_uses(const Site& site) {
    bool splits = false, has_rows = false;
    for (const auto& name : names_) {
      const auto* adapter = site.find(name);
      if (adapter == nullptr) continue;
      splits = splits || site.splits_uses(*adapter);
      has_rows = has_rows || adapter->rows.defined();
    }
    if (!splits || !(for_good_ || has_rows)) return;
    problems_ +=
        (problems_.empty() ? "" : "\n") +
        ("[lora::merge] found the weight " + site.parameter_path() +
         " looked up and multiplied with, as by a tied head, expected one use: no single W' stands for both; " +
         (for_good_ ? "merge() keeps them apart, or give the head a weight of its own"
                    : "merge the adapters of tokens and of updates apart"));
  }

  static void check_finite(const Site& site, const at::Tensor& values) {
    TORCH_CHECK_VALUE(!values.is_floating_point() || at::isfinite(values).all().item<bool>(),
                      "[lora::merge] found NaN or infinite values in W', expected finite ones at ",
                      site.parameter_path(), "; check the adapter's copy there; nothing was changed");
  }

  const std::vector<Site>& sites_;
  const Names& names_;
  const Names& active_;
  bool for_good_;
  std::vector<std::unique_ptr<MergeJob>> jobs_;
  std::vector<size_t> indices_;
  std::map<size_t, at::Tensor> weights_;
  std::string problems_;
};

inline std::map<size_t, at::Tensor> merge_sites(const std::vector<Site>& sites, const Names& names, const Names& active,
                                                bool for_good = false) {
  return SiteMerger(sites, names, active, for_good).merge();
}

}  // namespace detail
LORA_NAMESPACE_END
