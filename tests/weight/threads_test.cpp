// Forwards on several threads, and changes that come in between.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/lora.h>
#include <torch/csrc/autograd/autograd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "harness/models.h"
#include "harness/values.h"
#include "harness/wrapped_lora.h"

namespace threads_test {
namespace {

using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

lora::LoraConfig config() { return lora::LoraConfig().r(2).lora_alpha(3).target_modules({"up", "down"}); }

/// Runs `work(thread)` on four threads at once.
void on_four_threads(const std::function<void(size_t)>& work) {
  std::vector<std::thread> threads;
  for (size_t i = 0; i < 4; ++i) threads.emplace_back(work, i);
  for (auto& thread : threads) thread.join();
}

std::vector<at::Tensor> forward_and_gradients(Mlp model, const std::vector<at::Tensor>& parameters, size_t seed) {
  const auto x = harness::normal({5, 12}, seed, at::kFloat).requires_grad_();
  auto inputs = parameters;
  inputs.push_back(x);
  const auto y = model->forward(x);
  auto results = torch::autograd::grad({y}, inputs, {harness::normal(y.sizes(), seed + 50, at::kFloat)});
  results.push_back(y.detach());
  return results;
}

TEST(Threads, GiveTheSameOutputsAndGradientsBitForBit) {
  Mlp model = (torch::manual_seed(7), Mlp());
  const auto adapters = lora::inject(*model, config());
  harness::fill(adapters);
  const auto parameters = adapters.parameters();
  std::vector<std::vector<at::Tensor>> expected;
  for (size_t i = 0; i < 4; ++i) expected.push_back(forward_and_gradients(model, parameters, i));
  std::array<int, 4> different{};
  on_four_threads([&](size_t i) {
    for (int run = 0; run < 50; ++run) {
      const auto results = forward_and_gradients(model, parameters, i);
      for (size_t k = 0; k < results.size(); ++k) different[i] += at::equal(results[k], expected[i][k]) ? 0 : 1;
    }
  });
  EXPECT_THAT(different, ::testing::Each(0));
}

TEST(Threads, DisableAdaptersForThemselvesOnly) {
  Mlp model = (torch::manual_seed(7), Mlp());
  const auto x = harness::normal({5, 12}, 3, at::kFloat);
  for (auto& parameter : model->parameters()) parameter.set_requires_grad(false);
  const auto plain = model->forward(x);
  const auto adapters = lora::inject(*model, config());
  harness::fill(adapters);
  const auto adapted = model->forward(x).detach();
  std::array<int, 4> wrong{};
  on_four_threads([&](size_t i) {
    const at::NoGradGuard no_grad;
    for (int run = 0; run < 50; ++run) {
      if (i % 2 == 0) {
        const lora::DisableAdapters guard(adapters);
        const lora::DisableAdapters nested(adapters);
        wrong[i] += at::equal(model->forward(x), plain) ? 0 : 1;
      }
      wrong[i] += at::equal(model->forward(x), adapted) ? 0 : 1;
    }
  });
  EXPECT_THAT(wrong, ::testing::Each(0));
}

TEST(Threads, SeeTheOldOrTheNewAdapterWhileAnotherOneSwitches) {
  Mlp model = (torch::manual_seed(7), Mlp());
  auto adapters = lora::inject(*model, lora::LoraConfig().r(2).target_modules({"up"}));
  adapters.add(lora::LoraConfig().r(3).target_modules({"up"}), "other");
  harness::fill(adapters);
  harness::fill(adapters, "other", 70);
  const at::NoGradGuard no_grad;
  const auto x = harness::normal({5, 12}, 3, at::kFloat);
  const auto first = model->forward(x);
  adapters.set_active({"other"});
  const auto second = model->forward(x);
  ASSERT_FALSE(at::equal(first, second));

  const auto member = model->up->weight;
  std::atomic<int> running{4};
  std::array<int, 4> torn{};
  std::vector<std::thread> threads;
  for (size_t i = 0; i < torn.size(); ++i) {
    threads.emplace_back([&, i] {
      const at::NoGradGuard no_grad_here;
      for (int run = 0; run < 2000; ++run) {
        const auto y = model->forward(x);
        torn[i] += at::equal(y, first) || at::equal(y, second) ? 0 : 1;
        // Leaves moments in which no kernel runs, however busy the machine is.
        if (run % 50 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
      --running;
    });
  }
  int switches = 0;
  while (running != 0) {
    try {
      adapters.set_active({switches % 2 == 0 ? "default" : "other"});
      ++switches;
    } catch (const lora::StateError&) {  // a kernel was running
    }
  }
  for (auto& thread : threads) thread.join();
  EXPECT_THAT(torn, ::testing::Each(0));
  EXPECT_GT(switches, 0);
  EXPECT_TRUE(model->up->weight.is_same(member)) << "a forward may hold the tensor that it replaces";
}

/// Lets a kernel wait inside its product until it is let go.
class Gate {
 public:
  void pass() {
    std::unique_lock<std::mutex> lock(mutex_);
    waiting_ = true;
    changed_.notify_all();
    changed_.wait(lock, [&] { return open_; });
  }
  void wait_for_a_kernel() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return waiting_; });
  }
  void open() {
    const std::lock_guard<std::mutex> lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool waiting_ = false;
  bool open_ = false;
};

/// LoRA whose products wait at a gate.
class GatedUpdate final : public harness::WrappedUpdate {
 public:
  GatedUpdate(std::shared_ptr<lora::Update> update, std::shared_ptr<Gate> gate)
      : WrappedUpdate(std::move(update)), gate_(std::move(gate)) {}
  lora::Factors factors(const lora::BaseRows& base) const override {
    gate_->pass();
    return WrappedUpdate::factors(base);
  }

