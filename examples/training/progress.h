#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <optional>
#include <string>

/// One line that follows the training: rewritten in place on a terminal, a line each tenth of the way in a log.
class Progress {
 public:
  Progress(std::string title, std::size_t steps)
      : title_(std::move(title)), steps_(steps), terminal_(isatty(STDOUT_FILENO) == 1) {}

  void show(std::size_t step, double loss, double tokens_per_second, double seconds) {
    mean_loss_ = 0.9 * mean_loss_.value_or(loss) + 0.1 * loss;  // single batches jump
    const auto tenth = std::max<std::size_t>(1, steps_ / 10);
    if (!terminal_ && step % tenth != 0 && step != steps_) return;
    const double left = seconds / static_cast<double>(step) * static_cast<double>(steps_ - step);
    std::printf("%s%s  step %zu/%zu  loss %.3f  %.0f tokens/s  %.0f s left%s", terminal_ ? "\r" : "", title_.c_str(),
                step, steps_, *mean_loss_, tokens_per_second, left, terminal_ ? "\033[K" : "\n");
    std::fflush(stdout);
  }

  void finish() const {
    if (terminal_) std::printf("\n");
  }

 private:
  std::string title_;
  std::size_t steps_;
  bool terminal_;
  std::optional<double> mean_loss_;
};
