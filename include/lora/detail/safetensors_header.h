#pragma once

#include <c10/core/ScalarType.h>
#include <lora/detail/error.h>
#include <lora/detail/safetensors_dtypes.h>
#include <lora/detail/strict_json.h>
#include <lora/detail/tensor_bytes.h>
#include <lora/version.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

// The layout of a safetensors file: 8 bytes with the length N of the header (little-endian), N bytes of JSON, then the
// data. The header maps each tensor's name to {"dtype", "shape", "data_offsets": [begin, end]}, offsets counted from
// the data's first byte; the tensors cover the data without gap or overlap. "__metadata__" maps strings to strings.

inline constexpr const char* kSafetensorsMetadata = "__metadata__";
inline constexpr size_t kSafetensorsLongestHeader = 100'000'000;  // the format's own limit
inline constexpr size_t kSafetensorsMostDimensions = 64;          // TensorIterator's limit

struct SafetensorsEntry {
  std::string name;
  c10::ScalarType dtype = c10::ScalarType::Float;
  std::vector<int64_t> shape;
  size_t begin = 0;  // of the data, not of the file
  size_t end = 0;
};

struct SafetensorsHeader {
  std::vector<SafetensorsEntry> entries;
  std::map<std::string, std::string> metadata;
  size_t data_begin = 0;
};

/// Reads and checks the header of one file; nothing that it declares is believed before it was held against the file.
class SafetensorsHeaderReader {
 public:
  SafetensorsHeaderReader(std::string path, const std::byte* file, size_t size)
      : path_(std::move(path)), file_(file), size_(size) {}

  SafetensorsHeader read() {
    const nlohmann::json root = parse(header_text());
    if (!root.is_object()) stop("header is " + std::string(root.type_name()) + ", expected an object");
    bool offsets_known = true;
    for (const auto& [name, value] : root.items()) {
      if (name == kSafetensorsMetadata) {
        read_metadata(value);
      } else {
        offsets_known = read_entry(name, value) && offsets_known;
      }
    }
    if (offsets_known) check_coverage();
    for (const auto& entry : header_.entries) check_bools(entry);
    if (!problems_.empty()) throw FormatError(path_, std::move(problems_));
    return std::move(header_);
  }

 private:
  /// Ends at a problem that leaves nothing further to be read.
  [[noreturn]] void stop(std::string problem) {
    problems_.push_back(std::move(problem));
    throw FormatError(path_, std::move(problems_));
  }

  void report(const std::string& tensor, const std::string& problem) {
    problems_.push_back("tensor '" + tensor + "': " + problem);
  }

  size_t data_size() const { return size_ - header_.data_begin; }

  std::string_view header_text() {
    uint64_t length = 0;
    if (size_ < sizeof length) stop("has " + std::to_string(size_) + " bytes, expected 8 and a header (truncated?)");
    std::memcpy(&length, file_, sizeof length);
    const std::string found = "header length " + std::to_string(length);
    if (length > kSafetensorsLongestHeader) stop(found + " is above the limit of 100000000 (no safetensors file?)");
    if (length > size_ - sizeof length) {
      stop(found + " is more than the " + std::to_string(size_ - sizeof length) + " bytes that follow (truncated?)");
    }
    header_.data_begin = sizeof length + static_cast<size_t>(length);
    const std::string_view text(reinterpret_cast<const char*>(file_) + sizeof length, static_cast<size_t>(length));
    if (text.empty() || text.front() != '{') stop("header does not begin with '{'");
    return text;
  }

  nlohmann::json parse(std::string_view text) {
    constexpr int kDeepest = 3;
    try {
      return parse_strict_json(text, kDeepest, problems_);
    } catch (const std::runtime_error& error) {
      stop(std::string("header is no valid JSON: ") + error.what());
    }
  }

  void read_metadata(const nlohmann::json& value) {
    if (!value.is_object()) {
      problems_.push_back("__metadata__ is no object");
      return;
    }
    for (const auto& [key, text] : value.items()) {
      if (text.is_string()) {
        header_.metadata.emplace(key, text.get<std::string>());
      } else {
        problems_.push_back("__metadata__ '" + key + "' is no string");
      }
    }
  }

  /// Returns whether the tensor's offsets are known, right or wrong.
  bool read_entry(const std::string& name, const nlohmann::json& value) {
    if (!value.is_object()) return report(name, "is no object"), false;
    for (const auto& [key, unused] : value.items()) {
      if (key != "dtype" && key != "shape" && key != "data_offsets") report(name, "unknown field '" + key + "'");
    }
    SafetensorsEntry entry;
    entry.name = name;
    const bool offsets_known = read_offsets(value, entry);
    const bool dtype_known = read_dtype(value, entry);
    const bool shape_known = read_shape(value, entry);
    if (dtype_known && shape_known) check_span(entry, offsets_known);
    if (offsets_known) header_.entries.push_back(std::move(entry));
    return offsets_known;
  }

