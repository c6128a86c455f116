#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <lora/version.h>

#include <cstdint>
#include <cstring>

#ifndef __GNUC__
#error "the merge kernel is written with the vector extensions of GCC and Clang"
#endif

LORA_NAMESPACE_BEGIN
namespace detail {

/// Vectors of kLanes elements, which the compiler maps to the widest registers of the function's target. They are
/// passed by reference only: by value they would change the calling convention from one instruction set to another.
inline constexpr int64_t kLanes = 16;
template <class T>
struct LanesOf {
  typedef T type __attribute__((vector_size(kLanes * sizeof(T))));
};
template <class T>
using Lanes = typename LanesOf<T>::type;

#define LORA_ALWAYS_INLINE __attribute__((always_inline)) inline

template <class To, class From>
LORA_ALWAYS_INLINE void copy_bits(const From& from, To& to) {
  static_assert(sizeof(From) == sizeof(To), "a bit pattern keeps its size");
  std::memcpy(&to, &from, sizeof to);
}

template <class T>
LORA_ALWAYS_INLINE void choose(const Lanes<int32_t>& mask, const Lanes<T>& yes, const Lanes<T>& no, Lanes<T>& result) {
  Lanes<uint32_t> bits, yes_bits, no_bits, mask_bits;
  copy_bits(mask, mask_bits);
  copy_bits(yes, yes_bits);
  copy_bits(no, no_bits);
  bits = (yes_bits & mask_bits) | (no_bits & ~mask_bits);
  copy_bits(bits, result);
}

// Loading: an element as a summand, exactly.

LORA_ALWAYS_INLINE void load(const double* from, Lanes<double>& to) { std::memcpy(&to, from, sizeof to); }

LORA_ALWAYS_INLINE void load(const float* from, Lanes<float>& to) { std::memcpy(&to, from, sizeof to); }

LORA_ALWAYS_INLINE void load(const c10::BFloat16* from, Lanes<float>& to) {
  Lanes<uint16_t> half;
  std::memcpy(&half, from, sizeof half);
  const Lanes<uint32_t> bits = __builtin_convertvector(half, Lanes<uint32_t>) << 16;
  copy_bits(bits, to);
}

LORA_ALWAYS_INLINE void load(const c10::Half* from, Lanes<float>& to) {
  Lanes<uint16_t> half;
  std::memcpy(&half, from, sizeof half);
  const Lanes<uint32_t> word = __builtin_convertvector(half, Lanes<uint32_t>) << 16;
  const Lanes<uint32_t> twice = word + word;  // without the sign
  // A normal number gets its exponent by a bias that the product takes back, a subnormal one by subtracting 1/2.
  Lanes<float> normal, subnormal, magnitude;
  copy_bits((twice >> 4) + (0xE0U << 23), normal);
  normal *= 0x1.0p-112f;
  copy_bits((twice >> 17) | (126U << 23), subnormal);
  subnormal -= 0.5f;
  choose<float>(twice < (1U << 27), subnormal, normal, magnitude);
  Lanes<uint32_t> bits;
  copy_bits(magnitude, bits);
  bits |= word & 0x80000000U;
  copy_bits(bits, to);
}

// Storing: the sum rounded to nearest, ties to even. `non_finite` counts by lane what comes out NaN or infinite, told
// by the bits, since -ffast-math lets the compiler assume that there is no such number.

LORA_ALWAYS_INLINE void store(const Lanes<double>& from, double* to, Lanes<uint64_t>& non_finite) {
  std::memcpy(to, &from, sizeof from);
  Lanes<uint64_t> bits;
  copy_bits(from, bits);
  const auto mask = (bits & 0x7ff0000000000000ULL) == 0x7ff0000000000000ULL;
  Lanes<uint64_t> found;
  copy_bits(mask, found);
  non_finite += found & 1U;
}

LORA_ALWAYS_INLINE void count_non_finite(const Lanes<uint32_t>& bits, uint32_t exponent, Lanes<uint32_t>& non_finite) {
  const auto mask = (bits & exponent) == exponent;
  Lanes<uint32_t> found;
  copy_bits(mask, found);
  non_finite += found & 1U;
}

LORA_ALWAYS_INLINE void store(const Lanes<float>& from, float* to, Lanes<uint32_t>& non_finite) {
  std::memcpy(to, &from, sizeof from);
  Lanes<uint32_t> bits;
  copy_bits(from, bits);
  count_non_finite(bits, 0x7f800000U, non_finite);
}

LORA_ALWAYS_INLINE void store(const Lanes<float>& from, c10::BFloat16* to, Lanes<uint32_t>& non_finite) {
  Lanes<uint32_t> bits, result;
  copy_bits(from, bits);
  const Lanes<uint32_t> rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;
  const Lanes<uint32_t> nan = bits * 0U + 0x7fc0U;
  choose<uint32_t>((bits & 0x7fffffffU) > 0x7f800000U, nan, rounded, result);
  count_non_finite(result, 0x7f80U, non_finite);
  const Lanes<uint16_t> half = __builtin_convertvector(result, Lanes<uint16_t>);
  std::memcpy(to, &half, sizeof half);
}

LORA_ALWAYS_INLINE void store(const Lanes<float>& from, c10::Half* to, Lanes<uint32_t>& non_finite) {
  Lanes<uint32_t> bits, result;
  copy_bits(from, bits);
  const Lanes<uint32_t> magnitude = bits & 0x7fffffffU;
  // Adding a power of two that depends on the exponent makes the float addition round at the last bit of the half.
  const Lanes<uint32_t> exponent = (bits + bits) & 0xFF000000U;
  const Lanes<uint32_t> least = bits * 0U + 0x71000000U;
  Lanes<uint32_t> bias;
  choose<uint32_t>(exponent < least, least, exponent, bias);
  Lanes<float> sum, power;
  copy_bits(magnitude, sum);
  copy_bits((bias >> 1) + 0x07800000U, power);
  sum = sum * 4.0f + power;
  Lanes<uint32_t> sum_bits;
  copy_bits(sum, sum_bits);
  const Lanes<uint32_t> rounded = ((sum_bits >> 13) & 0x7C00U) + (sum_bits & 0x0FFFU);
  const Lanes<uint32_t> infinite = bits * 0U + 0x7C00U, nan = bits * 0U + 0x7E00U;
  choose<uint32_t>(magnitude >= 0x477ff000U, infinite, rounded, result);  // 65520 and above
  choose<uint32_t>(magnitude > 0x7f800000U, nan, Lanes<uint32_t>(result), result);
  result |= (bits & 0x80000000U) >> 16;
  count_non_finite(result, 0x7C00U, non_finite);
  const Lanes<uint16_t> half = __builtin_convertvector(result, Lanes<uint16_t>);
  std::memcpy(to, &half, sizeof half);
}

}  // namespace detail
LORA_NAMESPACE_END
