// A program that uses the installed or the embedded library: adapts a layer, saves the adapter, loads it again.
#include <lora/lora.h>
#include <torch/nn/modules/linear.h>
#include <torch/types.h>

#include <cstdio>
#include <filesystem>
#include <string>

namespace {

struct Net : torch::nn::Module {
  Net() : fc(register_module("fc", torch::nn::Linear(8, 8))) {}
  torch::nn::Linear fc;
};

#ifdef LINKED_WITH_CUDA
constexpr bool kLinkedWithCuda = true;
#else
constexpr bool kLinkedWithCuda = false;
#endif

}  // namespace

int main(int argc, char** argv) {
  const std::string folder = argc > 1 ? argv[1] : "adapter";
  Net net;
  const at::Tensor x = torch::randn({2, 8});
  lora::Adapters adapters = lora::inject(net, lora::LoraConfig().r(2).lora_alpha(4).target_modules({"fc"}));
  {
    at::NoGradGuard guard;
    for (const at::Tensor& parameter : adapters.parameters()) parameter.normal_();
  }
  const at::Tensor adapted = net.fc->forward(x);
  adapters.save(folder);
  adapters.unload();
  lora::load(net, folder);
  const bool same = torch::equal(net.fc->forward(x), adapted);
  std::filesystem::remove_all(folder);
  const bool linked = lora::cuda::has_merge_kernels() == kLinkedWithCuda;
  std::printf("lora %d.%d.%d: %s%s\n", LORA_VERSION_MAJOR, LORA_VERSION_MINOR, LORA_VERSION_PATCH,
              same ? "same" : "different", linked ? "" : ", not linked as asked for");
  return same && linked ? 0 : 1;
}
