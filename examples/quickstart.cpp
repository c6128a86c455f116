#include <lora/lora.h>
#include <torch/torch.h>

struct Net : torch::nn::Module {  // an ordinary model, not written for adapters
  torch::nn::Linear input = register_module("input", torch::nn::Linear(1, 64));
  torch::nn::Linear hidden = register_module("hidden", torch::nn::Linear(64, 64));
  torch::nn::Linear output = register_module("output", torch::nn::Linear(64, 1));

  torch::Tensor forward(const torch::Tensor& x) { return output(torch::tanh(hidden(torch::tanh(input(x))))); }
};

double train(Net& net, torch::optim::Optimizer&& optimizer, double shift) {  // learns sin(x + shift)
  double last = 0;
  for (int step = 0; step < 400; ++step) {
    auto x = torch::rand({256, 1}) * 6 - 3;
    auto loss = torch::mse_loss(net.forward(x), torch::sin(x + shift));
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    last = loss.item<double>();
  }
  return last;
}

int main() {
  torch::manual_seed(1);
  Net net;
  std::cout << "base, sin(x): " << train(net, torch::optim::Adam(net.parameters(), 5e-3), 0.0) << '\n';

  auto adapters = lora::inject(net, lora::LoraConfig().r(4).lora_alpha(8).target_modules({"hidden", "output"}));
  std::cout << adapters.report() << '\n';
  torch::optim::AdamW optimizer(lora::param_groups(adapters, torch::optim::AdamWOptions(1e-2)));
  std::cout << "adapted, sin(x + 1): " << train(net, std::move(optimizer), 1.0) << '\n';

  adapters.save("quickstart_adapter");  // a directory that Python PEFT loads
  adapters.merge();                     // from here on as fast as the plain model
  std::cout << "merged, sin(0.5 + 1): " << net.forward(torch::full({1, 1}, 0.5)).item<double>() << '\n';
  adapters.unmerge();  // bit for bit the weights as they were
}
