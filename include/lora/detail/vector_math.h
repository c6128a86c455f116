#pragma once

#include <lora/detail/lanes.h>
#include <lora/version.h>

#include <cstdint>

LORA_NAMESPACE_BEGIN
namespace detail {

/// e^x of each lane within 2 ulp; 0 below −87.3 (where float32 turns subnormal), infinite above 88.7, NaN of NaN.
///
/// x = n·ln 2 + r with |r| ≤ ln 2 / 2, and e^r by a polynomial (Cephes, expf).
template <class V>
LORA_ALWAYS_INLINE void exp_lanes(const V& x, V& result) {
  const V zero{};
  V bounded = x > 88.8f ? zero + 88.8f : x;
  bounded = bounded < -87.3f ? zero - 87.3f : bounded;
  // The conversion cuts off what follows the point, so that it rounds down what 128.5 makes positive.
  const Like<int32_t, V> n = __builtin_convertvector(bounded * 1.44269504088896341f + 128.5f, Like<int32_t, V>) - 128;
  const V steps = __builtin_convertvector(n, V);
  const V r = bounded - steps * 0.693359375f + steps * 2.12194440e-4f;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // 2^n in two factors: n reaches 128, which has no factor of its own.
  const Like<int32_t, V> low = n >> 1, high = n - low;
  V low_power, high_power;
  copy_bits((low + 127) << 23, low_power);
  copy_bits((high + 127) << 23, high_power);
  p = p * low_power * high_power;
  result = x < -87.3f ? zero : p;
}

/// The sum of all lanes.
template <class V>
LORA_ALWAYS_INLINE float sum_of_lanes(const V& x) {
  float sum = 0;
  for (int64_t lane = 0; lane < kLanesOf<V>; ++lane) sum += x[lane];
  return sum;
}

}  // namespace detail
LORA_NAMESPACE_END
