// A program in a process of its own, which is killed at a moment of the test's choice.
#pragma once

#include <signal.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace harness {

class ChildProcess {
 public:
  explicit ChildProcess(std::vector<std::string> command) {
    std::vector<char*> words;
    for (auto& word : command) words.push_back(word.data());
    words.push_back(nullptr);
    pid_ = ::fork();
    if (pid_ != 0) return;
    ::execv(words[0], words.data());
    ::_exit(127);
  }
  ChildProcess(const ChildProcess&) = delete;
  ChildProcess& operator=(const ChildProcess&) = delete;
  ~ChildProcess() {
    if (running()) kill();
  }

  bool running() {
    if (!ended_) ended_ = ::waitpid(pid_, &status_, WNOHANG) != 0;
    return !ended_;
  }

  /// Waits until the process has replaced the file one to `most` times, then a moment more, by chance, or until it
  /// writes the next one; then kills it. False where it ended before.
  bool kill_after_saves(const std::string& path, std::mt19937& random, uint32_t most, bool in_a_save = false) {
    auto saves = 1 + random() % most;
    const std::chrono::microseconds moment(static_cast<int>(random() % 4000));
    for (auto last = identity(path); saves > 0;) {
      if (!running()) return false;
      const auto now = identity(path);
      if (now != last) --saves;
      last = now;
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
    if (!in_a_save) std::this_thread::sleep_for(moment);
    while (in_a_save && running() && !has_unfinished_save(std::filesystem::path(path).parent_path())) {
    }
    if (!running()) return false;
    kill();
    return WIFSIGNALED(status_);
  }

  /// Whether a save has begun in the folder, or was killed there.
  static bool has_unfinished_save(const std::filesystem::path& folder) {
    const std::filesystem::directory_iterator entries(folder);
    return std::any_of(begin(entries), end(entries),
                       [](const auto& entry) { return entry.path().extension() == ".tmp"; });
  }

  void kill() {
    ::kill(pid_, SIGKILL);
    wait();
  }

  /// The exit code, or -1 for a process that was killed.
  int wait() {
    if (!ended_) ::waitpid(pid_, &status_, 0);
    ended_ = true;
    return WIFEXITED(status_) ? WEXITSTATUS(status_) : -1;
  }

 private:
  /// Which file the name stands for, 0: none.
  static ino_t identity(const std::string& path) {
    struct stat found {};
    return ::stat(path.c_str(), &found) == 0 ? found.st_ino : 0;
  }

  pid_t pid_ = 0;
  int status_ = 0;
  bool ended_ = false;
};

}  // namespace harness