  bool read_dtype(const nlohmann::json& value, SafetensorsEntry& entry) {
    const auto field = value.find("dtype");
    if (field == value.end() || !field->is_string()) return report(entry.name, "dtype is missing or no string"), false;
    const auto dtype = safetensors_dtype(field->get_ref<const std::string&>());
    if (!dtype) return report(entry.name, "unknown dtype " + field->dump()), false;
    entry.dtype = *dtype;
    return true;
  }

  bool read_shape(const nlohmann::json& value, SafetensorsEntry& entry) {
    const auto field = value.find("shape");
    if (field == value.end() || !field->is_array()) return report(entry.name, "shape is missing or no list"), false;
    if (field->size() > kSafetensorsMostDimensions) {
      return report(entry.name, "has " + std::to_string(field->size()) + " dimensions, expected 64 at most"), false;
    }
    for (const auto& extent : *field) {
      const bool fits = extent.is_number_unsigned() &&
                        extent.get<uint64_t>() <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
      if (!fits) return report(entry.name, "shape holds " + extent.dump() + ", expected a size"), false;
      entry.shape.push_back(extent.get<int64_t>());
    }
    return true;
  }

  bool read_offsets(const nlohmann::json& value, SafetensorsEntry& entry) {
    const auto field = value.find("data_offsets");
    const bool known = field != value.end() && field->is_array() && field->size() == 2 &&
                       (*field)[0].is_number_unsigned() && (*field)[1].is_number_unsigned();
    if (!known) return report(entry.name, "data_offsets are missing or no two positions"), false;
    entry.begin = (*field)[0].get<size_t>();
    entry.end = (*field)[1].get<size_t>();
    if (entry.begin > entry.end || entry.end > data_size()) {
      report(entry.name, "data_offsets " + field->dump() + " are not within the " + std::to_string(data_size()) +
                             " bytes of data (truncated?)");
      return false;
    }
    return true;
  }

  void check_span(const SafetensorsEntry& entry, bool offsets_known) {
    // Strides multiply the sizes that are not zero, so an empty tensor can overflow too.
    size_t stride = c10::elementSize(entry.dtype);
    bool empty = false;
    for (const int64_t extent : entry.shape) {
      empty = empty || extent == 0;
      const size_t factor = extent == 0 ? 1 : static_cast<size_t>(extent);
      if (stride > static_cast<size_t>(std::numeric_limits<int64_t>::max()) / factor) {
        return report(entry.name, "shape overflows");
      }
      stride *= factor;
    }
    const size_t expected = empty ? 0 : stride;
    if (offsets_known && expected != entry.end - entry.begin) {
      report(entry.name, "data_offsets span " + std::to_string(entry.end - entry.begin) + " bytes, expected " +
                             std::to_string(expected) + " by dtype and shape");
    }
  }

  void check_coverage() {
    auto& entries = header_.entries;
    std::sort(entries.begin(), entries.end(),
              [](const auto& a, const auto& b) { return std::tie(a.begin, a.end) < std::tie(b.begin, b.end); });
    size_t covered = 0;
    for (const auto& entry : entries) {
      if (entry.begin < covered) report(entry.name, "overlaps the tensor before it");
      if (entry.begin > covered) {
        report(entry.name, std::to_string(entry.begin - covered) + " bytes before it belong to no tensor");
      }
      covered = std::max(covered, entry.end);
    }
    if (covered < data_size()) {
      problems_.push_back(std::to_string(data_size() - covered) + " bytes after the last tensor belong to no tensor");
    }
  }

  void check_bools(const SafetensorsEntry& entry) {
    if (entry.dtype != c10::ScalarType::Bool) return;
    const std::byte* data = file_ + header_.data_begin;
    if (!are_bools(data + entry.begin, entry.end - entry.begin))
      report(entry.name, "holds a BOOL that is neither 0 nor 1");
  }

  std::string path_;
  const std::byte* file_;
  size_t size_;
  SafetensorsHeader header_;
  std::vector<std::string> problems_;
};

inline SafetensorsHeader read_safetensors_header(const std::string& path, const std::byte* file, size_t size) {
  return SafetensorsHeaderReader(path, file, size).read();
}

}  // namespace detail
LORA_NAMESPACE_END
