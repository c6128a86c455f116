#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <lora/cuda/merge_body.h>
#include <lora/merge/merge.h>
#include <lora/methods/method.h>
#include <lora/version.h>

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace cuda {
namespace detail {

/// Nothing for a dtype that the kernels do not know.
inline std::optional<ElementType> element_type(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return ElementType::kFloat;
    case at::kDouble:
      return ElementType::kDouble;
    case at::kBFloat16:
      return ElementType::kBFloat16;
    case at::kHalf:
      return ElementType::kHalf;
    default:
      return std::nullopt;
  }
}

/// How many tiles a matrix has.
inline int64_t tile_count(ElementType type, int64_t rows, int64_t columns) {
  switch (type) {
    case ElementType::kFloat:
      return TileShape<float>::count(rows, columns);
    case ElementType::kDouble:
      return TileShape<double>::count(rows, columns);
    default:
      return TileShape<c10::Half>::count(rows, columns);
  }
}

/// The table of many jobs whose bases have one dtype and one device.
class MergePlan {
 public:
  explicit MergePlan(ElementType type) : type_(type) {}

  /// Adds a job and makes its W′, which is not filled yet.
  void add(lora::detail::MergeJob& job) {
    const auto base = job.base.contiguous();
    job.merged = at::empty_like(base, c10::MemoryFormat::Contiguous);
    add_matrix(job, base);
    for (const auto& [begin, update] : job.updates) {
      const auto rows = update.B.size(0), columns = update.A.size(1);
      MergeUpdate entry{factor(update.B, base, update.scaling),
                        factor(update.A, base, 1),
                        update.A.size(0),
                        begin,
                        begin + rows,
                        0,
                        columns};
      if (job.transposed) {  // (B·A)ᵀ = Aᵀ·Bᵀ, whose columns are B's rows
        std::swap(entry.left, entry.right);
        for (auto* side : {&entry.left, &entry.right}) std::swap(side->row_stride, side->column_stride);
        std::swap(entry.first_row, entry.first_column);
        std::swap(entry.last_row, entry.last_column);
      }
      updates_.push_back(entry);
    }
    matrices_.back().last_update = static_cast<int64_t>(updates_.size());
  }

  /// Adds a job whose W′ is complete: the kernel looks for NaN and infinite values in it.
  void add_check(lora::detail::MergeJob& job) { add_matrix(job, job.merged); }

  ElementType type() const { return type_; }
  int64_t tiles() const { return tiles_; }
  const std::vector<lora::detail::MergeJob*>& jobs() const { return jobs_; }
  const std::vector<MergeMatrix>& matrices() const { return matrices_; }
  const std::vector<MergeUpdate>& updates() const { return updates_; }

 private:
  void add_matrix(lora::detail::MergeJob& job, const at::Tensor& base) {
    MergeMatrix matrix{};
    matrix.base = base.const_data_ptr();
    matrix.merged = job.merged.mutable_data_ptr();
    matrix.rows = base.size(0);
    matrix.columns = base.size(1);
    matrix.first_update = matrix.last_update = static_cast<int64_t>(updates_.size());
    matrix.first_tile = tiles_;
    matrix.aligned = reinterpret_cast<uintptr_t>(matrix.base) % 16 == 0 &&
                     reinterpret_cast<uintptr_t>(matrix.merged) % 16 == 0 &&
                     matrix.columns * base.element_size() % 16 == 0;
    matrices_.push_back(matrix);
    tiles_ += tile_count(type_, matrix.rows, matrix.columns);
    jobs_.push_back(&job);
    kept_.push_back(base);
  }

  MergeFactor factor(const at::Tensor& tensor, const at::Tensor& base, double scaling) {
    auto here = tensor.to(base.device());
    if (!element_type(here.scalar_type())) here = here.to(accumulation_dtype(base.scalar_type()));
    kept_.push_back(here);
    return {here.const_data_ptr(), here.stride(0), here.stride(1), scaling, *element_type(here.scalar_type())};
  }

  ElementType type_;
  std::vector<lora::detail::MergeJob*> jobs_;
  std::vector<MergeMatrix> matrices_;
  std::vector<MergeUpdate> updates_;
  std::vector<at::Tensor> kept_;
  int64_t tiles_ = 0;
};

}  // namespace detail
}  // namespace cuda
LORA_NAMESPACE_END
