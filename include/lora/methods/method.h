#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ne.h>
#include <c10/core/TensorOptions.h>
#include <lora/base/base_rows.h>
#include <lora/config/targets.h>
#include <lora/detail/finite.h>
#include <lora/methods/update.h>
#include <lora/version.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN

/// What an update is made for: ΔW [out_features, in_features] of the weight with these paths, tensors as `options`
/// says.
struct UpdateSpec {
  std::vector<std::string> names;  ///< The weight's paths.
  int64_t in_features = 0;         ///< Columns of ΔW.
  int64_t out_features = 0;        ///< Rows of ΔW.
  at::TensorOptions options;       ///< Dtype and device of the tensors.
  bool initialise = true;          ///< False: the caller fills the tensors, and no random number is drawn.
  bool embedding = false;          ///< An update of a lookup table: a column of ΔW for each entry.
  bool convolution = false;        ///< An update of a kernel.
  bool rows_are_inputs = false;    ///< Of a transposed convolution's.
  int64_t kernel = 1;              ///< Columns of ΔW for each channel of the input: a kernel's places.
  BaseRows base;                   ///< W0.
};

/// A tensor of a file.
struct StoredTensor {
  std::string name;   ///< Below the weight's module, as "lora_A.weight".
  at::Tensor tensor;  ///< Its values.
};

/// A weight that a file has tensors for.
struct StoredWeight {
  BaseRows base;                ///< W0, all rows of it.
  int64_t rows = 0;             ///< Of the matrix [out, in].
  std::vector<int64_t> kernel;  ///< [out, in, …] of a convolution; empty: a matrix.
  std::string path = {};        ///< In the file, for errors: "base_model.model.h.0.attn.c_attn.".
  int64_t rank = 0;             ///< The rank that the file has for it, where that is more than the updates'; else 0.
};

/// A method with its configuration: it makes the updates of one adapter.
class Method {
 public:
  virtual ~Method() = default;

  /// PEFT's name of the method, as "LORA".
  virtual const char* peft_type() const = 0;
  /// Where the updates go.
  virtual const Targeting& targeting() const = 0;
  /// A new update, initialised by the method's rule from the global random generator of the options' device.
  virtual std::shared_ptr<Update> create(const UpdateSpec& spec) const = 0;
  /// The updates of one adapter, in order; what they share is as large as the largest of them needs.
  virtual std::vector<std::shared_ptr<Update>> create_all(const std::vector<UpdateSpec>& specs) const {
    std::vector<std::shared_ptr<Update>> updates;
    for (const auto& spec : specs) updates.push_back(create(spec));
    return updates;
  }
  /// Why the method has no update for such a weight, as "…, expected …"; empty: it has one. `is_part`: of some rows.
  virtual std::string refusal(const UpdateSpec& /*spec*/, bool /*is_part*/) const { return ""; }
  /// Entries of the configuration, as "rank_pattern[\"q_prj\"]", that name none of the weights with these paths.
  virtual std::vector<std::string> unmatched(const std::vector<std::vector<std::string>>& /*weights*/) const {
    return {};
  }
  /// Probability with which an element of the input is dropped in training.
  virtual double dropout() const = 0;
  /// The dtype of the adapter's tensors on a base of the given dtype.
  virtual at::ScalarType tensor_dtype(at::ScalarType base) const = 0;

  /// The tensors of a file for one weight. By default each trained tensor is the one that the update has; those of a
  /// fused projection's parts are joined where all of them count rows, else the part's name follows theirs.
  virtual std::vector<StoredTensor> store(const std::vector<UpdatePart>& parts, const StoredWeight& weight) const;
  /// Fills the updates' tensors from a file's, which have the names and shapes of store(); returns what is wrong with
  /// their values.
  virtual std::vector<std::string> restore(const std::vector<UpdatePart>& parts, const StoredWeight& weight,
                                           const std::map<std::string, at::Tensor>& stored) const;
  /// The shape that a file has for a tensor of `sizes`.
  virtual std::vector<int64_t> stored_sizes(const UpdateTensor& /*tensor*/, std::vector<int64_t> sizes,
                                            const StoredWeight& /*weight*/) const {
    return sizes;
  }
  /// Tensors of a file that all updates share, under their whole keys, as "base_model.vera_A"; they are in each update.
  virtual std::vector<StoredTensor> store_shared(const Update& /*update*/) const { return {}; }
  /// Whether a file may lack the shared tensors: create() has given the updates the same ones.
  virtual bool may_lack_shared() const { return false; }
  /// How the names of its tensors in files begin.
  virtual const char* prefix() const = 0;
  /// Keys of the configuration that PEFT's class for the method does not have.
  virtual std::vector<const char*> keys_unknown_to_peft() const { return {}; }
};

