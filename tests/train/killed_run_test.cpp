// A run that is killed again and again, also while it saves, ends bitwise where the uninterrupted run ends.
#include <gtest/gtest.h>
#include <stdlib.h>

#include <cstdlib>
#include <filesystem>
#include <random>
#include <string>
#include <vector>

#include "harness/child_process.h"
#include "harness/num_threads.h"
#include "harness/temp_folder.h"
#include "train/training.h"

namespace killed_run_test {
namespace {

constexpr int kSteps = 300;
constexpr int kKills = 20;
constexpr const char* kStateVariable = "LORA_TEST_KILLED_RUN";

/// The state after the last step, from the file or from the beginning, saved at each step.
void train(const std::string& path) {
  const harness::NumThreads guard(1);
  torch::manual_seed(17);
  harness::Choices choices;
  choices.schedule.total_steps(kSteps);
  harness::Training training(choices);
  int step = training.state.load(path) ? training.state.get<int>("step") : 0;
  while (step < kSteps) {
    training.step();
    training.state.set("step", ++step).save(path);
  }
}

TEST(KilledRun, EndsWhereTheUninterruptedRunEnds) {
  if (const char* const path = std::getenv(kStateVariable)) return train(path);  // the child
  TempFolder folder;
  const auto path = folder / "killed.safetensors";
  std::mt19937 random(2026);
  int kills_in_a_save = 0;
  setenv(kStateVariable, path.c_str(), 1);
  const std::vector<std::string> command{"/proc/self/exe", "--gtest_filter=KilledRun.*", "--gtest_brief=1"};
  for (int kill = 0; kill < kKills; ++kill) {
    harness::ChildProcess child(command);
    ASSERT_TRUE(child.kill_after_saves(path, random, 8, /*in_a_save=*/kill % 2 == 1))
        << "it ended before kill " << kill;
    kills_in_a_save += harness::ChildProcess::has_unfinished_save(folder.path()) ? 1 : 0;
  }
  EXPECT_GT(kills_in_a_save, 0);
  ASSERT_EQ(harness::ChildProcess(command).wait(), 0);
  EXPECT_FALSE(harness::ChildProcess::has_unfinished_save(folder.path())) << "later saves remove what killed ones left";

  const auto whole = folder / "whole.safetensors";
  train(whole);
  EXPECT_EQ(read_bytes(path), read_bytes(whole));
}

}  // namespace
}  // namespace killed_run_test
