#pragma once

#include <malloc.h>

#include <cstdint>
#include <fstream>
#include <string>

/// Starts a new peak at what the process holds now (Linux, /proc/self/clear_refs); where the kernel refuses, the peak
/// goes on counting from the start of the process.
inline void reset_peak_memory() {
  malloc_trim(0);  // freed memory that the allocator still holds is none of the new peak
  std::ofstream("/proc/self/clear_refs") << "5" << std::flush;
}

/// Largest resident memory of the process in bytes since the last reset, LibTorch's own code included; 0 where unknown.
inline std::int64_t peak_memory_bytes() {
  std::ifstream status("/proc/self/status");
  for (std::string key; status >> key;) {
    std::int64_t kibibytes = 0;
    if (key == "VmHWM:" && status >> kibibytes) return kibibytes * 1024;
    std::string rest;
    std::getline(status, rest);
  }
  return 0;
}
