// How many threads LibTorch's operators use, for a scope.
#pragma once

#include <ATen/Parallel.h>

namespace harness {

class NumThreads {
 public:
  explicit NumThreads(int count) { at::set_num_threads(count); }
  ~NumThreads() { at::set_num_threads(before_); }
  NumThreads(const NumThreads&) = delete;
  NumThreads& operator=(const NumThreads&) = delete;

 private:
  int before_ = at::get_num_threads();
};

}  // namespace harness
