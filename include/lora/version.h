#pragma once

#define LORA_VERSION_MAJOR 0
#define LORA_VERSION_MINOR 1
#define LORA_VERSION_PATCH 0

/// Number of the memory layout that the libraries of one process have to share; raised with every change of it.
#define LORA_ABI 3

// The inline namespace keeps the symbols of two layouts apart; registrar.h turns their meeting in one process into an
// error that names both.
#define LORA_NAMESPACE_BEGIN \
  namespace lora {           \
  inline namespace abi3 {
#define LORA_NAMESPACE_END \
  } /* abi3 */             \
  } /* lora */
