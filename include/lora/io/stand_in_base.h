#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <lora/config/targets.h>
#include <lora/inject/hosts/checkpoint_hosts.h>
#include <lora/io/adapter_files.h>
#include <lora/io/checkpoint_hints.h>
#include <lora/version.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// Tensors of the shapes that an adapter's base has by its factors and copies, so that an adapter can be read without
/// one. They take no memory, and no value of them is equal to any.
class StandInBase {
 public:
  StandInBase(const AdapterFiles& files, const Targeting& targeting)
      : files_(files), targeting_(targeting), hints_(checkpoint_hints(files)) {}

  std::map<std::string, at::Tensor> tensors() const {
    std::map<std::string, at::Tensor> base;
    for (const auto& [name, tensor] : hints_.copies) base[name] = of(tensor.sizes().vec(), tensor.scalar_type());
    for (const auto& path : hints_.tables) {
      constexpr int64_t kMostTokens = int64_t{1} << 31;
      const auto& rows = files_.tensors.at(path + ".token_adapter.trainable_tokens_delta").tensor;
      base.emplace(path + ".weight", of({kMostTokens, rows.dim() == 2 ? rows.size(1) : 1}, rows.scalar_type()));
    }
    for (const auto& [path, factors] : hints_.factors) {
      base[without_base_layer(path) + (is_attention(path) ? ".in_proj_weight" : ".weight")] =
          of(sizes_of_weight(path, factors), type_of(path));
    }
    return base;
  }

 private:
  /// The dtype is that of the factors, a type without NaN counts as zeros.
  static at::Tensor of(const std::vector<int64_t>& sizes, at::ScalarType type) {
    const auto nan = std::numeric_limits<double>::quiet_NaN();
    return (at::isFloatingType(type) ? at::full({}, nan, type) : at::zeros({}, type)).expand(sizes);
  }

  at::ScalarType type_of(const std::string& path) const {
    for (const auto* end : {".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B"}) {
      const auto found = files_.tensors.find(path + end);
      if (found != files_.tensors.end() && found->second.tensor.is_floating_point()) {
        return found->second.tensor.scalar_type();
      }
    }
    return at::kFloat;
  }

  bool is_attention(const std::string& path) const {
    const auto wrapped = path + ".base_layer.";
    const auto next = hints_.factors.lower_bound(wrapped);
    return next != hints_.factors.end() && next->first.compare(0, wrapped.size(), wrapped) == 0;
  }

  /// [out, in, ...], of an embedding [in, out]. What a missing factor would say counts as 1.
  std::vector<int64_t> sizes_of_weight(const std::string& path, const CheckpointHints::Factors& factors) const {
    const auto out = factors.B.empty() ? 1 : all_rows(path, factors.B[0]);
    if (factors.embedding) return {factors.A.size() < 2 ? 1 : factors.A[1], out};
    if (factors.A.size() < 2) return {out, 1};
    auto sizes = factors.A;
    sizes[0] = out;
    return sizes;
  }

  /// The rows of a fused projection, of which loralib's B has those of the parts alone.
  int64_t all_rows(const std::string& path, int64_t rows) const {
    if (!files_.is_loralib) return rows;
    for (const auto& entry : targeting_.modules.entries()) {
      if (entry.parts.empty() || !targeting_.modules.matches(entry, path)) continue;
      for (const auto& [name, parts] : targeting_.fused_parts) {
        if (!TargetModules::is_path_or_suffix(name, path)) continue;
        int64_t sum = 0;
        for (const auto& part : parts) sum += part.size;
        return sum;
      }
      constexpr int64_t kParts = 3;  // q, k and v
      return rows / static_cast<int64_t>(entry.parts.size()) * kParts;
    }
    return rows;
  }

  const AdapterFiles& files_;
  const Targeting& targeting_;
  CheckpointHints hints_;
};

}  // namespace detail
LORA_NAMESPACE_END
