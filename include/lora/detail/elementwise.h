#pragma once

#include <lora/detail/instruction_set.h>
#include <lora/detail/lanes.h>
#include <lora/detail/parallel.h>
#include <lora/version.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

LORA_NAMESPACE_BEGIN
namespace detail {

/// result[i] = Function(inputs[i]…) with the arithmetic in float32. `Function<width>::run(const Vector<float, width>
/// (&x)[inputs], Vector<float, width>& y)` computes a vector.
template <template <int64_t> class Function>
struct Elementwise {
  template <int64_t width>
  struct Kernel {
    using Floats = Vector<float, width>;

    template <class T, class... Inputs>
    LORA_ALWAYS_INLINE static void run(int64_t count, T* result, const Inputs*... inputs) {
      const auto whole = count - count % width;
      for (int64_t i = 0; i < whole; i += width) {
        Floats x[sizeof...(Inputs)], y;
        size_t k = 0;
        (load(inputs + i, x[k++]), ...);
        Function<width>::run(x, y);
        store(y, result + i);
      }
      if (whole == count) return;
      Floats x[sizeof...(Inputs)], y;
      size_t k = 0;
      (load_first(inputs + whole, count - whole, T(0), x[k++]), ...);
      Function<width>::run(x, y);
      store_first(y, count - whole, result + whole);
    }
  };
};

/// The same on LibTorch's threads; what comes out does not depend on their number.
template <template <int64_t> class Function, class T, class... Inputs>
void map_elements(int64_t count, T* result, const Inputs*... inputs) {
  constexpr int64_t kOfTask = int64_t{1} << 14;
  parallel_tasks((count + kOfTask - 1) / kOfTask, [&](int64_t task) {
    const auto begin = task * kOfTask;
    run_register_kernel<Elementwise<Function>::template Kernel>(instruction_set(), std::min(kOfTask, count - begin),
                                                                result + begin, inputs + begin...);
  });
}

}  // namespace detail
LORA_NAMESPACE_END
