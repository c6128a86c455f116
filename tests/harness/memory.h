// What a test takes of memory.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <fstream>
#include <memory>

#include "harness/sanitizer.h"

namespace harness {

/// What the process has of the address space, and what of that lies in memory.
struct ProcessBytes {
  size_t reserved = 0, resident = 0;
};

inline ProcessBytes process_bytes() {
  const auto page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  size_t reserved = 0, resident = 0;
  std::ifstream("/proc/self/statm") >> reserved >> resident;
  return {reserved * page, resident * page};
}

/// The largest tensor that is allocated on this thread while it lives.
class LargestAllocation {
 public:
  int64_t bytes() const { return info_->largest; }

 private:
  struct Info : c10::MemoryReportingInfoBase {
    void reportMemoryUsage(void*, int64_t size, size_t, size_t, c10::Device) override {
      largest = std::max(largest, size);
    }
    bool memoryProfilingEnabled() const override { return true; }
    int64_t largest = 0;
  };

  std::shared_ptr<Info> info_ = std::make_shared<Info>();
  c10::DebugInfoGuard guard_{c10::DebugInfoKind::PROFILER_STATE, info_};
};

/// While it lives the process can take no more than `bytes` of memory beyond what it has: std::bad_alloc. Without
/// effect under the address sanitizer, which reserves terabytes.
class MemoryLimit {
 public:
  explicit MemoryLimit(size_t bytes) {
    ::getrlimit(RLIMIT_AS, &before_);
    if (kAddressSanitizer) return;
    const rlimit limit{process_bytes().reserved + bytes, before_.rlim_max};
    ::setrlimit(RLIMIT_AS, &limit);
  }
  MemoryLimit(const MemoryLimit&) = delete;
  MemoryLimit& operator=(const MemoryLimit&) = delete;
  ~MemoryLimit() { ::setrlimit(RLIMIT_AS, &before_); }

 private:
  rlimit before_{};
};

}  // namespace harness
