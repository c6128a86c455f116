#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/safe_numerics.h>
#include <lora/detail/error.h>
#include <lora/detail/pickle_machine.h>
#include <lora/detail/pickle_value.h>
#include <lora/detail/tensor_bytes.h>
#include <lora/detail/torch_archive.h>
#include <lora/detail/torch_pickle_dtypes.h>
#include <lora/version.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// Finds the tensors in what Python's torch.save wrote: dicts of dicts of tensors.
class TorchPickleReader {
 public:
  TorchPickleReader(std::string path, TorchArchive& archive) : path_(std::move(path)), archive_(archive) {}

  std::map<std::string, at::Tensor> read() {
    if (archive_.has("constants.pkl")) {
      throw FormatError(path_, {"found a TorchScript module, expected tensors; load it by torch::jit::load"});
    }
    const auto pickle = archive_.record("data.pkl", problems_);
    const auto order = archive_.has("byteorder") ? archive_.record("byteorder", problems_) : "little";
    if (order && order != "little") {
      problems_.push_back("found the byte order " + PickleValues::shortened(*order) + ", expected little");
    }
    finish();
    const auto root = PickleMachine(path_, *pickle).run(values_);
    if (values_.is(root, Kind::kDict)) {
      collect(values_[root], "", 0);
    } else {
      problems_.push_back("found " + values_.describe(values_[root]) + ", expected a dict of tensors");
    }
    finish();
    return std::move(tensors_);
  }

 private:
  using Kind = PickleValue::Kind;

  struct Storage {
    at::Storage storage;
    size_t size = 0;                      // in bytes
    std::optional<at::ScalarType> dtype;  // nothing: untyped
  };
  struct Geometry {
    int64_t offset = 0;
    std::vector<int64_t> sizes;
    std::vector<int64_t> strides;
  };

  void finish() {
    if (!problems_.empty()) throw FormatError(path_, std::move(problems_));
  }
  std::nullopt_t report(const std::string& name, const std::string& problem) {
    problems_.push_back("tensor '" + name + "': " + problem);
    return std::nullopt;
  }

  /// Reads the tensors of a dict and of the dicts in it, whose keys are joined by dots.
  void collect(const PickleValue& dict, const std::string& prefix, size_t depth) {
    constexpr size_t kDeepest = 32, kMostMemory = size_t{1} << 26, kOneTensor = 64;
    for (size_t i = 0; i < dict.items.size(); i += 2) {
      const auto& key = values_.item(dict, i);
      const auto& value = values_.item(dict, i + 1);
      if (key.kind != Kind::kString) {
        problems_.push_back("found " + values_.describe(key) + " as a key in '" + prefix + "', expected a string");
        continue;
      }
      // One dict may stand in many places, so that a short pickle could name tensors without end.
      names_size_ += prefix.size() + key.text.size() + kOneTensor;
      if (depth == kDeepest || names_size_ > kMostMemory) {
        problems_.push_back("the dicts are nested too deeply or name too many tensors");
        return finish();
      }
      const auto name = prefix + std::string(key.text);
      if (value.kind == Kind::kDict) {
        collect(value, name + ".", depth + 1);
      } else if (!is_utf8(name)) {
        report(name, "the name is not UTF-8");
      } else if (const auto tensor = rebuild(name, value)) {
        if (!tensors_.emplace(name, *tensor).second) report(name, "is there twice");
      }
    }
  }

  std::string callee(const PickleValue& value) const {
    return value.kind == Kind::kCall ? values_.global_name(values_.item(value, 0)) : "";
  }

  /// The tensor of a call that would make one in Python, or nothing and a problem.
  std::optional<at::Tensor> rebuild(const std::string& name, const PickleValue& value) {
    const auto* call = &value;
    if (callee(*call) == "torch._utils._rebuild_parameter" && values_.item(*call, 1).items.size() == 3) {
      call = &values_.item(values_.item(*call, 1), 0);  // data, requires_grad, backward_hooks
    }
    const auto function = callee(*call);
    const bool with_dtype = function == "torch._utils._rebuild_tensor_v3";
    if (!with_dtype && function != "torch._utils._rebuild_tensor_v2") {
      problems_.push_back("found " + values_.describe(*call) + " at " + name + ", expected tensors");
      return std::nullopt;
    }
    // storage, offset, sizes, strides, requires_grad, backward_hooks[, dtype][, metadata]
    const auto& arguments = values_.item(*call, 1);
    const size_t count = with_dtype ? 7 : 6;
    if (arguments.kind != Kind::kTuple || arguments.items.size() < count || arguments.items.size() > count + 1) {
      return report(name, "has arguments that are not PyTorch's");
    }
    auto storage = find_storage(name, values_.item(arguments, 0));
    if (!storage) return std::nullopt;
    if (with_dtype) {
      const auto dtype = values_.global_name(values_.item(arguments, 6));
      const auto* found =
          find_pickle_dtype([&](const auto& known) { return dtype == "torch." + std::string(known.name); });
      if (found == nullptr) return report(name, "found the dtype " + dtype + ", expected one of dense numbers");
      storage->dtype = found->type;
    }
    Geometry geometry;
    const auto& offset = values_.item(arguments, 1);
    geometry.offset = offset.number;
    if (offset.kind != Kind::kInt || !read_sizes(values_.item(arguments, 2), geometry.sizes) ||
        !read_sizes(values_.item(arguments, 3), geometry.strides) || geometry.sizes.size() != geometry.strides.size()) {
      return report(name, "has sizes or strides that are no integers or not equal in number");
    }
    if (!check(name, *storage, geometry)) return std::nullopt;
    auto tensor = at::empty({0}, *storage->dtype);
    tensor.set_(storage->storage, geometry.offset, geometry.sizes, geometry.strides);
    if (arguments.items.size() > count && !apply_metadata(values_.item(arguments, count), tensor)) {
      return report(name, "has metadata other than the flags conj and neg");
    }
    return tensor;
  }

