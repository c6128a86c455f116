#pragma once

#include <unistd.h>

#include <filesystem>
#include <string>
#include <system_error>

#include "file_error.h"        // defines: FileError
#include "finetune/options.h"  // defines: Options, Method

/// This program's own file; its name is followed through links (Linux).
inline std::filesystem::path program_path() { return std::filesystem::read_symlink("/proc/self/exe"); }

/// A path in the program's folder, which is a folder of the build.
inline std::string beside_program(const std::string& name) { return (program_path().parent_path() / name).string(); }

/// Makes the folder of the output and asks whether the files may be written, before a training is spent.
inline void check_outputs(const Options& options) {
  const auto& output = options.output;
  std::error_code failed;
  std::filesystem::create_directories(output, failed);
  if (failed || access(output.c_str(), W_OK) != 0)
    throw FileError(output, {"can't be written; choose another --output"});
  if (options.method->whole_model && std::filesystem::equivalent(output, options.model, failed)) {
    throw FileError(output, {"is the folder of --model, which the result would replace; choose another --output"});
  }
  const auto& json = options.json;
  if (json.empty()) return;
  const auto folder = std::filesystem::absolute(json).parent_path();
  if (access(folder.c_str(), W_OK) != 0 || std::filesystem::is_directory(json)) {
    throw FileError(json, {"can't be written; choose another --json"});
  }
}