 private:
  std::shared_ptr<Gate> gate_;
};

TEST(Threads, ThatRunAKernelKeepChangesOut) {
  Mlp model = (torch::manual_seed(7), Mlp());
  const auto gate = std::make_shared<Gate>();
  auto adapters = lora::inject(
      *model, harness::WrappedConfig{lora::LoraConfig().r(2).target_modules({"up"}),
                                     [&](auto update) { return std::make_shared<GatedUpdate>(update, gate); }});
  adapters.add(config(), "other");
  const auto x = harness::normal({5, 12}, 3, at::kFloat);
  at::Tensor y;
  std::thread forward([&] {
    const at::NoGradGuard no_grad;
    y = model->forward(x);
  });
  gate->wait_for_a_kernel();
  const std::map<std::string, std::function<void()>> changes{
      {"set_active", [&] { adapters.set_active({}); }},
      {"set_trainable", [&] { adapters.set_trainable({}); }},
      {"merge", [&] { adapters.merge(); }},
      {"remove", [&] { adapters.remove("other"); }},
      {"add", [&] { adapters.add(config(), "third"); }},
      {"load", [&] { adapters.load("nowhere", "third"); }},
      {"unload", [&] { adapters.unload(); }},
      {"merge_and_unload", [&] { adapters.merge_and_unload(); }},
      {"verify", [&] { adapters.verify([&] { return x; }); }},
  };
  for (const auto& [name, change] : changes) {
    EXPECT_THAT(change, ThrowsMessage<lora::StateError>(HasSubstr("lora::" + name + "] found a forward running")))
        << name;
  }
  {
    const lora::DisableAdapters guard(adapters);  // of this thread only, hence allowed
    EXPECT_NO_THROW(model->forward(x));
  }
  gate->open();
  forward.join();
  EXPECT_THAT(adapters.names(), ::testing::ElementsAre("default", "other"));
  EXPECT_TRUE(at::equal(y, (torch::manual_seed(7), Mlp())->forward(x))) << "B is zero";
  EXPECT_NO_THROW(adapters.set_active({"other"})) << "once the forward is over";
}

}  // namespace
}  // namespace threads_test
