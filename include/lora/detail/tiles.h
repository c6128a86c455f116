#pragma once

#include <lora/detail/lanes.h>
#include <lora/version.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

LORA_NAMESPACE_BEGIN
namespace detail {

// Products of small float32 matrices that lie in the caches, in vectors of `width` floats. They are formed in tiles of
// kTileRows rows times one or two vectors, whose sums stay in registers: half of the 32 that AVX-512 has, or of the 16
// of the other instruction sets.

template <int64_t width>
inline constexpr int64_t kTileRows = width == 16 ? 8 : 4;

/// A panel is as wide as the widest tile.
template <int64_t width>
inline constexpr int64_t kPanel = 2 * width;

constexpr int64_t round_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

/// The left matrix of a product: element (i, k) at data[i·row + k·step].
struct LeftMatrix {
  const float* data;
  int64_t row, step;
};

/// A row-major matrix, `row` elements from one row to the next.
template <class T>
struct RowMatrix {
  T* data;
  int64_t row;

  LORA_ALWAYS_INLINE T* at(int64_t i) const { return data + i * row; }
  LORA_ALWAYS_INLINE RowMatrix from(int64_t i) const { return {at(i), row}; }
};

template <int64_t width, bool accumulate, size_t... cell, size_t... column>
LORA_ALWAYS_INLINE void multiply_tile(const LeftMatrix& a, const RowMatrix<const float>& b, int64_t count, float scale,
                                      const RowMatrix<float>& c, std::index_sequence<cell...> /*cells*/,
                                      std::index_sequence<column...> /*columns*/) {
  constexpr size_t columns = sizeof...(column);
  using Floats = Vector<float, width>;
  Floats sums[sizeof...(cell)] = {};
  if constexpr (accumulate) (load(c.at(cell / columns) + cell % columns * width, sums[cell]), ...);
  const auto* left = a.data;
  const auto* right = b.data;
  for (int64_t k = 0; k < count; ++k, left += a.step, right += b.row) {
    Floats values[columns];
    (load(right + column * width, values[column]), ...);
    ((sums[cell] += values[cell % columns] * left[static_cast<int64_t>(cell / columns) * a.row]), ...);
  }
  if constexpr (!accumulate) ((sums[cell] *= scale), ...);
  (store(sums[cell], c.at(cell / columns) + cell % columns * width), ...);
}

/// C = scale·A·B, or C += A·B, for kTileRows rows of A and C; A has `count` columns, B and C `vectors` vectors.
template <int64_t width, bool accumulate>
LORA_ALWAYS_INLINE void multiply_rows(const LeftMatrix& a, const RowMatrix<const float>& b, int64_t count, float scale,
                                      const RowMatrix<float>& c, int64_t vectors) {
  constexpr size_t rows = kTileRows<width>;
  int64_t i = 0;
  for (; i + 2 <= vectors; i += 2) {
    multiply_tile<width, accumulate>(a, {b.data + i * width, b.row}, count, scale, {c.data + i * width, c.row},
                                     std::make_index_sequence<2 * rows>(), std::make_index_sequence<2>());
  }
  if (i == vectors) return;
  multiply_tile<width, accumulate>(a, {b.data + i * width, b.row}, count, scale, {c.data + i * width, c.row},
                                   std::make_index_sequence<rows>(), std::make_index_sequence<1>());
}

/// The first `count` elements, zeros behind them.
template <class T, class V>
LORA_ALWAYS_INLINE void load_some(const T* from, int64_t count, V& to) {
  if (count >= kLanesOf<V>) return load(from, to);
  load_first(from, count, T(0), to);
}

/// The first `count` lanes.
template <class T, class V>
LORA_ALWAYS_INLINE void store_some(const V& from, int64_t count, T* to) {
  if (count >= kLanesOf<V>) return store(from, to);
  store_first(from, count, to);
}

/// Rows [0, count) of `size` elements into float32, with zeros up to a whole vector and behind the last row up to
/// `rows`.
template <int64_t width, class T>
LORA_ALWAYS_INLINE void pack_rows(const RowMatrix<const T>& from, int64_t count, int64_t size, int64_t rows,
                                  const RowMatrix<float>& to) {
  using Floats = Vector<float, width>;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t e = 0; e < size; e += width) {
      Floats x;
      load_some(from.at(i) + e, size - e, x);
      store(x, to.at(i) + e);
    }
  }
  for (int64_t i = count; i < rows; ++i) {
    for (int64_t e = 0; e < size; e += width) store(Floats{}, to.at(i) + e);
  }
}

