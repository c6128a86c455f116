// copy_safetensors IN OUT: loads a safetensors file and saves its tensors and metadata as another.

#include <lora/io/safetensors.h>

#include "oracles/program.h"  // defines: run_program

int main(int argc, char** argv) {
  return run_program(argc == 3, "copy_safetensors IN OUT", [&] {
    const lora::SafetensorsFile file = lora::load_safetensors_with_metadata(argv[1]);
    lora::save_safetensors(file.tensors, argv[2], file.metadata);
  });
}
