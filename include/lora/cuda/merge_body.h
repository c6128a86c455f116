#pragma once

#include <c10/macros/Macros.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <lora/version.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __CUDA_ARCH__
#define LORA_UNROLL _Pragma("unroll")
#define LORA_NO_UNROLL _Pragma("unroll 1")
#else
#define LORA_UNROLL
#define LORA_NO_UNROLL
#endif

LORA_NAMESPACE_BEGIN
namespace cuda {
namespace detail {

/// What a matrix holds.
enum class ElementType : int32_t { kFloat, kDouble, kBFloat16, kHalf };

/// A factor in its own dtype and strides: it is cast while it is read, so that no copy of it is made.
struct MergeFactor {
  const void* data;
  int64_t row_stride;
  int64_t column_stride;
  double scaling;
  ElementType type;
};

/// One update: left [rows, rank] · right [rank, columns], added to a rectangle of the matrix.
struct MergeUpdate {
  MergeFactor left;
  MergeFactor right;
  int64_t rank;
  int64_t first_row, last_row;
  int64_t first_column, last_column;
};

/// One W′ = W0 + Σ left·right, both row-major, and its places in the table.
struct MergeMatrix {
  const void* base;
  void* merged;
  int64_t rows;
  int64_t columns;
  int64_t first_update, last_update;
  int64_t first_tile;
  bool aligned;  // every row begins at a multiple of 16 bytes
};

/// Many matrices of one dtype, merged by one launch.
struct MergeTable {
  const MergeMatrix* matrices;
  int64_t count;
  const MergeUpdate* updates;
  unsigned long long* non_finite;  // for each matrix
};

/// The sizes of a tile. A thread has a vector of 16 bytes in each of several rows; 32 threads stand side by side.
template <class T>
struct TileShape {
  using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;
  static constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  static constexpr int kSumVector = 16 / static_cast<int>(sizeof(Sum));
  static constexpr int kWidth = 32;
  static constexpr int kThreads = 256;
  static constexpr int kThreadRows = sizeof(T) == 2 ? 4 : 8;  // 32 sums fit the registers
  static constexpr int kRows = kThreads / kWidth * kThreadRows;
  static constexpr int kColumns = kWidth * kVector;
  static constexpr int kRanks = 16;  // of an update at a time

  /// How many tiles a matrix has.
  static int64_t count(int64_t rows, int64_t columns) {
    return (rows + kRows - 1) / kRows * ((columns + kColumns - 1) / kColumns);
  }
};

/// Slices of an update's factors, which the threads of a block share.
template <class T>
struct TileSlices {
  using Shape = TileShape<T>;
  alignas(16) typename Shape::Sum left[Shape::kRanks][Shape::kRows];
  alignas(16) typename Shape::Sum right[Shape::kRanks][Shape::kColumns];
};

/// Sixteen bytes, which a device reads and writes at once. In words: an element of a smaller type would take a whole
/// register.
struct alignas(16) Words {
  uint32_t words[4];
};

/// What one thread keeps in registers: its part of W0, which is on its way while the updates are summed, and the sums.
template <class T>
struct TileRegisters {
  using Shape = TileShape<T>;
  Words base[Shape::kThreadRows];
  typename Shape::Sum sum[Shape::kThreadRows][Shape::kVector];
};

template <class T>
C10_HOST_DEVICE bool is_finite(T value) {
  // By the bits: a compiler told to be fast assumes that every number is finite.
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
  constexpr Bits kExponent = static_cast<Bits>(std::is_same_v<T, double>          ? 0x7ff0000000000000ULL
                                               : std::is_same_v<T, float>         ? 0x7f800000ULL
                                               : std::is_same_v<T, c10::BFloat16> ? 0x7f80ULL
                                                                                  : 0x7c00ULL);
  Bits bits;
  std::memcpy(&bits, &value, sizeof bits);
  return (bits & kExponent) != kExponent;
}

/// The matrix that a tile belongs to.
C10_HOST_DEVICE inline int64_t matrix_of(const MergeTable& table, int64_t tile) {
  int64_t first = 0, last = table.count;
  while (last - first > 1) {
    const auto middle = (first + last) / 2;
    (table.matrices[middle].first_tile <= tile ? first : last) = middle;
  }
  return first;
}

/// One tile of W′: the updates are summed in their order by fused multiply-adds in `Sum`, W0 is added last, the result
/// is rounded once. W0 is read and W′ written once, in vectors of 16 bytes where the rows allow it.
///
/// `Block` runs the steps of the tile by its threads: `run(step)` calls `step(thread, registers)` for every thread and
/// waits for all of them; `slices()` is the memory that they share; `add(counter, count)` is atomic. On a device a
/// block of threads is one; on the host a loop is one, by which the tests run this same function.
template <class T>
class TileMerger {
 public:
  using Shape = TileShape<T>;
  using Sum = typename Shape::Sum;
  using Slices = TileSlices<T>;
  using Registers = TileRegisters<T>;

