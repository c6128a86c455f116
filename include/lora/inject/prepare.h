#pragma once

#include <ATen/core/Tensor.h>
#include <lora/inject/plan.h>
#include <lora/inject/report.h>
#include <lora/inject/site.h>
#include <lora/methods/method.h>
#include <lora/version.h>
#include <lora/weight/adapted_weight.h>

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// An adapter that is made and checked but not yet in the model.
struct PreparedAdapter {
  std::string name;
  std::shared_ptr<const Method> method;
  InjectionReport report;
  std::vector<std::pair<size_t, std::shared_ptr<WeightAdapter>>> updates;  // site index, updates
};

/// Makes the updates of a planned adapter, without values where they are not to be `initialise`d; the model is not
/// touched.
inline PreparedAdapter prepare(const std::vector<Site>& sites, const std::shared_ptr<const Method>& method,
                               const std::string& name, const Plan& plan, bool initialise) {
  PreparedAdapter prepared{name, method, {}, {}};
  std::map<size_t, InjectionReport::Module> modules;
  for (const auto& planned : plan.sites) {
    const auto& site = sites[planned.site];
    const auto base = site.base_matrix();
    const auto options = base.options().dtype(method->tensor_dtype(base.scalar_type())).requires_grad(false);
    auto adapter = std::make_shared<WeightAdapter>();
    adapter->adapter = name;
    adapter->dropout = method->dropout();
    InjectionReport::Module module{site.path, "", base.size(0), base.size(1), 0};
    for (const auto& part : planned.parts) {
      adapter->parts.push_back(
          {part.name, part.begin, method->create({names_of(site), base.size(1), part.size, options, initialise})});
      if (!part.name.empty()) module.parts += (module.parts.empty() ? "" : ",") + part.name;
      for (const auto& named : adapter->parts.back().update->tensors()) module.parameters += named.tensor.numel();
    }
    if (!module.parts.empty()) module.parts = "[" + module.parts + "]";
    prepared.updates.emplace_back(planned.site, std::move(adapter));
    modules[planned.site] = std::move(module);
  }
  prepared.report.adapter = name;
  prepared.report.notes = plan.notes;
  for (const auto& entry : plan.entries) {
    InjectionReport::Entry lines{entry.target, {}};
    for (const auto site : entry.sites) lines.modules.push_back(modules.at(site));
    prepared.report.entries.push_back(std::move(lines));
  }
  return prepared;
}

}  // namespace detail
LORA_NAMESPACE_END
