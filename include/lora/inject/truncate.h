#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>
#include <lora/config/lora_config.h>
#include <lora/inject/model_adapters.h>
#include <lora/inject/prepare.h>
#include <lora/methods/lora.h>
#include <lora/methods/svd.h>
#include <lora/version.h>
#include <torch/arg.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <memory>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN

/// What Adapters::truncate leaves of an adapter: rank(r) or energy(share).
class Truncation {
 public:
  /// The first r singular values of each weight.
  static Truncation rank(int64_t r) {
    TORCH_CHECK_VALUE(r > 0, "[lora::truncate] found rank = ", r, ", expected at least 1");
    return {r, 1};
  }
  /// As many as hold this share of the sum of their squares, at least one; 0 < share ≤ 1.
  static Truncation energy(double share) {
    TORCH_CHECK_VALUE(share > 0 && share <= 1, "[lora::truncate] found energy = ", share, ", expected a share up to 1");
    return {0, share};
  }

  /// How many of these singular values stay.
  int64_t count(const at::Tensor& singular_values) const {
    if (rank_ > 0) return std::min(rank_, singular_values.size(0));
    const auto squares = singular_values.to(at::kDouble).square();
    const auto wanted = energy_ * squares.sum().item<double>();
    double sum = 0;
    int64_t count = 0;
    while (count < squares.size(0) && (count == 0 || sum < wanted * (1 - 1e-12)))
      sum += squares[count++].item<double>();
    return count;
  }

 private:
  Truncation(int64_t rank, double energy) : rank_(rank), energy_(energy) {}

  int64_t rank_;
  double energy_;
};

/// What a truncation has cost.
struct TruncationReport {
  /// One weight, or one part of a fused projection.
  struct Weight {
    std::string path;    ///< In the model.
    int64_t before = 0;  ///< Its rank.
    int64_t after = 0;   ///< What it is now.
    double error = 0;    ///< ‖ΔW − ΔW′‖ / ‖ΔW‖, Frobenius; 0 where ΔW = 0.
  };
  std::vector<Weight> weights;  ///< In the model's order.
  double error = 0;             ///< The same over all weights together.
};

/// A line for each weight, and the error of all.
inline std::ostream& operator<<(std::ostream& out, const TruncationReport& report) {
  for (const auto& weight : report.weights) {
    out << weight.path << ": rank " << weight.before << " -> " << weight.after << ", error " << weight.error << "\n";
  }
  return out << "all: error " << report.error << "\n";
}

namespace detail {

/// ΔW of a part as one pair of factors, the scalings in B.
inline std::pair<at::Tensor, at::Tensor> joined_factors(const UpdatePart& part, const Site& site) {
  const auto factors =
      part.update->is_factored() ? part.update->factors(part.base(site.base(), site.layout)) : Factors();
  TORCH_CHECK_VALUE(!factors.terms.empty() && factors.is_sum(),
                    "[lora::truncate] found an update that is no sum of products, expected one at ", site.path);
  std::vector<at::Tensor> A, B;
  for (const auto& term : factors.terms) {
    const auto wide = accumulation_dtype(term.A.scalar_type());
    A.push_back(term.A.detach().to(wide));
    B.push_back(term.B.detach().to(wide) * term.scaling);
  }
  return {at::cat(A), at::cat(B, 1)};
}

/// The adapter with truncated updates, to be put into the place of the present one.
inline std::pair<PreparedAdapter, TruncationReport> truncate(const ModelAdapters& adapters, const std::string& name,
                                                             const Truncation& to) {
  const c10::NoGradGuard no_grad;
  const auto& present = adapters.adapter(name);
  const auto* lora = dynamic_cast<const LoRA*>(present.method.get());
  PreparedAdapter prepared{name, present.method, present.report, {}};
  TruncationReport report;
  double all = 0, lost = 0;
  std::vector<std::string> targets;
  for (size_t i = 0; i < adapters.sites().size(); ++i) {
    const auto& site = adapters.sites()[i];
    const auto* updates = site.find(name);
    if (updates == nullptr) continue;
    auto copy = std::make_shared<WeightAdapter>(*updates);
    for (auto& part : copy->parts) {
      const auto [A, B] = joined_factors(part, site);
      const auto svd = svd_of_product(B, A, std::min({A.size(0), A.size(1), B.size(0)}));
      const auto count = to.count(svd.S);
      const auto norm = svd.S.square().sum().item<double>();
      const auto rest = svd.S.narrow(0, count, svd.S.size(0) - count).square().sum().item<double>();
      all += norm;
      lost += rest;
      const auto path = join_path(site.path, part.name);
      report.weights.push_back({path, A.size(0), count, norm > 0 ? std::sqrt(rest / norm) : 0});

      const auto scaling = lora == nullptr ? 1 : part.update->scaling();
      const auto options = part.update->tensors().front().tensor.options().requires_grad(false);
      const auto kept = svd.factors(scaling, count);
      part.update = std::make_shared<LoraUpdate>(kept.A.to(options).contiguous(), kept.B.to(options).contiguous(),
                                                 scaling, site.layout == WeightLayout::kTable);
    }
    if (!copy->parts.empty()) targets.push_back(target_of(site, *copy));
    for (auto& entry : prepared.report.entries) {
      for (auto& line : entry.modules) {
        if (line.path != site.path || copy->parts.empty()) continue;
        line.parameters = 0;
        for (const auto& tensor : copy->tensors()) line.parameters += tensor.tensor.tensor.numel();
      }
    }
    prepared.sites.emplace(i, std::move(copy));
  }
  report.error = all > 0 ? std::sqrt(lost / all) : 0;
  auto config = lora == nullptr
                    ? LoraConfig().target_modules(targets).lora_alpha(8).lora_dropout(present.method->dropout())
                    : lora->config();
  config.init_lora_weights(LoraInit::kKaiming);
  prepared.method = std::make_shared<const LoRA>(config);
  return {std::move(prepared), std::move(report)};
}

}  // namespace detail
LORA_NAMESPACE_END
