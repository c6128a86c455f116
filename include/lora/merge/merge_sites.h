#pragma once

#include <lora/inject/model_adapters.h>
#include <lora/merge/merge.h>
#include <lora/version.h>

#include <map>
#include <memory>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// W′ of every site that one of the named adapters lives in, each one pass from W0; throws before anything is changed.
inline std::map<size_t, at::Tensor> merge_sites(const std::vector<Site>& sites, const Names& names) {
  std::vector<std::unique_ptr<MergeJob>> jobs;
  std::vector<size_t> indices;
  for (size_t i = 0; i < sites.size(); ++i) {
    auto job = std::make_unique<MergeJob>();
    for (const auto& name : names) {
      const auto* adapter = sites[i].find(name);
      if (adapter == nullptr) continue;
      for (const auto& part : adapter->parts) job->updates.emplace_back(part.begin, part.update->low_rank());
    }
    if (job->updates.empty()) continue;
    job->path = sites[i].path;
    job->base = sites[i].base().detach();
    job->transposed = sites[i].transposed;
    jobs.push_back(std::move(job));
    indices.push_back(i);
  }
  merge_weights(jobs);
  std::map<size_t, at::Tensor> weights;
  for (size_t k = 0; k < jobs.size(); ++k) weights.emplace(indices[k], std::move(jobs[k]->merged));
  return weights;
}

}  // namespace detail
LORA_NAMESPACE_END
