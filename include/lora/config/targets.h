#pragma once

#include <c10/util/Exception.h>
#include <lora/detail/python_regex.h>
#include <lora/version.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace torch {
namespace nn {
class Module;
}
namespace jit {
struct Module;
}
}  // namespace torch

LORA_NAMESPACE_BEGIN

namespace detail {

/// A path as a regular expression that matches nothing else.
inline std::string escaped(const std::string& path) {
  std::string result;
  for (const char c : path) {
    result += (std::isalnum(static_cast<unsigned char>(c)) || c == '_' ? "" : "\\") + std::string(1, c);
  }
  return result;
}

}  // namespace detail

/// A named range of rows of a fused projection, for instance {"q", 768}; the ranges follow each other from row 0.
struct FusedPart {
  std::string name;  ///< As targets call it: "q".
  int64_t size = 0;  ///< Rows.
};

/// The modules that an adapter goes into, in PEFT's three forms: a list of names, each the whole path of a module or
/// its end behind a dot; one regular expression over the whole path (Python's dialect); or "all-linear".
///
/// A name in a list may choose parts of a fused projection: "c_attn[q,v]".
class TargetModules {
 public:
  /// The forms; kNone: no targets.
  enum class Kind { kNone, kList, kRegex, kAllLinear };

  /// One name of a list, or the regular expression.
  struct Entry {
    std::string text;                ///< As the user wrote it: "c_attn[q,v]".
    std::string name;                ///< "c_attn".
    std::vector<std::string> parts;  ///< {"q", "v"}; empty: the whole weight.
  };

  TargetModules() = default;
  /// A list of names.
  TargetModules(std::initializer_list<std::string> names) : TargetModules(std::vector<std::string>(names)) {}
  /// A list of names.
  TargetModules(const std::vector<std::string>& names) : kind_(Kind::kList) {  // NOLINT: implicit as TORCH_ARG wants
    for (const auto& name : names) entries_.push_back(parse(name));
  }
  /// A regular expression, or "all-linear".
  TargetModules(const char* regex) : TargetModules(std::string(regex)) {}  // NOLINT
  /// A regular expression, or "all-linear". Throws c10::ValueError for what Python would read differently.
  TargetModules(const std::string& regex) {  // NOLINT
    std::string lower = regex;
    std::transform(lower.begin(), lower.end(), lower.begin(), [](unsigned char c) { return std::tolower(c); });
    kind_ = lower == "all-linear" ? Kind::kAllLinear : Kind::kRegex;
    entries_.push_back({regex, regex, {}});
    if (kind_ == Kind::kRegex) regex_ = std::make_shared<const detail::PythonRegex>(regex);
  }

  /// The form.
  Kind kind() const noexcept { return kind_; }
  /// Whether nothing is chosen.
  bool empty() const noexcept { return entries_.empty(); }
  /// The names of a list, or the one expression.
  const std::vector<Entry>& entries() const noexcept { return entries_; }

  /// Whether `entry` names the module at `path`; "all-linear" is decided by the hosts, not by the path.
  bool matches(const Entry& entry, const std::string& path) const {
    if (kind_ == Kind::kRegex) return regex_->fullmatch(path);
    return kind_ == Kind::kList && is_path_or_suffix(entry.name, path);
  }

  /// Whether `name` is `path` or its end behind a dot.
  static bool is_path_or_suffix(const std::string& name, const std::string& path) {
    if (name.size() >= path.size()) return name == path;
    return path[path.size() - name.size() - 1] == '.' &&
           path.compare(path.size() - name.size(), name.size(), name) == 0;
  }

 private:
  static Entry parse(const std::string& text) {
    Entry entry{text, text, {}};
    const auto open = text.find('[');
    if (open != std::string::npos && !text.empty() && text.back() == ']') {
      entry.name = text.substr(0, open);
      std::string part;
      for (size_t i = open + 1; i < text.size(); ++i) {
        if (text[i] == ',' || text[i] == ']') {
          TORCH_CHECK_VALUE(!part.empty(), "[lora::config] found an empty part in the target \"", text,
                            "\", expected names as in \"c_attn[q,v]\"");
          TORCH_CHECK_VALUE(std::find(entry.parts.begin(), entry.parts.end(), part) == entry.parts.end(),
                            "[lora::config] found the part ", part, " twice in the target \"", text, "\"");
          entry.parts.push_back(part);
          part.clear();
        } else if (text[i] != ' ') {
          part += text[i];
        }
      }
    }
    TORCH_CHECK_VALUE(!entry.name.empty(),
                      "[lora::config] found an empty name in target_modules, expected a module's "
                      "path or its end, as \"c_attn\"");
    return entry;
  }

  Kind kind_ = Kind::kNone;
  std::vector<Entry> entries_;
  std::shared_ptr<const detail::PythonRegex> regex_;
};

/// A value or a list of values: PEFT's files keep the two apart.
template <class Value>
class OneOrMore {
 public:
  OneOrMore() = default;
  /// A value.
  template <class One, class = std::enable_if_t<std::is_convertible_v<One, Value>>>
  OneOrMore(One value) : values_{Value(std::move(value))} {}  // NOLINT: implicit as TORCH_ARG wants
  /// A list.
  OneOrMore(std::initializer_list<Value> values) : values_(values), is_list_(true) {}
  /// A list.
  OneOrMore(std::vector<Value> values) : values_(std::move(values)), is_list_(true) {}  // NOLINT

