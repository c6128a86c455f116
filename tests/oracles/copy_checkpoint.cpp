// copy_checkpoint IN OUT BYTES [TIED OF]: loads a checkpoint and saves it as the folder OUT in shards of at most BYTES,
// without the tensor TIED, which is equal to OF.

#include <lora/io/checkpoint.h>

#include <string>

#include "oracles/program.h"  // defines: run_program

int main(int argc, char** argv) {
  return run_program(argc == 4 || argc == 6, "copy_checkpoint IN OUT BYTES [TIED OF]", [&] {
    lora::SaveCheckpointOptions options;
    options.max_shard_bytes(std::stoll(argv[3]));
    if (argc == 6) options.tied({{argv[4], argv[5]}});
    lora::save_checkpoint(lora::load_checkpoint(argv[1]), argv[2], options);
  });
}
