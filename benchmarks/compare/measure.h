// What every case of the comparison measures with.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

template <class Function>
double seconds_of(const Function& function) {
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  function();
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// A field of /proc/self/status that is given in kB: "VmRSS", "VmHWM".
inline std::int64_t resident_bytes(const std::string& field) {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind(field + ":", 0) == 0) return std::stoll(line.substr(field.size() + 1)) * 1024;
  }
  throw std::runtime_error("found no " + field + " in /proc/self/status");
}

/// Lets VmHWM begin anew.
inline void reset_peak() { std::ofstream("/proc/self/clear_refs") << "5"; }
