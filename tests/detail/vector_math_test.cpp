// The vectorised functions against those of the standard library in double, in every instruction set.
#include <gtest/gtest.h>
#include <lora/detail/instruction_set.h>
#include <lora/detail/parallel.h>
#include <lora/detail/vector_math.h>

#include <array>
#include <atomic>
#include <cmath>
#include <limits>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#include "harness/instruction_sets.h"
#include "harness/num_threads.h"

namespace vector_math_test {
namespace {

using Values = std::array<float, 16>;

/// In vectors of `width` floats.
template <int64_t width>
struct ExpOfValues {
  LORA_ALWAYS_INLINE static void run(const Values& x, Values* y) {
    for (size_t i = 0; i < x.size(); i += width) {
      lora::detail::Vector<float, width> lanes, result;
      lora::detail::load(&x[i], lanes);
      lora::detail::exp_lanes(lanes, result);
      lora::detail::store(result, &(*y)[i]);
    }
  }
};

/// e^x in every width of every instruction set, and in the width of the set's registers.
std::vector<Values> exp_of(const Values& x) {
  using namespace lora::detail;
  std::vector<Values> results;
  for (const auto set : harness::instruction_sets()) {
    results.resize(results.size() + 4);
    auto* const result = &results[results.size() - 4];
    run_kernel<ExpOfValues<4>>(set, x, result + 0);
    run_kernel<ExpOfValues<8>>(set, x, result + 1);
    run_kernel<ExpOfValues<16>>(set, x, result + 2);
    run_register_kernel<ExpOfValues>(set, x, result + 3);
  }
  return results;
}

TEST(ExpLanes, IsWithinTwoUlp) {
  for (float start = -87.2F; start < 88.6F; start += 0.0113F) {
    Values x;
    for (size_t lane = 0; lane < x.size(); ++lane) x[lane] = start + static_cast<float>(lane) * 0.0007F;
    for (const auto& y : exp_of(x)) {
      for (size_t lane = 0; lane < x.size(); ++lane) {
        const double exact = std::exp(static_cast<double>(x[lane]));
        const auto rounded = static_cast<float>(exact);
        const double ulp = std::nextafter(rounded, std::numeric_limits<float>::infinity()) - rounded;
        ASSERT_LE(std::abs(y[lane] - exact), 2 * ulp) << x[lane];
      }
    }
  }
}

TEST(ExpLanes, KnowsTheEnds) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (const auto& y : exp_of({-infinity, infinity, std::nanf(""), -100.F, 100.F, 0.F, -0.F})) {
    EXPECT_EQ(y[0], 0.F);
    EXPECT_EQ(y[1], infinity);
    EXPECT_TRUE(std::isnan(y[2]));
    EXPECT_EQ(y[3], 0.F);
    EXPECT_EQ(y[4], infinity);
    EXPECT_EQ(y[5], 1.F);
    EXPECT_EQ(y[6], 1.F);
  }
}

TEST(ParallelTasks, RunEachOnceOnAsManyThreadsAsLibTorchHas) {
  for (const int threads : {1, 2, 3}) {
    const harness::NumThreads guard(threads);
    std::vector<std::atomic<int>> runs(50);
    std::mutex mutex;
    std::set<std::thread::id> ids;
    std::atomic<int> waiting{0};
    lora::detail::parallel_tasks(50, [&](int64_t i) {
      ++runs[static_cast<size_t>(i)];
      // The first task of each thread waits for the others', so that no thread can do the work of two.
      bool is_first = false;
      {
        const std::lock_guard<std::mutex> lock(mutex);
        is_first = ids.insert(std::this_thread::get_id()).second;
      }
      if (!is_first) return;
      ++waiting;
      while (waiting < threads) std::this_thread::yield();
    });
    for (const auto& count : runs) EXPECT_EQ(count, 1);
    EXPECT_EQ(ids.size(), static_cast<size_t>(threads));
  }
}

TEST(ParallelTasks, OfNoneOrOneOrInsideOfOthersRunWhereTheyAre) {
  lora::detail::parallel_tasks(0, [](int64_t) { FAIL(); });
  std::atomic<int> inner{0};
  lora::detail::parallel_tasks(2, [&](int64_t) { lora::detail::parallel_tasks(3, [&](int64_t) { ++inner; }); });
  EXPECT_EQ(inner, 6);
}

}  // namespace
}  // namespace vector_math_test
