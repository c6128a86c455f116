#pragma once

#include <lora/detail/instruction_set.h>

#include <vector>

namespace harness {

/// Every instruction set that this processor has and the kernels are compiled for.
inline std::vector<lora::detail::InstructionSet> instruction_sets() {
  using Set = lora::detail::InstructionSet;
  std::vector<Set> sets;
  for (const auto set : {Set::kPlain, Set::kAvx2, Set::kAvx512}) {
    if (set <= lora::detail::instruction_set()) sets.push_back(set);
  }
  return sets;
}

}  // namespace harness
