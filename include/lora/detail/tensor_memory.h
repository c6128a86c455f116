#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>
#include <c10/core/Storage.h>
#include <c10/util/Exception.h>
#include <c10/util/accumulate.h>
#include <lora/version.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <list>
#include <map>
#include <mutex>
#include <unordered_map>
#include <utility>

LORA_NAMESPACE_BEGIN
namespace detail {

inline constexpr size_t kHugePage = 2 << 20;

inline size_t page_size() {
  static const auto size = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  return size;
}

/// Fresh memory of whole pages, in huge ones where the system has them; null: there is none.
inline void* map_pages(size_t bytes) {
  const auto spare = bytes < kHugePage ? 0 : kHugePage;
  void* const mapped = ::mmap(nullptr, bytes + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  if (spare == 0) return mapped;
  auto* const first = static_cast<char*>(mapped);
  const auto before = (kHugePage - reinterpret_cast<uintptr_t>(first) % kHugePage) % kHugePage;
  if (before != 0) ::munmap(first, before);
  if (before != spare) ::munmap(first + before + bytes, spare - before);
#ifdef MADV_HUGEPAGE
  ::madvise(first + before, bytes, MADV_HUGEPAGE);
#endif
  return first + before;
}

/// Lets the system take the memory when it lacks some; until then it is mapped, and free of faults when it is written.
inline void let_system_take(void* data, size_t bytes) {
#ifdef MADV_FREE
  if (bytes >= kHugePage) ::madvise(data, bytes, MADV_FREE);
#endif
}

/// Zeros on the CPU in pages of their own, which go back to the system with the tensor. What is needed once, in the
/// midst of a step, would stay in an allocator's memory for good.
inline at::Tensor zeros_in_own_pages(at::IntArrayRef sizes, at::ScalarType dtype) {
  const auto wanted = static_cast<size_t>(c10::multiply_integers(sizes)) * c10::elementSize(dtype);
  const auto bytes = (wanted + page_size() - 1) / page_size() * page_size();
  void* const data = map_pages(bytes);
  const auto options = at::TensorOptions(dtype).device(at::kCPU);
  if (data == nullptr) return at::zeros(sizes, options);
  return at::from_blob(
             data, sizes, [bytes](void* pages) { ::munmap(pages, bytes); }, options)
      .zero_();
}

/// An allocator of the CPU whose freed blocks wait for the next tensors of their size. Small ones are left to
/// LibTorch's default.
///
/// glibc cuts blocks to size and cannot put them together again around what lives longer: a training step ends with
/// tens of megabytes that no tensor fits into. Here a block is given out whole: its size is rounded up by at most an
/// eighth, below 32 KiB to whole pages, and one that waits may be an eighth larger still. It never holds more than a
/// sixty-fourth beyond what the blocks of its tensors took at their most: what would exceed it is given back to the
/// system, first what has waited longest; and what waits beyond 256 MiB, a system that lacks memory takes.
class TensorMemory final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < kSmallest) return small_->allocate(bytes);
    void* const data = take(bytes);
    if (data == nullptr) return small_->allocate(bytes);  // throws its error
    c10::profiledCPUMemoryReporter().New(data, bytes);
    return {data, data, &free, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }

  /// An uninitialised contiguous tensor like another on the CPU.
  at::Tensor empty_like(const at::Tensor& like) {
    c10::Storage storage(c10::Storage::use_byte_size_t(), static_cast<int64_t>(like.nbytes()), this,
                         /*resizable=*/true);
    return at::empty({0}, like.options()).set_(std::move(storage), 0, like.sizes(), {});
  }

  /// The one of this process. It is never destroyed: tensors may outlive everything.
  static TensorMemory& instance() {
    static auto* const memory = new TensorMemory;
    return *memory;
  }

 private:
  static constexpr size_t kSmallest = 16 << 10;
  static constexpr size_t kUnmarked = 256 << 20;  // waits without a call of the system, so that an unmerge is a swap

  struct Block {
    void* data;
    size_t bytes;
  };

  static void free(void* data) { instance().give(data); }

  /// The size of a block for so many bytes, one of eight between two powers of two: the tensors of steps that differ a
  /// little fit into each other's blocks, and what a tensor does not reach takes no memory.
  static size_t block_size(size_t bytes) {
    size_t power = kSmallest;
    while (2 * power < bytes) power *= 2;
    const auto step = std::max(page_size(), power / 8);
    return (bytes + step - 1) / step * step;
  }

  static bool fits(size_t block, size_t bytes) { return block <= bytes + bytes / 8; }

  void* take(size_t asked) {
    const auto bytes = block_size(asked);
    const std::lock_guard<std::mutex> lock(mutex_);
    void* data = nullptr;
    auto size = bytes;
    const auto found = waiting_by_size_.lower_bound(bytes);
    if (found != waiting_by_size_.end() && fits(found->first, bytes)) {
      size = found->first;
      data = found->second->data;
      waiting_.erase(found->second);
      waiting_by_size_.erase(found);
      waiting_bytes_ -= size;
    }
    most_ = std::max(most_, given_bytes_ + size);
    if (data == nullptr) {
      give_back(size, most_ + most_ / 64);
      data = map_pages(size);
    }
    if (data == nullptr) {
      give_back(size, 0);
      data = map_pages(size);
    }
    if (data == nullptr) return nullptr;
    given_.emplace(data, size);
    given_bytes_ += size;
    return data;
  }

  void give(void* data) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = given_.find(data);
      if (found != given_.end()) {
        c10::profiledCPUMemoryReporter().Delete(data);
        waiting_.push_back({data, found->second});
        waiting_by_size_.emplace(found->second, std::prev(waiting_.end()));
        waiting_bytes_ += found->second;
        given_bytes_ -= found->second;
        if (waiting_bytes_ > kUnmarked) let_system_take(data, found->second);
        given_.erase(found);
        return;
      }
    }
    small_->raw_deallocate(data);
  }

  /// Makes room for a block to come, so that no more than `limit` is held with it, as far as blocks wait.
  void give_back(size_t bytes, size_t limit) {
    while (!waiting_.empty() && given_bytes_ + waiting_bytes_ + bytes > limit) {
      const auto block = waiting_.front();
      auto entry = waiting_by_size_.lower_bound(block.bytes);
      while (entry->second != waiting_.begin()) ++entry;
      waiting_by_size_.erase(entry);
      waiting_.pop_front();
      waiting_bytes_ -= block.bytes;
      ::munmap(block.data, block.bytes);
    }
  }

  c10::Allocator* const small_ = c10::GetDefaultCPUAllocator();
  std::mutex mutex_;
  std::unordered_map<void*, size_t> given_;
  std::list<Block> waiting_;  // the one that has waited longest first
  std::multimap<size_t, std::list<Block>::iterator> waiting_by_size_;
  size_t given_bytes_ = 0;
  size_t waiting_bytes_ = 0;
  size_t most_ = 0;  // of given_bytes_
};

}  // namespace detail
LORA_NAMESPACE_END
