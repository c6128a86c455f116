// W0 + Σ s·B·A, formed densely in float64 from the adapters' tensors alone, and the bounds of rounding.
#pragma once

#include <ATen/ATen.h>
#include <lora/adapters.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "harness/models.h"
#include "harness/values.h"

namespace harness {

/// Distance of neighbouring numbers of `dtype` at each value, in float64.
inline at::Tensor ulp(const at::Tensor& value, at::ScalarType dtype) {
  struct Format {
    int digits, min_exponent;
  };
  const auto format = dtype == at::kDouble     ? Format{53, -1021}
                      : dtype == at::kFloat    ? Format{24, -125}
                      : dtype == at::kBFloat16 ? Format{8, -125}
                                               : Format{11, -13};
  const auto exponent = std::get<1>(at::frexp(value.to(at::kDouble))).to(at::kDouble).clamp_min(format.min_exponent);
  return at::exp2(exponent - format.digits);
}

/// Twice the largest relative error of one rounding.
inline double epsilon(at::ScalarType dtype) { return ulp(at::ones({1}, at::kDouble), dtype).item<double>(); }

/// A dense adapted weight and the sums that its rounding is measured by.
struct DenseWeight {
  at::Tensor value;      // W0 + Σ s·B·A
  at::Tensor magnitude;  // Σ |s|·|B|·|A|
  int64_t rank = 0;      // all updates of an element together
};

/// Half an ulp of W′ plus r·ε·Σ|s·b·a|, ε of the dtype that sums are formed in. On top comes the rounding of that sum
/// where the base is narrower, and that of the oracle where the base is as wide as the oracle.
inline at::Tensor weight_bound(const DenseWeight& weight, at::ScalarType dtype) {
  const auto sum = dtype == at::kDouble ? at::kDouble : at::kFloat;
  auto bound = ulp(weight.value, dtype) / 2 + static_cast<double>(weight.rank) * epsilon(sum) * weight.magnitude;
  if (dtype == at::kDouble) return 2 * bound;
  return sum == dtype ? bound : bound + ulp(weight.value, sum) / 2;
}

/// The bound of x·W′ᵀ: (i + r + 2)·ε·(|W0||x| + |s||B||A||x|) and an ulp of y for each of the three roundings to its
/// dtype.
inline at::Tensor output_bound(const DenseWeight& weight, const at::Tensor& base, const at::Tensor& x,
                               at::ScalarType dtype) {
  const auto wide = x.detach().to(at::kDouble);
  const auto y = at::matmul(wide, weight.value.t());
  const auto magnitude = at::matmul(wide.abs(), (base.detach().to(at::kDouble).abs() + weight.magnitude).t());
  return static_cast<double>(base.size(1) + weight.rank + 2) * epsilon(dtype) * magnitude + 3 * ulp(y, dtype);
}

inline double excess(const at::Tensor& found, const at::Tensor& expected, const at::Tensor& bound) {
  return found.numel() == 0 ? 0 : (found.detach().to(at::kDouble) - expected).abs().sub(bound).max().item<double>();
}

/// The largest difference over the largest expected value.
inline double relative_error(const at::Tensor& found, const at::Tensor& expected) {
  if (found.sizes() != expected.sizes()) return std::numeric_limits<double>::infinity();
  if (found.numel() == 0) return 0;
  const auto wide = expected.detach().to(at::kDouble);
  return ((found.detach().to(at::kDouble) - wide).abs().max() / wide.abs().max().clamp_min(1e-300)).item<double>();
}

/// The plain model of a case in float64 with dense adapted weights.
class DenseOracle {
 public:
  /// `scalings` names the adapters in the sum with their s.
  DenseOracle(const HostCase& host, at::ScalarType dtype, const lora::Adapters& adapters,
              const std::vector<std::pair<std::string, double>>& scalings)
      : subject_(host.make()) {
    subject_.module->to(dtype);
    subject_.module->to(at::kDouble);
    const at::NoGradGuard no_grad;
    const auto parameters = subject_.module->named_parameters();
    for (const auto& [adapter, scaling] : scalings) {
      std::map<std::string, at::Tensor> tensors;
      for (const auto& [name, tensor] : adapters.named_tensors(adapter)) tensors[name] = tensor;
      for (const auto& rows : host.rows) {
        auto path = rows.tensors;
        path.replace(path.find('*'), 1, "lora_" + adapter);
        const auto name_of_A = path + "." + rows.A();
        if (tensors.count(name_of_A) == 0) continue;  // this adapter has other targets
        const auto A = tensors.at(name_of_A).detach().to(at::kDouble);
        const auto B = tensors.at(path + "." + rows.B()).detach().to(at::kDouble);
        auto& weight = weights_[rows.parameter];
        if (!weight.value.defined()) {
          weight.value = parameters[rows.parameter];
          weight.magnitude = at::zeros_like(weight.value);
        }
        rows.matrix(weight.value).narrow(0, rows.row, B.size(0)).add_(at::mm(B, A), scaling);
        const auto magnitude = rows.matrix(weight.magnitude).narrow(0, rows.row, B.size(0));
        magnitude.add_(at::mm(B.abs(), A.abs()), std::abs(scaling));
        weight.rank += A.size(0);
        pairs_.push_back({{path, A, B, scaling, rows.A(), rows.B()}, rows});
      }
    }
  }

  const std::map<std::string, DenseWeight>& weights() const { return weights_; }
  const Subject& subject() const { return subject_; }

  at::Tensor forward(const at::Tensor& x) const { return subject_.forward(x.detach().to(at::kDouble)).detach(); }

  /// Gradients of (y·g).sum() by x ("x") and by every A and B, by the chain rule from the dense weight's.
  std::map<std::string, at::Tensor> gradients(const at::Tensor& x, const at::Tensor& g) const {
    std::vector<at::Tensor> inputs{x.detach().to(at::kDouble).requires_grad_(true)};
    std::vector<std::string> names;
    for (const auto& [name, weight] : weights_) {
      names.push_back(name);
      inputs.push_back(weight.value);
    }
    const auto found = torch::autograd::grad({subject_.forward(inputs[0])}, inputs, {g.to(at::kDouble)});
    std::map<std::string, at::Tensor> result{{"x", found[0]}};
    for (const auto& pair : pairs_) {
      const auto index =
          static_cast<size_t>(std::find(names.begin(), names.end(), pair.rows.parameter) - names.begin());
      const auto dW = pair.rows.matrix(found[index + 1]).narrow(0, pair.rows.row, pair.B.size(0));
      pair.add_gradients(dW, result);
    }
    return result;
  }

 private:
  struct Pair : Factors {
    AdaptedRows rows;
  };

  Subject subject_;
  std::map<std::string, DenseWeight> weights_;
  std::vector<Pair> pairs_;
};

}  // namespace harness
