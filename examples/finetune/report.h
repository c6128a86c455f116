#pragma once

#include <cmath>
#include <cstdint>
#include <iomanip>
#include <iostream>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "finetune/base_model.h"  // defines: Base
#include "finetune/data.h"        // defines: Pairs
#include "finetune/figures.h"     // defines: Figures
#include "models/greedy.h"        // defines: greedy
#include "training/loss.h"        // defines: Reading

inline std::string fixed(double value, int digits) {
  std::ostringstream text;
  text << std::fixed << std::setprecision(digits) << value;
  return text.str();
}

inline std::string bytes_text(std::int64_t bytes) {
  const auto value = static_cast<double>(bytes);
  if (bytes < 1'000'000) return fixed(value / 1e3, 1) + " kB";
  return bytes < 1'000'000'000 ? fixed(value / 1e6, 1) + " MB" : fixed(value / 1e9, 2) + " GB";
}

/// Greedy texts for three inputs of the dev set at several moments of the run.
class Texts {
 public:
  Texts(const ByteBpe& tokenizer, const std::vector<Pair>& dev) : tokenizer_(tokenizer) {
    for (const auto& at : {std::size_t{0}, dev.size() / 2, dev.size() - 1}) shown_.push_back({dev[at], {}});
  }

  /// Lets the model write for each input; `moment` becomes the line's title.
  void write(const std::string& moment, GPT2LMHeadModel& model, const Reading& read = read_tokens) {
    constexpr std::size_t kLimit = 120;
    for (auto& one : shown_) {
      const auto tokens = torch::tensor(encode_input(tokenizer_, one.pair.input), torch::kInt64);
      const auto ids = tokens.to(model->lm_head->weight.device()).unsqueeze(0);
      const auto written = greedy(model, read_without_gradient(read, ids), tokenizer_.end_of_text(), kLimit);
      one.texts.emplace_back(moment, tokenizer_.decode(written));
    }
  }

  void print() const {
    for (const auto& one : shown_) {
      std::cout << "\ninput      " << one.pair.input << "\nreference  " << one.pair.text << '\n';
      for (const auto& [moment, text] : one.texts) {
        std::cout << std::left << std::setw(10) << moment << (text.empty() || text.front() != ' ' ? " " : "") << text
                  << '\n';
      }
    }
    std::cout << '\n';
  }

 private:
  static GPT2Inputs read_without_gradient(const Reading& read, const torch::Tensor& ids) {
    torch::NoGradGuard no_grad;
    return read(ids);
  }

  struct Shown {
    Pair pair;
    std::vector<std::pair<std::string, std::string>> texts;
  };

  const ByteBpe& tokenizer_;
  std::vector<Shown> shown_;
};

inline void print_settings(const Options& options, const Base& base, const Pairs& pairs) {
  std::cout << "base " << base.directory << ", " << options.dtype << " on " << options.device << ", " << options.threads
            << " threads\n"
            << pairs.train.size() << " training pairs, " << pairs.dev.size() << " dev pairs, " << options.steps
            << " steps of " << options.batch_size << ", method " << options.method->name << ", lr "
            << options.learning_rate() << ", seed " << options.seed << "\n\n";
}

inline void print_report(const Figures& figures, const Options& options, const std::string& curve) {
  const auto line = [](const std::string& what, double before, double after) {
    std::cout << std::left << std::setw(24) << what << fixed(before, 4) << " -> " << fixed(after, 4) << "   perplexity "
              << fixed(std::exp(before), 2) << " -> " << fixed(std::exp(after), 2) << '\n';
  };
  line("dev loss, new domain", figures.dev_loss_before, figures.dev_loss_after);
  line("dev loss, old domains", figures.old_domain_loss_before, figures.old_domain_loss_after);
  std::cout << "trained parameters      " << figures.trainable_parameters << " of " << figures.total_parameters << " ("
            << fixed(100.0 * static_cast<double>(figures.trainable_parameters) /
                         static_cast<double>(figures.total_parameters),
                     2)
            << " %)\n"
            << "saved                   " << bytes_text(figures.adapter_bytes) << " in " << options.output
            << (options.method->whole_model
                    ? "\n"
                    : " (the model: " + bytes_text(figures.total_parameters * 4) + " in float32)\n");
  if (figures.merged_max_abs_difference)
    std::cout << "merged - unmerged       " << *figures.merged_max_abs_difference << " at most in the logits\n";
  std::cout << "training                " << fixed(figures.seconds, 1) << " s, " << fixed(figures.tokens_per_second, 0)
            << " tokens/s, peak memory " << bytes_text(figures.peak_memory_bytes) << "\nloss curve              "
            << curve << '\n';
}
