// Built twice: as another library, and, with LAYOUT, as a lora of another layout.
#include "tests/package/owner/other_owner.h"

#include <torch/library.h>

#include <cstdint>

namespace {

TORCH_LIBRARY_IMPL(_, TESTING_ONLY_GenericWrapper, library) { library.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(_, TESTING_ONLY_GenericMode, library) { library.fallback(torch::CppFunction::makeFallthrough()); }

#ifdef LAYOUT
int64_t layout() { return LAYOUT; }

TORCH_LIBRARY(lora, library) {
  library.def("_abi() -> int", &layout);
  library.def("_fast_operators_abi() -> int", &layout);
}
#endif

}  // namespace

namespace other_owner {

const char* expected_error() { return EXPECTED_ERROR; }

}  // namespace other_owner
