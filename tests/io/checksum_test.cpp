#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/adapters.h>
#include <lora/io/checksum.h>
#include <lora/io/safetensors.h>

#include <cstring>
#include <map>
#include <random>
#include <string>
#include <utility>

#include "harness/message_of.h"
#include "harness/temp_folder.h"
#include "harness/values.h"
#include "oracles/models.h"

namespace checksum_test {
namespace {

using harness::message_of;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

lora::SafetensorsFile example() {
  lora::SafetensorsFile file;
  file.tensors = {{"a", torch::arange(6, at::kFloat).reshape({2, 3})}, {"b", torch::ones({2}, at::kBFloat16)}};
  file.metadata = {{"format", "pt"}, {"lora.x", "y"}};
  lora::add_checksums(file.tensors, file.metadata);
  return file;
}

std::string error_of(const lora::SafetensorsFile& file) {
  const auto message = message_of<lora::FormatError>([&] { lora::check_checksums(file, "file.safetensors"); });
  if (!message.empty()) {
    EXPECT_THAT(message, HasSubstr("file.safetensors: "));
  }
  return message;
}

TEST(Checksums, AreThoseOfZlib) {
  // zlib.crc32(b"a F32 [2,3]\n" + struct.pack("<6f", 0, 1, 2, 3, 4, 5)), zlib.crc32(b"b BF16 [2]\n\x80\x3f\x80\x3f")
  // and zlib.crc32(b"format=pt\nlora.x=y\n") in Python
  EXPECT_EQ(example().metadata.at("lora.crc32"), R"({"__metadata__":"618d2374","a":"631a4b0f","b":"7ee3a43e"})");
}

TEST(Checksums, NameEverythingThatChanged) {
  EXPECT_EQ(error_of(example()), "");
  EXPECT_EQ(error_of({{{"a", torch::ones({1})}}, {{"format", "pt"}}}), "") << "a file of another program";
  auto file = example();
  file.tensors["a"] = file.tensors["a"].clone();
  file.tensors["a"][1][2] = 9;
  file.tensors.erase("b");
  file.tensors["c"] = torch::ones({1});
  file.metadata["format"] = "np";
  EXPECT_THAT(error_of(file), AllOf(HasSubstr("4 problems"), HasSubstr("of the metadata"), HasSubstr("of tensor 'a'"),
                                    HasSubstr("found no tensor 'b'"), HasSubstr("found no checksum of tensor 'c'")));
  file = example();
  file.tensors["a"] = file.tensors["a"].reshape({3, 2});
  file.tensors["b"] = file.tensors["b"].view(at::kHalf);
  EXPECT_THAT(error_of(file), AllOf(HasSubstr("2 problems"), HasSubstr("tensor 'a'"), HasSubstr("tensor 'b'")));
  for (const char* text : {"", "[]", "7", "{\"a\":1", "{\"a\":{\"b\":{}}}"}) {
    file.metadata["lora.crc32"] = text;
    EXPECT_THAT(error_of(file), HasSubstr("found no JSON object as lora.crc32")) << text;
  }
}

TEST(Checksums, AreNotLostWithTheirKey) {
  const auto error_with = [](const std::string& key) {
    auto file = example();
    file.metadata.erase("lora.x");
    auto entry = file.metadata.extract("lora.crc32");
    entry.key() = key;
    file.metadata.insert(std::move(entry));
    return error_of(file);
  };
  for (const auto* key : {"lora.crc33", "mora.crc32", "Lora_crc32", "lora.more"}) {
    EXPECT_THAT(error_with(key), HasSubstr("without lora.crc32")) << key;
  }
  EXPECT_EQ(error_with("their.crc32"), "") << "the key of another program";
}

/// An adapter saved by us, which Mlp can load.
class SavedAdapter : public ::testing::Test {
 protected:
  SavedAdapter() : path_(folder_ / "adapter_model.safetensors") {
    Mlp model;
    auto adapters = lora::inject(*model, lora::LoraConfig().r(3).lora_alpha(7).target_modules({"up", "down"}));
    harness::fill(adapters);
    adapters.save(folder_.path().string());
    intact_ = read_bytes(path_);
    std::memcpy(&header_size_, intact_.data(), sizeof header_size_);
  }

  void expect_error_with_flipped(size_t bit) {
    auto damaged = intact_;
    damaged[bit / 8] = static_cast<char>(damaged[bit / 8] ^ (1 << bit % 8));
    write_bytes(path_, damaged);
    const auto load = [&] { lora::load(*model_, folder_.path().string()).unload(); };
    EXPECT_THROW(load(), lora::FormatError) << "bit " << bit << " of " << intact_.substr(bit / 8, 9);
  }

  TempFolder folder_;
  std::string path_;
  std::string intact_;
  uint64_t header_size_ = 0;
  Mlp model_;
};

TEST_F(SavedAdapter, NoFlippedBitIsLoaded) {
  const auto before = harness::parameter_state(*model_);
  const size_t data = sizeof header_size_ + header_size_;
  for (size_t bit = 0; bit < 8 * data; ++bit) expect_error_with_flipped(bit);
  std::mt19937 random(20260108);
  std::uniform_int_distribution<size_t> in_data(8 * data, 8 * intact_.size() - 1);
  for (int trial = 0; trial < 500; ++trial) expect_error_with_flipped(in_data(random));
  EXPECT_EQ(harness::parameter_state(*model_), before);
  write_bytes(path_, intact_);
  EXPECT_EQ(lora::load(*model_, folder_.path().string()).names().size(), 1u);
}

TEST_F(SavedAdapter, AnErrorNamesTheTensor) {
  auto damaged = intact_;
  damaged.back() = static_cast<char>(damaged.back() ^ 1);
  write_bytes(path_, damaged);
  try {
    lora::load(*model_, folder_.path().string());
    ADD_FAILURE() << "it was loaded";
  } catch (const lora::FormatError& error) {
    EXPECT_EQ(error.path(), path_);
    EXPECT_THAT(error.problems(),
                ::testing::ElementsAre(
                    AllOf(HasSubstr("of tensor 'base_model.model.up.lora_B.weight'"), HasSubstr(": damaged"))));
  }
}

}  // namespace
}  // namespace checksum_test
