#pragma once

#include <lora/version.h>

#include <cstddef>
#include <cstdint>
#include <deque>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// What a pickle describes. Values refer to others by their index, so that cycles and shared parts are harmless.
struct PickleValue {
  enum class Kind {
    kNone,
    kBool,        // number
    kInt,         // number
    kWideInt,     // beyond 64 bits
    kFloat,       // the value is left out
    kString,      // text
    kBytes,       // text
    kTuple,       // items
    kList,        // items
    kDict,        // items: key, value, key, value, …
    kSet,         // the items are left out
    kGlobal,      // items: module, name; what Python would import
    kCall,        // items: callable, argument tuple; what Python would run
    kPersistent,  // items: the tuple by which the object is known outside of the pickle
  };

  Kind kind = Kind::kNone;
  int64_t number = 0;
  std::string_view text;  // in the pickle's own bytes
  std::vector<uint32_t> items;
};

/// The values of one pickle.
class PickleValues {
 public:
  using Kind = PickleValue::Kind;

  uint32_t add(PickleValue value) {
    values_.push_back(std::move(value));
    return static_cast<uint32_t>(values_.size() - 1);
  }
  PickleValue& operator[](uint32_t index) { return values_[index]; }
  const PickleValue& operator[](uint32_t index) const { return values_[index]; }

  bool is(uint32_t index, Kind kind) const { return values_[index].kind == kind; }
  /// The i-th item of a value.
  const PickleValue& item(const PickleValue& value, size_t i) const { return values_[value.items[i]]; }

  /// "module.name" of a global; empty for any other value.
  std::string global_name(const PickleValue& value) const {
    if (value.kind != Kind::kGlobal) return "";
    return shortened(item(value, 0).text) + "." + shortened(item(value, 1).text);
  }

  /// What a value is, in Python's words.
  std::string describe(const PickleValue& value) const {
    switch (value.kind) {
      case Kind::kNone:
        return "None";
      case Kind::kBool:
        return "a builtins.bool";
      case Kind::kInt:
      case Kind::kWideInt:
        return "a builtins.int";
      case Kind::kFloat:
        return "a builtins.float";
      case Kind::kString:
        return "a builtins.str";
      case Kind::kBytes:
        return "a builtins.bytes";
      case Kind::kTuple:
        return "a builtins.tuple";
      case Kind::kList:
        return "a builtins.list";
      case Kind::kDict:
        return "a builtins.dict";
      case Kind::kSet:
        return "a builtins.set";
      case Kind::kGlobal:
        return "the name " + global_name(value);
      case Kind::kCall:
        return is(value.items[0], Kind::kGlobal) ? "a call of " + global_name(item(value, 0)) : "a call";
      case Kind::kPersistent:
        return "a torch.UntypedStorage";
    }
    return "";
  }

  /// Text of a file for a message, of a bounded length.
  static std::string shortened(std::string_view text) {
    constexpr size_t kLongest = 200;
    return text.size() <= kLongest ? std::string(text) : std::string(text.substr(0, kLongest)) + "…";
  }

 private:
  std::deque<PickleValue> values_;
};

}  // namespace detail
LORA_NAMESPACE_END
