// The allocator whose freed blocks wait for the next tensors of their size.
#include <ATen/ATen.h>
#include <c10/core/CPUAllocator.h>
#include <gtest/gtest.h>
#include <lora/train/keep_freed_memory.h>
#include <sys/resource.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <fstream>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "harness/memory.h"

namespace keep_freed_memory_test {
namespace {

using lora::detail::TensorMemory;
constexpr std::size_t kMega = 1 << 20;

c10::DataPtr written(std::size_t bytes) {
  auto block = TensorMemory::instance().allocate(bytes);
  auto* const data = static_cast<volatile char*>(block.get());
  for (std::size_t i = 0; i < bytes; i += 4096) data[i] = 1;
  return block;
}

/// Pages that the system hands out while a block is taken, written to and freed.
long faults_of(std::size_t bytes) {
  const auto faults = [] {
    rusage usage{};
    ::getrusage(RUSAGE_SELF, &usage);
    return usage.ru_minflt;
  };
  const auto before = faults();
  written(bytes);
  return faults() - before;
}

TEST(TensorMemory, TakesPagesFromTheSystemOnce) {
  faults_of(24 * kMega);
  EXPECT_LT(faults_of(24 * kMega), 16);
  EXPECT_LT(faults_of(23 * kMega), 16) << "at most an eighth is left unused";
  EXPECT_GE(faults_of(11 * kMega), 5) << "not into a block of twice the size";
  faults_of(33 * kMega);
  EXPECT_LT(faults_of(35 * kMega), 16) << "a block has one of eight sizes between two powers of two";
}

TEST(TensorMemory, HoldsLittleMoreThanItsTensorsTookAtTheirMost) {
  const auto before = harness::process_bytes().resident;
  for (std::size_t size = 4; size <= 128; size += size / 4) written(size * kMega);
  EXPECT_LT(harness::process_bytes().resident - before, 150 * kMega);
  const auto first = written(60 * kMega), second = written(60 * kMega);
  EXPECT_LT(harness::process_bytes().resident - before, 150 * kMega);
}

TEST(TensorMemory, GivesBlocksOfAnySizeThatDoNotOverlap) {
  auto& memory = TensorMemory::instance();
  std::vector<std::pair<c10::DataPtr, std::size_t>> blocks;
  for (int round = 0; round < 3; ++round) {
    for (const std::size_t size : std::vector<std::size_t>{0, 1, 100, 16383, 16384, 16385, 2097152, 2097153, 5000000}) {
      blocks.emplace_back(memory.allocate(size), size);
      const auto address = reinterpret_cast<std::uintptr_t>(blocks.back().first.get());
      EXPECT_EQ(address % (size >= 2 * kMega ? 2 * kMega : 64), 0U) << "huge pages begin there";
      auto* const bytes = static_cast<unsigned char*>(blocks.back().first.get());
      std::fill(bytes, bytes + size, static_cast<unsigned char>(blocks.size()));
    }
    for (std::size_t i = 0; i < blocks.size(); ++i) {
      const auto* const bytes = static_cast<const unsigned char*>(blocks[i].first.get());
      EXPECT_EQ(std::count(bytes, bytes + blocks[i].second, static_cast<unsigned char>(i + 1)),
                static_cast<std::ptrdiff_t>(blocks[i].second));
    }
    if (round == 1) blocks.erase(blocks.begin() + 9, blocks.end());
  }
}

TEST(TensorMemory, HasLibTorchsRawInterface) {
  auto& memory = TensorMemory::instance();
  for (const std::size_t size : std::vector<std::size_t>{100, 1000000})
    memory.raw_deallocate(memory.raw_allocate(size));
}

TEST(TensorMemory, IsUsedByManyThreads) {
  std::vector<std::thread> threads;
  std::vector<c10::DataPtr> kept(4);
  for (std::size_t t = 0; t < kept.size(); ++t) {
    threads.emplace_back([t, &kept] {
      for (std::size_t i = 1; i < 200; ++i) kept[t] = written(i % 7 * 100000 + t);
    });
  }
  for (auto& thread : threads) thread.join();
  kept.clear();  // blocks of other threads
}

/// What the system may take of this process, in bytes; nothing where it does not say.
std::optional<std::size_t> lazily_freed_bytes() {
  std::ifstream file("/proc/self/smaps_rollup");
  for (std::string word; file >> word;) {
    std::size_t kilobytes = 0;
    if (word == "LazyFree:" && file >> kilobytes) return kilobytes * 1024;
  }
  return {};
}

TEST(TensorMemory, LetsTheSystemTakeWhatWaitsBeyond256MiB) {
  if (!lazily_freed_bytes()) GTEST_SKIP() << "the system does not say what it may take";
  auto& memory = TensorMemory::instance();
  auto first = memory.allocate(200 * kMega), second = written(104 * kMega), third = written(40 * kMega);
  const auto before = *lazily_freed_bytes();
  third.clear();
  EXPECT_EQ(*lazily_freed_bytes(), before) << "a free without a call of the system";
  first.clear();
  second.clear();
  EXPECT_GE(*lazily_freed_bytes(), before + 104 * kMega);
}

/// LibTorch's allocator of before again at the end.
class KeepFreedMemory : public ::testing::Test {
 protected:
  KeepFreedMemory() { lora::keep_freed_memory(); }
  ~KeepFreedMemory() override { c10::SetCPUAllocator(before_); }

 private:
  c10::Allocator* before_ = c10::GetCPUAllocator();
};

TEST_F(KeepFreedMemory, HoldsForTensors) {
  const void* first = at::empty({1 << 20}).data_ptr();
  EXPECT_EQ(at::empty({1 << 20}).data_ptr(), first);
  auto x = at::ones({1 << 20});
  x.resize_({2 << 20}).narrow(0, 1 << 20, 1 << 20).fill_(2);
  EXPECT_EQ(x.sum().item<double>(), 3 * (1 << 20));
  EXPECT_TRUE(at::equal(x.clone(), x));
}

TEST_F(KeepFreedMemory, IsSeenByLibTorchsProfilers) {
  const harness::LargestAllocation allocations;
  at::empty({1 << 20});
  EXPECT_EQ(allocations.bytes(), 4 << 20);
}

}  // namespace
}  // namespace keep_freed_memory_test
