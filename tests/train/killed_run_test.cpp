// A run that is killed again and again, also while it saves, ends bitwise where the uninterrupted run ends.
#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <random>
#include <string>
#include <thread>

#include "harness/temp_folder.h"
#include "train/training.h"

namespace {

constexpr int kSteps = 300;
constexpr int kKills = 20;
constexpr const char* kStateVariable = "LORA_TEST_KILLED_RUN";

/// The state after the last step, from the file or from the beginning, saved at each step.
void train(const std::string& path) {
  at::set_num_threads(1);
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

/// This program in a process of its own, which trains.
pid_t start(const std::string& path) {
  const auto child = fork();
  if (child != 0) return child;
  setenv(kStateVariable, path.c_str(), 1);
  execl("/proc/self/exe", "test", "--gtest_filter=KilledRun.*", "--gtest_brief=1", nullptr);
  _exit(127);
}

/// Which file the name stands for; each save makes another.
ino_t identity(const std::string& path) {
  struct stat found {};
  return ::stat(path.c_str(), &found) == 0 ? found.st_ino : 0;
}

/// Waits until the child has saved `saves` times and a moment more. False where it ended before.
bool wait_for_saves(pid_t child, const std::string& path, uint64_t saves, std::chrono::microseconds more) {
  auto last = identity(path);
  for (uint64_t seen = 0; seen < saves;) {
    if (waitpid(child, nullptr, WNOHANG) != 0) return false;
    const auto now = identity(path);
    seen += now != last ? 1U : 0U;
    last = now;
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
  std::this_thread::sleep_for(more);
  return true;
}

TEST(KilledRun, EndsWhereTheUninterruptedRunEnds) {
  if (const char* const path = std::getenv(kStateVariable)) return train(path);  // the child
  TempFolder folder;
  const auto path = folder / "killed.safetensors";
  std::mt19937 random(2026);
  int unfinished_saves = 0;
  for (int kill = 0; kill < kKills; ++kill) {
    const auto child = start(path);
    ASSERT_GT(child, 0);
    const auto saves = 1 + random() % 8;
    ASSERT_TRUE(wait_for_saves(child, path, saves, std::chrono::microseconds(static_cast<int>(random() % 4000))))
        << kill;
    ASSERT_EQ(::kill(child, SIGKILL), 0);
    int status = 0;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    ASSERT_TRUE(WIFSIGNALED(status)) << "it ended before the kill " << kill;
  }
  for (const auto& entry : std::filesystem::directory_iterator(folder.path())) {
    unfinished_saves += entry.path().extension() == ".tmp" ? 1 : 0;
  }
  RecordProperty("unfinished_saves", unfinished_saves);
  const auto child = start(path);
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_EQ(status, 0);

  const auto whole = folder / "whole.safetensors";
  train(whole);
  EXPECT_EQ(read_bytes(path), read_bytes(whole));
}

}  // namespace
