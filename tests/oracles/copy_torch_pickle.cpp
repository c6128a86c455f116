// copy_torch_pickle IN OUT: loads what torch.save wrote and saves its tensors as another such file.

#include <lora/io/torch_pickle.h>

#include "oracles/program.h"  // defines: run_program

int main(int argc, char** argv) {
  return run_program(argc == 3, "copy_torch_pickle IN OUT",
                     [&] { lora::save_torch_pickle(lora::load_torch_pickle(argv[1]), argv[2]); });
}
