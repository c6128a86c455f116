// copy_torch_pickle IN OUT: loads what torch.save wrote and saves its tensors as another such file.

#include <lora/io/torch_pickle.h>

#include <cstdio>
#include <exception>

int main(int argc, char** argv) {
  if (argc != 3) return std::fputs("usage: copy_torch_pickle IN OUT\n", stderr), 2;
  try {
    lora::save_torch_pickle(lora::load_torch_pickle(argv[1]), argv[2]);
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "error: %s\n", error.what_without_backtrace());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  }
  return 0;
}
