// A run of every method that is stopped and continued ends bitwise where the uninterrupted run ends.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <lora/lora.h>
#include <torch/optim/adamw.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <vector>

#include "harness/num_threads.h"
#include "harness/temp_folder.h"
#include "harness/values.h"
#include "oracles/models.h"

namespace methods_training_state_test {
namespace {

struct Trained {
  std::string name;
  std::function<lora::Adapters(Mlp& model)> inject;
  bool only_B = false;  // by LoRA-FA
};
void PrintTo(const Trained& trained, std::ostream* out) { *out << trained.name; }

at::Tensor batch() { return harness::normal({6, 12}, 3, at::kFloat); }

template <class Config>
Trained trained(const std::string& name, Config config, bool only_B = false) {
  config.target_modules({"up", "down"});
  const auto inject = [config](Mlp& model) {
    const auto data = [&model](int64_t index) {
      if (index > 0) return false;
      model->forward(batch());
      return true;
    };
    return lora::inject(*model, config, "default", lora::InjectOptions().data(data));
  };
  return {name, inject, only_B};
}

std::vector<Trained> all_trained() {
  const auto started = [](lora::LoraInit init) {
    return lora::LoraConfig().r(2).lora_dropout(0.3).init_lora_weights(init);
  };
  return {trained("DoRA", lora::LoraConfig().r(3).lora_dropout(0.3).use_dora(true)),
          trained("PiSSA", started(lora::LoraInit::kPissa)),
          trained("PiSSARandomised", started(lora::LoraInit::kPissa).pissa_niter(2)),
          trained("OLoRA", started(lora::LoraInit::kOlora)),
          trained("Orthogonal", started(lora::LoraInit::kOrthogonal)),
          trained("EVA", started(lora::LoraInit::kEva)),
          trained("VeRA", lora::VeraConfig().r(5).vera_dropout(0.3)),
          trained("IA3", lora::IA3Config().feedforward_modules({"down"})),
          trained("MiSS", lora::MissConfig().r(3).miss_dropout(0.3)),
          trained("MiSSBat", lora::MissConfig().r(4).init_weights(lora::MissForm::kBat)),
          trained("MoRA1", lora::MoraConfig().r(3).mora_dropout(0.3).mora_type(1)),
          trained("MoRA6", lora::MoraConfig().r(3).mora_dropout(0.3).mora_type(6)),
          trained("LoraFa", lora::LoraConfig().r(3).lora_dropout(0.3), /*only_B=*/true)};
}

/// A run with everything that it needs to go on.
class Training {
 public:
  explicit Training(const Trained& trained) : adapters_(trained.inject(model_)) {
    if (trained.only_B) only_B_.emplace(adapters_);
    optimizer_ = std::make_unique<torch::optim::AdamW>(lora::param_groups(adapters_, torch::optim::AdamWOptions(0.03)));
    state.adapters(adapters_).optimizer(*optimizer_);
    model_->train();
  }

  double step() {
    optimizer_->zero_grad();
    const auto loss = (model_->forward(batch()) - 1).square().mean();
    loss.backward();
    optimizer_->step();
    return loss.item<double>();
  }

  at::Tensor output() {
    model_->eval();
    const at::NoGradGuard no_grad;
    return model_->forward(batch());
  }

 private:
  Mlp model_;
  lora::Adapters adapters_;
  std::optional<lora::LoraFa> only_B_;
  std::unique_ptr<torch::optim::AdamW> optimizer_;

 public:
  lora::TrainingState state;
};

class MethodsTrainingState : public ::testing::TestWithParam<Trained> {
  const harness::NumThreads one_thread_{1};
};

TEST_P(MethodsTrainingState, ContinuesBitwise) {
  const TempFolder folder;
  torch::manual_seed(1);
  Training whole(GetParam());
  whole.step();
  whole.step();
  whole.state.save(folder / "run.safetensors");
  const auto third = whole.step(), fourth = whole.step();
  EXPECT_NE(third, fourth);

  torch::manual_seed(1);  // the same base
  Training resumed(GetParam());
  resumed.step();  // what was there before does not matter
  ASSERT_TRUE(resumed.state.load(folder / "run.safetensors"));
  EXPECT_EQ(resumed.step(), third);
  EXPECT_EQ(resumed.step(), fourth);
  EXPECT_TRUE(at::equal(resumed.output(), whole.output()));
}

INSTANTIATE_TEST_SUITE_P(All, MethodsTrainingState, ::testing::ValuesIn(all_trained()),
                         [](const auto& test) { return test.param.name; });

}  // namespace
}  // namespace methods_training_state_test
