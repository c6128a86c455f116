#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/accumulate.h>
#include <lora/detail/instruction_set.h>
#include <lora/detail/parallel.h>
#include <lora/detail/plain_tensor.h>
#include <lora/functional/attention_kernel.h>
#include <lora/version.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// New memory for a tensor of x's sizes [*, L, E]: as [B, L, H, E] for [B, H, L, E], the heads of a token side by side,
/// which is how LibTorch's kernels leave it too.
inline at::Tensor empty_heads(const at::Tensor& x) {
  if (x.dim() != 4) return at::empty(x.sizes(), x.options());
  const auto heads = x.size(1), length = x.size(2), size = x.size(3);
  return at::empty_strided(x.sizes(), {heads * length * size, size, heads * size, 1}, x.options());
}

/// The tensor itself or a copy of it in which the elements of a row are adjacent.
inline at::Tensor with_whole_rows(const at::Tensor& x) { return x.stride(-1) == 1 ? x : x.contiguous(); }

/// The rows of a head of x [*, rows, E] from `first` on, null where there are none. T is const where they are read.
template <class T>
RowMatrix<T> rows_of(const at::Tensor& x, int64_t head, int64_t first) {
  if (!x.defined() || x.numel() == 0) return {nullptr, 0};
  auto offset = first * x.stride(-2);
  for (auto dim = x.dim() - 3; dim >= 0; --dim) {
    offset += head % x.size(dim) * x.stride(dim);
    head /= x.size(dim);
  }
  if constexpr (std::is_const_v<T>) {
    return {x.const_data_ptr<std::remove_const_t<T>>() + offset, x.stride(-2)};
  } else {
    return {x.mutable_data_ptr<T>() + offset, x.stride(-2)};
  }
}

/// The rows of each head are sequences, one behind the other: sequence i has the queries [queries[i], queries[i + 1])
/// and the keys [keys[i], keys[i + 1]), the first `past` of them in front of those of the queries themselves.
struct AttentionOptions : torch::CustomClassHolder {
  AttentionOptions(std::vector<int64_t> query_offsets, std::vector<int64_t> key_offsets, bool is_causal,
                   double of_scores, int64_t past_keys = 0)
      : queries(std::move(query_offsets)),
        keys(std::move(key_offsets)),
        causal(is_causal),
        scale(of_scores),
        past(past_keys) {}

  std::vector<int64_t> queries, keys;
  bool causal;
  double scale;
  int64_t past;
};

/// Attention of the heads of q and out [*, queries, E], k and v [*, keys, E], plain tensors of one dtype with whole
/// rows.
struct AttentionCall {
  at::Tensor q, k, v, out;
  at::Tensor softmax;  // [heads, queries, 2] in float32, a SoftmaxRow each; undefined: not wanted
  c10::intrusive_ptr<const AttentionOptions> options;
  InstructionSet instructions = instruction_set();

  /// Writes out and softmax.
  void forward() const {
    const auto parts = parts_of_heads(4);
    for_heads(parts, [&](auto zero, size_t sequence, int64_t index, int64_t part) {
      const auto head = this->head<decltype(zero)>(sequence, index);
      const auto [first, last] = range_of(part, parts, head.queries, kMostTileRows);
      if (first == last) return;
      const auto scratch = scratch_memory(attention_forward_scratch(head.keys_below(last), head.size));
      run_register_kernel<AttentionForwardKernel>(instructions, head, first, last, static_cast<float*>(scratch.get()));
    });
  }

  /// Writes the gradients that are defined, of dk and dv both or none, from that of out.
  void backward(const at::Tensor& dout, const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& dv) const {
    // dq is a sum over all keys, dk and dv are sums over all queries: where heads are fewer than threads, parts of the
    // queries and parts of the keys are tasks of their own, which form the same probabilities twice.
    const auto parts = parts_of_heads(1);
    const bool divided = parts > 1;
    for_heads(divided ? 2 * parts : 1, [&](auto zero, size_t sequence, int64_t index, int64_t part) {
      using T = decltype(zero);
      const auto head = this->head<T>(sequence, index);
      const auto query = options->queries[sequence], key = options->keys[sequence];
      AttentionGradients<T> gradients{rows_of<const T>(dout, index, query), rows_of<T>(dq, index, query),
                                      rows_of<T>(dk, index, key), rows_of<T>(dv, index, key)};
      AttentionRange range{0, head.queries, 0, head.keys};
      if (divided && part < parts) {
        gradients.dk.data = gradients.dv.data = nullptr;
        std::tie(range.first_query, range.last_query) = range_of(part, parts, head.queries, kBackwardQueries);
        range.last_key = head.keys_below(range.last_query);
      } else if (divided) {
        gradients.dq.data = nullptr;
        std::tie(range.first_key, range.last_key) = range_of(part - parts, parts, head.keys, kBackwardKeys);
      }
      if (gradients.dq.data == nullptr && gradients.dk.data == nullptr) return;
      const auto scratch = scratch_memory(attention_backward_scratch(range.last_query - range.first_query, head.size));
      run_register_kernel<AttentionBackwardKernel>(instructions, head, gradients, range,
                                                   static_cast<float*>(scratch.get()));
    });
  }

 private:
  int64_t count_sequences() const { return static_cast<int64_t>(options->queries.size()) - 1; }
  int64_t count_heads() const { return c10::multiply_integers(q.sizes().slice(0, static_cast<size_t>(q.dim()) - 2)); }

  template <class T>
  AttentionHead<T> head(size_t sequence, int64_t index) const {
    const auto &queries = options->queries, &keys = options->keys;
    const auto query = queries[sequence], key = keys[sequence];
    SoftmaxRow* rows = nullptr;
    if (softmax.defined()) {
      rows = reinterpret_cast<SoftmaxRow*>(softmax.mutable_data_ptr<float>()) + index * q.size(-2) + query;
    }
    return {rows_of<const T>(q, index, query),
            rows_of<const T>(k, index, key),
            rows_of<const T>(v, index, key),
            rows_of<T>(out, index, query),
            rows,
            queries[sequence + 1] - query,
            keys[sequence + 1] - key,
            q.size(-1),
            static_cast<float>(options->scale),
            options->causal,
            options->past};
  }

  /// Into how many parts to divide heads, so that each thread gets `share` tasks; one thread takes heads whole.
  int64_t parts_of_heads(int64_t share) const {
    const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
    const auto tasks = std::max<int64_t>(1, count_sequences() * count_heads());
    return threads == 1 ? 1 : (share * threads + tasks - 1) / tasks;
  }

  /// Part `part` of `parts` of `count` rows, its begin a multiple of `unit`.
  static std::pair<int64_t, int64_t> range_of(int64_t part, int64_t parts, int64_t count, int64_t unit) {
    const auto length = round_up((count + parts - 1) / parts, unit);
    return {std::min(count, part * length), std::min(count, (part + 1) * length)};
  }

  /// Calls task(T(), sequence, head, part) for `parts` parts of every head, T the type of an element.
  template <class Task>
  void for_heads(int64_t parts, const Task& task) const {
    const auto heads = count_heads();
    visit_plain_dtype(q.scalar_type(), [&](auto zero) {
      parallel_tasks(count_sequences() * heads * parts, [&](int64_t i) {
        task(zero, static_cast<size_t>(i / parts / heads), i / parts % heads, i % parts);
      });
    });
  }

  static c10::DataPtr scratch_memory(int64_t floats) {
    return c10::GetCPUAllocator()->allocate(static_cast<size_t>(floats) * sizeof(float));
  }
};

}  // namespace detail
LORA_NAMESPACE_END