  C10_HOST_DEVICE TileMerger(const MergeTable& table, int64_t tile)
      : index_(matrix_of(table, tile)), matrix_(table.matrices[index_]), table_(table) {
    const auto in_matrix = tile - matrix_.first_tile;
    const auto across = (matrix_.columns + Shape::kColumns - 1) / Shape::kColumns;
    row_ = in_matrix / across * Shape::kRows;
    column_ = in_matrix % across * Shape::kColumns;
  }

  template <class Block>
  C10_HOST_DEVICE void run(Block& block) const {
    if (matrix_.aligned && row_ + Shape::kRows <= matrix_.rows && column_ + Shape::kColumns <= matrix_.columns) {
      run_steps<true>(block);
    } else {
      run_steps<false>(block);
    }
  }

 private:
  /// `whole`: the tile lies inside of the matrix, whose rows allow vectors.
  template <bool whole, class Block>
  C10_HOST_DEVICE void run_steps(Block& block) const {
    block.run([&](int thread, Registers& registers) { begin<whole>(thread, registers); });
    for (auto k = matrix_.first_update; k < matrix_.last_update; ++k) {
      const auto& update = table_.updates[k];
      if (update.last_row <= row_ || update.first_row >= row_ + Shape::kRows) continue;
      if (update.last_column <= column_ || update.first_column >= column_ + Shape::kColumns) continue;
      for (int64_t rank = 0; rank < update.rank; rank += Shape::kRanks) {
        const auto left = update.rank - rank;
        const int ranks = left < Shape::kRanks ? static_cast<int>(left) : Shape::kRanks;
        auto& slices = block.slices();
        block.run([&](int thread, Registers&) {
          load_slice<Shape::kRows>(update.left, update.left.row_stride, update.left.column_stride, rank,
                                   update.first_row - row_, update.last_row - row_, ranks, thread, slices.left[0]);
          load_slice<Shape::kColumns>(update.right, update.right.column_stride, update.right.row_stride, rank,
                                      update.first_column - column_, update.last_column - column_, ranks, thread,
                                      slices.right[0]);
        });
        block.run([&](int thread, Registers& registers) { add_update(update, ranks, thread, slices, registers); });
      }
    }
    block.run([&](int thread, Registers& registers) {
      const auto bad = store<whole>(thread, registers);
      if (bad != 0) block.add(table_.non_finite + index_, bad);
    });
  }

  // A thread's place in the tile.
  C10_HOST_DEVICE static int row_of(int thread) { return thread / Shape::kWidth * Shape::kThreadRows; }
  C10_HOST_DEVICE static int column_of(int thread) { return thread % Shape::kWidth * Shape::kVector; }

