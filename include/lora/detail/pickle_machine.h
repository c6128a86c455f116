#pragma once

#include <lora/detail/error.h>
#include <lora/detail/pickle_value.h>
#include <lora/version.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// Reads a pickle of Python's protocols 2 to 5 without running anything of it.
///
/// What Python would import or call becomes a value that names it (kGlobal, kCall); one call alone is understood,
/// collections.OrderedDict(), which becomes a kDict. Attributes that a pickle gives to objects are passed over, as is
/// what it adds to objects that calls made. The work and the memory are bounded by the pickle's length.
class PickleMachine {
 public:
  PickleMachine(std::string path, std::string_view pickle) : path_(std::move(path)), pickle_(pickle) {}

  /// Returns the index of the pickled object in `values`.
  uint32_t run(PickleValues& values) {
    values_ = &values;
    for (size_t operations = 0; take(1).front() != '.'; ++operations) {  // '.' is STOP
      if (operations == kMostOperations) stop("has more than " + std::to_string(operations) + " operations");
      start_ = position_ - 1;
      step(static_cast<unsigned char>(pickle_[start_]));
    }
    if (position_ != pickle_.size()) stop("has bytes behind its end");
    return pop();
  }

 private:
  using Kind = PickleValue::Kind;
  using Items = std::vector<uint32_t>;  // indices of values
  static constexpr size_t kMostOperations = size_t{1} << 23;

  [[noreturn]] void stop(const std::string& problem) const {
    throw FormatError(path_, {"the pickle " + problem + " at its byte " + std::to_string(start_)});
  }

  std::string_view take(uint64_t size) {
    if (size > pickle_.size() - position_) stop("ends within an operation (truncated?)");
    const auto bytes = pickle_.substr(position_, size);
    position_ += size;
    return bytes;
  }
  /// A little-endian number.
  template <class Number>
  Number number() {
    Number value = 0;
    std::memcpy(&value, take(sizeof value).data(), sizeof value);
    return value;
  }
  std::string_view line() {
    const auto end = pickle_.find('\n', position_);
    if (end == std::string_view::npos) stop("ends within a name (truncated?)");
    const auto text = take(end - position_);
    take(1);
    return text;
  }

  void push(PickleValue value) { stack_.push_back(values_->add(std::move(value))); }
  void push(Kind kind, std::string_view text) { push({kind, 0, text, {}}); }
  void push(Kind kind, int64_t value) { push({kind, value, {}, {}}); }
  void push(Kind kind, Items items) { push({kind, 0, {}, std::move(items)}); }

  size_t floor() const { return marks_.empty() ? 0 : marks_.back(); }
  uint32_t pop() {
    if (stack_.size() <= floor()) stop("takes a value that is not there");
    const auto index = stack_.back();
    stack_.pop_back();
    return index;
  }
  uint32_t top() {
    stack_.push_back(pop());
    return stack_.back();
  }
  Items pop(size_t count) {
    if (stack_.size() - floor() < count) stop("takes a value that is not there");
    Items items(stack_.end() - static_cast<std::ptrdiff_t>(count), stack_.end());
    stack_.resize(stack_.size() - count);
    return items;
  }
  /// All values above the last mark, which goes too.
  Items pop_to_mark() {
    if (marks_.empty()) stop("closes a group that was not opened");
    auto items = pop(stack_.size() - floor());
    marks_.pop_back();
    return items;
  }

  void remember(uint64_t key) { memo_[key] = top(); }
  void recall(uint64_t key) {
    const auto found = memo_.find(key);
    if (found == memo_.end()) stop("refers to a value that was not stored");
    stack_.push_back(found->second);
  }

  void append(const Items& items, Kind kind) {
    if (kind == Kind::kDict && items.size() % 2 != 0) stop("has a key without a value");
    PickleValue& target = (*values_)[top()];
    if (target.kind == kind) target.items.insert(target.items.end(), items.begin(), items.end());
  }

  void long_integer(std::string_view bytes) {
    if (bytes.size() > sizeof(int64_t)) return push(Kind::kWideInt, int64_t{0});
    const bool negative = !bytes.empty() && (static_cast<unsigned char>(bytes.back()) & 0x80) != 0;
    int64_t value = negative ? -1 : 0;
    std::memcpy(&value, bytes.data(), bytes.size());
    push(Kind::kInt, value);
  }

  void global(Items names) {
    if (!values_->is(names[0], Kind::kString) || !values_->is(names[1], Kind::kString)) stop("imports what is no name");
    push(Kind::kGlobal, std::move(names));
  }

  void check_protocol(int protocol) const {
    if (protocol < 2 || protocol > 5) stop("has protocol " + std::to_string(protocol) + ", expected 2 to 5,");
  }

