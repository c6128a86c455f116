#pragma once

#include <lora/detail/lanes.h>
#include <lora/version.h>

#include <cstdint>
#include <utility>

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
  // n + 128 is positive, so that the conversion, which cuts off what follows the point, rounds down. Its bits are
  // unsigned, which NaN cannot overflow.
  const Like<int32_t, V> converted = __builtin_convertvector(bounded * 1.44269504088896341f + 128.5f, Like<int32_t, V>);
  const V steps = __builtin_convertvector(converted, V) - 128.0f;
  const V r = bounded - steps * 0.693359375f + steps * 2.12194440e-4f;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // 2^n in two factors: n reaches 128, which has no factor of its own.
  Like<uint32_t, V> n_plus_128;
  copy_bits(converted, n_plus_128);
  const Like<uint32_t, V> low = n_plus_128 >> 1, high = n_plus_128 - low;
  V low_power, high_power;
  copy_bits((low + 63U) << 23, low_power);
  copy_bits((high + 63U) << 23, high_power);
  p = p * low_power * high_power;
  result = x < -87.3f ? zero : p;
}

struct AddLanes {
  template <class V>
  LORA_ALWAYS_INLINE static void run(V& a, const V& b) {
    a += b;
  }
};

struct TakeLargerLanes {
  template <class V>
  LORA_ALWAYS_INLINE static void run(V& a, const V& b) {
    a = a > b ? a : b;
  }
};

/// Combines all lanes into each, those that are `distance` apart first, then half as far, down to neighbours.
template <class Combine, int64_t distance, class V, int64_t... lane>
LORA_ALWAYS_INLINE void fold_lanes(V& x, std::integer_sequence<int64_t, lane...> lanes) {
  if constexpr (distance > 0) {
    const V other = __builtin_shufflevector(x, x, (lane ^ distance)...);
    Combine::run(x, other);
    fold_lanes<Combine, distance / 2>(x, lanes);
  }
}

template <class Combine, class V>
LORA_ALWAYS_INLINE float folded_lanes(const V& x) {
  V folded = x;
  fold_lanes<Combine, kLanesOf<V> / 2>(folded, std::make_integer_sequence<int64_t, kLanesOf<V>>());
  return folded[0];
}

template <class V>
LORA_ALWAYS_INLINE float sum_of_lanes(const V& x) {
  return folded_lanes<AddLanes>(x);
}

template <class V>
LORA_ALWAYS_INLINE float maximum_of_lanes(const V& x) {
  return folded_lanes<TakeLargerLanes>(x);
}

}  // namespace detail
LORA_NAMESPACE_END