  /// Where a row or column of the tile stands in its slice. The vectors that the threads read together lie side by
  /// side, so that they are in different banks of the shared memory.
  template <int size>
  C10_HOST_DEVICE static int slot(int place) {
    if (size == Shape::kRows) return place;
    return place % Shape::kVector / Shape::kSumVector * (Shape::kWidth * Shape::kSumVector) +
           place / Shape::kVector * Shape::kSumVector + place % Shape::kSumVector;
  }

  C10_HOST_DEVICE int64_t offset_of(int thread) const {
    return (row_ + row_of(thread)) * matrix_.columns + column_ + column_of(thread);
  }

  // What is read or written once is not kept in the caches.

  C10_HOST_DEVICE static void load_once(const T* from, Words& to) {
#ifdef __CUDA_ARCH__
    const auto found = __ldcs(reinterpret_cast<const uint4*>(from));
    to = Words{{found.x, found.y, found.z, found.w}};
#else
    std::memcpy(&to, from, sizeof to);
#endif
  }

  C10_HOST_DEVICE static void store_once(const Words& from, T* to) {
#ifdef __CUDA_ARCH__
    __stcs(reinterpret_cast<uint4*>(to), make_uint4(from.words[0], from.words[1], from.words[2], from.words[3]));
#else
    std::memcpy(to, &from, sizeof from);
#endif
  }

  C10_HOST_DEVICE static void load_shared(const Sum* from, Sum* to) {
#ifdef __CUDA_ARCH__
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
#else
    std::memcpy(to, from, 16);
#endif
  }

  /// Asks for W0 ahead of its use; at the edges of a matrix it is read in `store`.
  template <bool whole>
  C10_HOST_DEVICE void begin(int thread, Registers& registers) const {
    const auto* from = static_cast<const T*>(matrix_.base) + offset_of(thread);
    LORA_UNROLL
    for (int i = 0; i < Shape::kThreadRows; ++i, from += matrix_.columns) {
      if (whole) load_once(from, registers.base[i]);
      LORA_UNROLL
      for (int v = 0; v < Shape::kVector; ++v) registers.sum[i][v] = 0;
    }
  }

  /// Copies ranks of a factor for the `size` rows or columns of the tile into a slice, scaled, and zero outside of
  /// [first, last). `stride` leads to the next row or column, `rank_stride` to the next rank.
  template <int size>
  C10_HOST_DEVICE static void load_slice(const MergeFactor& factor, int64_t stride, int64_t rank_stride, int64_t rank,
                                         int64_t first, int64_t last, int ranks, int thread, Sum* slice) {
    const auto begin = rank * rank_stride - first * stride;
    switch (factor.type) {
      case ElementType::kFloat:
        return load_slice_of<size, float>(factor, begin, stride, rank_stride, first, last, ranks, thread, slice);
      case ElementType::kDouble:
        return load_slice_of<size, double>(factor, begin, stride, rank_stride, first, last, ranks, thread, slice);
      case ElementType::kBFloat16:
        return load_slice_of<size, c10::BFloat16>(factor, begin, stride, rank_stride, first, last, ranks, thread,
                                                  slice);
      case ElementType::kHalf:
        return load_slice_of<size, c10::Half>(factor, begin, stride, rank_stride, first, last, ranks, thread, slice);
    }
  }

  template <int size, class Factor>
  C10_HOST_DEVICE static void load_slice_of(const MergeFactor& factor, int64_t begin, int64_t stride,
                                            int64_t rank_stride, int64_t first, int64_t last, int ranks, int thread,
                                            Sum* slice) {
    const auto* values = static_cast<const Factor*>(factor.data);
    const auto scaling = static_cast<Sum>(factor.scaling);
    for (int i = thread; i < ranks * size; i += Shape::kThreads) {
      const int place = i % size, rank = i / size;
      const bool inside = place >= first && place < last;
      const auto value = inside ? static_cast<Sum>(values[begin + place * stride + rank * rank_stride]) : Sum(0);
      slice[rank * size + slot<size>(place)] = value * scaling;
    }
  }

