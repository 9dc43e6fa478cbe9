// SPDX-License-Identifier: BSD-3-Clause
//
// What the operators of the CPU and those of a GPU check alike.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <type_traits>

#include "table.h"

namespace dgg {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    default:
      return "uint8";
  }
}

template <typename Element>
constexpr ScalarType dtype_of() {
  using T = std::remove_const_t<Element>;
  return std::is_same<T, double>::value    ? ScalarType::Double
         : std::is_same<T, float>::value   ? ScalarType::Float
         : std::is_same<T, int64_t>::value ? ScalarType::Long
         : std::is_same<T, int32_t>::value ? ScalarType::Int
                                           : ScalarType::Byte;
}

// The number of rows.
inline int64_t checked_rows(const char* op, const Tensor& table) {
  STD_TORCH_CHECK(table.dim() == 2 && table.size(1) == kColumns, "dgg::", op,
                  ": table must have shape [n, ", static_cast<int>(kColumns), "]");
  return table.size(0);
}

// The number of rows that there are sums of.
inline int64_t checked_sums(const char* op, const char* name, const Tensor& sums, int count) {
  STD_TORCH_CHECK(sums.dim() == 2 && sums.size(0) == count, "dgg::", op, ": ", name,
                  " must have shape [", count, ", n]");
  return sums.size(1);
}

inline void check_hyper(const char* op, const Tensor& hyper, int64_t columns) {
  STD_TORCH_CHECK(hyper.dim() == 2 && hyper.size(1) == columns, "dgg::", op,
                  ": hyper must have shape [groups, ", columns, "]");
}

inline double checked_importance(const char* op, double importance) {
  STD_TORCH_CHECK(importance >= 0 && importance <= 1, "dgg::", op,
                  ": importance must lie in [0, 1], not ", importance);
  return importance;
}

}  // namespace dgg
