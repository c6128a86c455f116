#pragma once

#include <lora/detail/json.h>
#include <lora/detail/safetensors_dtypes.h>
#include <lora/version.h>
#include <lora/weight/product_plan.h>

#include <cstdint>
#include <string>
#include <utility>

LORA_NAMESPACE_BEGIN
namespace detail {

/// A plan's choices with the processor that they are for. Times are left out: they are of one moment.
inline Json plan_json(const ProductPlan& plan) {
  auto choices = Json::array();
  for (const auto& [shape, choice] : plan.choices()) {
    choices.push_back({{"rows", shape.rows},
                       {"in", shape.in},
                       {"out", shape.out},
                       {"transposed", shape.transposed},
                       {"dtype", safetensors_dtype_name(shape.dtype)},
                       {"threads", shape.threads},
                       {"kernel", to_string(choice.kernel)}});
  }
  return {{"processor", ProductPlan::processor()}, {"choices", std::move(choices)}};
}

/// The choices of plan_json; none where they are for another processor. Throws for anything else than plan_json gives.
inline ProductPlan::Choices plan_choices(const Json& json) {
  ProductPlan::Choices choices;
  if (json.at("processor").get<std::string>() != ProductPlan::processor()) return choices;
  for (const auto& entry : json.at("choices")) {
    ProductShape shape;
    shape.rows = entry.at("rows").get<int64_t>();
    shape.in = entry.at("in").get<int64_t>();
    shape.out = entry.at("out").get<int64_t>();
    shape.transposed = entry.at("transposed").get<bool>();
    shape.dtype = safetensors_dtype(entry.at("dtype").get<std::string>()).value();
    shape.threads = entry.at("threads").get<int>();
    const bool is_onednn = entry.at("kernel").get<std::string>() == to_string(ProductKernel::kOneDnn);
    choices[shape].kernel = is_onednn && ProductPlan::has_onednn() ? ProductKernel::kOneDnn : ProductKernel::kAten;
  }
  return choices;
}

}  // namespace detail
LORA_NAMESPACE_END
