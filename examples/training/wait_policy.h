#pragma once

#include <unistd.h>

#include <cstdlib>

/// Lets OpenMP's threads sleep while they wait for each other. By default they spin, and where another process holds a
/// core the others wait in vain for the one that does not run: many times slower. OpenMP reads its policy when a
/// process starts, so the program starts itself again (Linux); a policy of the user's own stays.
inline void sleep_while_waiting(char** argv) {
  if (std::getenv("OMP_WAIT_POLICY") != nullptr || setenv("OMP_WAIT_POLICY", "passive", 1) != 0) return;
  execv("/proc/self/exe", argv);  // returns only where it fails: then the program goes on as it is
}
