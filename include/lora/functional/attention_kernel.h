#pragma once

#include <lora/detail/lanes.h>
#include <lora/detail/tiles.h>
#include <lora/detail/vector_math.h>
#include <lora/version.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

LORA_NAMESPACE_BEGIN
namespace detail {

/// What the backward needs of a softmax over scores: p = e^(score − maximum)·weight, weight = 1 / Σ e^(score −
/// maximum). The two say what their log-sum-exp does, without a logarithm and with more digits.
struct SoftmaxRow {
  float maximum;
  float weight;
};

/// Attention of one head: query i of `queries` sees the keys [0, keys), only those up to past + i where it is causal.
/// Each matrix has a row for each query or key and `size` elements in a row, adjacent to each other.
template <class T>
struct AttentionHead {
  RowMatrix<const T> q, k, v;
  RowMatrix<T> out;
  SoftmaxRow* softmax;  // [queries]; null: not wanted
  int64_t queries, keys, size;
  float scale;  // of the scores q·kᵀ
  bool causal;
  int64_t past;

  /// How many keys the queries below `end` see.
  LORA_ALWAYS_INLINE int64_t keys_below(int64_t end) const { return causal ? std::min(keys, past + end) : keys; }
  /// The first query that sees a key.
  LORA_ALWAYS_INLINE int64_t first_query_of(int64_t key) const { return causal ? std::max<int64_t>(0, key - past) : 0; }
};

/// A head's gradients: dout is given, the others are written.
template <class T>
struct AttentionGradients {
  RowMatrix<const T> dout;
  RowMatrix<T> dq, dk, dv;  // null: not wanted; dk and dv are wanted together
};

/// Scores of a tile of queries are held for so many keys at a time, 16 KiB of them.
inline constexpr int64_t kForwardKeys = 512;
/// Scores of so many queries and keys are held in the backward, twice 32 KiB with room that spreads the columns over
/// the sets of a cache.
inline constexpr int64_t kBackwardQueries = 64;
inline constexpr int64_t kBackwardKeys = 128;
inline constexpr int64_t kBackwardRow = kBackwardKeys + 16;

inline constexpr int64_t kMostTileRows = 8;
inline constexpr int64_t kMostLanes = 16;

/// Floats of scratch memory for the forward of a head, in any instruction set.
inline int64_t attention_forward_scratch(int64_t keys, int64_t size) {
  const auto columns = round_up(size, kMostLanes);
  return round_up(keys, 2 * kMostLanes) * size + keys * columns +
         kMostTileRows * (2 * columns + std::min(kForwardKeys, round_up(keys, 2 * kMostLanes)));
}

/// Floats of scratch memory for the backward of a head, in any instruction set.
inline int64_t attention_backward_scratch(int64_t queries, int64_t size) {
  const auto columns = round_up(size, kMostLanes);
  return round_up(queries, kBackwardQueries) * (1 + columns) + 2 * kBackwardQueries * (columns + kBackwardRow) +
         kBackwardKeys * (2 * size + 3 * columns);
}

template <int64_t width>
struct AttentionTiles {
  using Floats = Vector<float, width>;
  static constexpr int64_t kRows = kTileRows<width>;

  /// `rest` in all lanes from `count` on.
  template <size_t... lane>
  LORA_ALWAYS_INLINE static void keep_first(int64_t count, float rest, Floats& x,
                                            std::index_sequence<lane...> /*lanes*/) {
    const Like<int32_t, Floats> lanes{static_cast<int32_t>(lane)...};
    x = lanes < static_cast<int32_t>(count) ? x : Floats{} + rest;
  }
  LORA_ALWAYS_INLINE static void keep_first(int64_t count, float rest, Floats& x) {
    if (count < width) keep_first(count, rest, x, std::make_index_sequence<width>());
  }

  /// scale·Q·Kᵀ for a tile of packed queries and the first `keys` keys of packed panels; beyond them, up to a whole
  /// vector, come scores of other keys.
  LORA_ALWAYS_INLINE static void scores(const RowMatrix<const float>& q, const float* panels, int64_t size,
                                        int64_t keys, float scale, const RowMatrix<float>& result) {
    for (int64_t key = 0; key < keys; key += kPanel<width>) {
      multiply_rows<width, false>({q.data, q.row, 1}, {panels + key * size, kPanel<width>}, size, scale,
                                  {result.data + key, result.row}, keys - key > width ? 2 : 1);
    }
  }

  /// The largest of the first `count` ≥ 1 scores.
  LORA_ALWAYS_INLINE static float maximum(const float* scores, int64_t count) {
    Floats largest = Floats{} + scores[0], x;
    for (int64_t i = 0; i < count; i += width) {
      load(scores + i, x);
      keep_first(count - i, scores[0], x);
      largest = x > largest ? x : largest;
    }
    return maximum_of_lanes(largest);
  }

