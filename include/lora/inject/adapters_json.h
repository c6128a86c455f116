#pragma once

#include <lora/detail/content_hash.h>
#include <lora/detail/json.h>
#include <lora/inject/model_adapters.h>
#include <lora/version.h>

#include <set>
#include <string>

LORA_NAMESPACE_BEGIN
namespace detail {

/// A hash of the model's own parameters but those in `trained`.
inline std::string base_hash(const ModelAdapters& adapters, const std::set<const c10::TensorImpl*>& trained) {
  ContentHash hash;
  for (const auto& [parameter, required] : adapters.original_parameters()) {
    if (trained.count(parameter.unsafeGetTensorImpl()) == 0) hash.add(parameter);
  }
  return hash.text();
}

/// Everything about a model's adapters but their tensors that the model's output depends on. A scaling that all updates
/// of an adapter share stands there once, else each by its path.
inline Json adapters_json(const ModelAdapters& adapters) {
  Json json = {{"active", adapters.active()}, {"trainable", Json::array()}, {"adapters", Json::object()}};
  for (const auto& adapter : adapters.adapters()) {
    auto scalings = Json::object(), tokens = Json::object();
    std::set<double> different;
    for (const auto& site : adapters.sites()) {
      const auto* updates = site.find(adapter.name);
      if (updates == nullptr) continue;
      for (const auto& part : updates->parts) {
        const auto scaling = part.update->scaling();
        different.insert(scaling);
        scalings[join_path(site.path, part.name)] = scaling;
      }
      if (updates->rows.defined() && !updates->rows_tied) tokens[site.path] = updates->rows.ids;
    }
    json["adapters"][adapter.name] = {{"type", adapter.method->peft_type()},
                                      {"dropout", adapter.method->dropout()},
                                      {"scaling", different.size() == 1 ? Json(*different.begin()) : scalings},
                                      {"tokens", tokens}};
    if (adapter.trainable) json["trainable"].push_back(adapter.name);
  }
  return json;
}

}  // namespace detail
LORA_NAMESPACE_END
