#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <lora/detail/finite.h>
#include <lora/detail/lanes.h>
#include <lora/detail/register_vectors.h>
#include <lora/version.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

LORA_NAMESPACE_BEGIN
namespace detail {

/// How many columns of A lie together, so that a tile reads its memory in one row.
inline constexpr int64_t kMergePanel = 64;

/// Whether the sums of even columns are formed in one register and those of odd ones in another: a word of 32 bits
/// holds two numbers of bfloat16, and each of them is a float of its own by a shift or a mask.
template <class T>
inline constexpr bool kSplitsColumns = std::is_same_v<T, c10::BFloat16>;

/// One update in the merge of a weight: rows [begin, end) += B · A, the scaling already in B.
template <class Sum>
struct MergeFactors {
  const Sum* A;  // [panels, rank, kMergePanel], zeros beyond the last column; by kSplitsColumns the even columns first
  const Sum* B;  // [end − begin, rank]
  int64_t rank;
  int64_t begin;
  int64_t end;
};

/// Rows [first, last) × columns [left, right) of W′ = W0 + Σ B·A, all row-major with `columns` columns; `left` is a
/// multiple of kMergePanel.
template <class T, class Sum>
struct MergeTile {
  const T* base;
  T* merged;
  int64_t columns;
  const MergeFactors<Sum>* factors;
  int64_t count;
  int64_t first, last, left, right;
};

/// The magnitude, as bits, from which a sum becomes infinite when it is rounded to T.
template <class T>
inline constexpr int64_t kInfiniteFrom = 0x7f800000;
template <>
inline constexpr int64_t kInfiniteFrom<double> = 0x7ff0000000000000;
template <>
inline constexpr int64_t kInfiniteFrom<c10::BFloat16> = 0x7f7f8000;
template <>
inline constexpr int64_t kInfiniteFrom<c10::Half> = 0x477ff000;  // 65520

/// Merges one tile in registers of `floats` floats: reads W0 and writes W′ once. The updates are summed in `Sum`, in
/// their order, and W0 is added last, so that W′ is rounded once and not with every term. An element's bits depend on
/// its own terms alone: neither on its place nor on the tile. With AVX they are the same from every compiler, and the
/// same in both of its versions.
template <int64_t floats>
struct MergeTileKernel {
  /// Returns how many results are NaN or infinite; at least one where there is any, since a NaN whose payload overflows
  /// as it is rounded to bfloat16 is seen and not counted.
  template <class T, class Sum>
  LORA_ALWAYS_INLINE static int64_t run(const MergeTile<T, Sum>& tile) {
    Magnitudes<Sum> largest{};
    for (int64_t row = tile.first; row < tile.last;) {
      const auto end = end_of_equal_rows(tile, row);
      for (; row + kRows <= end; row += kRows) merge_rows<kRows>(tile, row, largest);
      for (; row < end; ++row) merge_rows<1>(tile, row, largest);
    }
    end_streams();
    bool all_finite = true;
    for (int64_t i = 0; i < kWidth<Sum>; ++i) all_finite = all_finite && largest[i] < kInfiniteFrom<T>;
    return all_finite ? 0 : std::max<int64_t>(count_non_finite(tile), 1);
  }

 private:
  template <class Sum>
  using Magnitudes = Register<std::conditional_t<sizeof(Sum) == 8, int64_t, int32_t>, floats>;
  template <class Sum>
  static constexpr int64_t kWidth = floats * 4 / static_cast<int64_t>(sizeof(Sum));
  // Rows that share what is loaded of A, and vectors of each: their sums fill the registers.
  static constexpr int64_t kRows = 4;
  static constexpr int64_t kVectors = floats == 16 ? 4 : 2;

  /// The first row behind `row` that has other updates.
  template <class T, class Sum>
  LORA_ALWAYS_INLINE static int64_t end_of_equal_rows(const MergeTile<T, Sum>& tile, int64_t row) {
    int64_t end = tile.last;
    for (int64_t k = 0; k < tile.count; ++k) {
      if (tile.factors[k].begin > row) end = std::min(end, tile.factors[k].begin);
      if (tile.factors[k].end > row) end = std::min(end, tile.factors[k].end);
    }
    return end;
  }

  /// Rows of W0 and W′ from a column on, `stride` apart; `ahead` from them those that follow.
  template <class T>
  struct Rows {
    const T* base;
    T* merged;
    int64_t stride;
    int64_t ahead;
  };

  template <int64_t rows, class T, class Sum>
  LORA_ALWAYS_INLINE static void merge_rows(const MergeTile<T, Sum>& tile, int64_t row, Magnitudes<Sum>& largest) {
    constexpr auto block = kVectors * kWidth<Sum>;
    constexpr int64_t kLine = 64;
    const auto columns = tile.columns;
    const T* base = tile.base + row * columns;
    T* merged = tile.merged + row * columns;
    // Whole lines of W′ go past the caches: otherwise the processor reads each of them before it is written.
    const bool streams =
        reinterpret_cast<uintptr_t>(merged) % kLine == 0 && columns * static_cast<int64_t>(sizeof(T)) % kLine == 0;
    // The processor does not see by itself that the next rows follow these.
    const auto ahead = row + 2 * rows <= tile.last ? rows * columns : 0;
    int64_t column = tile.left;
    if (streams) {
      for (; column + block <= tile.right; column += block) {
        merge_block<rows, true>(tile, row, column, Rows<T>{base + column, merged + column, columns, ahead}, largest);
      }
    }
    for (; column + block <= tile.right; column += block) {
      merge_block<rows, false>(tile, row, column, Rows<T>{base + column, merged + column, columns, ahead}, largest);
    }
    if (column == tile.right) return;
    const auto bytes = static_cast<size_t>(tile.right - column) * sizeof(T);
    T last[rows * block] = {};
    for (int64_t i = 0; i < rows; ++i) std::memcpy(last + i * block, base + i * columns + column, bytes);
    merge_block<rows, false>(tile, row, column, Rows<T>{last, last, block, 0}, largest);
    for (int64_t i = 0; i < rows; ++i) std::memcpy(merged + i * columns + column, last + i * block, bytes);
  }

