#pragma once

#include <lora/detail/crc32.h>
#include <lora/detail/error.h>
#include <lora/version.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

// The layout of a zip file (PKWARE's APPNOTE 6.3): entries, each a local header and its data; the central directory,
// which repeats every local header and says where it is; the end record, which says where the directory is. Numbers
// that do not fit are 0xFF… and stand in "zip64" fields. PyTorch stores its data as it is, for the data to be mapped.

/// Where an entry's bytes are in the file.
struct ZipEntry {
  size_t begin = 0;
  size_t size = 0;
  uint32_t crc32 = 0;
  const char* unreadable = nullptr;  // why the bytes are not the content
};

/// Reads the directory of a zip file in memory; every position and size in it is held against the file.
class ZipReader {
 public:
  ZipReader(const std::string& path, const std::byte* file, size_t size) : path_(path), file_(file), size_(size) {
    const Directory directory = find_directory();
    read_directory(directory);
    check_overlap();
    if (!problems_.empty()) throw FormatError(path_, std::move(problems_));
  }

  /// The entries by name.
  const std::map<std::string, ZipEntry>& entries() const { return entries_; }
  /// The name of the entry that the directory lists first; empty where there is none.
  const std::string& first_name() const { return first_name_; }

 private:
  struct Directory {
    uint64_t begin = 0;
    uint64_t size = 0;
    uint64_t count = 0;
  };
  /// What stands behind an entry's last byte must not stand before the next entry's first one.
  struct Span {
    size_t begin = 0;
    size_t end = 0;
    std::string name;
  };

  static constexpr uint32_t kLocalHeader = 0x04034b50, kDirectoryHeader = 0x02014b50, kEndRecord = 0x06054b50,
                            kEndRecord64 = 0x06064b50, kEndLocator64 = 0x07064b50;
  static constexpr size_t kLocalSize = 30, kDirectorySize = 46, kEndSize = 22, kEndSize64 = 56, kLocatorSize64 = 20;
  static constexpr uint32_t kIn64 = 0xFFFFFFFF;

  [[noreturn]] void stop(std::string problem) {
    problems_.push_back(std::move(problem));
    throw FormatError(path_, std::move(problems_));
  }

  /// The little-endian number at `position`, which the caller has checked.
  template <class Number>
  Number at(size_t position) const {
    Number number = 0;
    std::memcpy(&number, file_ + position, sizeof number);
    return number;
  }
  /// Whether `size` bytes from `position` on lie before `end`.
  static bool within(uint64_t position, uint64_t size, uint64_t end) {
    return position <= end && size <= end - position;
  }
  std::string_view text(size_t position, size_t size) const {
    return {reinterpret_cast<const char*>(file_) + position, size};
  }

  Directory find_directory() {
    if (size_ < 4 || at<uint32_t>(0) != kLocalHeader) stop("does not begin as a zip file");
    const size_t longest_comment = std::numeric_limits<uint16_t>::max();
    for (size_t comment = 0; comment <= longest_comment && kEndSize + comment <= size_; ++comment) {
      const size_t end = size_ - kEndSize - comment;
      if (at<uint32_t>(end) == kEndRecord && at<uint16_t>(end + 20) == comment) return read_end(end);
    }
    stop("is a zip file without its end (truncated?)");
  }

  Directory read_end(size_t end) {
    Directory directory{at<uint32_t>(end + 16), at<uint32_t>(end + 12), at<uint16_t>(end + 10)};
    bool one_disk =
        at<uint16_t>(end + 4) == 0 && at<uint16_t>(end + 6) == 0 && at<uint16_t>(end + 8) == at<uint16_t>(end + 10);
    uint64_t directory_end = end;
    if (end >= kLocatorSize64 && at<uint32_t>(end - kLocatorSize64) == kEndLocator64) {
      const auto end64 = at<uint64_t>(end - kLocatorSize64 + 8);
      if (!within(end64, kEndSize64, end - kLocatorSize64) || at<uint32_t>(end64) != kEndRecord64) {
        stop("has no zip64 end record where its locator says");
      }
      directory = {at<uint64_t>(end64 + 48), at<uint64_t>(end64 + 40), at<uint64_t>(end64 + 32)};
      one_disk =
          at<uint32_t>(end64 + 16) == 0 && at<uint32_t>(end64 + 20) == 0 && at<uint64_t>(end64 + 24) == directory.count;
      directory_end = end64;
    }
    if (!one_disk) stop("is a part of a zip file of several disks");
    if (!within(directory.begin, directory.size, directory_end)) {
      stop("has its directory at byte " + std::to_string(directory.begin) + " with " + std::to_string(directory.size) +
           " bytes, expected it before byte " + std::to_string(directory_end));
    }
    return directory;
  }

