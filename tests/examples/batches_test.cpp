#include "examples/text/batches.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>
#include <vector>

namespace batches_test {
namespace {

using testing::ElementsAre;

std::vector<Sample> samples_of_lengths(const std::vector<std::size_t>& lengths) {
  std::vector<Sample> samples;
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    samples.push_back({std::vector<std::int64_t>(lengths[i], static_cast<std::int64_t>(i) + 1), lengths[i] / 2});
  }
  return samples;
}

TEST(Batches, LabelTheTextAlone) {
  const std::vector<Sample> samples = {{{5, 6, 7, 8}, 2}, {{9, 1}, 1}};
  const auto batch = collate(samples, {0, 1});
  EXPECT_EQ(batch.tokens, 6);
  EXPECT_TRUE(at::equal(batch.input_ids, torch::tensor({{5, 6, 7, 8}, {9, 1, 0, 0}}, at::kLong)));
  EXPECT_TRUE(at::equal(batch.labels, torch::tensor({{-100, -100, 7, 8}, {-100, 1, -100, -100}}, at::kLong)));
}

TEST(Batches, LeaveOutWhatIsTooLong) {
  const ByteBpe bpe(LORA_SOURCE_DIR "/examples/text/small_vocab/vocab.json",
                    LORA_SOURCE_DIR "/examples/text/small_vocab/merges.txt");
  std::size_t left_out = 0;
  const auto samples = encode_pairs(bpe, {{"name : A", "A ."}, {"name : B", std::string(300, '?')}}, 40, left_out);
  EXPECT_EQ(left_out, 1U);
  ASSERT_EQ(samples.size(), 1U);
  EXPECT_EQ(bpe.decode(samples[0].tokens), " name : A || A .<|endoftext|>");
  EXPECT_EQ(samples[0].input_length, encode_input(bpe, "name : A").size());
}

TEST(Batches, AnEpochHasEachSampleOnce) {
  std::vector<std::size_t> lengths;
  for (std::size_t i = 0; i < 103; ++i) lengths.push_back(2 + i % 17);
  BatchStream stream(samples_of_lengths(lengths), 4, 7);
  for (int epoch = 0; epoch < 2; ++epoch) {
    std::multiset<std::int64_t> seen;
    for (std::size_t i = 0; i < stream.batches_per_epoch(); ++i) {
      const auto batch = stream.next();
      for (std::int64_t row = 0; row < batch.input_ids.size(0); ++row)
        seen.insert(batch.input_ids[row][0].item<std::int64_t>());
    }
    EXPECT_EQ(seen.size(), lengths.size());
    EXPECT_EQ(std::set<std::int64_t>(seen.begin(), seen.end()).size(), lengths.size());
  }
}

TEST(Batches, TheSeedSetsTheOrder) {
  const auto samples = samples_of_lengths(std::vector<std::size_t>(50, 3));
  BatchStream first(samples, 8, 1), again(samples, 8, 1), other(samples, 8, 2);
  const auto batch = first.next();
  EXPECT_TRUE(at::equal(batch.input_ids, again.next().input_ids));
  EXPECT_FALSE(at::equal(batch.input_ids, other.next().input_ids));
}

TEST(Batches, GoOnAtAPosition) {
  std::vector<std::size_t> lengths;
  for (std::size_t i = 0; i < 23; ++i) lengths.push_back(2 + i % 5);
  const auto samples = samples_of_lengths(lengths);
  for (std::size_t read = 0; read <= 2 * 6 + 1; ++read) {  // 6 batches an epoch
    BatchStream first(samples, 4, 3), second(samples, 4, 9);
    for (std::size_t i = 0; i < read; ++i) first.next();
    second.next();
    second.go_to(first.position());
    EXPECT_EQ(second.position(), first.position());
    for (int i = 0; i < 14; ++i) EXPECT_TRUE(at::equal(second.next().input_ids, first.next().input_ids)) << read;
  }
  EXPECT_THROW(BatchStream(samples, 4, 1).go_to("no numbers"), std::runtime_error);
}

}  // namespace
}  // namespace batches_test
