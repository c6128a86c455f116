// What the programs of this folder share: arguments, and errors as one line.
#pragma once

#include <cstdio>

#include "harness/message_of.h"

/// The exit status of a program that does one thing: 2 after one line on stderr where the arguments are not as the
/// usage says or the action throws.
template <class Action>
int run_program(bool usable, const char* usage, const Action& action) {
  if (!usable) return std::fprintf(stderr, "usage: %s\n", usage), 2;
  const auto error = harness::message_of(action);
  if (!error.empty()) return std::fprintf(stderr, "error: %s\n", error.c_str()), 2;
  return 0;
}
