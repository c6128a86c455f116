#pragma once

#include <ATen/core/Tensor.h>
#include <lora/detail/atomic_file.h>
#include <lora/detail/error.h>
#include <lora/detail/mmap.h>
#include <lora/detail/tensor_bytes.h>
#include <lora/detail/torch_archive.h>
#include <lora/detail/torch_pickle_reader.h>
#include <lora/detail/torch_pickle_writer.h>
#include <lora/version.h>
#include <torch/types.h>

#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// The reason why bytes cannot be what torch.save writes today, or nothing.
inline std::string why_no_torch_archive(std::string_view bytes) {
  constexpr std::string_view kZip("PK\x03\x04", 4), kLegacy("\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20", 10);
  constexpr std::string_view kTar("ustar");
  constexpr size_t kTarPosition = 257;
  const std::string again = "; load it by torch.load in Python and save it again by torch.save";
  if (bytes.substr(0, kZip.size()) == kZip) return "";
  if (bytes.substr(0, kLegacy.size()) == kLegacy)
    return "found the format of PyTorch before 1.6, expected its zip file" + again;
  if (bytes.size() > kTarPosition && bytes.substr(kTarPosition, kTar.size()) == kTar) {
    return "found a tar file, which PyTorch wrote before 0.2, expected its zip file" + again;
  }
  return "does not begin as a zip file, expected what torch.save writes";
}

}  // namespace detail

/// Reads the tensors that Python's torch.save wrote (.pt, .pth, .bin) by name, on the CPU; nothing of the file is run.
///
/// A dict of tensors and parameters; those of dicts in it have their keys joined by dots. The file is mapped as
/// load_safetensors does it, and its checksums are compared. Tensors that shared a storage share it here too. Throws
/// FormatError with every problem of the file: values that are no tensors, too, by their keys.
inline std::map<std::string, torch::Tensor> load_torch_pickle(const std::string& path) {
  const auto file = detail::MappedFile::open(path);
  const auto problem = detail::why_no_torch_archive({reinterpret_cast<const char*>(file->data()), file->size()});
  if (!problem.empty()) throw FormatError(path, {problem});
  detail::TorchArchive archive(path, file);
  return detail::TorchPickleReader(path, archive).read();
}

/// Writes tensors of any device and stride as a dict that torch.load(path, weights_only=True) reads in Python.
///
/// Each is written with its own elements in a row; those that are one and the same stay one storage. The file appears
/// whole or not at all, as by save_safetensors.
inline void save_torch_pickle(const std::map<std::string, torch::Tensor>& tensors, const std::string& path) {
  detail::AtomicFile file(path);
  detail::TorchPickleWriter(file).write(tensors);
  file.commit();
}

LORA_NAMESPACE_END
