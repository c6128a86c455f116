#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iostream>
#include <set>
#include <string>
#include <vector>

#include "finetune/options.h"  // defines: Options
#include "text/batches.h"      // defines: Sample, encode_pairs
#include "text/e2e.h"          // defines: Pair, read_e2e
#include "text/generator.h"    // defines: PairGenerator, the domains

struct Pairs {
  std::vector<Pair> train, dev;
};

/// Fixed pairs of one domain of the generator, no input in both parts.
inline Pairs draw_pairs(const GeneratorDomain& domain, std::size_t train, std::size_t dev) {
  constexpr std::uint64_t kSeed = 2021;
  PairGenerator generator(domain, kSeed);
  std::set<std::string> taken;
  Pairs pairs;
  pairs.dev = generator.draw(dev, taken);
  pairs.train = generator.draw(train, taken);
  return pairs;
}

/// The domains of the base's pre-training, `train` pairs of each; the dev pairs are the same for every `train`.
inline Pairs old_domain_pairs(std::size_t train) {
  constexpr std::size_t kDev = 20;
  Pairs all;
  for (const auto& domain : generator_base_domains()) {
    const auto pairs = draw_pairs(domain, train, kDev);
    all.train.insert(all.train.end(), pairs.train.begin(), pairs.train.end());
    all.dev.insert(all.dev.end(), pairs.dev.begin(), pairs.dev.end());
  }
  return all;
}

/// The domain to adapt to: the files of --data and --dev, else the generator's held-out one.
inline Pairs new_domain_pairs(const Options& options) {
  constexpr std::size_t kTrain = 1200, kDev = 200;
  auto pairs = options.data.empty() ? draw_pairs(generator_new_domain(), kTrain, kDev)
                                    : Pairs{read_e2e(options.data), read_e2e(options.dev)};
  if (options.dev_pairs > 0) pairs.dev.resize(std::min(options.dev_pairs, pairs.dev.size()));
  return pairs;
}

/// The pairs as tokens; pairs beyond the model's positions are left out, which is said, and an empty rest is an error.
inline std::vector<Sample> encode_or_report(const ByteBpe& tokenizer, const std::vector<Pair>& pairs,
                                            std::int64_t positions, const std::string& what) {
  std::size_t left_out = 0;
  auto samples = encode_pairs(tokenizer, pairs, static_cast<std::size_t>(positions), left_out);
  if (samples.empty()) {
    throw FileError(what, {"every pair is longer than the model's " + std::to_string(positions) + " positions"});
  }
  if (left_out > 0) {
    std::cout << what << ": " << left_out << " of " << pairs.size() << " pairs are longer than the model's "
              << positions << " positions and are left out\n";
  }
  return samples;
}

/// Batches for evaluation on the model's device.
inline std::vector<Batch> evaluation_batches(const std::vector<Sample>& samples, const torch::Device& device) {
  constexpr std::size_t kBatch = 32;
  auto batches = batches_in_order(samples, kBatch);
  for (auto& batch : batches) batch = batch.to(device);
  return batches;
}