  template <int64_t rows, bool streams, class T, class Sum>
  LORA_ALWAYS_INLINE static void merge_block(const MergeTile<T, Sum>& tile, int64_t row, int64_t column,
                                             const Rows<T>& at, Magnitudes<Sum>& largest) {
    using V = Register<Sum, floats>;
    constexpr auto width = kWidth<Sum>;
    constexpr int64_t kUnit = kSplitsColumns<T> ? 2 : 1;  // vectors that are loaded and stored together
    constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
    V sums[rows][kVectors];
#pragma GCC unroll 4
    for (int64_t i = 0; i < rows; ++i) {
#pragma GCC unroll 4
      for (int64_t j = 0; j < kVectors; ++j) sums[i][j] = V{};
    }
    for (int64_t k = 0; k < tile.count; ++k) {
      const auto update = tile.factors[k];
      if (row < update.begin || row >= update.end) continue;
      const Sum* b = update.B + (row - update.begin) * update.rank;
      const Sum* a_row = update.A + column / kMergePanel * update.rank * kMergePanel + column % kMergePanel / kUnit;
      for (int64_t r = 0; r < update.rank; ++r, a_row += kMergePanel) {
        V a[kVectors];
#pragma GCC unroll 4
        for (int64_t j = 0; j < kVectors; ++j) {
          load_register(a_row + j / kUnit * width + j % kUnit * (kMergePanel / 2), a[j]);
        }
#pragma GCC unroll 4
        for (int64_t i = 0; i < rows; ++i) {
#pragma GCC unroll 4
          for (int64_t j = 0; j < kVectors; ++j) multiply_add(a[j], b[i * update.rank + r], sums[i][j]);
        }
      }
    }
#pragma GCC unroll 4
    for (int64_t i = 0; i < rows; ++i) {
      const T* base = at.base + i * at.stride;
      T* merged = at.merged + i * at.stride;
#pragma GCC unroll 8
      for (int64_t j = 0; j < kVectors * width; j += kLine) __builtin_prefetch(base + j + at.ahead);
#pragma GCC unroll 4
      for (int64_t j = 0; j < kVectors; j += kUnit) {
        add_base(base + j * width, sums[i] + j);
        take_magnitudes(sums[i][j], largest);
        if constexpr (kUnit == 2) take_magnitudes(sums[i][j + 1], largest);
        write<streams>(sums[i] + j, merged + j * width);
      }
    }
  }

  template <class V, class Words>
  LORA_ALWAYS_INLINE static void take_magnitudes(const V& sum, Words& largest) {
    Words magnitude;
    copy_bits(sum, magnitude);
    magnitude &= std::numeric_limits<std::decay_t<decltype(magnitude[0])>>::max();
    largest = magnitude > largest ? magnitude : largest;
  }

  template <class T, class V>
  LORA_ALWAYS_INLINE static void add_base(const T* from, V* sum) {
    V base;
    load_register(from, base);
    *sum += base;
  }
  template <class V>
  LORA_ALWAYS_INLINE static void add_base(const c10::BFloat16* from, V* sums) {
    Like<uint32_t, V> words;
    std::memcpy(&words, from, sizeof words);
    V even, odd;
    copy_bits(words << 16, even);
    copy_bits(words & 0xffff0000U, odd);
    sums[0] += even;
    sums[1] += odd;
  }

  template <bool streams, class V>
  LORA_ALWAYS_INLINE static void write_words(const V& words, void* to) {
    if constexpr (streams) {
      stream(words, to);
    } else {
      std::memcpy(to, &words, sizeof words);
    }
  }
  template <bool streams, class T, class V>
  LORA_ALWAYS_INLINE static void write(const V* sum, T* to) {
    Vector<uint32_t, floats> words;
    copy_bits(*sum, words);
    write_words<streams>(words, to);
  }
  template <bool streams, class V>
  LORA_ALWAYS_INLINE static void write(const V* sum, c10::Half* to) {
    Vector<uint32_t, floats / 2> words;
    half_words(*sum, words);
    write_words<streams>(words, to);
  }
  /// A NaN may come out as a number: its magnitude was taken before.
  template <bool streams, class V>
  LORA_ALWAYS_INLINE static void write(const V* sums, c10::BFloat16* to) {
    Vector<uint32_t, floats> even, odd;
    copy_bits(sums[0], even);
    copy_bits(sums[1], odd);
    even += 0x7fffU + ((even >> 16) & 1U);
    odd += 0x7fffU + ((odd >> 16) & 1U);
    write_words<streams>((even >> 16) | (odd & 0xffff0000U), to);
  }

  template <class T, class Sum>
  LORA_ALWAYS_INLINE static int64_t count_non_finite(const MergeTile<T, Sum>& tile) {
    int64_t count = 0;
    for (int64_t row = tile.first; row < tile.last; ++row) {
      for (int64_t column = tile.left; column < tile.right; ++column) {
        if (!is_finite(tile.merged[row * tile.columns + column])) ++count;
      }
    }
    return count;
  }
};

}  // namespace detail
LORA_NAMESPACE_END
