// The loss of a head by the dense formula in float64, with bounds of what rounding may change.
#pragma once

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <lora/functional/linear_cross_entropy.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <ostream>
#include <string>
#include <variant>
#include <vector>

#include "harness/dense_oracle.h"
#include "harness/values.h"

namespace dense_loss {

inline constexpr int64_t kIgnored = -100;

/// (1 − ε)·[label] + ε / classes for each row.
inline at::Tensor targets(const at::Tensor& labels, int64_t classes, double smoothing) {
  return at::one_hot(labels, classes).to(at::kDouble) * (1 - smoothing) + smoothing / static_cast<double>(classes);
}

/// A value and how far the library's may be from it.
struct Bounded {
  at::Tensor value, bound;
};

inline void expect_within(const at::Tensor& found, const Bounded& expected, const std::string& what) {
  ASSERT_EQ(found.sizes(), expected.value.sizes()) << what;
  EXPECT_LE(harness::excess(found, expected.value, expected.bound), 0) << what;
}

/// Losses and their gradient by the logits, for logits that are off by `off` [rows, 1] already.
struct DenseLoss {
  DenseLoss(const at::Tensor& logits, const at::Tensor& labels, double smoothing, const at::Tensor& off,
            at::ScalarType dtype) {
    const auto classes = logits.size(1);
    const auto q = targets(labels, classes, smoothing);
    const auto log_p = at::log_softmax(logits, 1);
    const auto p = log_p.exp();
    // A sum of e^(z − max): two ulp each, what z − max is rounded by, and an addition for each vector of a lane.
    const double wide = harness::epsilon(dtype == at::kDouble ? at::kDouble : at::kFloat);
    const auto additions = dtype == at::kDouble ? classes : std::min<int64_t>(classes / 16 + 1, 256) + 16;
    const auto range = (logits - std::get<0>(logits.max(1, true))).abs();
    const auto of_term = (2 + range) * wide;
    const auto of_sum =
        (p * of_term).sum(1, true) + static_cast<double>(additions) * wide + 2 * harness::epsilon(at::kDouble);
    losses.value = -(q * log_p).sum(1);
    losses.bound = (2 * off + of_sum).squeeze(1) + 4 * harness::ulp(logits.abs().amax(1), at::kDouble);
    gradient.value = p - q;
    gradient.bound = p * (at::expm1(2 * off) + of_term + of_sum + 4 * wide) + q * 4 * wide +
                     harness::ulp(p - q, dtype) / 2 + std::exp(-87.3);  // where terms count as zero
  }
  Bounded losses, gradient;
};

struct Shape {
  std::string name;
  std::vector<int64_t> rows;
  int64_t width, classes;
  std::string labelled;  // "all", "some", "none"
  int64_t chunk_rows;
  double smoothing = 0;
  bool sum = false;
  bool bias = false;
};

inline void PrintTo(const Shape& shape, std::ostream* out) { *out << shape.name; }

struct Problem {
  Problem(const Shape& shape, at::ScalarType dtype) {
    auto sizes = shape.rows;
    sizes.push_back(shape.width);
    hidden = harness::normal(sizes, 1, dtype).requires_grad_();
    weight = harness::normal({shape.classes, shape.width}, 2, dtype).requires_grad_();
    const auto count = c10::multiply_integers(shape.rows);
    labels = at::arange(count, at::kLong).mul(7).remainder(shape.classes);
    if (shape.labelled == "some") labels.masked_fill_(at::arange(count).remainder(3) != 1, kIgnored);
    if (shape.labelled == "none") labels.fill_(kIgnored);
    labels = labels.view(shape.rows);
    options.chunk_rows(shape.chunk_rows).label_smoothing(shape.smoothing);
    if (shape.sum) options.reduction(torch::kSum);
    if (shape.bias) options.bias(harness::normal({shape.classes}, 3, dtype).requires_grad_());
  }

