// copy_safetensors IN OUT: loads a safetensors file and saves its tensors and metadata as another.

#include <lora/io/safetensors.h>

#include "oracles/commands.h"

void copy_safetensors(const Arguments& arguments) {
  const lora::SafetensorsFile file = lora::load_safetensors_with_metadata(arguments[0]);
  lora::save_safetensors(file.tensors, arguments[1], file.metadata);
}
