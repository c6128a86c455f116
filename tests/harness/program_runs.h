// Programs as their users run them: exit codes, output and files, in a folder of their own.
#pragma once

#include <gtest/gtest.h>
#include <sys/wait.h>

#include <cstdlib>
#include <nlohmann/json.hpp>
#include <string>

#include "harness/temp_folder.h"

namespace harness {

struct Outcome {
  int exit_code;
  std::string output, errors;
};

class ProgramRuns : public testing::Test {
 protected:
  void SetUp() override {
    // One thread each and no second start: nothing here is worth more, and threads that wait for a core are slow.
    setenv("OMP_NUM_THREADS", "1", 1);
    setenv("OMP_WAIT_POLICY", "passive", 1);
  }

  Outcome run(const std::string& command) const {
    const auto status = std::system(
        ("cd " + folder.path().string() + " && " + command + " >output.txt 2>errors.txt").c_str());  // NOLINT
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, read_bytes(folder / "output.txt"),
            read_bytes(folder / "errors.txt")};
  }

  nlohmann::json json(const std::string& name) const { return nlohmann::json::parse(read_bytes(folder / name)); }

  TempFolder folder;
};

}  // namespace harness
