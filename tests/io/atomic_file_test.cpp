#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/detail/atomic_file.h>
#include <lora/detail/error.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <string>
#include <thread>
#include <vector>

#include "harness/message_of.h"
#include "harness/system_limits.h"
#include "harness/temp_folder.h"

namespace atomic_file_test {
namespace {

using harness::FileSizeLimit;
using harness::message_of;
using harness::NotRoot;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
namespace fs = std::filesystem;

std::vector<std::string> names_in(const fs::path& folder) {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(folder)) names.push_back(entry.path().filename().string());
  std::sort(names.begin(), names.end());
  return names;
}

void replace(const std::string& path, const std::string& content) {
  lora::detail::AtomicFile file(path);
  file.write(content);
  file.commit();
}

/// The text of the error that `action` has to end in.
TEST(AtomicFile, AppearsOnlyWithCommit) {
  TempFolder folder;
  const std::string path = folder / "file";
  lora::detail::AtomicFile file(path);
  file.write("new ");
  file.write("content");
  file.sync();
  EXPECT_FALSE(fs::exists(path));
  file.commit();
  EXPECT_EQ(read_bytes(path), "new content");
  EXPECT_THAT(names_in(folder.path()), ElementsAre("file"));
}

TEST(AtomicFile, WithoutCommitTheOldFileStays) {
  TempFolder folder;
  const std::string path = folder / "file";
  write_bytes(path, "old");
  { lora::detail::AtomicFile(path).write("new"); }
  EXPECT_EQ(read_bytes(path), "old");
  EXPECT_THAT(names_in(folder.path()), ElementsAre("file"));
}

TEST(AtomicFile, TwoWritersOfOnePathDoNotMix) {
  TempFolder folder;
  const std::string path = folder / "file";
  lora::detail::AtomicFile first(path);
  lora::detail::AtomicFile second(path);
  first.write("first");
  second.write("2nd");
  second.commit();
  EXPECT_EQ(read_bytes(path), "2nd");
  first.commit();
  EXPECT_EQ(read_bytes(path), "first");
  EXPECT_THAT(names_in(folder.path()), ElementsAre("file"));
}

TEST(AtomicFile, WhoseTemporaryIsRemovedUnderWay) {
  TempFolder folder;
  write_bytes(folder / "file", "old");
  lora::detail::AtomicFile file(folder / "file");
  file.write("new");
  for (const auto& name : names_in(folder.path())) {
    if (name != "file") fs::remove(folder / name);
  }
  EXPECT_THAT(message_of<lora::SystemError>([&] { file.commit(); }), HasSubstr("its temporary file was removed"));
  EXPECT_EQ(read_bytes(folder / "file"), "old");
}

TEST(AtomicFile, RemovesWhatAKilledWriterLeft) {
  TempFolder folder;
  int ready[2];
  ASSERT_EQ(::pipe(ready), 0);
  const auto child = ::fork();
  if (child == 0) {
    lora::detail::AtomicFile file(folder / "file");
    file.write("half");
    if (::write(ready[1], "x", 1) != 1) ::_exit(1);
    for (;;) ::pause();
  }
  char signal = 0;
  ASSERT_EQ(::read(ready[0], &signal, 1), 1);
  replace(folder / "other", "new");
  EXPECT_EQ(names_in(folder.path()).size(), 2U) << "the child's file is being written";
  ::kill(child, SIGKILL);
  ASSERT_EQ(::waitpid(child, nullptr, 0), child);
  EXPECT_EQ(names_in(folder.path()).size(), 2U);
  write_bytes(folder / ".lora-mine", "a user's");
  replace(folder / "other", "newer");
  EXPECT_THAT(names_in(folder.path()), ElementsAre(".lora-mine", "other"));
}

TEST(AtomicFile, ManyWritersInOneFolderLeaveEachOtherAlone) {
  TempFolder folder;
  std::vector<std::thread> writers;
  for (int writer = 0; writer < 4; ++writer) {
    writers.emplace_back([&, path = folder / std::to_string(writer)] {
      for (int i = 0; i < 200; ++i) replace(path, std::to_string(i));
    });
  }
  for (auto& writer : writers) writer.join();
  EXPECT_THAT(names_in(folder.path()), ElementsAre("0", "1", "2", "3"));
}

TEST(AtomicFile, RelativePathAndAccessRights) {
  TempFolder folder;
  const fs::path before = fs::current_path();
  fs::current_path(folder.path());
  const mode_t mask = ::umask(0027);
  replace("file", "content");
  ::umask(mask);
  fs::current_path(before);
  EXPECT_EQ(read_bytes(folder / "file"), "content");
  struct stat status {};
  ASSERT_EQ(::stat((folder / "file").c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777, 0640u);
}

TEST(AtomicFile, ReplacesALinkAndNotItsTarget) {
  TempFolder folder;
  write_bytes(folder / "target", "old");
  fs::create_symlink("target", folder / "link");
  replace(folder / "link", "new");
  EXPECT_EQ(read_bytes(folder / "target"), "old");
  EXPECT_EQ(read_bytes(folder / "link"), "new");
}

/// Replacing the file of that name with 200 kB fails with `reason` and leaves it and its folder as they were.
void expect_no_room(const fs::path& folder, const std::string& reason) {
  const std::string path = folder / "file";
  write_bytes(path, "old");
  EXPECT_THAT(message_of<lora::FormatError>([&] { replace(path, std::string(200'000, 'x')); }),
              ::testing::AllOf(HasSubstr(path), HasSubstr(reason)));
  EXPECT_EQ(read_bytes(path), "old");
  EXPECT_THAT(names_in(folder), ElementsAre("file"));
}

TEST(AtomicFile, AFullDiskLeavesTheOldOne) {
  TempFolder limited;
  {
    FileSizeLimit limit(100'000);
    expect_no_room(limited.path(), "File too large");
  }
  TempFolder disk;  // a real one, where the user may mount it
  if (::mount("tmpfs", disk.path().c_str(), "tmpfs", 0, "size=64k") != 0) return;
  expect_no_room(disk.path(), "No space left on device");
  EXPECT_EQ(::umount(disk.path().c_str()), 0);
}

TEST(AtomicFile, ReadOnlyFolder) {
  TempFolder folder;
  const std::string path = folder / "file";
  write_bytes(path, "old");
  ASSERT_EQ(::chmod(folder.path().c_str(), 0555), 0);
  {
    NotRoot guard;
    EXPECT_THAT(message_of<lora::FormatError>([&] { replace(path, "new"); }),
                ::testing::AllOf(HasSubstr(path), HasSubstr("Permission denied")));
  }
  EXPECT_EQ(read_bytes(path), "old");
  ASSERT_EQ(::chmod(folder.path().c_str(), 0755), 0);
}

TEST(AtomicFile, FolderThatIsMissingOrRemovedMeanwhile) {
  TempFolder folder;
  EXPECT_THAT(message_of<lora::FormatError>([&] { replace(folder / "none/file", "new"); }),
              HasSubstr("No such file or directory"));
  write_bytes(folder / "plain", "");
  EXPECT_THAT(message_of<lora::FormatError>([&] { replace(folder / "plain/file", "new"); }),
              HasSubstr("Not a directory"));

  fs::create_directory(folder / "gone");
  lora::detail::AtomicFile file(folder / "gone/file");
  file.write("new");
  fs::remove_all(folder / "gone");
  EXPECT_THAT(message_of<lora::FormatError>([&] { file.commit(); }), HasSubstr("No such file or directory"));
}

TEST(AtomicFile, PathThatIsAFolder) {
  TempFolder folder;
  fs::create_directory(folder / "taken");
  EXPECT_THAT(message_of<lora::FormatError>([&] { replace(folder / "taken", "new"); }), HasSubstr("Is a directory"));
  EXPECT_THAT(message_of<lora::FormatError>([&] { replace(folder / "taken/", "new"); }), HasSubstr("names no file"));
  EXPECT_THAT(message_of<lora::FormatError>([] { replace("", "new"); }), HasSubstr("names no file"));
  EXPECT_THAT(names_in(folder.path()), ElementsAre("taken"));
}

}  // namespace
}  // namespace atomic_file_test
