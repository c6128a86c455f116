#include "examples/text/e2e.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "harness/message_of.h"
#include "harness/temp_folder.h"

namespace e2e_test {
namespace {

using harness::message_of;
using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

std::string error_of(const std::string& path) {
  return message_of<FileError>([&] { read_e2e(path); });
}

TEST(E2e, ReadsPairs) {
  const TempFolder folder;
  const auto path = folder / "pairs.txt";
  write_bytes(path, "name : Blue | area : old town||Blue is there . \r\n\nname : A:B||Two || bars , one text");
  const auto pairs = read_e2e(path);
  ASSERT_EQ(pairs.size(), 2U);
  EXPECT_EQ(pairs[0].input, "name : Blue | area : old town");
  EXPECT_EQ(pairs[0].text, "Blue is there .");
  EXPECT_EQ(pairs[1].input, "name : A:B");
  EXPECT_EQ(pairs[1].text, "Two || bars , one text");
}

TEST(E2e, TellsEveryBrokenLine) {
  const TempFolder folder;
  const auto path = folder / "pairs.txt";
  write_bytes(path,
              "name : Blue||Fine.\nname : Blue\nname : Blue||\n||text\nname||text\n\nname : Blue | : old||text\nname : "
              "||text\n");
  const auto error = error_of(path);
  EXPECT_THAT(error, AllOf(HasSubstr(path + ": line 2: found no '||'"), HasSubstr("line 3: found no text"),
                           HasSubstr("line 4: found"), HasSubstr("line 5: found the field 'name'"),
                           HasSubstr("line 7: found the field ': old'"), HasSubstr("and 1 more")));
  EXPECT_THAT(error, AllOf(Not(HasSubstr("line 1")), Not(HasSubstr("\n"))));
}

TEST(E2e, RefusesAnEmptyFileAndAMissingOne) {
  const TempFolder folder;
  write_bytes(folder / "empty.txt", "");
  EXPECT_THAT(error_of(folder / "empty.txt"), HasSubstr("found no pair"));
  EXPECT_THAT(error_of(folder / "missing.txt"), HasSubstr("can't be read"));
}

TEST(E2e, ReadsTheRealFiles) {
  const std::string data = LORA_SOURCE_DIR "/../shared/data/e2e";
  if (!std::filesystem::exists(data)) GTEST_SKIP() << "needs ../shared/data/e2e";
  EXPECT_EQ(read_e2e(data + "/train.txt").size(), 4108U);
  EXPECT_EQ(read_e2e(data + "/dev.txt").size(), 564U);
}

}  // namespace
}  // namespace e2e_test