  /// The storage of a persistent id: "storage", class, key, location, number of elements.
  std::optional<Storage> find_storage(const std::string& name, const PickleValue& id) {
    if (id.kind != Kind::kPersistent || values_.item(id, 0).items.size() != 5 ||
        !values_.is(id.items[0], Kind::kTuple)) {
      return report(name, "refers to no storage");
    }
    const auto& parts = values_.item(id, 0);
    const auto& key = values_.item(parts, 2);
    const auto& count = values_.item(parts, 4);
    if (key.kind != Kind::kString || count.kind != Kind::kInt) return report(name, "refers to no storage");
    Storage result;
    const auto type = values_.global_name(values_.item(parts, 1));
    if (type != "torch.storage.UntypedStorage" && type != "torch.UntypedStorage") {
      const auto* found = find_pickle_dtype(
          [&](const auto& known) { return !known.storage.empty() && type == "torch." + std::string(known.storage); });
      if (found == nullptr) return report(name, "found the storage " + type + ", expected one of dense numbers");
      result.dtype = found->type;
    }
    const auto storage = archive_.storage(std::string(key.text), problems_);
    if (!storage) return std::nullopt;
    result.storage = *storage;
    result.size = storage->nbytes();
    uint64_t bytes = 0;
    const uint64_t element = result.dtype ? c10::elementSize(*result.dtype) : 1;
    if (count.number < 0 || c10::mul_overflows(static_cast<uint64_t>(count.number), element, &bytes) ||
        bytes != result.size) {
      return report(name, "its storage has " + std::to_string(result.size) + " bytes, expected " +
                              std::to_string(count.number) + " elements of " + std::to_string(element));
    }
    return result;
  }

  bool read_sizes(const PickleValue& tuple, std::vector<int64_t>& sizes) const {
    constexpr size_t kMostDimensions = 64;  // TensorIterator's limit
    if (tuple.kind != Kind::kTuple || tuple.items.size() > kMostDimensions) return false;
    for (const auto item : tuple.items) {
      if (!values_.is(item, Kind::kInt)) return false;
      sizes.push_back(values_[item].number);
    }
    return true;
  }

  /// Whether every element lies in the storage; that nothing overflows holds for empty tensors too.
  bool check(const std::string& name, const Storage& storage, const Geometry& geometry) {
    if (!storage.dtype) return report(name, "has no dtype"), false;
    uint64_t bytes = c10::elementSize(*storage.dtype), end = static_cast<uint64_t>(geometry.offset) + 1;
    bool overflows = false, negative = geometry.offset < 0, empty = false;
    for (size_t i = 0; i < geometry.sizes.size(); ++i) {
      const auto extent = static_cast<uint64_t>(geometry.sizes[i]), stride = static_cast<uint64_t>(geometry.strides[i]);
      negative = negative || geometry.sizes[i] < 0 || geometry.strides[i] < 0;
      empty = empty || extent == 0;
      uint64_t reach = 0;
      overflows = c10::mul_overflows(bytes, std::max<uint64_t>(extent, 1), &bytes) || overflows;
      overflows = c10::mul_overflows(std::max<uint64_t>(extent, 1) - 1, stride, &reach) || overflows;
      overflows = c10::add_overflows(end, reach, &end) || overflows;
    }
    if (negative) return report(name, "has a negative offset, size or stride"), false;
    overflows = c10::mul_overflows(end, uint64_t{c10::elementSize(*storage.dtype)}, &end) || overflows;
    constexpr auto kLargest = static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
    if (overflows || bytes > kLargest || end > kLargest) return report(name, "has sizes that overflow"), false;
    if (!empty && end > storage.size) {
      report(name, "reaches byte " + std::to_string(end) + " of its storage of " + std::to_string(storage.size));
      return false;
    }
    // A stride of 0 repeats elements, without a limit: the first use of the tensor would make them all.
    if (!empty && bytes > archive_.size()) return report(name, "repeats elements beyond the file's own size"), false;
    if (*storage.dtype == at::kBool && !holds_bools(storage)) {
      return report(name, "holds a bool that is neither 0 nor 1"), false;
    }
    return true;
  }

  bool holds_bools(const Storage& storage) {
    const auto [known, is_new] = holds_bools_.emplace(storage.storage.data(), false);
    if (is_new) known->second = are_bools(static_cast<const std::byte*>(known->first), storage.size);
    return known->second;
  }

  bool apply_metadata(const PickleValue& metadata, const at::Tensor& tensor) const {
    if (metadata.kind == Kind::kNone) return true;
    if (metadata.kind != Kind::kDict) return false;
    for (size_t i = 0; i < metadata.items.size(); i += 2) {
      const auto& key = values_.item(metadata, i);
      const auto& value = values_.item(metadata, i + 1);
      const bool conj = key.text == "conj";
      if (value.kind != Kind::kBool || (!conj && key.text != "neg") || (conj && !tensor.is_complex())) return false;
      conj ? tensor._set_conj(value.number != 0) : tensor._set_neg(value.number != 0);
    }
    return true;
  }

  std::string path_;
  TorchArchive& archive_;
  PickleValues values_;
  size_t names_size_ = 0;
  std::map<const void*, bool> holds_bools_;  // by where the storage is
  std::map<std::string, at::Tensor> tensors_;
  std::vector<std::string> problems_;
};

}  // namespace detail
LORA_NAMESPACE_END