  /// Whether there is no value.
  bool empty() const noexcept { return values_.empty(); }
  /// Whether it was given as a list.
  bool is_list() const noexcept { return is_list_; }
  /// The value or values.
  const std::vector<Value>& values() const noexcept { return values_; }

 private:
  std::vector<Value> values_;
  bool is_list_ = false;
};

/// The layers that target names are confined to: those with the given indices in a list of layers.
class LayerFilter {
 public:
  LayerFilter() = default;
  /// `lists` are regular expressions for the path of the list, or its end behind a dot, as "h"; none: any list.
  LayerFilter(std::vector<int64_t> indices, const std::vector<std::string>& lists) : indices_(std::move(indices)) {
    for (const auto& list : lists) lists_.emplace_back("(.*\\.)?(" + list + ")");
  }

  /// Whether no layer is confined.
  bool empty() const noexcept { return indices_.empty(); }

  /// The same by PEFT's rule: without lists, it counts in lists below another module only.
  bool contains_in_peft(const std::string& path) const {
    if (!lists_.empty()) return contains(path);
    return contains(path, [](const std::string& name) { return name.find('.') != std::string::npos; }).value_or(false);
  }

  /// Whether the first number in the path that stands behind a list's name is one of the indices; of several lists the
  /// first that the path holds decides.
  bool contains(const std::string& path) const {
    if (lists_.empty()) return contains(path, [](const std::string&) { return true; }).value_or(false);
    for (const auto& list : lists_) {
      const auto found = contains(path, [&](const std::string& name) { return list.fullmatch(name); });
      if (found) return *found;
    }
    return false;
  }

 private:
  template <class IsList>
  std::optional<bool> contains(const std::string& path, const IsList& is_list) const {
    constexpr size_t kMostDigits = 18;  // an int64_t holds them
    for (size_t begin = path.find('.'); begin != std::string::npos; begin = path.find('.', begin + 1)) {
      const auto end = path.find('.', begin + 1);
      if (end == std::string::npos) break;
      const auto component = path.substr(begin + 1, end - begin - 1);
      const bool is_number = !component.empty() && component.find_first_not_of("0123456789") == std::string::npos;
      if (!is_number || component.size() > kMostDigits || !is_list(path.substr(0, begin))) continue;
      return std::find(indices_.begin(), indices_.end(), std::stoll(component)) != indices_.end();
    }
    return std::nullopt;
  }

  std::vector<int64_t> indices_;
  std::vector<detail::PythonRegex> lists_;
};

/// Which biases of the model an adapter has copies of.
enum class BiasCopies {
  kNone,         ///< Of none.
  kAll,          ///< Of every layer.
  kAdaptedOnly,  ///< Of the layers that the adapter updates: PEFT's "lora_only".
};

/// PEFT's values for a BiasCopies.
inline constexpr std::array<const char*, 3> peft_names(BiasCopies) { return {"none", "all", "lora_only"}; }

/// Rows of embeddings that an adapter has copies of: tokens by the embedding's path or its end behind a dot. Without a
/// name they are of the model's input embedding.
class TokenIndices {
 public:
  /// Rows of one embedding.
  using Tokens = std::vector<int64_t>;

  TokenIndices() = default;
  /// Rows of the input embedding.
  TokenIndices(std::initializer_list<int64_t> tokens) : TokenIndices(Tokens(tokens)) {}
  /// Rows of the input embedding.
  TokenIndices(Tokens tokens) : is_list_(true) { embeddings_.emplace_back("", std::move(tokens)); }  // NOLINT
  /// Rows by embedding.
  TokenIndices(std::initializer_list<std::pair<std::string, Tokens>> embeddings) : embeddings_(embeddings) {}
  /// Rows by embedding.
  TokenIndices(std::vector<std::pair<std::string, Tokens>> embeddings)  // NOLINT
      : embeddings_(std::move(embeddings)) {}

  /// Whether there are no rows.
  bool empty() const noexcept { return embeddings_.empty(); }
  /// Whether they are of the input embedding, without its name.
  bool is_list() const noexcept { return is_list_; }
  /// The rows by embedding; of a list, under an empty name.
  const std::vector<std::pair<std::string, Tokens>>& embeddings() const noexcept { return embeddings_; }

 private:
  std::vector<std::pair<std::string, Tokens>> embeddings_;
  bool is_list_ = false;
};

/// Where an adapter goes and what it has copies of: the part of a configuration that all methods share.
struct Targeting {
  /// Whether to adapt a module.
  using Predicate = std::function<bool(const std::string& path, const torch::nn::Module& module)>;
  /// The same in TorchScript.
  using ScriptPredicate = std::function<bool(const std::string& path, const torch::jit::Module& module)>;
  /// Row ranges by the module's path or its end behind a dot.
  using FusedParts = std::vector<std::pair<std::string, std::vector<FusedPart>>>;

  TargetModules modules;                     ///< By target_modules.
  TargetModules exclude;                     ///< By exclude_modules.
  Predicate predicate;                       ///< By target_if.
  ScriptPredicate script_predicate;          ///< By target_script_if.
  FusedParts fused_parts;                    ///< The declared row ranges.
  LayerFilter layers;                        ///< By layers_to_transform with layers_pattern.
  BiasCopies bias = BiasCopies::kNone;       ///< By bias.
  bool update_bias = false;                  ///< Whether the updates have a bias of their own.
  bool scales_bias = false;                  ///< Whether the updates may scale the layer's bias.
  std::vector<std::string> modules_to_save;  ///< By modules_to_save.
  TokenIndices tokens;                       ///< By trainable_token_indices.
};

LORA_NAMESPACE_END
