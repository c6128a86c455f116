#pragma once

#include <lora/detail/lanes.h>
#include <lora/version.h>

#include <cstdint>

LORA_NAMESPACE_BEGIN
namespace detail {

/// e^x of each lane within 2 ulp; 0 below −87.3 (where float32 turns subnormal), infinite above 88.7, NaN of NaN.
///
/// x = n·ln 2 + r with |r| ≤ ln 2 / 2, and e^r by a polynomial (Cephes, expf).
LORA_ALWAYS_INLINE void exp_lanes(const Lanes<float>& x, Lanes<float>& result) {
  const Lanes<float> zero{};
  Lanes<float> bounded, half;
  choose<float>(x > 88.8f, zero + 88.8f, x, bounded);
  choose<float>(bounded < -87.3f, zero - 87.3f, bounded, bounded);
  choose<float>(bounded < 0.0f, zero - 0.5f, zero + 0.5f, half);
  const Lanes<int32_t> n = __builtin_convertvector(bounded * 1.44269504088896341f + half, Lanes<int32_t>);
  const Lanes<float> steps = __builtin_convertvector(n, Lanes<float>);
  const Lanes<float> r = bounded - steps * 0.693359375f + steps * 2.12194440e-4f;
  Lanes<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // 2^n in two factors: n reaches 128, which has no factor of its own.
  const Lanes<int32_t> low = n >> 1, high = n - low;
  Lanes<float> low_power, high_power;
  copy_bits((low + 127) << 23, low_power);
  copy_bits((high + 127) << 23, high_power);
  p = p * low_power * high_power;
  choose<float>(x < -87.3f, zero, p, result);
}

/// The sum of all lanes.
LORA_ALWAYS_INLINE float sum_of_lanes(const Lanes<float>& x) {
  float sum = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) sum += x[lane];
  return sum;
}

}  // namespace detail
LORA_NAMESPACE_END
