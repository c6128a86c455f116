// Files cut off and with flipped bits at hundreds of places.
#pragma once

#include <c10/util/Exception.h>
#include <gtest/gtest.h>
#include <lora/detail/error.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <random>
#include <string>

#include "harness/memory.h"
#include "harness/temp_folder.h"

namespace harness {

/// How many of the damaged files were loaded all the same.
struct LoadedDamage {
  int cut = 0;
  int flipped = 0;
};

/// Calls `load` with 500 beginnings of a file in its place and 500 times with one to three bits of it flipped, every
/// second time near its beginning. It has to throw a FormatError or a ValueError, or to load something.
inline LoadedDamage damage(const std::string& path, const std::function<void()>& load) {
  constexpr int kTrials = 500;
  constexpr size_t kMemory = size_t{256} << 20, kBeginning = 1000;
  const auto intact = read_bytes(path);
  load();
  std::mt19937 random(20260109);
  const auto below = [&](size_t n) { return std::uniform_int_distribution<size_t>(0, n - 1)(random); };
  const auto loads = [&](const std::string& bytes) {
    write_bytes(path, bytes);
    try {
      load();
      return 1;
    } catch (const lora::FormatError&) {
    } catch (const c10::ValueError&) {
    }
    return 0;
  };
  LoadedDamage loaded;
  const LargestAllocation allocations;
  const MemoryLimit limit(kMemory);
  for (int trial = 0; trial < kTrials; ++trial) loaded.cut += loads(intact.substr(0, below(intact.size())));
  for (int trial = 0; trial < kTrials; ++trial) {
    auto flipped = intact;
    const size_t places = trial % 2 == 0 ? intact.size() : std::min(intact.size(), kBeginning);
    for (size_t i = 0; i <= below(3); ++i) {
      auto& byte = flipped[below(places)];
      byte = static_cast<char>(byte ^ (1 << below(8)));
    }
    if (flipped != intact) loaded.flipped += loads(flipped);
  }
  EXPECT_LE(allocations.bytes(), static_cast<int64_t>(intact.size()) + 4096);
  write_bytes(path, intact);
  return loaded;
}

}  // namespace harness
