// The bound on the kernels that oneDNN keeps compiled.
#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>
#include <lora/train/limit_kernel_caches.h>
#include <lora/weight/frozen_product.h>
#include <sys/wait.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <optional>
#include <string>

#include "harness/memory.h"
#include "harness/sanitizer.h"

namespace limit_kernel_caches_test {
namespace {

void unset_all() {
  for (const auto* name : {"ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"}) {
    ::unsetenv(name);
  }
}

/// Multiplies 300 numbers of rows in a process of its own, after `prepare`; by how many mebibytes that process grew.
int growth_after(const std::function<void()>& prepare) {
  int mebibytes = -1;
  const auto multiply = [&] {
    unset_all();
    prepare();
    const lora::detail::PlainDispatch plain;
    const auto matrix = at::ones({720, 240}).t();
    std::size_t before = 0;
    for (int64_t rows = 17; rows < 317; ++rows) {
      lora::detail::onednn_product(at::ones({rows, 240}), matrix, std::nullopt);
      if (rows == 17) before = harness::process_bytes().resident;
    }
    const auto grown = harness::process_bytes().resident - before;
    std::_Exit(static_cast<int>(std::min<std::size_t>(grown >> 20, 255)));
  };
  const auto take = [&](int status) {
    mebibytes = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    return mebibytes >= 0;
  };
  EXPECT_EXIT(multiply(), take, "");
  return mebibytes;
}

class LimitKernelCaches : public ::testing::Test {
 protected:
  /// For this test alone: GoogleTest sets its flags back after each.
  LimitKernelCaches() { GTEST_FLAG_SET(death_test_style, "threadsafe"); }
};

TEST_F(LimitKernelCaches, LetsOldKernelsGo) {
  if (!lora::detail::has_onednn_product()) GTEST_SKIP() << "this LibTorch multiplies nothing by oneDNN";
  if (harness::kAddressSanitizer) GTEST_SKIP() << "the sanitizer holds what is freed";
  const auto unlimited = growth_after([] {});
  const auto limited = growth_after([] { lora::limit_kernel_caches(16); });
  EXPECT_GT(unlimited, 10);
  EXPECT_LT(limited, unlimited / 2);
}

TEST_F(LimitKernelCaches, LeavesWhatTheUserHasSet) {
  const auto child = [] {
    unset_all();
    ::setenv("DNNL_PRIMITIVE_CACHE_CAPACITY", "7", 1);
    ::setenv("LRU_CACHE_CAPACITY", "8", 1);
    lora::limit_kernel_caches();
    const bool left = std::getenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY") == nullptr;
    std::_Exit(left && std::string(std::getenv("LRU_CACHE_CAPACITY")) == "8" ? 0 : 1);
  };
  EXPECT_EXIT(child(), ::testing::ExitedWithCode(0), "");
}

TEST_F(LimitKernelCaches, RefusesNoKernelAtAll) { EXPECT_THROW(lora::limit_kernel_caches(0), c10::ValueError); }

}  // namespace
}  // namespace limit_kernel_caches_test
