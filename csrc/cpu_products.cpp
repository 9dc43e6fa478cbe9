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
#include "cpu_squares.h"

namespace dgg {
namespace {

// Squares and products of equation (7), of a block; A is the sums' type. h, u and r are made on the
// way: a buffer of each would have to be written and read again.
struct BlockProducts {
  double head = 0, pull = 0, replay = 0, h_dot_r = 0, u_dot_r = 0;
};

template <typename T>
struct BlockInputs {
  const T* grad;
  const T* replay;
  const T* param;
  const T* anchor;
  const T* importance;
  int64_t n;
  T replay_weight;
  GuideScalars<T> scalars;
};

template <typename A, typename T, int kPulled, bool kReplayed>
struct ProductSums {
  BlockInputs<T> in;
  BlockProducts* sums;

  DGG_HOST_DEVICE void operator()() const {
    const ProductSums self = *this;
    A lanes[5][kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= self.in.n; i += kLanes) {
      prefetch(self.in.grad + i);
      prefetch(self.in.param + i);
      prefetch(self.in.anchor + i);
      if constexpr (kReplayed) prefetch(self.in.replay + i);
      if constexpr (kPulled == kByImportance) prefetch(self.in.importance + i);
      DGG_PRAGMA_SIMD
      for (int lane = 0; lane < kLanes; ++lane) self.add(lanes, lane, i + lane);
    }
    for (int rest = 0; i + rest < self.in.n; ++rest) self.add(lanes, rest, i + rest);
    double totals[5] = {};
    for (int k = 0; k < (kReplayed ? 5 : 2); ++k) {
      totals[k] = sum_of_lanes<kLanes>(lanes[k], self.in.n);
    }
    *self.sums = {totals[0], totals[1], totals[2], totals[3], totals[4]};
  }

