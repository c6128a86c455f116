#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <lora/detail/crc32.h>
#include <lora/detail/mmap.h>
#include <lora/detail/zip_reader.h>
#include <lora/version.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// The zip file that torch.save writes: all its records are in one folder, the tensors' bytes in "data/<key>".
class TorchArchive {
 public:
  TorchArchive(const std::string& path, std::shared_ptr<MappedFile> file)
      : file_(std::move(file)), zip_(path, file_->data(), file_->size()) {
    folder_ = zip_.first_name().substr(0, zip_.first_name().find('/') + 1);
  }

  size_t size() const { return file_->size(); }
  bool has(const std::string& name) const { return zip_.entries().count(folder_ + name) != 0; }

  /// The content of a record, or nothing and a problem.
  std::optional<std::string_view> record(const std::string& name, std::vector<std::string>& problems) const {
    const auto entry = "entry '" + folder_ + name + "' ";
    const auto found = zip_.entries().find(folder_ + name);
    if (found == zip_.entries().end()) return problems.push_back(entry + "is missing"), std::nullopt;
    const auto& [begin, size, checksum, unreadable] = found->second;
    if (unreadable != nullptr) return problems.push_back(entry + unreadable), std::nullopt;
    // All checksums are zero where torch.serialization.set_crc32_options(False) held when the file was written.
    if (checksum != 0 && crc32(file_->data() + begin, size) != checksum) {
      return problems.push_back(entry + "does not have the checksum that the file gives it: it is damaged"),
             std::nullopt;
    }
    return std::string_view(reinterpret_cast<const char*>(file_->data()) + begin, size);
  }

  /// The bytes of a record as a storage, or nothing and a problem: where they are in the mapped file, which lives as
  /// long as the storage, or copied where a dtype would not be aligned.
  std::optional<at::Storage> storage(const std::string& key, std::vector<std::string>& problems) {
    const auto known = storages_.find(key);
    if (known != storages_.end()) return known->second;
    const auto bytes = record("data/" + key, problems);
    if (!bytes) return storages_[key] = std::nullopt;
    constexpr size_t kLargestElement = 16;
    // The file is mapped copy-on-write.
    auto* data = const_cast<char*>(bytes->data());
    const auto size = static_cast<int64_t>(bytes->size());
    at::Tensor tensor;
    if (size > 0 && reinterpret_cast<std::uintptr_t>(data) % kLargestElement == 0) {
      tensor = at::from_blob(
          data, {size}, [file = file_](void*) {}, at::kByte);
    } else {
      tensor = at::empty({size}, at::kByte);
      if (size > 0) std::memcpy(tensor.mutable_data_ptr(), data, bytes->size());
    }
    return storages_[key] = tensor.storage();
  }

 private:
  std::shared_ptr<MappedFile> file_;
  ZipReader zip_;
  std::string folder_;
  std::map<std::string, std::optional<at::Storage>> storages_;  // nothing: the problem has been told
};

}  // namespace detail
LORA_NAMESPACE_END
