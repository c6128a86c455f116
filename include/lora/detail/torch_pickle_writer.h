#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/strides.h>
#include <caffe2/serialize/inline_container.h>
#include <lora/detail/atomic_file.h>
#include <lora/detail/error.h>
#include <lora/detail/tensor_bytes.h>
#include <lora/detail/torch_pickle_dtypes.h>
#include <lora/version.h>

#include <cstddef>
#include <cstdint>
#include <exception>
#include <map>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// Writes tensors as Python's torch.save writes a dict of them: a pickle of protocol 2, then the storages it refers to.
class TorchPickleWriter {
 public:
  explicit TorchPickleWriter(AtomicFile& file) : file_(file) {}

  void write(const std::map<std::string, at::Tensor>& tensors) {
    check(tensors);
    pickle_ = "\x80\x02}(";
    for (const auto& [name, tensor] : tensors) {
      add_string(name);
      add_tensor(tensor);
    }
    pickle_ += "u.";
    write_records();
  }

 private:
  /// The memory that a tensor's elements are in; equal ones are written once.
  using Identity = std::tuple<const void*, at::ScalarType, std::vector<int64_t>, std::vector<int64_t>, bool, bool>;

  void check(const std::map<std::string, at::Tensor>& tensors) const {
    std::vector<std::string> problems;
    for (const auto& [name, tensor] : tensors) {
      auto why_not = why_no_bytes(tensor);
      if (why_not.empty() && find_dtype(tensor) == nullptr) {
        why_not = std::string("has a dtype that is not written here: ") + toString(tensor.scalar_type());
      }
      if (why_not.empty() && !is_utf8(name)) why_not = "the name is not UTF-8";
      if (!why_not.empty()) problems.push_back("tensor '" + name + "' " + why_not);
    }
    if (!problems.empty()) throw FormatError(file_.path(), std::move(problems));
  }

  static const PickleDtype* find_dtype(const at::Tensor& tensor) {
    return find_pickle_dtype([&](const auto& known) { return known.type == tensor.scalar_type(); });
  }

  template <class Number>
  void add_number(char operation, Number number) {
    pickle_ += operation;
    pickle_.append(reinterpret_cast<const char*>(&number), sizeof number);
  }
  void add_string(std::string_view text) {
    add_number('X', static_cast<uint32_t>(text.size()));
    pickle_ += text;
  }
  void add_integer(int64_t number) {
    pickle_ += '\x8a';  // LONG1
    add_number(sizeof number, number);
  }
  void add_global(std::string_view module, std::string_view name) {
    pickle_.append("c").append(module).append("\n").append(name).append("\n");
  }
  void add_tuple(c10::IntArrayRef numbers) {
    pickle_ += '(';
    for (const auto number : numbers) add_integer(number);
    pickle_ += 't';
  }

  void add_tensor(const at::Tensor& tensor) {
    const auto& dtype = *find_dtype(tensor);
    const bool typed = !dtype.storage.empty();
    add_global("torch._utils", typed ? "_rebuild_tensor_v2" : "_rebuild_tensor_v3");
    pickle_ += "((";
    add_string("storage");
    add_global(typed ? "torch" : "torch.storage", typed ? dtype.storage : "UntypedStorage");
    add_string(std::to_string(storage_of(tensor)));
    add_string("cpu");
    add_integer(tensor.numel() * (typed ? 1 : static_cast<int64_t>(tensor.element_size())));
    pickle_ += "tQ";
    add_integer(0);
    add_tuple(tensor.sizes());
    add_tuple(c10::contiguous_strides(tensor.sizes()));
    pickle_ += '\x89';  // no gradient
    add_global("collections", "OrderedDict");
    pickle_ += ")R";
    if (!typed) add_global("torch", dtype.name);
    pickle_ += "tR";
  }

  size_t storage_of(const at::Tensor& tensor) {
    const Identity identity{tensor.const_data_ptr(), tensor.scalar_type(), tensor.sizes().vec(),
                            tensor.strides().vec(),  tensor.is_conj(),     tensor.is_neg()};
    const auto [entry, is_new] = storages_.emplace(identity, data_.size());
    if (is_new) data_.push_back(tensor);
    return entry->second;
  }

  void write_records() {
    // LibTorch's writer must not see an error: it ends the process when it fails twice.
    std::exception_ptr failure;
    const auto check = [&] {
      if (failure) std::rethrow_exception(failure);
    };
    {
      caffe2::serialize::PyTorchStreamWriter writer([&](const void* data, size_t size) {
        try {
          if (!failure) file_.write(data, size);
        } catch (...) {
          failure = std::current_exception();
        }
        return size;
      });
      writer.writeRecord("data.pkl", pickle_.data(), pickle_.size());
      writer.writeRecord("byteorder", "little", 6);
      for (size_t i = 0; i < data_.size(); ++i) {
        const auto data = in_a_row(data_[i]);
        writer.writeRecord("data/" + std::to_string(i), data.const_data_ptr(), data.nbytes());
        check();
      }
      writer.writeEndOfFile();
    }
    check();
  }

  AtomicFile& file_;
  std::string pickle_;
  std::map<Identity, size_t> storages_;
  std::vector<at::Tensor> data_;
};

}  // namespace detail
LORA_NAMESPACE_END