namespace detail {

inline std::string stored_name(const UpdateTensor& tensor) {
  return tensor.stored.name.empty() ? tensor.name : tensor.stored.name;
}

inline std::vector<UpdateTensor> trained_tensors(const Update& update) {
  auto tensors = update.tensors();
  const auto frozen = [](const UpdateTensor& tensor) { return !is_trained(tensor.role); };
  tensors.erase(std::remove_if(tensors.begin(), tensors.end(), frozen), tensors.end());
  return tensors;
}

/// Whether the tensors of several parts are joined to ones of the whole weight.
inline bool joins_parts(const std::vector<UpdatePart>& parts) {
  const auto tensors = trained_tensors(*parts.front().update);
  return std::all_of(tensors.begin(), tensors.end(), [](const auto& tensor) { return tensor.stored.rows >= 0; });
}

inline bool is_whole(const std::vector<UpdatePart>& parts) { return parts.size() == 1 && parts.front().name.empty(); }

/// Copies values that the tensor's dtype may not hold; says what is wrong.
inline void copy_finite(const at::Tensor& to, const at::Tensor& from, const std::string& name,
                        std::vector<std::string>& problems) {
  to.copy_(from);
  if (all_finite(to)) return;
  problems.push_back("found values beyond the range of " + std::string(c10::toString(to.scalar_type())) +
                     ", expected ones that the adapter's type holds in " + name);
}

}  // namespace detail

inline std::vector<StoredTensor> Method::store(const std::vector<UpdatePart>& parts, const StoredWeight& weight) const {
  std::vector<StoredTensor> result;
  const bool whole = detail::is_whole(parts), joins = !whole && detail::joins_parts(parts);
  const auto add = [&](const std::string& name, const UpdateTensor& tensor, const at::Tensor& values) {
    result.push_back({name, values.detach().reshape(stored_sizes(tensor, values.sizes().vec(), weight))});
  };
  for (const auto& part : parts) {
    const auto tensors = detail::trained_tensors(*part.update);
    for (size_t i = 0; i < tensors.size(); ++i) {
      const auto name = detail::stored_name(tensors[i]);
      if (!joins) {
        add(whole ? name : name + "." + part.name, tensors[i], tensors[i].tensor);
        continue;
      }
      const auto dim = tensors[i].stored.rows;
      if (&part == &parts.front()) {
        auto sizes = tensors[i].tensor.sizes().vec();
        sizes[static_cast<size_t>(dim)] = weight.rows;
        const auto options = tensors[i].tensor.options().requires_grad(false);
        add(name, tensors[i], at::full(sizes, tensors[i].stored.other, options));
      }
      auto sizes = tensors[i].tensor.sizes().vec();
      sizes[static_cast<size_t>(dim)] = weight.rows;
      result[i].tensor.view(sizes).narrow(dim, part.begin, part.update->out_features()).copy_(tensors[i].tensor);
    }
  }
  return result;
}

inline std::vector<std::string> Method::restore(const std::vector<UpdatePart>& parts, const StoredWeight& weight,
                                                const std::map<std::string, at::Tensor>& stored) const {
  std::vector<std::string> problems;
  const bool whole = detail::is_whole(parts), joins = !whole && detail::joins_parts(parts);
  const auto form = detail::trained_tensors(*parts.front().update);
  for (size_t i = 0; i < form.size(); ++i) {
    const auto name = detail::stored_name(form[i]);
    const auto dim = form[i].stored.rows;
    at::Tensor rest;  // of the whole weight's tensor, what no part has taken
    for (const auto& part : parts) {
      const auto tensor = detail::trained_tensors(*part.update)[i].tensor;
      auto sizes = tensor.sizes().vec();
      if (!joins) {
        const auto key = whole ? name : name + "." + part.name;
        detail::copy_finite(tensor, stored.at(key).reshape(sizes), weight.path + key, problems);
        continue;
      }
      sizes[static_cast<size_t>(dim)] = weight.rows;
      if (!rest.defined()) rest = stored.at(name).reshape(sizes).clone();
      auto rows = rest.narrow(dim, part.begin, part.update->out_features());
      detail::copy_finite(tensor, rows, weight.path + name, problems);
      rows.fill_(form[i].stored.other);
    }
    if (rest.defined() && at::ne(rest, form[i].stored.other).any().item<bool>()) {
      problems.push_back("found values in rows without a part, expected none in " + weight.path + name);
    }
  }
  return problems;
}

LORA_NAMESPACE_END
