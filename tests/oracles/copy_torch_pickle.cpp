// copy_torch_pickle IN OUT: loads what torch.save wrote and saves its tensors as another such file.

#include <lora/io/torch_pickle.h>

#include "oracles/commands.h"

void copy_torch_pickle(const Arguments& arguments) {
  lora::save_torch_pickle(lora::load_torch_pickle(arguments[0]), arguments[1]);
}