  /// Scores into e^(score − maximum), zeros from `count` up to `end`; returns their sum.
  LORA_ALWAYS_INLINE static float exponentials(float* scores, int64_t count, int64_t end, float maximum) {
    Floats total{}, x;
    for (int64_t i = 0; i < end; i += width) {
      load(scores + i, x);
      exp_lanes(x - maximum, x);
      keep_first(count - i, 0, x);
      total += x;
      store(x, scores + i);
    }
    return sum_of_lanes(total);
  }
};

/// Queries [first, last) of a head, `first` a multiple of kMostTileRows.
template <int64_t width>
struct AttentionForwardKernel {
  using Tiles = AttentionTiles<width>;
  static constexpr int64_t kRows = kTileRows<width>;

  template <class T>
  LORA_ALWAYS_INLINE static void run(const AttentionHead<T>& head, int64_t first, int64_t last, float* scratch) {
    using Floats = Vector<float, width>;
    const auto size = head.size, columns = round_up(size, width);
    const auto keys = head.keys_below(last);
    float* const panels = scratch;
    const RowMatrix<float> values{panels + round_up(keys, kPanel<width>) * size, columns};
    const RowMatrix<float> q{values.at(keys), columns}, sums{q.at(kRows), columns};
    const RowMatrix<float> scores{sums.at(kRows), std::min(kForwardKeys, round_up(keys, kPanel<width>))};
    pack_transposed<width>(head.k, keys, size, panels);
    pack_rows<width>(head.v, keys, size, keys, values);

    for (int64_t row = first; row < last; row += kRows) {
      const auto rows = std::min(kRows, last - row);
      pack_rows<width>(head.q.from(row), rows, size, kRows, q);
      SoftmaxRow softmax[kRows];
      for (int64_t begin = 0; begin < head.keys_below(row + rows); begin += kForwardKeys) {
        const auto count = std::min(kForwardKeys, head.keys_below(row + rows) - begin);
        Tiles::scores({q.data, q.row}, panels + begin * size, size, count, head.scale, scores);
        for (int64_t i = 0; i < rows; ++i) {
          const auto seen = std::min(count, head.keys_below(row + i + 1) - begin);
          if (seen <= 0) {  // none of this block, as only later queries of the tile do
            std::memset(scores.at(i), 0, static_cast<size_t>(count) * sizeof(float));
            continue;
          }
          auto& state = softmax[i];
          const auto before = state;
          state.maximum = Tiles::maximum(scores.at(i), seen);
          if (begin > 0 && before.maximum > state.maximum) state.maximum = before.maximum;
          state.weight = Tiles::exponentials(scores.at(i), seen, count, state.maximum);
          if (begin == 0) continue;
          const float kept = std::exp(before.maximum - state.maximum);
          state.weight += before.weight * kept;
          for (int64_t e = 0; e < columns; e += width) {
            Floats x;
            load(sums.at(i) + e, x);
            store(x * kept, sums.at(i) + e);
          }
        }
        const LeftMatrix p{scores.data, scores.row, 1};
        const RowMatrix<const float> v{values.at(begin), columns};
        if (begin == 0) {
          multiply_rows<width, false>(p, v, count, 1, sums, columns / width);
        } else {
          multiply_rows<width, true>(p, v, count, 1, sums, columns / width);
        }
      }
      for (int64_t i = 0; i < rows; ++i) {
        softmax[i].weight = 1 / softmax[i].weight;
        if (head.softmax != nullptr) head.softmax[row + i] = softmax[i];
        for (int64_t e = 0; e < size; e += width) {
          Floats x;
          load(sums.at(i) + e, x);
          store_some(x * softmax[i].weight, size - e, head.out.at(row + i) + e);
        }
      }
    }
  }
};

/// The part of a head's backward that queries [first_query, last_query) and keys [first_key, last_key) have: dq of
/// these queries is whole where the keys are all, dk and dv of these keys where the queries are. The begins are
/// multiples of kBackwardQueries and kBackwardKeys. The order of the sums does not depend on the ranges.
struct AttentionRange {
  int64_t first_query, last_query, first_key, last_key;
};

template <int64_t width>
struct AttentionBackwardKernel {
  using Floats = Vector<float, width>;
  using Tiles = AttentionTiles<width>;
  static constexpr int64_t kRows = kTileRows<width>;

