#pragma once

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

#include "finetune/paths.h"  // defines: program_path

/// A folder for the runs' output that is removed at the end.
class ScratchFolder {
 public:
  ScratchFolder() {
    auto pattern = (std::filesystem::temp_directory_path() / "finetune_gpt2.XXXXXX").string();
    if (mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("can't make a folder like " + pattern);
    path_ = pattern;
  }
  ~ScratchFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  ScratchFolder(const ScratchFolder&) = delete;
  ScratchFolder& operator=(const ScratchFolder&) = delete;

  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

/// Runs this program again, its output into a file, and returns its exit code.
inline int run_program(const std::vector<std::string>& arguments, const std::string& log) {
  std::vector<char*> argv;
  auto words = arguments;
  words.insert(words.begin(), program_path().string());
  for (auto& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  std::cout << std::flush;
  const auto child = fork();
  if (child < 0) throw std::runtime_error("can't start a process for a run");
  if (child == 0) {  // between fork and exec nothing but system calls: LibTorch's threads are not here
    const int file = open(log.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (file >= 0) dup2(file, STDOUT_FILENO);
    execv(argv[0], argv.data());
    _exit(127);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}
