#pragma once

#include <lora/version.h>

#include <cstdint>

#ifdef __x86_64__
#include <cpuid.h>
#define LORA_X86_TARGETS 1
#define LORA_TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define LORA_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")))
#endif

LORA_NAMESPACE_BEGIN
namespace detail {

/// What the kernels are compiled for; the processor decides at run time.
enum class InstructionSet { kPlain, kAvx2, kAvx512 };

/// The widest that this processor runs.
inline InstructionSet instruction_set() {
#ifdef LORA_X86_TARGETS
  static const auto widest = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      return InstructionSet::kAvx512;
    }
    // Clang knows no name for half precision: bit 29 of what CPUID's leaf 1 leaves in ECX.
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    const bool converts_half = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && ((ecx >> 29) & 1U) != 0;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && converts_half ? InstructionSet::kAvx2
                                                                                            : InstructionSet::kPlain;
  }();
  return widest;
#else
  return InstructionSet::kPlain;
#endif
}

template <class Kernel, class... Args>
auto run_plain(const Args&... args) {
  return Kernel::run(args...);
}

#ifdef LORA_X86_TARGETS
template <class Kernel, class... Args>
LORA_TARGET_AVX2 auto run_avx2(const Args&... args) {
  return Kernel::run(args...);
}

template <class Kernel, class... Args>
LORA_TARGET_AVX512 auto run_avx512(const Args&... args) {
  return Kernel::run(args...);
}
#endif

/// Runs `Kernel::run(args...)` as compiled for an instruction set that this processor has. `run` and all that it calls
/// are LORA_ALWAYS_INLINE, so that they take on the instructions of the version they stand in; a lambda would not.
template <class Kernel, class... Args>
auto run_kernel(InstructionSet set, const Args&... args) {
#ifdef LORA_X86_TARGETS
  if (set == InstructionSet::kAvx512) return run_avx512<Kernel>(args...);
  if (set == InstructionSet::kAvx2) return run_avx2<Kernel>(args...);
#endif
  static_cast<void>(set);
  return run_plain<Kernel>(args...);
}

/// The same for a kernel that is a template over the number of floats in a register of the instruction set.
template <template <int64_t> class Kernel, class... Args>
auto run_register_kernel(InstructionSet set, const Args&... args) {
#ifdef LORA_X86_TARGETS
  if (set == InstructionSet::kAvx512) return run_avx512<Kernel<16>>(args...);
  if (set == InstructionSet::kAvx2) return run_avx2<Kernel<8>>(args...);
#endif
  static_cast<void>(set);
  return run_plain<Kernel<4>>(args...);
}

}  // namespace detail
LORA_NAMESPACE_END
