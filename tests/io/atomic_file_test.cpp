#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <lora/detail/atomic_file.h>
#include <lora/detail/error.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <string>
#include <vector>

#include "harness/temp_folder.h"

namespace atomic_file_test {
namespace {

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
template <class Action>
std::string error_of(Action action) {
  try {
    action();
  } catch (const lora::FormatError& error) {
    return error.what_without_backtrace();
  }
  ADD_FAILURE() << "expected a FormatError";
  return "";
}

/// Files of this process cannot grow beyond `bytes` while it lives: the write fails as it does on a full disk.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t bytes) : handler_(::signal(SIGXFSZ, SIG_IGN)) {
    ::getrlimit(RLIMIT_FSIZE, &before_);
    const rlimit limit{bytes, before_.rlim_max};
    ::setrlimit(RLIMIT_FSIZE, &limit);
  }
  ~FileSizeLimit() {
    ::setrlimit(RLIMIT_FSIZE, &before_);
    ::signal(SIGXFSZ, handler_);
  }

 private:
  rlimit before_{};
  sighandler_t handler_;
};

/// Root may write anywhere: while it lives the process is nobody.
class NotRoot {
 public:
  NotRoot() : was_root_(::geteuid() == 0 && ::seteuid(65534) == 0) {}
  ~NotRoot() {
    if (was_root_ && ::seteuid(0) != 0) ::abort();
  }

 private:
  bool was_root_;
};

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
  EXPECT_THAT(error_of([&] { replace(path, std::string(200'000, 'x')); }),
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
    EXPECT_THAT(error_of([&] { replace(path, "new"); }),
                ::testing::AllOf(HasSubstr(path), HasSubstr("Permission denied")));
  }
  EXPECT_EQ(read_bytes(path), "old");
  ASSERT_EQ(::chmod(folder.path().c_str(), 0755), 0);
}

TEST(AtomicFile, FolderThatIsMissingOrRemovedMeanwhile) {
  TempFolder folder;
  EXPECT_THAT(error_of([&] { replace(folder / "none/file", "new"); }), HasSubstr("No such file or directory"));
  write_bytes(folder / "plain", "");
  EXPECT_THAT(error_of([&] { replace(folder / "plain/file", "new"); }), HasSubstr("Not a directory"));

  fs::create_directory(folder / "gone");
  lora::detail::AtomicFile file(folder / "gone/file");
  file.write("new");
  fs::remove_all(folder / "gone");
  EXPECT_THAT(error_of([&] { file.commit(); }), HasSubstr("No such file or directory"));
}

TEST(AtomicFile, PathThatIsAFolder) {
  TempFolder folder;
  fs::create_directory(folder / "taken");
  EXPECT_THAT(error_of([&] { replace(folder / "taken", "new"); }), HasSubstr("Is a directory"));
  EXPECT_THAT(error_of([&] { replace(folder / "taken/", "new"); }), HasSubstr("names no file"));
  EXPECT_THAT(error_of([] { replace("", "new"); }), HasSubstr("names no file"));
  EXPECT_THAT(names_in(folder.path()), ElementsAre("taken"));
}

}  // namespace
}  // namespace atomic_file_test
