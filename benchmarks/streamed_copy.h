// The fastest copy of tensors there is: into memory that is there, past the caches.
#pragma once

#include <ATen/core/Tensor.h>
#include <lora/detail/instruction_set.h>
#include <lora/detail/lanes.h>
#include <lora/detail/parallel.h>
#include <lora/detail/register_vectors.h>
#include <lora/detail/tensor_memory.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

class StreamedCopy {
 public:
  explicit StreamedCopy(std::vector<at::Tensor> from) : from_(std::move(from)) {
    for (std::size_t i = 0; i < from_.size(); ++i) {
      to_.push_back(lora::detail::TensorMemory::instance().empty_like(from_[i]));
      for (std::int64_t begin = 0; begin < bytes(i); begin += kTask) tasks_.emplace_back(i, begin);
    }
  }

  void run() const {
    lora::detail::parallel_tasks(static_cast<std::int64_t>(tasks_.size()), [&](std::int64_t task) {
      const auto [i, begin] = tasks_[static_cast<std::size_t>(task)];
      lora::detail::run_register_kernel<Kernel>(
          lora::detail::instruction_set(), static_cast<const char*>(from_[i].const_data_ptr()) + begin,
          static_cast<char*>(to_[i].mutable_data_ptr()) + begin, std::min(kTask, bytes(i) - begin));
    });
  }

 private:
  static constexpr std::int64_t kTask = 1 << 20;

  template <std::int64_t floats>
  struct Kernel {
    LORA_ALWAYS_INLINE static void run(const char* from, char* to, std::int64_t bytes) {
      using Words = lora::detail::Vector<uint32_t, floats>;
      for (std::int64_t i = 0; i < bytes; i += static_cast<std::int64_t>(sizeof(Words))) {
        Words words;
        std::memcpy(&words, from + i, sizeof words);
        lora::detail::stream(words, to + i);
      }
      lora::detail::end_streams();
    }
  };

  std::int64_t bytes(std::size_t i) const { return static_cast<std::int64_t>(from_[i].nbytes()); }

  std::vector<at::Tensor> from_, to_;  // of whole vectors
  std::vector<std::pair<std::size_t, std::int64_t>> tasks_;
};
