#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <lora/detail/instruction_set.h>
#include <lora/detail/lanes.h>
#include <lora/version.h>

#include <cstdint>
#include <cstring>

#ifdef LORA_X86_TARGETS
#include <immintrin.h>
#endif

LORA_NAMESPACE_BEGIN
namespace detail {

// For kernels of run_register_kernel: what is one instruction where the instruction set has it. A function with a
// target of its own cannot be LORA_ALWAYS_INLINE inside a kernel that is a template without one; it is inlined from
// -O2 on and is as right when it is called.

/// A vector as wide as a register of `floats` floats.
template <class T, int64_t floats>
using Register = Vector<T, floats * 4 / static_cast<int64_t>(sizeof(T))>;

/// sum += a · b, fused in the AVX versions: by instruction, since whether `sum += a * b` is fused is left to the
/// compiler and its flags, and the last bits with it.
template <class V, class T>
LORA_ALWAYS_INLINE void multiply_add(const V& a, T b, V& sum) {
  sum += a * b;
}

/// load(), with the instructions for half precision.
template <class T, class V>
LORA_ALWAYS_INLINE void load_register(const T* from, V& to) {
  load(from, to);
}

/// The bits of each lane rounded to half, as they lie in memory.
template <class V, class Words>
LORA_ALWAYS_INLINE void half_words(const V& from, Words& words) {
  Like<uint32_t, V> bits;
  half_bits(from, bits);
  copy_bits(__builtin_convertvector(bits, Like<uint16_t, V>), words);
}

/// Writes a vector to a multiple of its size in memory that is not read soon, past the caches: what stands there is not
/// read before. end_streams() makes it visible to other threads.
template <class V>
LORA_ALWAYS_INLINE void stream(const V& from, void* to) {
  std::memcpy(to, &from, sizeof from);
}
inline void end_streams() {
#ifdef LORA_X86_TARGETS
  _mm_sfence();
#endif
}

#ifdef LORA_X86_TARGETS
inline void stream(const Vector<uint32_t, 4>& from, void* to) {
  _mm_stream_si128(static_cast<__m128i*>(to), reinterpret_cast<__m128i>(from));
}

LORA_TARGET_AVX2 inline void stream(const Vector<uint32_t, 8>& from, void* to) {
  _mm256_stream_si256(static_cast<__m256i*>(to), reinterpret_cast<__m256i>(from));
}
LORA_TARGET_AVX2 inline void multiply_add(const Vector<float, 8>& a, float b, Vector<float, 8>& sum) {
  sum = reinterpret_cast<Vector<float, 8>>(_mm256_fmadd_ps(a, _mm256_set1_ps(b), sum));
}
LORA_TARGET_AVX2 inline void multiply_add(const Vector<double, 4>& a, double b, Vector<double, 4>& sum) {
  sum = reinterpret_cast<Vector<double, 4>>(_mm256_fmadd_pd(a, _mm256_set1_pd(b), sum));
}
LORA_TARGET_AVX2 inline void load_register(const c10::Half* from, Vector<float, 8>& to) {
  to = reinterpret_cast<Vector<float, 8>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
LORA_TARGET_AVX2 inline void half_words(const Vector<float, 8>& from, Vector<uint32_t, 4>& words) {
  words = reinterpret_cast<Vector<uint32_t, 4>>(_mm256_cvtps_ph(from, _MM_FROUND_TO_NEAREST_INT));
}

LORA_TARGET_AVX512 inline void stream(const Vector<uint32_t, 16>& from, void* to) {
  _mm512_stream_si512(static_cast<__m512i*>(to), reinterpret_cast<__m512i>(from));
}
LORA_TARGET_AVX512 inline void multiply_add(const Vector<float, 16>& a, float b, Vector<float, 16>& sum) {
  sum = reinterpret_cast<Vector<float, 16>>(_mm512_fmadd_ps(a, _mm512_set1_ps(b), sum));
}
LORA_TARGET_AVX512 inline void multiply_add(const Vector<double, 8>& a, double b, Vector<double, 8>& sum) {
  sum = reinterpret_cast<Vector<double, 8>>(_mm512_fmadd_pd(a, _mm512_set1_pd(b), sum));
}
// With a mask of all lanes: GCC 12 warns of the undefined vector that the forms without one begin from.
LORA_TARGET_AVX512 inline void load_register(const c10::Half* from, Vector<float, 16>& to) {
  to = reinterpret_cast<Vector<float, 16>>(
      _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
}
LORA_TARGET_AVX512 inline void half_words(const Vector<float, 16>& from, Vector<uint32_t, 8>& words) {
  words = reinterpret_cast<Vector<uint32_t, 8>>(_mm512_maskz_cvtps_ph(0xffff, from, _MM_FROUND_TO_NEAREST_INT));
}
#endif

}  // namespace detail
LORA_NAMESPACE_END
