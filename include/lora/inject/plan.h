#pragma once

#include <lora/version.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

LORA_NAMESPACE_BEGIN
namespace detail {

/// A row range of a site that gets an update; without a name it is the whole weight.
struct PlannedPart {
  std::string name;
  int64_t begin = 0;
  int64_t size = 0;
};

struct PlannedSite {
  size_t site = 0;  // index into ModelSites::sites
  std::vector<PlannedPart> parts;
};

/// A range of a bias that gets the bias of an update's B.
struct PlannedOffset {
  size_t site = 0;    // of the bias
  size_t weight = 0;  // of the update's matrix
  std::string part;   // as the update's
  int64_t begin = 0;
  int64_t size = 0;
};

/// A bias that the updates of a weight scale.
struct PlannedScale {
  size_t site = 0;    // of the bias
  size_t weight = 0;  // of the updates' matrix
  int64_t begin = 0;  // of the weight's rows in the bias
};

/// Rows of an embedding that the adapter has copies of.
struct PlannedRows {
  size_t site = 0;
  std::vector<int64_t> ids;
  std::vector<size_t> tied;  // matrices on the same memory, whose rows they are too
};

/// Which sites an adapter goes into, and why. Making it changes nothing.
struct Plan {
  struct Entry {
    std::string target;  // as the configuration says it
    std::vector<size_t> sites;
  };

  std::vector<PlannedSite> sites;  // with updates, in the model's order
  std::vector<PlannedOffset> offsets;
  std::vector<PlannedScale> scales;
  std::vector<size_t> copies;  // parameters and buffers that the adapter has copies of
  std::vector<PlannedRows> rows;
  std::vector<Entry> entries;
  std::vector<std::string> notes;
};

/// What an entry without a match is: a typing error to the user who injects, a line of the report where a file's
/// tensors decide.
enum class Unmatched { kError, kNote };

}  // namespace detail
LORA_NAMESPACE_END
