// Tensors by name, compared by dtype, shape and bytes.
#pragma once

#include <ATen/core/Tensor.h>
#include <gtest/gtest.h>

#include <map>
#include <string>

#include "harness/values.h"

namespace harness {

inline void expect_same_bits(const std::map<std::string, at::Tensor>& found,
                             const std::map<std::string, at::Tensor>& expected) {
  ASSERT_EQ(found.size(), expected.size());
  for (const auto& [name, tensor] : expected) {
    ASSERT_EQ(found.count(name), 1U) << name;
    EXPECT_EQ(found.at(name).scalar_type(), tensor.scalar_type()) << name;
    EXPECT_EQ(found.at(name).sizes(), tensor.sizes()) << name;
    EXPECT_TRUE(bytes_of(found.at(name)) == bytes_of(tensor)) << name;
  }
}

}  // namespace harness
