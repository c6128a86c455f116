#pragma once

#include <c10/util/Exception.h>
#include <lora/detail/json.h>
#include <lora/inject/site.h>
#include <lora/io/config_json.h>
#include <lora/io/peft_layout.h>
#include <lora/methods/lora.h>
#include <lora/version.h>
#include <lora/weight/weight_adapter.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// The rank and alpha that a file of PEFT has for each weight of a LoRA adapter: the parts of a fused projection are
/// one update there, and both weights of a MultiheadAttention have one rank.
class StoredRanks {
 public:
  explicit StoredRanks(const LoRA& method) : method_(&method) {}

  void add(const Site& site, const WeightAdapter& updates) {
    int64_t rank = 0;
    for (const auto& part : updates.parts) rank += lora_update(part).stored_rank();
    entries_.push_back({&site, &lora_update(updates.parts.front()), rank, rank, 0});
  }

  /// Chooses them once all weights are added: the smaller rank of a MultiheadAttention is filled up with zeros. Throws
  /// c10::ValueError where its weights have different scalings.
  void settle() {
    for (auto& entry : entries_) {
      for (const auto& other : entries_) {
        if (module(other) == module(entry)) entry.rank = std::max(entry.rank, other.own_rank);
      }
      entry.alpha = alpha_for(entry);
    }
    for (const auto& entry : entries_) {
      for (const auto& other : entries_) {
        TORCH_CHECK_VALUE(module(other) != module(entry) || same(other.alpha, entry.alpha),
                          "[lora::save] found different scalings on the weights of ", module(entry),
                          ", expected one: PEFT has one rank and one alpha for a MultiheadAttention; choose "
                          "alpha_pattern so that alpha / rank are equal");
      }
    }
  }

  /// Whether a weight's factors have a start of their own beside them in the file.
  bool has_starts() const {
    return std::any_of(entries_.begin(), entries_.end(),
                       [](const Entry& entry) { return entry.update->stored_rank() != entry.update->rank(); });
  }

  /// Whether a weight has a larger rank in the file.
  bool fills() const {
    return std::any_of(entries_.begin(), entries_.end(),
                       [](const Entry& entry) { return entry.rank != entry.own_rank; });
  }

  /// The rank that the weight's factors are filled up to; 0: they are stored as they are.
  int64_t filled(const Site& site) const {
    const auto found =
        std::find_if(entries_.begin(), entries_.end(), [&](const Entry& entry) { return entry.site == &site; });
    return found->rank == found->own_rank ? 0 : found->rank;
  }

  /// Puts them into a configuration that does not say them as it is.
  void write(Json& json) const {
    if (has_starts()) json["init_lora_weights"] = true;
    if (as_configured()) return;
    json["r"] = entries_.front().rank;
    json["lora_alpha"] = number(entries_.front().alpha);
    json["rank_pattern"] = pattern([](const Entry& entry) { return static_cast<double>(entry.rank); });
    json["alpha_pattern"] = pattern([](const Entry& entry) { return entry.alpha; });
  }

 private:
  struct Entry {
    const Site* site;
    const LoraUpdate* update;
    int64_t own_rank;
    int64_t rank;
    double alpha;
  };

  static std::string module(const Entry& entry) { return peft_module(*entry.site); }

  /// The alpha that gives the update's scaling at the stored rank.
  double alpha_for(const Entry& entry) const {
    const auto& update = *entry.update;
    const auto names = names_of(*entry.site);
    const auto divisor = [&](int64_t rank) {
      return method_->config().use_rslora() ? std::sqrt(static_cast<double>(rank)) : static_cast<double>(rank);
    };
    // Modules written with LoRALinear may have other configurations than the first one of the name.
    const bool as_configured = update.rank() == method_->rank(names) && update.scaling() == method_->scaling(names);
    const double alpha = as_configured ? method_->alpha(names) : update.scaling() * divisor(update.rank());
    return entry.rank == update.rank() ? alpha : alpha * divisor(entry.rank) / divisor(update.rank());
  }

  /// Whether the configuration gives every stored rank and alpha to a reader that knows modules by PEFT's names.
  bool as_configured() const {
    return std::all_of(entries_.begin(), entries_.end(), [&](const Entry& entry) {
      const std::vector<std::string> names{module(entry)};
      return method_->rank(names) == entry.rank && method_->alpha(names) == entry.alpha;
    });
  }

  /// The entries of rank_pattern or alpha_pattern for the modules that differ from the first one.
  template <class Value>
  Json pattern(const Value& value) const {
    auto json = Json::object();
    const auto common = value(entries_.front());
    for (const auto& entry : entries_) {
      const auto path = module(entry);
      const auto last = path.substr(path.rfind('.') + 1);
      bool uniform = true;
      for (const auto& other : entries_) {
        const auto other_path = module(other);
        const bool same_name = other_path.substr(other_path.rfind('.') + 1) == last;
        uniform = uniform && (!same_name || value(other) == value(entry));
      }
      if (value(entry) != common) json[uniform ? escaped(last) : "^" + escaped(path)] = number(value(entry));
    }
    return json;
  }

  const LoRA* method_;
  std::vector<Entry> entries_;
};

}  // namespace detail
LORA_NAMESPACE_END
