#pragma once

#include <lora/version.h>

#include <cstring>
#include <string>

#ifdef __x86_64__
#include <cpuid.h>
#endif

LORA_NAMESPACE_BEGIN
namespace detail {

/// The processor's name with its family, model and stepping, as of CPUID; "unknown" where there is none.
inline std::string processor_name() {
#ifdef __x86_64__
  unsigned brand[12] = {};
  for (unsigned leaf = 0; leaf < 3; ++leaf) {
    auto* words = brand + 4 * leaf;
    if (__get_cpuid(0x80000002U + leaf, words, words + 1, words + 2, words + 3) == 0) return "unknown";
  }
  char text[sizeof brand + 1] = {};
  std::memcpy(text, brand, sizeof brand);
  unsigned signature = 0, b = 0, c = 0, d = 0;
  __get_cpuid(1, &signature, &b, &c, &d);
  std::string name(text);
  name.erase(0, name.find_first_not_of(' '));
  name.erase(name.find_last_not_of(' ') + 1);
  return name + " (" + std::to_string(signature) + ")";
#else
  return "unknown";
#endif
}

}  // namespace detail
LORA_NAMESPACE_END