  DGG_HOST_DEVICE void add(A (&lanes)[5][kLanes], int lane, int64_t i) const {
    T h = in.grad[i];
    if constexpr (kReplayed) h = real_gradient(h, in.replay[i], in.replay_weight);
    T f = T(0);
    if constexpr (kPulled == kByImportance) f = in.importance[i];
    const T u = pull_of<kPulled>(in.scalars, in.param[i], in.anchor[i], f);
    const A head = static_cast<A>(h), pull = static_cast<A>(u);
    lanes[0][lane] += head * head;
    lanes[1][lane] += pull * pull;
    if constexpr (kReplayed) {
      const A replay = static_cast<A>(in.replay[i]);
      lanes[2][lane] += replay * replay;
      lanes[3][lane] += head * replay;
      lanes[4][lane] += pull * replay;
    }
  }
};

// Apart, as in cpu_squares.h.
template <typename T, int kPulled, bool kReplayed>
DGG_COLD BlockProducts products_again(const BlockInputs<T>& in) {
  BlockProducts sums;
  run(ProductSums<double, T, kPulled, kReplayed>{in, &sums});
  return sums;
}

// A product is no larger than the squares of its factors: where these are sound, so is it.
template <typename T, int kPulled, bool kReplayed>
BlockProducts products_of(const BlockInputs<T>& in) {
  BlockProducts sums;
  run(ProductSums<T, T, kPulled, kReplayed>{in, &sums});
  const bool spoiled = may_be_spoiled<T>(sums.head) || may_be_spoiled<T>(sums.pull) ||
                       (kReplayed && may_be_spoiled<T>(sums.replay));
  return spoiled ? products_again<T, kPulled, kReplayed>(in) : sums;
}

template <typename T>
BlockProducts products_of(const BlockInputs<T>& in) {
  if (in.importance) {
    return in.replay ? products_of<T, kByImportance, true>(in)
                     : products_of<T, kByImportance, false>(in);
  }
  return in.replay ? products_of<T, kByAnchor, true>(in) : products_of<T, kByAnchor, false>(in);
}

template <typename T>
BlockProducts product_chunk(const Row& row, const Chunk& chunk) {
  T buffers[5][kBlock];
  BlockInputs<T> in{};
  in.replay_weight = static_cast<T>(row.replay_weight);
  in.scalars = weights_of(row.weight).template as<T>();
  BlockProducts sums;
  for (int64_t offset = 0; offset < chunk.count; offset += kBlock) {
    const int64_t begin = chunk.begin + offset;
    const int64_t n = in.n = std::min<int64_t>(kBlock, chunk.count - offset);
    if (!row.guided) {
      sums.head += sum_squares<T>(stage_gradient<T>(row, begin, n, buffers[0], buffers[1]), n);
      continue;
    }
    in.grad = stage_or_zeros(row.grad, begin, n, buffers[0]);
    in.replay = row.replay ? row.replay.stage<T>(begin, n, buffers[1]) : nullptr;
    in.param = stage_param(row, begin, n, buffers[2]);
    in.anchor = row.anchor.stage<T>(begin, n, buffers[3]);
    in.importance = row.importance ? row.importance.stage<T>(begin, n, buffers[4]) : nullptr;
    const BlockProducts block = products_of(in);
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
  std::vector<Row>& work = scratch<Row>(n);
  Plan plan(n);
  for (int64_t i = 0; i < n; ++i) {
    if (!rows.active(i)) continue;
    plan.add(work.size(), rows.row(i)[kColumnNumel]);
    work.emplace_back(rows, i).guided = (flags[i] & kInject) != 0 && rows.anchored(i);
  }
  std::vector<BlockProducts> partials(plan.size());
  plan.for_each(false, [&](int64_t k, const Chunk& chunk) {
    const Row& row = work[chunk.row];
    partials[k] = row.param.dtype == kFloat64 ? product_chunk<double>(row, chunk)
                                              : product_chunk<float>(row, chunk);
  });
  const double scale = rows.grad_scale, squared = scale * scale;
  for (size_t k = 0; k < plan.size(); ++k) {
    const Row& row = work[plan[k].row];
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

namespace {

Tensor products_table(const Tensor& table, const Tensor& grads, const Tensor& replays,
                      const Tensor& flags, double replay_weight, double grad_scale,
                      double importance) {
  const char* const op = "products_table";
  const Rows rows =
      make_rows(op, table, grads, replays, INT64_MAX, replay_weight, grad_scale, importance);
  Tensor sums = empty_doubles({kProducts, rows.n});
  compute_products(rows, checked<const uint8_t>(op, "flags", flags, rows.n), doubles_of(sums));
  return sums;
}

Tensor guard_coefficients(const Tensor& products, std::optional<double> max_grad_norm,
                          bool per_tensor, bool maximize) {
  const char* const op = "guard_coefficients";
  const int64_t n = checked_sums(op, "products", products, kProducts);
  const double* const in = checked<const double>(op, "products", products, kProducts * n);
  Tensor result = empty_doubles({kScales + n + kGuardExtras});
  double* const out = doubles_of(result);
  double whole[kProducts];
  for (int k = 0; k < kProducts; ++k) {
    whole[k] = 0;
    for (int64_t i = 0; i < n; ++i) whole[k] += in[k * n + i];
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
    const double* const of_row = in + i;
    const Guard own{std::sqrt(of_row[kGuided * n]), std::sqrt(of_row[kPull * n]),
                    of_row[kHDotR * n], of_row[kUDotR * n]};
    const double a = per_tensor ? guard_of(clip, own, maximize) : common;
    out[kScales + i] = a;
    squares += a * a * of_row[kPull * n];
  }
  out[kScales + n] = head * replay > 0 ? whole[kHDotR] / (head * replay) : 0;
  out[kScales + n + 1] = head > 0 ? std::sqrt(squares) / head : 0;
  return result;
}

}  // namespace
}  // namespace dgg

STABLE_TORCH_LIBRARY_IMPL(dgg, CPU, m) {
  m.impl("products_table", TORCH_BOX(&dgg::products_table));
  m.impl("guard_coefficients", TORCH_BOX(&dgg::guard_coefficients));
}
