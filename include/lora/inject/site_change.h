#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/TensorImpl.h>
#include <lora/inject/site.h>
#include <lora/version.h>
#include <lora/weight/adapted_weight.h>

#include <memory>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

class ModelAdapters;

/// Names a model's adapters on a merged weight, which is a plain tensor: TorchScript has no other place for it.
struct OwnerMark final : c10::BackendMeta {
  explicit OwnerMark(std::shared_ptr<ModelAdapters> model_adapters) : adapters(std::move(model_adapters)) {}
  std::shared_ptr<ModelAdapters> adapters;
};

/// What a site is to become: W0 or W′, plain or below a carrier with the updates that stay low-rank.
struct SiteChange {
  Site& site;
  at::Tensor base;
  bool is_merged;
  bool carrier;
  std::vector<std::shared_ptr<const WeightAdapter>> unmerged;

  /// `owner` is what the site's carrier or mark keeps alive.
  void apply(const std::shared_ptr<ModelAdapters>& owner) const {
    auto& host = *site.host;
    site.weight->publish(base, unmerged);
    if (carrier) {
      // One that is in its place stays there: a forward on another thread may hold it, and reads the snapshot.
      const auto* present = as_carrier(host.weight());
      if (present != nullptr && present->weight() == site.weight && present->owner() == owner) return;
      host.set_weight(make_carrier(site.weight, owner));
    } else if (!is_merged) {
      host.set_weight(site.base());
    } else if (host.takes_nodes()) {
      host.set_weight(base);
    } else {
      // An alias carries the mark: the merged weight itself is kept by the state that the mark keeps.
      const auto marked = base.detach();
      marked.unsafeGetTensorImpl()->set_backend_meta(c10::make_intrusive<OwnerMark>(owner));
      host.set_weight(marked);
    }
  }
};

}  // namespace detail
LORA_NAMESPACE_END
