// SPDX-License-Identifier: BSD-3-Clause
//
// What the CPU operators are given: checked here, handed to the passes of cpu.cpp, by its operators
// on tables and by those on lists.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "arguments.h"

namespace dgg {

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

// Address of a tensor's elements.
template <typename T>
T* checked(const char* op, const char* name, const Tensor& tensor, int64_t numel) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == dtype_of<T>() &&
                      tensor.is_contiguous() && tensor.numel() == numel,
                  "dgg::", op, ": ", name, " must be a contiguous CPU tensor of dtype ",
                  name_of(dtype_of<T>()), " with ", numel, " elements; it has ", tensor.numel());
  return static_cast<T*>(tensor.data_ptr());
}

inline Rows make_rows(const char* op, const Tensor& table, const Tensor& grads,
                      const Tensor& replays, int64_t groups, double replay_weight,
                      double grad_scale, double importance) {
  const int64_t n = checked_rows(op, table);
  const Rows rows{checked<const int64_t>(op, "table", table, n * kColumns),
                  checked<const int64_t>(op, "grads", grads, n),
                  replays.numel() ? checked<const int64_t>(op, "replays", replays, n) : nullptr,
                  n,
                  replay_weight,
                  grad_scale,
                  checked_importance(op, importance)};
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
  return {checked<const double>(op, "coefficients", coefficients, kScales + n),
          checked<const uint8_t>(op, "flags", flags, n),
          hyper,
          groups,
          {static_cast<uint64_t>(seed), static_cast<uint32_t>(draw)},
          static_cast<int>(route)};
}

inline Control make_control(const char* op, int64_t n, const Tensor& coefficients,
                            const Tensor& flags, const Tensor& hyper, int64_t hypers, int64_t seed,
                            int64_t draw, int64_t route) {
  check_hyper(op, hyper, hypers);
  return make_control(op, n, coefficients, flags,
                      checked<const double>(op, "hyper", hyper, hyper.numel()), hyper.size(0), seed,
                      draw, route);
}

inline Tensor empty_doubles(std::vector<int64_t> sizes) {
  return torch::stable::empty({sizes.data(), sizes.size()}, ScalarType::Double);
}

inline double* doubles_of(const Tensor& tensor) {
  return static_cast<double*>(tensor.data_ptr());
}

}  // namespace dgg
