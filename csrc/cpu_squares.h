// SPDX-License-Identifier: BSD-3-Clause
//
// Sums of squares of a block: of one tensor, of a difference, and weighted by an importance. In a
// fixed order: float32 (float64) in a fixed number of lanes, float64 beyond.

#pragma once

#include <cstdint>

#include "cpu_loops.h"

namespace dgg {
namespace {

// What squares are summed of: x, x - y, or (x - y) weighted by an importance.
enum Squared : int { kOfOne, kOfDifference, kOfPull };
// The importance of the differences that are squared, and the weights of equation (3).
template <typename S>
struct Weighting {
  const S* importance;
  double rest, weight;
};

template <int kCount>
DGG_HOST_DEVICE void fold(double* sums) {
  if constexpr (kCount > 1) {
    for (int lane = 0; lane < kCount / 2; ++lane) sums[lane] += sums[lane + kCount / 2];
    fold<kCount / 2>(sums);
  }
}

// The sum of the lanes in double, by halves. Lanes beyond the n elements hold zeros, which would
// change nothing; their number is the compiler's to know, or a tiny tensor waits for every half.
template <int kCount, typename T>
DGG_HOST_DEVICE double sum_of_lanes(const T* lanes, int64_t n) {
  if constexpr (kCount > 1) {
    if (n <= kCount / 2) return sum_of_lanes<kCount / 2>(lanes, n);
  }
  double sums[kCount];
  for (int lane = 0; lane < kCount; ++lane) sums[lane] = lanes[lane];
  fold<kCount>(sums);
  return sums[0];
}

// sum x^2, sum (x - y)^2, or the latter weighted. The lanes are explicit so that their number is
// not the compiler's choice. A is the arithmetic's type, T that of the sums.
template <typename T, typename S, Squared kOf, typename A = T>
struct SquareSum {
  const S* x;
  const S* y;
  int64_t n;
  double* sum;
  Weighting<S> by;

  DGG_HOST_DEVICE void operator()() const {
    const SquareSum self = *this;
    T lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= self.n; i += kLanes) {
      prefetch(self.x + i);
      if constexpr (kOf != kOfOne) prefetch(self.y + i);
      if constexpr (kOf == kOfPull) prefetch(self.by.importance + i);
      DGG_PRAGMA_SIMD
      for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += self.square(i + lane);
    }
    int rest = 0;
    for (; i + rest + kShortStrip <= self.n; rest += kShortStrip) {
      DGG_PRAGMA_SIMD
      for (int lane = 0; lane < kShortStrip; ++lane) {
        lanes[rest + lane] += self.square(i + rest + lane);
      }
    }
    for (; i + rest < self.n; ++rest) lanes[rest] += self.square(i + rest);
    *self.sum = sum_of_lanes<kLanes>(lanes, self.n);
  }

  DGG_HOST_DEVICE T square(int64_t i) const {
    A value = widen<A>(x[i]);
    if constexpr (kOf != kOfOne) value -= widen<A>(y[i]);
    if constexpr (kOf == kOfPull) {
      value *= static_cast<A>(by.rest) + static_cast<A>(by.weight) * widen<A>(by.importance[i]);
    }
    return static_cast<T>(value) * static_cast<T>(value);
  }
};

// Sum of the squares of kWays blocks that lie `gap` apart, read together: one stream from memory
// does not keep a core's memory requests going, several do.
constexpr int kWays = 4;
constexpr int kWayLanes = 16;

template <typename T>
struct SquareSumOfWays {
  const T* x;
  int64_t gap;
  double* sum;

  DGG_HOST_DEVICE void operator()() const {
    const SquareSumOfWays self = *this;
    T lanes[kWays][kWayLanes] = {};
    for (int64_t i = 0; i < kBlock; i += kWayLanes) {
      for (int way = 0; way < kWays; ++way) {
        const T* const block = self.x + way * self.gap + i;
        prefetch<kWayLanes>(block);
        DGG_PRAGMA_SIMD
        for (int lane = 0; lane < kWayLanes; ++lane) lanes[way][lane] += block[lane] * block[lane];
      }
    }
    double total = 0;
    for (int way = 0; way < kWays; ++way) {
      for (int lane = 0; lane < kWayLanes; ++lane) total += lanes[way][lane];
    }
    *self.sum = total;
  }
};

// float32 has no room for the squares of large and small numbers. A sum that one of them could have
// spoiled is formed once more, in float64 and out of the cache.
template <typename T>
bool may_be_spoiled(double sum) {
  return std::is_same<T, float>::value && !square_sum_is_reliable(sum);
}

// Apart, so that the function in which it is needed once in a thousand million years is inlined.
template <typename T, typename S, Squared kOf>
DGG_COLD double sum_squares_again(const S* x, const S* y, int64_t n, const Weighting<S>& by) {
  double sum;
  run(SquareSum<double, S, kOf, T>{x, y, n, &sum, by});
  return sum;
}

template <typename T, typename S, Squared kOf>
double sum_squares_of(const S* x, const S* y, int64_t n, const Weighting<S>& by) {
  double sum;
  run(SquareSum<T, S, kOf>{x, y, n, &sum, by});
  return may_be_spoiled<T>(sum) ? sum_squares_again<T, S, kOf>(x, y, n, by) : sum;
}

template <typename T, typename S>
double sum_squares(const S* x, int64_t n) {
  return sum_squares_of<T, S, kOfOne>(x, nullptr, n, {});
}

// The one function behind both the norm pass and the look-ahead, so that they agree bit for bit.
// Without importance its address is null.
template <typename T, typename S>
double sum_squared_pulls(const S* x, const S* y, int64_t n, const Weighting<S>& by) {
  return by.importance ? sum_squares_of<T, S, kOfPull>(x, y, n, by)
                       : sum_squares_of<T, S, kOfDifference>(x, y, n, by);
}

template <typename T>
double sum_squares_of_ways(const T* x, int64_t gap) {
  double sum;
  run(SquareSumOfWays<T>{x, gap, &sum});
  if (!may_be_spoiled<T>(sum)) return sum;
  sum = 0;
  for (int way = 0; way < kWays; ++way) sum += sum_squares<double>(x + way * gap, kBlock);
  return sum;
}

}  // namespace
}  // namespace dgg
