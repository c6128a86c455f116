#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/matmul.h>
#include <c10/core/TensorOptions.h>
#include <lora/config/targets.h>
#include <lora/version.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN

/// An update as scaling · B · A with A [r, in] and B [out, r].
struct LowRank {
  at::Tensor A;        ///< [r, in]
  at::Tensor B;        ///< [out, r]
  double scaling = 1;  ///< On the product.
};

/// What a tensor of an adapter is to an optimizer.
enum class TensorRole {
  kInput,      ///< A factor that starts at random, as LoRA's A.
  kOutput,     ///< A factor that starts at zero, as LoRA's B: LoRA+ gives it a higher learning rate.
  kEmbedding,  ///< A factor of an embedding's update.
  kCopy,       ///< Values that stand in place of the base's: of modules_to_save, biases and token rows.
  kBuffer,     ///< The copy of a buffer, as of a running mean: it belongs to the adapter and takes no gradient.
};

/// A tensor of an adapter under its own name, as "lora_A".
struct UpdateTensor {
  std::string name;   ///< Below the adapter's node.
  at::Tensor tensor;  ///< The tensor itself, no copy.
  TensorRole role;    ///< What it is to an optimizer.
};

/// ΔW [out, in] of one adapter on one weight, or on one row range of it.
class Update {
 public:
  virtual ~Update() = default;

  /// Columns of ΔW.
  virtual int64_t in_features() const = 0;
  /// Rows of ΔW.
  virtual int64_t out_features() const = 0;

  /// The trainable tensors, in a fixed order; they stay the same tensors for the life of the update.
  virtual std::vector<UpdateTensor> tensors() const = 0;

  /// ΔW in factors, in the adapter's dtype, differentiable in the update's tensors. Products and merging work on these.
  virtual LowRank low_rank() const = 0;

  /// A copy with tensors of its own on the given device.
  virtual std::shared_ptr<Update> clone(at::Device device) const = 0;

  /// ΔW [out, in], differentiable in the update's tensors.
  at::Tensor dense() const {
    const auto factors = low_rank();
    return at::matmul(factors.B * factors.scaling, factors.A);
  }
};

/// What an update is made for: ΔW [out_features, in_features] of the weight with these paths, tensors as `options`
/// says.
struct UpdateSpec {
  std::vector<std::string> names;  ///< The weight's paths.
  int64_t in_features = 0;         ///< Columns of ΔW.
  int64_t out_features = 0;        ///< Rows of ΔW.
  at::TensorOptions options;       ///< Dtype and device of the tensors.
  bool initialise = true;          ///< False: the caller fills the tensors, and no random number is drawn.
  bool embedding = false;          ///< An update of a lookup table: a column of ΔW for each entry.
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
  /// Entries of the configuration, as "rank_pattern[\"q_prj\"]", that name none of the weights with these paths.
  virtual std::vector<std::string> unmatched(const std::vector<std::vector<std::string>>& /*weights*/) const {
    return {};
  }
  /// Probability with which an element of the input is dropped in training.
  virtual double dropout() const = 0;
  /// The dtype of the adapter's tensors on a base of the given dtype.
  virtual at::ScalarType tensor_dtype(at::ScalarType base) const = 0;
};

/// The dtype in which sums with a base of the given dtype are formed: at least float32.
inline at::ScalarType accumulation_dtype(at::ScalarType base) { return base == at::kDouble ? at::kDouble : at::kFloat; }

LORA_NAMESPACE_END
