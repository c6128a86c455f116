// copy_safetensors IN OUT: loads a safetensors file and saves its tensors and metadata as another.

#include <lora/io/safetensors.h>

#include <cstdio>
#include <exception>

int main(int argc, char** argv) {
  if (argc != 3) return std::fputs("usage: copy_safetensors IN OUT\n", stderr), 2;
  try {
    const lora::SafetensorsFile file = lora::load_safetensors_with_metadata(argv[1]);
    lora::save_safetensors(file.tensors, argv[2], file.metadata);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  }
  return 0;
}
