#pragma once

#include <lora/detail/lanes.h>
#include <lora/detail/vector_math.h>
#include <lora/version.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

LORA_NAMESPACE_BEGIN
namespace detail {

/// The logits of one row and the class that it is to predict.
template <class T>
struct CrossEntropyRow {
  T* logits;
  int64_t classes;
  int64_t label;
  double smoothing;  // of the label, in [0, 1]
  bool gradient;     // whether the logits are overwritten by the loss's gradient
};

/// The cross entropy (nats) of one row with the distribution (1 − smoothing)·[label] + smoothing / classes, in vectors
/// of `width` floats; of double element by element.
template <int64_t width>
struct CrossEntropyKernel {
  template <class T>
  LORA_ALWAYS_INLINE static double run(const CrossEntropyRow<T>& row) {
    const auto total = log_sum_exp(row.logits, row.classes);
    const auto at_label = static_cast<double>(row.logits[row.label]);
    const double kept = 1 - row.smoothing, uniform = row.smoothing / static_cast<double>(row.classes);
    double expected = kept * at_label;
    if (row.smoothing > 0) expected += uniform * sum(row.logits, row.classes);
    if (row.gradient) {
      to_gradient(total, uniform, row.classes, row.logits);
      // Rounded once: in a half precision the difference to a probability that was stored would be coarse.
      using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
      const double gradient = std::exp(at_label - total.maximum) / total.sum - uniform - kept;
      row.logits[row.label] = static_cast<T>(static_cast<Wide>(gradient));
    }
    return total.maximum + std::log(total.sum) - expected;
  }

 private:
  using Floats = Vector<float, width>;

  /// log Σ e^z as maximum + log(sum), sum = Σ e^(z − maximum).
  struct LogSumExp {
    double maximum;
    double sum;
  };

  // A block stays in the first cache level, so that its maximum and its sum cost one pass over memory; it is short
  // enough for sums in float.
  static constexpr int64_t kBlock = 4096;

  template <class T>
  LORA_ALWAYS_INLINE static LogSumExp log_sum_exp(const T* logits, int64_t count) {
    const T nothing = -std::numeric_limits<T>::infinity();
    float maximum = std::numeric_limits<float>::lowest();
    double sum = 0;
    for (int64_t begin = 0; begin < count; begin += kBlock) {
      const auto end = std::min(count, begin + kBlock);
      const auto full = end - (end - begin) % width;
      Floats z, top = Floats{} + maximum, term, terms{};
      for (int64_t i = begin; i < full; i += width) {
        load(logits + i, z);
        top = z > top ? z : top;
      }
      load_first(logits + full, end - full, nothing, z);
      top = z > top ? z : top;
      const float before = maximum;
      for (int64_t lane = 0; lane < width; ++lane) maximum = std::max(maximum, top[lane]);
      if (maximum > before) sum *= std::exp(static_cast<double>(before) - static_cast<double>(maximum));
      for (int64_t i = begin; i < full; i += width) {
        load(logits + i, z);
        exp_lanes(z - maximum, term);
        terms += term;
      }
      load_first(logits + full, end - full, nothing, z);
      exp_lanes(z - maximum, term);
      terms += term;
      sum += static_cast<double>(sum_of_lanes(terms));
    }
    return {static_cast<double>(maximum), sum};
  }

  LORA_ALWAYS_INLINE static LogSumExp log_sum_exp(const double* logits, int64_t count) {
    const double maximum = *std::max_element(logits, logits + count);
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += std::exp(logits[i] - maximum);
    return {maximum, sum};
  }

  template <class T>
  LORA_ALWAYS_INLINE static double sum(const T* logits, int64_t count) {
    double result = 0;
    for (int64_t i = 0; i < count; ++i) result += static_cast<double>(logits[i]);
    return result;
  }

  /// logits ← e^(z − maximum) / sum − `uniform`.
  template <class T>
  LORA_ALWAYS_INLINE static void to_gradient(const LogSumExp& total, double uniform, int64_t count, T* logits) {
    const auto maximum = static_cast<float>(total.maximum), scale = static_cast<float>(1 / total.sum),
               each = static_cast<float>(uniform);
    const auto full = count - count % width;
    Floats z, term;
    for (int64_t i = 0; i < full; i += width) {
      load(logits + i, z);
      exp_lanes(z - maximum, term);
      store(term * scale - each, logits + i);
    }
    load_first(logits + full, count - full, T(0), z);
    exp_lanes(z - maximum, term);
    store_first(term * scale - each, count - full, logits + full);
  }

  LORA_ALWAYS_INLINE static void to_gradient(const LogSumExp& total, double uniform, int64_t count, double* logits) {
    for (int64_t i = 0; i < count; ++i) logits[i] = std::exp(logits[i] - total.maximum) / total.sum - uniform;
  }
};

}  // namespace detail
LORA_NAMESPACE_END
