#pragma once

#include <c10/util/Exception.h>
#include <lora/detail/python_regex.h>
#include <lora/version.h>

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <string>
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

/// A named range of rows of a fused projection, for instance {"q", 768}; the ranges follow each other from row 0.
struct FusedPart {
  std::string name;
  int64_t size = 0;
};

/// The modules that an adapter goes into, in PEFT's three forms: a list of names, each the whole path of a module or
/// its end behind a dot; one regular expression over the whole path (Python's dialect); or "all-linear".
///
/// A name in a list may choose parts of a fused projection: "c_attn[q,v]".
class TargetModules {
 public:
  enum class Kind { kNone, kList, kRegex, kAllLinear };

  struct Entry {
    std::string text;                // as the user wrote it: "c_attn[q,v]"
    std::string name;                // "c_attn"
    std::vector<std::string> parts;  // {"q", "v"}; empty: the whole weight
  };

  TargetModules() = default;
  TargetModules(std::initializer_list<std::string> names) : TargetModules(std::vector<std::string>(names)) {}
  TargetModules(const std::vector<std::string>& names) : kind_(Kind::kList) {  // NOLINT: implicit as TORCH_ARG wants
    for (const auto& name : names) entries_.push_back(parse(name));
  }
  TargetModules(const char* regex) : TargetModules(std::string(regex)) {}  // NOLINT
  TargetModules(const std::string& regex) {                                // NOLINT
    std::string lower = regex;
    std::transform(lower.begin(), lower.end(), lower.begin(), [](unsigned char c) { return std::tolower(c); });
    kind_ = lower == "all-linear" ? Kind::kAllLinear : Kind::kRegex;
    entries_.push_back({regex, regex, {}});
    if (kind_ == Kind::kRegex) regex_ = std::make_shared<const detail::PythonRegex>(regex);
  }

  Kind kind() const noexcept { return kind_; }
  bool empty() const noexcept { return entries_.empty(); }
  const std::vector<Entry>& entries() const noexcept { return entries_; }

  /// Whether `entry` names the module at `path`; "all-linear" is decided by the hosts, not by the path.
  bool matches(const Entry& entry, const std::string& path) const {
    if (kind_ == Kind::kRegex) return regex_->fullmatch(path);
    return kind_ == Kind::kList && is_path_or_suffix(entry.name, path);
  }

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

/// Where the updates of an adapter go: the part of a configuration that all methods share.
struct Targeting {
  using Predicate = std::function<bool(const std::string& path, const torch::nn::Module& module)>;
  using ScriptPredicate = std::function<bool(const std::string& path, const torch::jit::Module& module)>;
  using FusedParts = std::vector<std::pair<std::string, std::vector<FusedPart>>>;

  TargetModules modules;
  TargetModules exclude;
  Predicate predicate;
  ScriptPredicate script_predicate;
  FusedParts fused_parts;
};

LORA_NAMESPACE_END