/// Exchanges the bit `distance` of the row with that of the lane, for the pair of rows `low` and low + distance.
template <size_t distance, class V, size_t... lane>
LORA_ALWAYS_INLINE void exchange_lanes(V& low, V& high, std::index_sequence<lane...> /*lanes*/) {
  constexpr int lanes = sizeof...(lane);
  const V a = low, b = high;
  low = __builtin_shufflevector(
      a, b, ((lane & distance) != 0 ? lanes + static_cast<int>(lane - distance) : static_cast<int>(lane))...);
  high = __builtin_shufflevector(
      a, b, ((lane & distance) != 0 ? lanes + static_cast<int>(lane) : static_cast<int>(lane + distance))...);
}

/// Transposes a square matrix, given one half of its rows' numbers: a row's number and a lane's have the same bits.
template <size_t distance, class V, size_t size, size_t... pair>
LORA_ALWAYS_INLINE void transpose_square(V (&rows)[size], std::index_sequence<pair...> pairs) {
  if constexpr (distance != 0) {
    (exchange_lanes<distance>(rows[pair / distance * 2 * distance + pair % distance],
                              rows[pair / distance * 2 * distance + pair % distance + distance],
                              std::make_index_sequence<size>()),
     ...);
    transpose_square<distance / 2>(rows, pairs);
  }
}

/// Writes the transposed matrix of width × width elements.
template <int64_t width, class T, size_t... row>
LORA_ALWAYS_INLINE void transpose_block(const RowMatrix<const T>& from, const RowMatrix<float>& to,
                                        std::index_sequence<row...> /*rows*/) {
  Vector<float, width> rows[width];
  (load(from.at(row), rows[row]), ...);
  transpose_square<width / 2>(rows, std::make_index_sequence<width / 2>());
  (store(rows[row], to.at(row)), ...);
}

/// The same of `count` rows of `size` elements, neither more than `width`; zeros up to a whole vector.
template <int64_t width, class T>
LORA_ALWAYS_INLINE void transpose_part(const RowMatrix<const T>& from, int64_t count, int64_t size,
                                       const RowMatrix<float>& to) {
  float whole[width * width] = {}, transposed[width * width];
  pack_rows<width>(from, count, size, count, {whole, width});
  transpose_block<width, float>({whole, width}, {transposed, width}, std::make_index_sequence<width>());
  for (int64_t i = 0; i < size; ++i) std::memcpy(to.at(i), transposed + i * width, width * sizeof(float));
}

/// The transposed matrix of rows [0, count) of `size` elements in panels of kPanel of its columns, one panel after the
/// other: [panels, size, kPanel], zeros in the columns behind the last.
template <int64_t width, class T>
LORA_ALWAYS_INLINE void pack_transposed(const RowMatrix<const T>& from, int64_t count, int64_t size, float* to) {
  constexpr auto panel = kPanel<width>;
  for (int64_t i = 0; i < round_up(count, panel); i += width) {
    const auto rows = std::clamp<int64_t>(count - i, 0, width);
    for (int64_t e = 0; e < size; e += width) {
      const RowMatrix<const T> source{from.at(i) + e, from.row};
      const RowMatrix<float> target{to + (i / panel * size + e) * panel + i % panel, panel};
      if (rows == width && e + width <= size) {
        transpose_block<width>(source, target, std::make_index_sequence<width>());
      } else {
        transpose_part<width>(source, rows, std::min(size - e, width), target);
      }
    }
  }
}

}  // namespace detail
LORA_NAMESPACE_END
