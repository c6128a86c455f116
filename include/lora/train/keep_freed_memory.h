#pragma once

#include <c10/core/CPUAllocator.h>
#include <lora/detail/tensor_memory.h>
#include <lora/version.h>

LORA_NAMESPACE_BEGIN

/// Lets the memory of freed CPU tensors stay with the process for the next ones of their size, from now on and for all
/// threads; call it when the model is there, so that what loading took is not held.
///
/// A training step frees what the next one needs again. By default large blocks go back to the system in between, whose
/// pages are then cleared and mapped anew, which takes up to a tenth of a step, or they are cut to pieces that no
/// tensor fits into. Blocks from 64 KiB on come in huge pages where the system has them. At most a sixty-fourth more
/// than the tensors took at their most is held.
inline void keep_freed_memory() { c10::SetCPUAllocator(&detail::TensorMemory::instance()); }

LORA_NAMESPACE_END
