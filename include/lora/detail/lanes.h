#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <lora/version.h>

#include <cstdint>
#include <cstring>

#ifndef __GNUC__
#error "the kernels are written with the vector extensions of GCC and Clang"
#endif

LORA_NAMESPACE_BEGIN
namespace detail {

/// A vector of `count` elements: an operation on it is one on each lane. It is passed by reference only: by value it
/// would change the calling convention from one instruction set to another.
template <class T, int64_t count>
struct VectorOf {
  typedef T type __attribute__((vector_size(count * sizeof(T))));
};
template <class T, int64_t count>
using Vector = typename VectorOf<T, count>::type;

/// Vectors of kLanes elements, which the compiler maps to the widest registers of the function's target. GCC keeps one
/// that is wider than a register in memory: for a kernel whose sums stay in registers, instruction_set.h has vectors of
/// the register's own width. Everything below is for vectors of any width.
inline constexpr int64_t kLanes = 16;
template <class T>
using Lanes = Vector<T, kLanes>;

/// How many lanes a vector of 32-bit elements has.
template <class V>
inline constexpr int64_t kLanesOf = static_cast<int64_t>(sizeof(V) / 4);
/// Elements of another type in as many lanes.
template <class T, class V>
using Like = Vector<T, kLanesOf<V>>;

#define LORA_ALWAYS_INLINE __attribute__((always_inline)) inline

template <class To, class From>
LORA_ALWAYS_INLINE void copy_bits(const From& from, To& to) {
  static_assert(sizeof(From) == sizeof(To), "a bit pattern keeps its size");
  std::memcpy(&to, &from, sizeof to);
}

template <class T>
LORA_ALWAYS_INLINE void choose(const Lanes<int32_t>& mask, const Lanes<T>& yes, const Lanes<T>& no, Lanes<T>& result) {
  result = mask ? yes : no;
}

// Loading: an element as a summand, exactly.

template <class V>
LORA_ALWAYS_INLINE void load(const double* from, V& to) {
  std::memcpy(&to, from, sizeof to);
}

template <class V>
LORA_ALWAYS_INLINE void load(const float* from, V& to) {
  std::memcpy(&to, from, sizeof to);
}

template <class V>
LORA_ALWAYS_INLINE void load(const c10::BFloat16* from, V& to) {
  Like<uint16_t, V> half;
  std::memcpy(&half, from, sizeof half);
  const Like<uint32_t, V> bits = __builtin_convertvector(half, Like<uint32_t, V>) << 16;
  copy_bits(bits, to);
}

template <class V>
LORA_ALWAYS_INLINE void load(const c10::Half* from, V& to) {
  using Words = Like<uint32_t, V>;
  Like<uint16_t, V> half;
  std::memcpy(&half, from, sizeof half);
  const Words word = __builtin_convertvector(half, Words) << 16;
  const Words twice = word + word;  // without the sign
  // A normal number gets its exponent by a bias that the product takes back, a subnormal one by subtracting 1/2.
  V normal, subnormal;
  copy_bits((twice >> 4) + (0xE0U << 23), normal);
  normal *= 0x1.0p-112f;
  copy_bits((twice >> 17) | (126U << 23), subnormal);
  subnormal -= 0.5f;
  Words normal_bits, subnormal_bits;
  copy_bits(normal, normal_bits);
  copy_bits(subnormal, subnormal_bits);
  const Words bits = (twice < (1U << 27) ? subnormal_bits : normal_bits) | (word & 0x80000000U);
  copy_bits(bits, to);
}

/// The first `count` elements, fewer than a vector has; `rest` in the lanes behind them.
template <class T, class V>
LORA_ALWAYS_INLINE void load_first(const T* from, int64_t count, T rest, V& to) {
  T padded[kLanesOf<V>];
  for (auto& element : padded) element = rest;
  std::memcpy(padded, from, static_cast<size_t>(count) * sizeof(T));
  load(padded, to);
}

// Rounding to nearest, ties to even: the bits of the nearest number of 16 bits in each lane.

template <class V>
LORA_ALWAYS_INLINE void bfloat16_bits(const V& from, Like<uint32_t, V>& result) {
  Like<uint32_t, V> bits;
  copy_bits(from, bits);
  const Like<uint32_t, V> rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;
  const Like<uint32_t, V> nan = bits * 0U + 0x7fc0U;
  result = (bits & 0x7fffffffU) > 0x7f800000U ? nan : rounded;
}

template <class V>
LORA_ALWAYS_INLINE void half_bits(const V& from, Like<uint32_t, V>& result) {
  using Words = Like<uint32_t, V>;
  Words bits;
  copy_bits(from, bits);
  const Words magnitude = bits & 0x7fffffffU;
  // Adding a power of two that depends on the exponent makes the float addition round at the last bit of the half.
  const Words exponent = (bits + bits) & 0xFF000000U;
  const Words least = bits * 0U + 0x71000000U;
  const Words bias = exponent < least ? least : exponent;
  V sum, power;
  copy_bits(magnitude, sum);
  copy_bits((bias >> 1) + 0x07800000U, power);
  sum = sum * 4.0f + power;
  Words sum_bits;
  copy_bits(sum, sum_bits);
  const Words rounded = ((sum_bits >> 13) & 0x7C00U) + (sum_bits & 0x0FFFU);
  const Words infinite = bits * 0U + 0x7C00U, nan = bits * 0U + 0x7E00U;
  const Words number = magnitude >= 0x477ff000U ? infinite : rounded;  // 65520 and above
  result = (magnitude > 0x7f800000U ? nan : number) | ((bits & 0x80000000U) >> 16);
}

template <class V>
LORA_ALWAYS_INLINE void store_half_words(const V& words, void* to) {
  const Like<uint16_t, V> half = __builtin_convertvector(words, Like<uint16_t, V>);
  std::memcpy(to, &half, sizeof half);
}

// Storing: the sum, rounded.

template <class V>
LORA_ALWAYS_INLINE void store(const V& from, double* to) {
  std::memcpy(to, &from, sizeof from);
}

template <class V>
LORA_ALWAYS_INLINE void store(const V& from, float* to) {
  std::memcpy(to, &from, sizeof from);
}

template <class V>
LORA_ALWAYS_INLINE void store(const V& from, c10::BFloat16* to) {
  Like<uint32_t, V> bits;
  bfloat16_bits(from, bits);
  store_half_words(bits, to);
}

template <class V>
LORA_ALWAYS_INLINE void store(const V& from, c10::Half* to) {
  Like<uint32_t, V> bits;
  half_bits(from, bits);
  store_half_words(bits, to);
}

/// The first `count` lanes, fewer than a vector has.
template <class T, class V>
LORA_ALWAYS_INLINE void store_first(const V& from, int64_t count, T* to) {
  T padded[kLanesOf<V>];
  store(from, padded);
  std::memcpy(to, padded, static_cast<size_t>(count) * sizeof(T));
}

}  // namespace detail
LORA_NAMESPACE_END
