#pragma once

#include <torch/types.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "text/byte_bpe.h"  // defines: ByteBpe
#include "text/e2e.h"       // defines: Pair

/// A pair as tokens: the input with its bars, then the text with the end-of-text token.
struct Sample {
  std::vector<std::int64_t> tokens;
  std::size_t input_length = 0;
};

/// Samples of one step, padded on the right.
struct Batch {
  torch::Tensor input_ids;  // [batch, length], int64
  torch::Tensor labels;     // the same shape; kIgnored on the input and on padding: the loss is the text's alone
  std::int64_t tokens = 0;  // without padding

  static constexpr std::int64_t kIgnored = -100;

  Batch to(const torch::Device& device) const { return {input_ids.to(device), labels.to(device), tokens}; }
};

/// What the model reads before it writes: a blank in front of each part gives its first word the usual token.
inline std::vector<std::int64_t> encode_input(const ByteBpe& tokenizer, const std::string& input) {
  return tokenizer.encode(" " + input + " ||");
}

/// The pairs that fit into `max_length` tokens; `left_out` counts the others.
inline std::vector<Sample> encode_pairs(const ByteBpe& tokenizer, const std::vector<Pair>& pairs,
                                        std::size_t max_length, std::size_t& left_out) {
  std::vector<Sample> samples;
  left_out = 0;
  for (const auto& pair : pairs) {
    Sample sample{encode_input(tokenizer, pair.input), 0};
    sample.input_length = sample.tokens.size();
    const auto text = tokenizer.encode(" " + pair.text);
    sample.tokens.insert(sample.tokens.end(), text.begin(), text.end());
    sample.tokens.push_back(tokenizer.end_of_text());
    if (sample.tokens.size() <= max_length) {
      samples.push_back(std::move(sample));
    } else {
      ++left_out;
    }
  }
  return samples;
}

inline Batch collate(const std::vector<Sample>& samples, const std::vector<std::size_t>& rows) {
  std::size_t length = 0;
  for (const auto row : rows) length = std::max(length, samples[row].tokens.size());
  const auto shape = {static_cast<std::int64_t>(rows.size()), static_cast<std::int64_t>(length)};
  // Nothing reads padding: attention looks back only, and its labels are ignored.
  Batch batch{torch::zeros(shape, torch::kInt64), torch::full(shape, Batch::kIgnored, torch::kInt64), 0};
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const auto& sample = samples[rows[i]];
    auto* const ids = batch.input_ids.data_ptr<std::int64_t>() + i * length;
    auto* const labels = batch.labels.data_ptr<std::int64_t>() + i * length;
    std::copy(sample.tokens.begin(), sample.tokens.end(), ids);
    std::copy(sample.tokens.begin() + static_cast<std::ptrdiff_t>(sample.input_length), sample.tokens.end(),
              labels + sample.input_length);
    batch.tokens += static_cast<std::int64_t>(sample.tokens.size());
  }
  return batch;
}

/// Batches in the samples' order, for evaluation.
inline std::vector<Batch> batches_in_order(const std::vector<Sample>& samples, std::size_t batch_size) {
  std::vector<Batch> batches;
  for (std::size_t begin = 0; begin < samples.size(); begin += batch_size) {
    std::vector<std::size_t> rows;
    for (auto row = begin; row < std::min(begin + batch_size, samples.size()); ++row) rows.push_back(row);
    batches.push_back(collate(samples, rows));
  }
  return batches;
}

/// Endless shuffled batches; neighbours in length share a batch, so that little is padding.
class BatchStream {
 public:
  BatchStream(std::vector<Sample> samples, std::size_t batch_size, std::uint64_t seed)
      : samples_(std::move(samples)), batch_size_(std::min(batch_size, samples_.size())), engine_(seed), epoch_(seed) {}

  const std::vector<Sample>& samples() const { return samples_; }

  std::size_t batches_per_epoch() const { return (samples_.size() + batch_size_ - 1) / batch_size_; }

  Batch next() {
    if (at_ == order_.size()) start_epoch();
    return collate(samples_, order_[at_++]);
  }

  /// Where the stream stands: the batches read of the epoch and the generator's state at its beginning.
  std::string position() const {
    std::ostringstream text;
    text << at_ << ' ' << epoch_;
    return text.str();
  }

  /// Goes to a position() of a stream of the same samples and batch size.
  void go_to(const std::string& position) {
    std::istringstream text(position);
    std::size_t at = 0;
    if (!(text >> at >> engine_)) throw std::runtime_error("found no position of a stream of batches");
    start_epoch();
    at_ = std::min(at, order_.size());
  }

 private:
  void start_epoch() {
    constexpr std::size_t kWindow = 16;  // batches that are sorted by length together
    epoch_ = engine_;
    std::vector<std::size_t> rows(samples_.size());
    for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = i;
    shuffle(rows);
    order_.clear();
    const auto row_at = [&](std::size_t i) {
      return rows.begin() + static_cast<std::ptrdiff_t>(std::min(i, rows.size()));
    };
    for (std::size_t begin = 0; begin < rows.size(); begin += kWindow * batch_size_) {
      std::stable_sort(row_at(begin), row_at(begin + kWindow * batch_size_), [&](std::size_t a, std::size_t b) {
        return samples_[a].tokens.size() < samples_[b].tokens.size();
      });
    }
    for (std::size_t begin = 0; begin < rows.size(); begin += batch_size_) {
      order_.emplace_back(row_at(begin), row_at(begin + batch_size_));
    }
    shuffle(order_);
    at_ = 0;
  }

  /// Fisher and Yates; std::shuffle differs from library to library.
  template <class T>
  void shuffle(std::vector<T>& items) {
    for (auto i = items.size(); i > 1; --i) std::swap(items[i - 1], items[engine_() % i]);
  }

  std::vector<Sample> samples_;
  std::size_t batch_size_;
  std::mt19937_64 engine_;
  std::mt19937_64 epoch_;  // engine_ at the beginning of the epoch
  std::vector<std::vector<std::size_t>> order_;
  std::size_t at_ = 0;
};
