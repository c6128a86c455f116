#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <lora/inject/plan.h>
#include <lora/inject/site.h>
#include <lora/io/adapter_files.h>
#include <lora/io/peft_layout.h>
#include <lora/version.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

inline void rename_tensor(AdapterFiles& files, const std::string& from, const std::string& to) {
  auto entry = files.tensors.extract(from);
  if (entry.empty()) return;
  entry.key() = to;
  files.tensors.insert(std::move(entry));
}

/// Gives the factors of embeddings PEFT's names: loralib has one name for the factors of all layers.
inline void rename_loralib_embeddings(AdapterFiles& files, const std::vector<Site>& sites) {
  for (const auto& table : sites) {
    if (table.layout != WeightLayout::kTable) continue;
    rename_tensor(files, join_path(table.file_path, "lora_A.weight"), PeftKeys::A(table));
    rename_tensor(files, join_path(table.file_path, "lora_B.weight"), PeftKeys::B(table));
  }
}

/// Brings loralib's tensors of one layer into PEFT's form: the bias's name, and the B of parts of the given rank, which
/// MergedLinear has without the zeros of the other rows. What has other shapes stays as it is.
inline void convert_loralib_layer(AdapterFiles& files, const Site& updated, const std::vector<PlannedPart>& parts,
                                  int64_t rank) {
  rename_tensor(files, join_path(updated.module_file_path, "bias"),
                join_path(updated.module_file_path, "base_layer.bias"));
  const auto found = files.tensors.find(PeftKeys::B(updated));
  if (found == files.tensors.end() || parts.front().name.empty()) return;
  auto& B = found->second.tensor;
  int64_t rows = 0;
  for (const auto& part : parts) rows += part.size;
  if (B.dim() != 2 || B.size(0) != rows || B.size(1) != rank) return;
  const auto columns = rank * static_cast<int64_t>(parts.size());
  auto stacked = at::zeros({updated.base_matrix().size(0), columns}, B.options());
  int64_t row = 0, column = 0;
  for (const auto& part : parts) {
    stacked.narrow(0, part.begin, part.size).narrow(1, column, rank).copy_(B.narrow(0, row, part.size));
    row += part.size;
    column += rank;
  }
  B = stacked;
}

}  // namespace detail
LORA_NAMESPACE_END
