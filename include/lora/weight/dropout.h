#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/native_dropout.h>
#include <ATen/ops/ones_like.h>
#include <c10/core/GradMode.h>
#include <lora/detail/instruction_set.h>
#include <lora/detail/lanes.h>
#include <lora/detail/parallel.h>
#include <lora/version.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <tuple>
#include <type_traits>

LORA_NAMESPACE_BEGIN
namespace detail {

/// Random words by counter and key: Philox 4×32 with 10 rounds (Salmon et al. 2011, "Parallel random numbers: as easy
/// as 1, 2, 3"), one counter in each lane.
LORA_ALWAYS_INLINE void philox_lanes(uint64_t counter, uint64_t key, Lanes<uint32_t> (&words)[4]) {
  Lanes<uint32_t> lane;
  for (int64_t i = 0; i < kLanes; ++i) lane[i] = static_cast<uint32_t>(i);
  words[0] = lane + static_cast<uint32_t>(counter);  // the caller's counters are multiples of kLanes: no carry
  words[1] = lane * 0U + static_cast<uint32_t>(counter >> 32);
  words[2] = words[3] = lane * 0U;
  auto low_key = static_cast<uint32_t>(key), high_key = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const Lanes<uint64_t> first = __builtin_convertvector(words[0], Lanes<uint64_t>) * 0xD2511F53ULL;
    const Lanes<uint64_t> second = __builtin_convertvector(words[2], Lanes<uint64_t>) * 0xCD9E8D57ULL;
    const Lanes<uint32_t> first_high = __builtin_convertvector(first >> 32, Lanes<uint32_t>);
    const Lanes<uint32_t> second_high = __builtin_convertvector(second >> 32, Lanes<uint32_t>);
    words[0] = second_high ^ words[1] ^ low_key;
    words[2] = first_high ^ words[3] ^ high_key;
    words[1] = __builtin_convertvector(second, Lanes<uint32_t>);
    words[3] = __builtin_convertvector(first, Lanes<uint32_t>);
    low_key += 0x9E3779B9U;
    high_key += 0xBB67AE85U;
  }
}

/// Elements [first, last) of `to` = `from` with what the key drops at zero and the rest scaled; `first` is a multiple
/// of kGroup.
struct DropoutKernel {
  static constexpr int64_t kGroup = 4 * kLanes;

  template <class T, class Factor>
  LORA_ALWAYS_INLINE static void run(const T* from, T* to, int64_t first, int64_t last, uint64_t key,
                                     uint32_t threshold, Factor scale) {
    uint32_t bits[kGroup];
    for (int64_t group = first; group < last; group += kGroup) {
      Lanes<uint32_t> words[4];
      philox_lanes(static_cast<uint64_t>(group / 4), key, words);
      std::memcpy(bits, words, sizeof bits);
      const auto count = std::min(kGroup, last - group);
      for (int64_t i = 0; i < count; ++i) {
        to[group + i] = bits[i] < threshold ? T(0) : static_cast<T>(static_cast<Factor>(from[group + i]) * scale);
      }
    }
  }
};

/// Dropout of one call: each element is dropped with probability p, else scaled by 1 / (1 − p), and the same ones each
/// time that it is applied. On the CPU only a seed is kept of it, elsewhere the mask.
class Dropout {
 public:
  /// Draws what to drop of x from the default generator of its device.
  Dropout(double p, const at::Tensor& x) : p_(p) {
    if (!x.device().is_cpu()) {
      mask_ = std::get<0>(at::native_dropout(at::ones_like(x.detach()), p_, /*train=*/true));
      return;
    }
    auto generator = at::detail::getDefaultCPUGenerator();
    const std::lock_guard<std::mutex> lock(generator.mutex());
    seed_ = at::check_generator<at::CPUGeneratorImpl>(generator)->random64();
  }

  /// x with its dropped elements; a gradient of the result becomes one of x in the same way.
  at::Tensor apply(const at::Tensor& x) const {
    if (mask_.defined()) return x * mask_.reshape(x.sizes()).to(x.scalar_type());
    if (c10::GradMode::is_enabled() && x.requires_grad()) return x * apply(at::ones_like(x.detach()));
    const auto from = x.contiguous();
    auto to = at::empty(from.sizes(), from.options().requires_grad(false));
    switch (from.scalar_type()) {
      case at::kDouble:
        fill<double>(from, to);
        break;
      case at::kBFloat16:
        fill<c10::BFloat16>(from, to);
        break;
      case at::kHalf:
        fill<c10::Half>(from, to);
        break;
      default:
        fill<float>(from, to);
    }
    return to;
  }

 private:
  template <class T>
  void fill(const at::Tensor& from, at::Tensor& to) const {
    constexpr int64_t kTask = 256 * DropoutKernel::kGroup;
    const auto* source = from.const_data_ptr<T>();
    auto* target = to.mutable_data_ptr<T>();
    const auto size = from.numel();
    const auto threshold = static_cast<uint32_t>(std::min(p_ * 0x1p32, 0x1p32 - 1));
    const auto scale = static_cast<std::conditional_t<std::is_same_v<T, double>, double, float>>(1 / (1 - p_));
    parallel_tasks((size + kTask - 1) / kTask, [&](int64_t task) {
      run_kernel<DropoutKernel>(instruction_set(), source, target, task * kTask, std::min(size, (task + 1) * kTask),
                                seed_, threshold, scale);
    });
  }

  double p_;
  uint64_t seed_ = 0;
  at::Tensor mask_;
};

}  // namespace detail
LORA_NAMESPACE_END