  void call(Items items) {
    const auto& arguments = (*values_)[items[1]];
    const bool is_dict = values_->global_name((*values_)[items[0]]) == "collections.OrderedDict" &&
                         arguments.kind == Kind::kTuple && arguments.items.empty();
    if (is_dict) return push(Kind::kDict, Items());
    push(Kind::kCall, std::move(items));
  }

  /// Runs one operation. The names in the comments are those of Python's pickletools.
  void step(unsigned char operation) {
    switch (operation) {
      case 0x80:  // PROTO
        return check_protocol(number<uint8_t>());
      case 0x95:  // FRAME
        take(sizeof(uint64_t));
        return;
      case 'N':  // NONE
        return push(PickleValue());
      case 0x88:  // NEWTRUE
      case 0x89:  // NEWFALSE
        return push(Kind::kBool, int64_t{operation == 0x88});
      case 'J':  // BININT
        return push(Kind::kInt, int64_t{number<int32_t>()});
      case 'K':  // BININT1
        return push(Kind::kInt, int64_t{number<uint8_t>()});
      case 'M':  // BININT2
        return push(Kind::kInt, int64_t{number<uint16_t>()});
      case 0x8a:  // LONG1
        return long_integer(take(number<uint8_t>()));
      case 0x8b:  // LONG4
        return long_integer(take(number<uint32_t>()));
      case 'G':  // BINFLOAT
        take(sizeof(double));
        return push(Kind::kFloat, int64_t{0});
      case 0x8c:  // SHORT_BINUNICODE
        return push(Kind::kString, take(number<uint8_t>()));
      case 'X':  // BINUNICODE
        return push(Kind::kString, take(number<uint32_t>()));
      case 0x8d:  // BINUNICODE8
        return push(Kind::kString, take(number<uint64_t>()));
      case 'C':  // SHORT_BINBYTES
        return push(Kind::kBytes, take(number<uint8_t>()));
      case 'B':  // BINBYTES
        return push(Kind::kBytes, take(number<uint32_t>()));
      case 0x8e:  // BINBYTES8
      case 0x96:  // BYTEARRAY8
        return push(Kind::kBytes, take(number<uint64_t>()));
      case '(':  // MARK
        return marks_.push_back(stack_.size());
      case '0':  // POP
        pop();
        return;
      case 'h':  // BINGET
        return recall(number<uint8_t>());
      case 'j':  // LONG_BINGET
        return recall(number<uint32_t>());
      case 'q':  // BINPUT
        return remember(number<uint8_t>());
      case 'r':  // LONG_BINPUT
        return remember(number<uint32_t>());
      case 0x94:  // MEMOIZE
        return remember(memo_.size());
      case ')':  // EMPTY_TUPLE
        return push(Kind::kTuple, Items());
      case 't':  // TUPLE
        return push(Kind::kTuple, pop_to_mark());
      case 0x85:  // TUPLE1
      case 0x86:  // TUPLE2
      case 0x87:  // TUPLE3
        return push(Kind::kTuple, pop(size_t{operation} - 0x84));
      case ']':  // EMPTY_LIST
        return push(Kind::kList, Items());
      case 'a':  // APPEND
        return append(pop(1), Kind::kList);
      case 'e':   // APPENDS
      case 0x90:  // ADDITEMS
        return append(pop_to_mark(), Kind::kList);
      case '}':  // EMPTY_DICT
        return push(Kind::kDict, Items());
      case 's':  // SETITEM
        return append(pop(2), Kind::kDict);
      case 'u':  // SETITEMS
        return append(pop_to_mark(), Kind::kDict);
      case 0x8f:  // EMPTY_SET
        return push(Kind::kSet, int64_t{0});
      case 'c': {  // GLOBAL
        const auto module = values_->add({Kind::kString, 0, line(), {}});
        return global({module, values_->add({Kind::kString, 0, line(), {}})});
      }
      case 0x93:  // STACK_GLOBAL
        return global(pop(2));
      case 'R':   // REDUCE
      case 0x81:  // NEWOBJ
        return call(pop(2));
      case 0x92:  // NEWOBJ_EX
        pop();
        return call(pop(2));
      case 'b':  // BUILD
        pop();
        top();
        return;
      case 'Q':  // BINPERSID
        return push(Kind::kPersistent, pop(1));
      default:
        stop("has the operation " + std::to_string(operation) + ", which protocols 2 to 5 do not need,");
    }
  }

  std::string path_;
  std::string_view pickle_;
  size_t position_ = 0;
  size_t start_ = 0;  // of the operation
  PickleValues* values_ = nullptr;
  std::vector<uint32_t> stack_;
  std::vector<size_t> marks_;
  std::unordered_map<uint64_t, uint32_t> memo_;
};

}  // namespace detail
LORA_NAMESPACE_END
