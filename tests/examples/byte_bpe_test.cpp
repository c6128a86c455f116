#include "examples/text/byte_bpe.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "harness/message_of.h"
#include "harness/temp_folder.h"

namespace byte_bpe_test {
namespace {

using harness::message_of;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

const std::string kVocab = LORA_SOURCE_DIR "/examples/text/small_vocab/vocab.json";
const std::string kMerges = LORA_SOURCE_DIR "/examples/text/small_vocab/merges.txt";

std::string error_of(const std::string& vocab, const std::string& merges) {
  return message_of<FileError>([&] { ByteBpe(vocab, merges); });
}

TEST(ByteBpe, GivesTheTokensOfPythonTokenizers) {
  const ByteBpe bpe(kVocab, kMerges);
  const auto rows = nlohmann::json::parse(read_bytes(LORA_SOURCE_DIR "/tests/examples/tokens.json"));
  ASSERT_GT(rows.size(), 80U);
  for (const auto& row : rows) {
    const auto text = row["text"].get<std::string>();
    EXPECT_EQ(bpe.encode(text), row["ids"].get<std::vector<std::int64_t>>()) << text;
    EXPECT_EQ(bpe.decode(bpe.encode(text)), text);
  }
}

TEST(ByteBpe, TakesAnyBytes) {
  const ByteBpe bpe(kVocab, kMerges);
  std::string all;
  for (int byte = 0; byte < 256; ++byte) all += static_cast<char>(byte);
  for (const auto& bytes :
       {all, std::string("\xff\xfe broken \xc3"), std::string("ok \xe2\x82 no"), std::string("\xf4\x90\x80\x80"),
        std::string("\xed\xa0\x80 surrogate"), std::string("x\0y", 3)}) {
    EXPECT_EQ(bpe.decode(bpe.encode(bytes)), bytes);
  }
}

TEST(ByteBpe, MergesAWordOfAMillionLetters) {
  const ByteBpe bpe(kVocab, kMerges);
  std::string text;
  for (int i = 0; i < 100'000; ++i) text += "restaurant";
  EXPECT_EQ(bpe.decode(bpe.encode(text)), text);
}

TEST(ByteBpe, RunsOfBlanksKeepTheLastOneForTheNextWord) {
  const WordSplitter splitter;
  EXPECT_THAT(splitter.split("a   b \t\n c"), ElementsAre("a", "  ", " b", " \t\n", " c"));
  EXPECT_THAT(splitter.split("end   "), ElementsAre("end", "   "));
  EXPECT_THAT(splitter.split("they're 12x, ok"), ElementsAre("they", "'re", " 12", "x", ",", " ok"));
  EXPECT_THAT(splitter.split("a\xff\xff b"), ElementsAre("a", "\xff\xff", " b"));
}

TEST(ByteBpe, NamesWhatIsWrongWithItsFiles) {
  const TempFolder folder;
  const auto write = [&](const std::string& name, const std::string& bytes) {
    write_bytes(folder / name, bytes);
    return folder / name;
  };
  EXPECT_THAT(error_of(folder / "none", kMerges), AllOf(HasSubstr("none"), HasSubstr("can't be read")));
  EXPECT_THAT(error_of(folder.path().string(), kMerges), HasSubstr("can't be read"));
  EXPECT_THAT(error_of(write("v1", ""), kMerges), HasSubstr("no JSON object"));
  EXPECT_THAT(error_of(write("v2", "{\"a\": 0"), kMerges), HasSubstr("no JSON object"));
  EXPECT_THAT(error_of(write("v3", "{\"a\": 0, \"b\": 7}"), kMerges),
              AllOf(HasSubstr("found the id 7 for 'b', expected 0 to 1"), HasSubstr("no token for the byte 0"),
                    HasSubstr("more")));
  auto json = nlohmann::json::parse(read_bytes(kVocab));
  json["restaurant"] = 5;
  EXPECT_THAT(error_of(write("v4", json.dump()), kMerges), HasSubstr("each once"));
  EXPECT_THAT(error_of(kVocab, write("m1", "#version: 0.2\na b c\nzz qq\n")),
              AllOf(HasSubstr("line 2: found 'a b c'"), HasSubstr("line 3: found 'zz qq'")));
  EXPECT_THAT(error_of(kVocab, write("m2", "a")), HasSubstr("line 1: found 'a'"));
}

}  // namespace
}  // namespace byte_bpe_test
