#pragma once

#include <lora/detail/instruction_set.h>
#include <lora/detail/lanes.h>
#include <lora/version.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

LORA_NAMESPACE_BEGIN
namespace detail {

/// One update in the merge of a weight: rows [begin, end) += B · A, the scaling already in B.
template <class Sum>
struct MergeFactors {
  const Sum* A;  // [rank, columns]
  const Sum* B;  // [end − begin, rank]
  int64_t rank;
  int64_t begin;
  int64_t end;
};

/// Rows [first, last) × columns [left, right) of W′ = W0 + Σ B·A, all row-major with `columns` columns.
template <class T, class Sum>
struct MergeTile {
  const T* base;
  T* merged;
  int64_t columns;
  const MergeFactors<Sum>* factors;
  int64_t count;
  int64_t first, last, left, right;
};

template <class T>
inline bool is_finite_bits(T value) {
  // By the bits: -ffast-math lets the compiler assume that every number is finite.
  std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>> bits, exponent;
  const T infinity = std::numeric_limits<T>::infinity();
  std::memcpy(&bits, &value, sizeof bits);
  std::memcpy(&exponent, &infinity, sizeof exponent);
  return (bits & exponent) != exponent;
}

/// Merges one tile; returns how many results are NaN or infinite. Sums the updates in `Sum` and adds W0 last, so that
/// W′ is rounded once and not with every term; reads W0 and writes W′ once.
template <class T, class Sum>
LORA_ALWAYS_INLINE int64_t merge_tile_body(const MergeTile<T, Sum>& tile) {
  using Mask = std::conditional_t<sizeof(Sum) == 8, uint64_t, uint32_t>;
  int64_t bad = 0;
  for (int64_t row = tile.first; row < tile.last; ++row) {
    const T* base = tile.base + row * tile.columns;
    T* merged = tile.merged + row * tile.columns;
    Lanes<Mask> bad_lanes{};
    int64_t column = tile.left;
    for (; column + 2 * kLanes <= tile.right; column += 2 * kLanes) {
      Lanes<Sum> low{}, high{}, a;
      for (int64_t k = 0; k < tile.count; ++k) {
        const auto& update = tile.factors[k];
        if (row < update.begin || row >= update.end) continue;
        const Sum* b = update.B + (row - update.begin) * update.rank;
        const Sum* a_row = update.A + column;
        for (int64_t r = 0; r < update.rank; ++r, a_row += tile.columns) {
          load(a_row, a);
          low += a * b[r];
          load(a_row + kLanes, a);
          high += a * b[r];
        }
      }
      load(base + column, a);
      low += a;
      load(base + column + kLanes, a);
      high += a;
      store(low, merged + column, bad_lanes);
      store(high, merged + column + kLanes, bad_lanes);
    }
    for (int64_t lane = 0; lane < kLanes; ++lane) bad += static_cast<int64_t>(bad_lanes[lane]);
    for (; column < tile.right; ++column) {
      Sum sum = 0;
      for (int64_t k = 0; k < tile.count; ++k) {
        const auto& update = tile.factors[k];
        if (row < update.begin || row >= update.end) continue;
        const Sum* b = update.B + (row - update.begin) * update.rank;
        for (int64_t r = 0; r < update.rank; ++r) sum += b[r] * update.A[r * tile.columns + column];
      }
      merged[column] = static_cast<T>(static_cast<Sum>(base[column]) + sum);
      bad += is_finite_bits(merged[column]) ? 0 : 1;
    }
  }
  return bad;
}

struct MergeTileKernel {
  template <class T, class Sum>
  LORA_ALWAYS_INLINE static int64_t run(const MergeTile<T, Sum>& tile) {
    return merge_tile_body(tile);
  }
};

}  // namespace detail
LORA_NAMESPACE_END
