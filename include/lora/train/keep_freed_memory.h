#pragma once

#include <c10/core/CPUAllocator.h>
#include <lora/detail/error.h>
#include <lora/detail/tensor_memory.h>
#include <lora/version.h>

LORA_NAMESPACE_BEGIN

/// Lets the memory of freed CPU tensors stay with the process for the next ones of their size, from now on and for all
/// threads; call it when the model is there, so that what loading took is not held.
///
/// A training step frees what the next one needs again. By default large blocks go back to the system in between, whose
/// pages are then cleared and mapped anew, which takes up to a tenth of a step, or they are cut to pieces that no
/// tensor fits into. Tensors from 16 KiB on have a block each, those from 2 MiB on in huge pages where the system has
/// them. A block is at most 27 % larger than its tensor, at most a sixty-fourth more than all blocks took at their most
/// is held, and of what waits a system that lacks memory takes all but 256 MiB. Throws a StateError where another
/// allocator is set with a higher priority.
inline void keep_freed_memory() {
  auto& memory = detail::TensorMemory::instance();
  c10::SetCPUAllocator(&memory);
  if (c10::GetCPUAllocator() == &memory) return;
  throw StateError(
      "[lora::keep_freed_memory] found an allocator of the CPU with a priority, expected LibTorch's default; do not "
      "set one, or leave this out");
}

LORA_NAMESPACE_END
