// SPDX-License-Identifier: BSD-3-Clause
//
// What the CPU operators are given: checked here, handed to the passes of cpu.cpp, by its operators
// on tables and by those on lists.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "table.h"

namespace dgg {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The rows of a call, checked once.
struct Rows {
  const int64_t* table;
  const int64_t* grads;
  const int64_t* replays;  // null: no replay gradients at all
  int64_t n;
  double replay_weight;
  double grad_scale;
  double importance;  // i of equation (3)

  const int64_t* row(int64_t i) const { return table + i * kColumns; }
  int64_t replay(int64_t i) const { return replays ? replays[i] : 0; }
  bool active(int64_t i) const { return grads[i] != 0 || replay(i) != 0; }
  bool anchored(int64_t i) const { return row(i)[kColumnAnchor] != 0; }
  int dtype(int64_t i, int slot) const {
    return code_at(static_cast<uint64_t>(row(i)[kColumnDtypes]), slot);
  }
};

struct Draws {
  uint64_t seed;
  uint32_t draw;
};

// Arguments of an update beside the rows.
struct Control {
  const double* coefficients;
  const uint8_t* flags;
  const double* hyper;
  int64_t groups;
  Draws draws;
  int route;
};

// The passes, in cpu.cpp.
void compute_norms(const Rows& rows, double* distances, int64_t which, double* squares);
void compute_adam(const Rows& rows, const Control& control, double* distances, bool look_ahead,
                  bool stochastic);
void compute_sgd(const Rows& rows, const Control& control, double* distances, bool look_ahead,
                 bool stochastic);
void compute_guide(const Rows& rows, const Control& control);

// In cpu_products.cpp.
void compute_products(const Rows& rows, const uint8_t* flags, double* sums);
void guard_coefficients(const double* products, int64_t n, std::optional<double> max_grad_norm,
                        bool per_tensor, bool maximize, double* out);

inline void check_tensor(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
                         int64_t numel) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == dtype && tensor.is_contiguous() &&
                      tensor.numel() == numel,
                  "dgg::", op, ": ", name, " must be a contiguous CPU tensor of dtype ",
                  dtype == ScalarType::Double ? "float64"
                  : dtype == ScalarType::Long ? "int64"
                                              : "uint8",
                  " with ", numel, " elements; it has ", tensor.numel());
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

inline void check_table(const char* op, const Tensor& table) {
  STD_TORCH_CHECK(table.dim() == 2 && table.size(1) == kColumns, "dgg::", op,
                  ": table must have shape [n, ", static_cast<int>(kColumns), "]");
}

inline Rows make_rows(const char* op, const Tensor& table, const Tensor& grads,
                      const Tensor& replays, int64_t groups, double replay_weight,
                      double grad_scale, double importance) {
  check_table(op, table);
  STD_TORCH_CHECK(importance >= 0 && importance <= 1, "dgg::", op,
                  ": importance must lie in [0, 1], not ", importance);
  const int64_t n = table.size(0);
  check_tensor(op, "table", table, ScalarType::Long, n * kColumns);
  check_tensor(op, "grads", grads, ScalarType::Long, n);
  const bool any_replay = replays.numel() != 0;
  if (any_replay) check_tensor(op, "replays", replays, ScalarType::Long, n);
  Rows rows{data<const int64_t>(table),
            data<const int64_t>(grads),
            any_replay ? data<const int64_t>(replays) : nullptr,
            n,
            replay_weight,
            grad_scale,
            importance};
  for (int64_t i = 0; i < n; ++i) {
    const int64_t* r = rows.row(i);
    STD_TORCH_CHECK(r[kColumnNumel] >= 0 && (r[kColumnNumel] == 0 || r[kColumnStretch] > 0) &&
                        r[kColumnGroup] >= 0 && r[kColumnGroup] < groups,
                    "dgg::", op, ": row ", i, " of table has numel ", r[kColumnNumel], ", stretch ",
                    r[kColumnStretch], ", group ", r[kColumnGroup], " of ", groups);
    // Places of elements are counted in 64 bits, and words are drawn by fours from their place on.
    constexpr int64_t kLast = int64_t{1} << 61;
    const bool whole = r[kColumnNumel] <= r[kColumnStretch];  // no division for most rows
    const int64_t turns = whole ? 0 : (r[kColumnNumel] - 1) / r[kColumnStretch];
    STD_TORCH_CHECK(r[kColumnBase] >= 0 && r[kColumnStride] >= 0 && r[kColumnBase] < kLast &&
                        r[kColumnNumel] < kLast && (turns == 0 || r[kColumnStride] < kLast / turns),
                    "dgg::", op, ": row ", i, " of table has base ", r[kColumnBase], ", stride ",
                    r[kColumnStride], ": its elements would lie at no place");
    STD_TORCH_CHECK((static_cast<uint64_t>(r[kColumnDtypes]) & kNoDtypes) == 0, "dgg::", op,
                    ": row ", i, " of table has an unknown dtype code");
  }
  return rows;
}

inline Control make_control(const char* op, int64_t n, const Tensor& coefficients,
                            const Tensor& flags, const double* hyper, int64_t groups, int64_t seed,
                            int64_t draw, int64_t route) {
  STD_TORCH_CHECK(route >= kByGradient && route <= kByDecoupled, "dgg::", op,
                  ": route must be 0 (gradient), 1 (first moment) or 2 (decoupled), not ", route);
  check_tensor(op, "coefficients", coefficients, ScalarType::Double, kScales + n);
  check_tensor(op, "flags", flags, ScalarType::Byte, n);
  return {data<const double>(coefficients),
          data<const uint8_t>(flags),
          hyper,
          groups,
          {static_cast<uint64_t>(seed), static_cast<uint32_t>(draw)},
          static_cast<int>(route)};
}

inline Control make_control(const char* op, int64_t n, const Tensor& coefficients,
                            const Tensor& flags, const Tensor& hyper, int64_t hypers, int64_t seed,
                            int64_t draw, int64_t route) {
  STD_TORCH_CHECK(hyper.dim() == 2 && hyper.size(1) == hypers, "dgg::", op,
                  ": hyper must have shape [groups, ", hypers, "]");
  check_tensor(op, "hyper", hyper, ScalarType::Double, hyper.numel());
  return make_control(op, n, coefficients, flags, data<const double>(hyper), hyper.size(0), seed,
                      draw, route);
}

inline Tensor empty_doubles(std::vector<int64_t> sizes) {
  return torch::stable::empty({sizes.data(), sizes.size()}, ScalarType::Double);
}

}  // namespace dgg