  template <class T>
  LORA_ALWAYS_INLINE static void run(const AttentionHead<T>& head, const AttentionGradients<T>& gradients,
                                     const AttentionRange& range, float* scratch) {
    const auto size = head.size, columns = round_up(size, width);
    const auto queries = range.last_query - range.first_query;
    float* const deltas = scratch;
    const RowMatrix<float> dq{deltas + round_up(queries, kBackwardQueries), columns};
    const RowMatrix<float> q{dq.at(round_up(queries, kBackwardQueries)), columns},
        dout{q.at(kBackwardQueries), columns};
    const RowMatrix<float> p{dout.at(kBackwardQueries), kBackwardRow}, ds{p.at(kBackwardQueries), kBackwardRow};
    const RowMatrix<float> k{ds.at(kBackwardQueries), columns}, dk{k.at(kBackwardKeys), columns},
        dv{dk.at(kBackwardKeys), columns};
    float* const k_panels = dv.at(kBackwardKeys);
    float* const v_panels = k_panels + kBackwardKeys * size;

    for (int64_t i = 0; i < queries; ++i) {
      deltas[i] = dot(gradients.dout.at(range.first_query + i), head.out.at(range.first_query + i), size);
    }
    std::memset(dq.data, 0, static_cast<size_t>(round_up(queries, kRows) * columns) * sizeof(float));

    for (auto key = range.first_key; key < range.last_key; key += kBackwardKeys) {
      const auto keys = std::min(kBackwardKeys, range.last_key - key);
      pack_rows<width>(head.k.from(key), keys, size, keys, k);
      pack_transposed<width>(head.k.from(key), keys, size, k_panels);
      pack_transposed<width>(head.v.from(key), keys, size, v_panels);
      std::memset(dk.data, 0, static_cast<size_t>(2 * kBackwardKeys * columns) * sizeof(float));

      auto query = std::max(range.first_query, head.first_query_of(key) / kBackwardQueries * kBackwardQueries);
      for (; query < range.last_query; query += kBackwardQueries) {
        const auto rows = std::min(kBackwardQueries, range.last_query - query);
        pack_rows<width>(head.q.from(query), rows, size, round_up(rows, kRows), q);
        pack_rows<width>(gradients.dout.from(query), rows, size, round_up(rows, kRows), dout);

        for (int64_t row = 0; row < rows; row += kRows) {
          const auto last = std::min(row + kRows, rows);
          const auto count = std::min(keys, head.keys_below(query + last) - key);
          if (count <= 0) continue;  // a tile in front of the first query that sees any of these keys
          const auto p_tile = p.from(row), ds_tile = ds.from(row);
          Tiles::scores({q.at(row), q.row}, k_panels, size, count, head.scale, p_tile);
          Tiles::scores({dout.at(row), dout.row}, v_panels, size, count, 1, ds_tile);
          for (auto i = row; i < last; ++i) {
            const auto seen = std::min(count, head.keys_below(query + i + 1) - key);
            weights(p.at(i), ds.at(i), seen, count, head.softmax[query + i], deltas[query + i - range.first_query],
                    head.scale);
          }
          if (gradients.dq.data == nullptr) continue;
          multiply_rows<width, true>({ds_tile.data, ds.row, 1}, {k.data, columns}, count, 1,
                                     dq.from(query + row - range.first_query), columns / width);
        }
        if (gradients.dk.data == nullptr) continue;
        for (int64_t i = 0; i < keys; i += kRows) {
          // The first query that sees any of these keys stands in the tile of rows that begins with it.
          const auto row = std::max<int64_t>(0, head.first_query_of(key + i) - query);
          if (row >= rows) break;
          multiply_rows<width, true>({p.at(row) + i, 1, p.row}, {dout.at(row), columns}, rows - row, 1, dv.from(i),
                                     columns / width);
          multiply_rows<width, true>({ds.at(row) + i, 1, ds.row}, {q.at(row), columns}, rows - row, 1, dk.from(i),
                                     columns / width);
        }
      }
      if (gradients.dk.data == nullptr) continue;
      unpack(dk, keys, size, gradients.dk.from(key));
      unpack(dv, keys, size, gradients.dv.from(key));
    }
    if (gradients.dq.data == nullptr) return;
    unpack(dq, queries, size, gradients.dq.from(range.first_query));
  }

 private:
  template <class T>
  LORA_ALWAYS_INLINE static float dot(const T* a, const T* b, int64_t size) {
    Floats total{}, x, y;
    for (int64_t e = 0; e < size; e += width) {
      load_some(a + e, size - e, x);
      load_some(b + e, size - e, y);
      total += x * y;
    }
    return sum_of_lanes(total);
  }

  /// Scores into probabilities p and their gradients dp into those of q·kᵀ, p·(dp − delta)·scale; zeros from `count` up
  /// to `end` and the vector that it stands in.
  LORA_ALWAYS_INLINE static void weights(float* p, float* dp, int64_t count, int64_t end, const SoftmaxRow& softmax,
                                         float delta, float scale) {
    Floats x, y;
    for (int64_t i = 0; i < end; i += width) {
      load(p + i, x);
      load(dp + i, y);
      exp_lanes(x - softmax.maximum, x);
      x *= softmax.weight;
      y = x * (y - delta) * scale;
      Tiles::keep_first(count - i, 0, x);
      Tiles::keep_first(count - i, 0, y);
      store(x, p + i);
      store(y, dp + i);
    }
  }

  template <class T>
  LORA_ALWAYS_INLINE static void unpack(const RowMatrix<float>& from, int64_t rows, int64_t size,
                                        const RowMatrix<T>& to) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t e = 0; e < size; e += width) {
        Floats x;
        load(from.at(i) + e, x);
        store_some(x, size - e, to.at(i) + e);
      }
    }
  }
};

}  // namespace detail
LORA_NAMESPACE_END
