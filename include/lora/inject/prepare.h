#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>
#include <lora/inject/plan.h>
#include <lora/inject/report.h>
#include <lora/inject/site.h>
#include <lora/methods/method.h>
#include <lora/version.h>
#include <lora/weight/adapted_weight.h>

#include <algorithm>
#include <map>
#include <memory>
#include <optional>
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
  std::map<size_t, std::shared_ptr<WeightAdapter>> sites;  // by site index
};

inline at::TensorOptions adapter_options(const at::Tensor& base, const Method& method) {
  return base.options().dtype(method.tensor_dtype(base.scalar_type())).requires_grad(false);
}

/// What an update of rows [begin, begin + size) of a site is made for.
inline UpdateSpec update_spec(const Site& site, const Method& method, int64_t begin, int64_t size, bool initialise) {
  const auto base = site.base().detach();
  UpdateSpec spec;
  spec.names = names_of(site);
  spec.in_features = site.base_matrix().size(1);
  spec.out_features = size;
  spec.options = adapter_options(base, method);
  spec.initialise = initialise;
  spec.embedding = site.layout == WeightLayout::kTable;
  spec.rows_are_inputs = site.transposed_convolution;
  spec.convolution = site.layout == WeightLayout::kKernel;
  if (spec.convolution) spec.kernel = spec.in_features / std::max<int64_t>(base.size(1), 1);
  spec.base = BaseRows(base, site.layout, begin, size);
  return spec;
}

/// The updates of a plan by site. On the device kMeta they have shapes alone.
inline std::map<size_t, std::vector<UpdatePart>> make_updates(const std::vector<Site>& sites, const Method& method,
                                                              const Plan& plan, bool initialise,
                                                              std::optional<at::Device> device = std::nullopt) {
  std::vector<UpdateSpec> specs;
  for (const auto& planned : plan.sites) {
    for (const auto& part : planned.parts) {
      specs.push_back(update_spec(sites[planned.site], method, part.begin, part.size, initialise));
      if (device) specs.back().options = specs.back().options.device(*device);
    }
  }
  auto updates = method.create_all(specs);
  std::map<size_t, std::vector<UpdatePart>> result;
  size_t next = 0;
  for (const auto& planned : plan.sites) {
    for (const auto& part : planned.parts) {
      result[planned.site].push_back({part.name, part.begin, std::move(updates[next++])});
    }
  }
  return result;
}

/// Makes what an adapter has on each site of its plan; the model is not touched.
class AdapterMaker {
 public:
  /// `initialise`: false leaves the updates without values. Copies begin with the base's values either way.
  AdapterMaker(const std::vector<Site>& sites, std::shared_ptr<const Method> method, const std::string& name,
               const Plan& plan, bool initialise)
      : sites_(sites), plan_(plan), initialise_(initialise) {
    prepared_.name = name;
    prepared_.method = std::move(method);
  }

  PreparedAdapter make() {
    const c10::NoGradGuard no_grad;
    auto updates = make_updates(sites_, method(), plan_, initialise_);
    for (const auto& planned : plan_.sites) add_updates(planned, std::move(updates.at(planned.site)));
    for (const auto& planned : plan_.offsets) add_offset(planned);
    for (const auto& planned : plan_.scales) add_scales(planned);
    for (const auto index : plan_.copies) add_copy(index);
    for (const auto& planned : plan_.rows) add_rows(planned);
    write_report();
    return std::move(prepared_);
  }

 private:
  const Method& method() const { return *prepared_.method; }

  at::TensorOptions options(const at::Tensor& base) const { return adapter_options(base, method()); }

  WeightAdapter& at(size_t index) {
    auto& adapter = prepared_.sites[index];
    if (adapter == nullptr) {
      adapter = std::make_shared<WeightAdapter>();
      adapter->adapter = prepared_.name;
      adapter->name = sites_[index].takes_updates() ? sites_[index].local_name() : "";
      adapter->dropout = method().dropout();
    }
    return *adapter;
  }

  void add_updates(const PlannedSite& planned, std::vector<UpdatePart> parts) {
    const auto& site = sites_[planned.site];
    const auto base = site.base_matrix();
    auto& adapter = at(planned.site);
    auto& line = lines_[planned.site] = {site.path, "", base.size(0), base.size(1), 0};
    adapter.parts = std::move(parts);
    for (const auto& part : adapter.parts) {
      if (!part.name.empty()) line.parts += (line.parts.empty() ? "" : ",") + part.name;
      for (const auto& named : part.update->tensors()) {
        if (is_trained(named.role)) line.parameters += named.tensor.numel();
      }
    }
    if (!line.parts.empty()) line.parts = "[" + line.parts + "]";
  }

  void add_offset(const PlannedOffset& planned) {
    const auto& weight = sites_[planned.weight];
    const auto child = planned.part.empty() ? weight.local_name() : planned.part;
    auto values = at::zeros({planned.size}, options(weight.base()));
    const auto& parts = at(planned.weight).parts;
    const auto part = std::find_if(parts.begin(), parts.end(), [&](const auto& p) { return p.name == planned.part; });
    at(planned.site).offsets.push_back({child, planned.begin, std::move(values), part->update->scaling()});
    lines_[planned.weight].parameters += planned.size;
  }

  void add_scales(const PlannedScale& planned) {
    for (const auto& part : at(planned.weight).parts) {
      const auto scale = part.update->bias_scale();
      if (scale.defined()) at(planned.site).scales.push_back({planned.begin + part.begin, scale});
    }
  }

  void add_copy(size_t index) {
    const auto& site = sites_[index];
    const auto base = site.base();
    auto& adapter = at(index);
    const auto dtype =
        site.is_buffer || !base.is_floating_point() ? base.scalar_type() : method().tensor_dtype(base.scalar_type());
    adapter.copy = base.detach().to(base.options().dtype(dtype), /*non_blocking=*/false, /*copy=*/true);
    adapter.copy_name = site.parameter;
    adapter.copies_buffer = site.is_buffer;
    const auto rows = base.dim() == 0 ? 1 : base.size(0);
    lines_[index] = {site.parameter_path(), "", rows, base.dim() < 2 ? 0 : base.numel() / std::max<int64_t>(rows, 1),
                     site.is_buffer ? 0 : base.numel()};
  }

  void add_rows(const PlannedRows& planned) {
    const auto& site = sites_[planned.site];
    const auto base = site.base().detach();
    TokenRows rows{planned.ids, at::Tensor()};
    rows.values = at::zeros({static_cast<int64_t>(planned.ids.size()), base.size(1)}, options(base));
    rows.values.copy_(base.index_select(0, rows.index()));
    lines_[planned.site] = {site.path, "", rows.values.size(0), rows.values.size(1), rows.values.numel()};
    for (const auto tied : planned.tied) {
      at(tied).rows = rows;
      at(tied).rows_tied = true;
    }
    at(planned.site).rows = std::move(rows);
  }

  void write_report() {
    prepared_.report.adapter = prepared_.name;
    prepared_.report.notes = plan_.notes;
    for (const auto& entry : plan_.entries) {
      InjectionReport::Entry lines{entry.target, {}};
      for (const auto site : entry.sites) lines.modules.push_back(lines_.at(site));
      prepared_.report.entries.push_back(std::move(lines));
    }
  }

  const std::vector<Site>& sites_;
  const Plan& plan_;
  bool initialise_;
  PreparedAdapter prepared_;
  std::map<size_t, InjectionReport::Module> lines_;
};

}  // namespace detail
LORA_NAMESPACE_END