  C10_HOST_DEVICE void add_update(const MergeUpdate& update, int ranks, int thread, const Slices& slices,
                                  Registers& registers) const {
    const auto row = row_ + row_of(thread), column = column_ + column_of(thread);
    const auto rows = covered(update.first_row - row, update.last_row - row, Shape::kThreadRows);
    const auto columns = covered(update.first_column - column, update.last_column - column, Shape::kVector);
    if (rows == (1U << Shape::kThreadRows) - 1 && columns == (1U << Shape::kVector) - 1) {
      add_products<true>(rows, columns, ranks, thread, slices, registers);
    } else {
      add_products<false>(rows, columns, ranks, thread, slices, registers);
    }
  }

  /// A bit for each of `count` places that lies in [first, last).
  C10_HOST_DEVICE static unsigned covered(int64_t first, int64_t last, int count) {
    unsigned bits = 0;
    for (int i = 0; i < count; ++i) bits |= (i >= first && i < last ? 1U : 0U) << i;
    return bits;
  }

  /// Elements outside of the update keep their sum, also where a factor is NaN or infinite.
  template <bool whole>
  C10_HOST_DEVICE static void add_products(unsigned rows, unsigned columns, int ranks, int thread, const Slices& slices,
                                           Registers& registers) {
    LORA_NO_UNROLL
    for (int k = 0; k < ranks; ++k) {
      alignas(16) Sum left[Shape::kThreadRows];
      alignas(16) Sum right[Shape::kVector];
      LORA_UNROLL
      for (int i = 0; i < Shape::kThreadRows; i += Shape::kSumVector) {
        load_shared(slices.left[k] + row_of(thread) + i, left + i);
      }
      LORA_UNROLL
      for (int v = 0; v < Shape::kVector; v += Shape::kSumVector) {
        load_shared(slices.right[k] + slot<Shape::kColumns>(column_of(thread) + v), right + v);
      }
      LORA_UNROLL
      for (int i = 0; i < Shape::kThreadRows; ++i) {
        LORA_UNROLL
        for (int v = 0; v < Shape::kVector; ++v) {
          if (whole || ((rows >> i & columns >> v) & 1U) != 0) {
            registers.sum[i][v] = std::fma(left[i], right[v], registers.sum[i][v]);
          }
        }
      }
    }
  }

  /// Adds W0, rounds and writes; returns how many results are NaN or infinite.
  template <bool whole>
  C10_HOST_DEVICE unsigned store(int thread, const Registers& registers) const {
    const auto offset = offset_of(thread);
    const auto* from = static_cast<const T*>(matrix_.base) + offset;
    auto* to = static_cast<T*>(matrix_.merged) + offset;
    const auto rows = matrix_.rows - row_ - row_of(thread), columns = matrix_.columns - column_ - column_of(thread);
    unsigned bad = 0;
    LORA_UNROLL
    for (int i = 0; i < Shape::kThreadRows; ++i, from += matrix_.columns, to += matrix_.columns) {
      T values[Shape::kVector];
      if (whole) std::memcpy(values, &registers.base[i], sizeof values);
      LORA_UNROLL
      for (int v = 0; v < Shape::kVector; ++v) {
        if (!whole) {
          if (i >= rows || v >= columns) continue;
          values[v] = from[v];
        }
        values[v] = static_cast<T>(static_cast<Sum>(values[v]) + registers.sum[i][v]);
        bad += is_finite(values[v]) ? 0 : 1;
        if (!whole) to[v] = values[v];
      }
      if (whole) {
        Words words;
        std::memcpy(&words, values, sizeof words);
        store_once(words, to);
      }
    }
    return bad;
  }

  int64_t index_;
  MergeMatrix matrix_;
  MergeTable table_;
  int64_t row_ = 0;
  int64_t column_ = 0;
};

}  // namespace detail
}  // namespace cuda
LORA_NAMESPACE_END