  void read_directory(const Directory& directory) {
    size_t position = directory.begin;
    const size_t end = directory.begin + directory.size;
    uint64_t count = 0;
    for (; position < end; ++count) {
      if (!within(position, kDirectorySize, end) || at<uint32_t>(position) != kDirectoryHeader) {
        stop("has no directory entry at byte " + std::to_string(position));
      }
      const size_t name_size = at<uint16_t>(position + 28), extra_size = at<uint16_t>(position + 30);
      const size_t length = kDirectorySize + name_size + extra_size + at<uint16_t>(position + 32);
      if (!within(position, length, end)) stop("has a directory entry beyond the directory's end");
      read_entry(position, std::string(text(position + kDirectorySize, name_size)), directory.begin);
      position += length;
    }
    if (count != directory.count) {
      stop("has " + std::to_string(count) + " entries, expected " + std::to_string(directory.count));
    }
  }

  void read_entry(size_t header, const std::string& name, size_t directory_begin) {
    const auto report = [&](const std::string& problem) { problems_.push_back("entry '" + name + "' " + problem); };
    if (spans_.empty()) first_name_ = name;
    uint64_t size = at<uint32_t>(header + 24), stored_size = at<uint32_t>(header + 20),
             local = at<uint32_t>(header + 42);
    if (!read_zip64(header, {{&size, kIn64}, {&stored_size, kIn64}, {&local, kIn64}})) {
      return report("lacks its zip64 field");
    }
    if (!within(local, kLocalSize, directory_begin) || at<uint32_t>(local) != kLocalHeader) {
      return report("has no header at byte " + std::to_string(local));
    }
    const size_t name_size = at<uint16_t>(local + 26);
    const size_t begin = local + kLocalSize + name_size + at<uint16_t>(local + 28);
    if (!within(begin, stored_size, directory_begin)) {
      return report("has " + std::to_string(stored_size) + " bytes, more than are left in the file");
    }
    if (text(local + kLocalSize, name_size) != name) report("has another name in its own header");
    const auto flags = at<uint16_t>(header + 8), method = at<uint16_t>(header + 10);
    constexpr uint16_t kEncrypted = 1 | (1 << 6) | (1 << 13);
    ZipEntry entry{begin, static_cast<size_t>(stored_size), at<uint32_t>(header + 16), nullptr};
    if ((flags & kEncrypted) != 0) {
      entry.unreadable = "is encrypted";
    } else if (method != 0) {
      entry.unreadable = "is compressed";
    } else if (size != stored_size) {
      return report("has two sizes");
    }
    spans_.push_back({static_cast<size_t>(local), begin + entry.size, name});
    if (!entries_.emplace(name, entry).second) report("is there twice");
  }

  /// Replaces those of the numbers that are 0xFF… by the entry's zip64 field, which holds just these, in this order.
  bool read_zip64(size_t header, std::initializer_list<std::pair<uint64_t*, uint64_t>> numbers) const {
    size_t extra = header + kDirectorySize + at<uint16_t>(header + 28);
    size_t end = extra + at<uint16_t>(header + 30);
    constexpr uint16_t kZip64Field = 1;
    size_t field = end, field_end = end;
    while (within(extra, 4, end)) {
      const size_t length = at<uint16_t>(extra + 2);
      if (!within(extra + 4, length, end)) break;
      if (at<uint16_t>(extra) == kZip64Field) field = extra + 4, field_end = field + length;
      extra += 4 + length;
    }
    for (const auto& [number, in_field] : numbers) {
      if (*number != in_field) continue;
      if (!within(field, sizeof *number, field_end)) return false;
      *number = at<uint64_t>(field);
      field += sizeof *number;
    }
    return true;
  }

  void check_overlap() {
    std::sort(spans_.begin(), spans_.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
    for (size_t i = 1; i < spans_.size(); ++i) {
      if (spans_[i].begin < spans_[i - 1].end) {
        problems_.push_back("entry '" + spans_[i].name + "' overlaps '" + spans_[i - 1].name + "'");
      }
    }
  }

  std::string path_;
  const std::byte* file_;
  size_t size_;
  std::map<std::string, ZipEntry> entries_;
  std::string first_name_;
  std::vector<Span> spans_;
  std::vector<std::string> problems_;
};

}  // namespace detail
LORA_NAMESPACE_END
