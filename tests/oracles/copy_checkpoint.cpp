// copy_checkpoint IN OUT BYTES [TIED OF]: loads a checkpoint and saves it as the folder OUT in shards of at most BYTES,
// without the tensor TIED, which is equal to OF.

#include <lora/io/checkpoint.h>

#include <string>

#include "oracles/commands.h"

void copy_checkpoint(const Arguments& arguments) {
  lora::SaveCheckpointOptions options;
  options.max_shard_bytes(std::stoll(arguments[2]));
  if (arguments.size() == 5) options.tied({{arguments[3], arguments[4]}});
  lora::save_checkpoint(lora::load_checkpoint(arguments[0]), arguments[1], options);
}
