#pragma once

#include <filesystem>
#include <string>

/// This program's own file; its name is followed through links (Linux).
inline std::filesystem::path program_path() { return std::filesystem::read_symlink("/proc/self/exe"); }

/// A path in the program's folder, which is a folder of the build.
inline std::string beside_program(const std::string& name) { return (program_path().parent_path() / name).string(); }
