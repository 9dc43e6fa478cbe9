// SPDX-License-Identifier: BSD-3-Clause
//
// The pass and the numbers behind alpha="auto": squares and products of gradient, replay gradient
// and pull, and the strength of equation (7) that follows from them.

#include <algorithm>
#include <cmath>
#include <optional>
#include <type_traits>
#include <vector>

#include "cpu_arguments.h"
#include "cpu_chunks.h"
#include "cpu_loops.h"

namespace dgg {
namespace {

struct ProductRow {
  Row row;
  bool guided;
  int64_t number;
  GuideScalars<double> scalars;

  ProductRow(const Rows& rows, int64_t i, bool guided)
      : row(rows, i), guided(guided), number(i), scalars(weights_of(rows.importance)) {}
};

template <typename T>
BlockProducts product_chunk(const ProductRow& work, const Chunk& chunk) {
  const Row& row = work.row;
  const auto scalars = work.scalars.as<T>();
  T first[kBlock], second[kBlock], third[kBlock], fourth[kBlock], fifth[kBlock];
  BlockProducts sums;
  for (int64_t offset = 0; offset < chunk.count; offset += kBlock) {
    const int64_t begin = chunk.begin + offset;
    const int64_t n = std::min<int64_t>(kBlock, chunk.count - offset);
    const T* const h = stage_gradient<T>(row, begin, n, first, second);
    if (!work.guided) {
      sums.head += sum_squares<T>(h, n);
      continue;
    }
    const T* param = row.param.stage<T>(begin, n, third);
    if (row.copy) {
      if (param != third) std::copy_n(param, n, third);
      row.copy.adopt(begin, n, third);
      param = third;
    }
    const T* const anchor = row.anchor.stage<T>(begin, n, fourth);
    const T* const importance = row.importance ? row.importance.stage<T>(begin, n, fifth) : nullptr;
    T u[kBlock];
    stage_pull(row, Draws{}, scalars, begin, n, param, anchor, importance, u);
    // One of another type is converted a second time, out of the cache.
    const T* const r = row.replay ? row.replay.stage<T>(begin, n, second) : nullptr;
    const BlockProducts block =
        r ? products_of<T, true>(h, u, r, n) : products_of<T, false>(h, u, h, n);
    sums.head += block.head;
    sums.pull += block.pull;
    sums.replay += block.replay;
    sums.h_dot_r += block.h_dot_r;
    sums.u_dot_r += block.u_dot_r;
  }
  return sums;
}

}  // namespace

void compute_products(const Rows& rows, const uint8_t* flags, double* sums) {
  const int64_t n = rows.n;
  std::fill_n(sums, kProducts * n, 0.0);
  std::vector<ProductRow>& work = scratch<ProductRow>(n);
  Plan plan(n);
  for (int64_t i = 0; i < n; ++i) {
    if (!rows.active(i)) continue;
    plan.add(work.size(), rows.row(i)[kColumnNumel]);
    work.emplace_back(rows, i, (flags[i] & kInject) != 0 && rows.anchored(i));
  }
  std::vector<BlockProducts> partials(plan.size());
  plan.for_each(false, [&](int64_t k, const Chunk& chunk) {
    const ProductRow& row = work[chunk.row];
    partials[k] = row.row.param.dtype == kFloat64 ? product_chunk<double>(row, chunk)
                                                  : product_chunk<float>(row, chunk);
  });
  const double scale = rows.grad_scale, squared = scale * scale;
  for (size_t k = 0; k < plan.size(); ++k) {
    const ProductRow& row = work[plan[k].row];
    const BlockProducts& part = partials[k];
    const int64_t i = row.number;
    sums[kTotal * n + i] += part.head / squared;
    if (!row.guided) continue;
    sums[kGuided * n + i] += part.head / squared;
    sums[kPull * n + i] += part.pull;
    sums[kReplay * n + i] += part.replay / squared;
    sums[kHDotR * n + i] += part.h_dot_r / squared;
    sums[kUDotR * n + i] += part.u_dot_r / scale;
  }
}

void guard_coefficients(const double* products, int64_t n, std::optional<double> max_grad_norm,
                        bool per_tensor, bool maximize, double* out) {
  double whole[kProducts];
  for (int k = 0; k < kProducts; ++k) {
    whole[k] = 0;
    for (int64_t i = 0; i < n; ++i) whole[k] += products[k * n + i];
  }
  const double total = std::sqrt(whole[kTotal]), head = std::sqrt(whole[kGuided]);
  const double pull = std::sqrt(whole[kPull]), replay = std::sqrt(whole[kReplay]);
  const double clip = max_grad_norm ? clip_of(*max_grad_norm, total) : 1;
  out[kClip] = clip;
  out[kGradLength] = head;
  out[kDistanceLength] = pull;
  out[kTotalLength] = total;
  const double common = guard_of(clip, {head, pull, whole[kHDotR], whole[kUDotR]}, maximize);
  double squares = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double* const of_row = products + i;
    const Guard own{std::sqrt(of_row[kGuided * n]), std::sqrt(of_row[kPull * n]),
                    of_row[kHDotR * n], of_row[kUDotR * n]};
    const double a = per_tensor ? guard_of(clip, own, maximize) : common;
    out[kScales + i] = a;
    squares += a * a * of_row[kPull * n];
  }
  out[kScales + n] = head * replay > 0 ? whole[kHDotR] / (head * replay) : 0;
  out[kScales + n + 1] = head > 0 ? std::sqrt(squares) / head : 0;
}

}  // namespace dgg
