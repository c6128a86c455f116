// copy_checkpoint IN OUT BYTES [TIED OF]: loads a checkpoint and saves it as the folder OUT in shards of at most BYTES,
// without the tensor TIED, which is equal to OF.

#include <lora/io/checkpoint.h>

#include <cstdio>
#include <exception>
#include <string>

int main(int argc, char** argv) {
  if (argc != 4 && argc != 6) return std::fputs("usage: copy_checkpoint IN OUT BYTES [TIED OF]\n", stderr), 2;
  try {
    lora::SaveCheckpointOptions options;
    options.max_shard_bytes(std::stoll(argv[3]));
    if (argc == 6) options.tied({{argv[4], argv[5]}});
    lora::save_checkpoint(lora::load_checkpoint(argv[1]), argv[2], options);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  }
  return 0;
}