  at::Tensor loss() const { return lora::linear_cross_entropy(hidden, weight, labels, options); }

  at::Tensor hidden, weight, labels;
  lora::LinearCrossEntropyOptions options;
};

/// The dense formula for a problem: everything in float64, the T × V logits too.
struct Answer {
  explicit Answer(const Problem& problem) {
    const auto dtype = problem.hidden.scalar_type();
    const auto sum_dtype = dtype == at::kDouble ? at::kDouble : at::kFloat;
    const double wide = harness::epsilon(sum_dtype);
    const auto wide_of = [](const at::Tensor& tensor) { return tensor.detach().to(at::kDouble); };
    const auto& bias = problem.options.bias();
    const auto W = wide_of(problem.weight);
    const auto d = W.size(1), classes = W.size(0);
    const auto flat = problem.labels.flatten();
    const auto rows = (flat != problem.options.ignore_index()).nonzero().flatten();
    const auto labels = flat.index_select(0, rows);
    const auto x = wide_of(problem.hidden).reshape({flat.size(0), d}).index_select(0, rows);
    const auto count = static_cast<double>(rows.size(0));
    const bool mean = std::holds_alternative<torch::enumtype::kMean>(problem.options.reduction());
    const double factor = mean && count > 0 ? 1 / count : 1;

    auto z = at::mm(x, W.t());
    auto z_magnitude = at::mm(x.abs(), W.t().abs());
    if (bias.defined()) {
      z = z + wide_of(bias);
      z_magnitude = z_magnitude + wide_of(bias).abs();
    }
    // A product in the wide dtype, rounded to the narrow one.
    const auto off =
        static_cast<double>(d + 2) * wide * z_magnitude + harness::ulp(z, dtype) / 2 + harness::ulp(z, sum_dtype);
    const auto worst = count > 0 ? off.amax(1, true) : off.sum(1, true);
    const DenseLoss dense(z, labels, problem.options.label_smoothing(), worst, dtype);
    loss.value = dense.losses.value.sum() * factor;
    loss.bound = dense.losses.bound.sum() * factor + harness::ulp(loss.value, sum_dtype);

    const auto& dz = dense.gradient.value;
    const auto& dz_off = dense.gradient.bound;
    const auto of_sum = [&](const at::Tensor& magnitude, int64_t terms) {
      return static_cast<double>(terms + 2) * wide * magnitude;
    };
    const auto finish = [&](const at::Tensor& value, const at::Tensor& bound) {
      const auto scaled = value * factor;
      return Bounded{scaled, bound * factor + 2 * harness::ulp(scaled, dtype) + harness::ulp(value, dtype) * factor};
    };
    const auto dx = finish(at::mm(dz, W), at::mm(dz_off, W.abs()) + of_sum(at::mm(dz.abs(), W.abs()), classes));
    const auto spread = [&](const at::Tensor& of_rows) {
      return at::zeros({flat.size(0), d}, at::kDouble).index_copy(0, rows, of_rows).view(problem.hidden.sizes());
    };
    hidden = {spread(dx.value), spread(dx.bound)};
    // Each chunk's product is rounded to the narrow dtype before it joins the sum.
    const auto dW_magnitude = at::mm(dz.abs().t(), x.abs());
    const double narrow = dtype == sum_dtype ? 0 : harness::epsilon(dtype) / 2;
    weight = finish(at::mm(dz.t(), x),
                    at::mm(dz_off.t(), x.abs()) + of_sum(dW_magnitude, rows.size(0)) + narrow * dW_magnitude);
    offset = finish(dz.sum(0), dz_off.sum(0) + of_sum(dz.abs().sum(0), rows.size(0)));
    if (dtype != at::kDouble) return;
    for (auto* bounded : {&loss, &hidden, &weight, &offset}) bounded->bound = bounded->bound * 2;  // the oracle's own
  }

  Bounded loss, hidden, weight, offset;
};

}  // namespace dense_loss
