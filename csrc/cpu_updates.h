// SPDX-License-Identifier: BSD-3-Clause
//
// The loops of the updates: what happens to element i of a block, and which memory is read.
// Included by cpu.cpp alone.
//
// They read and write S and compute in T. S is T where blocks are staged, and the storage type
// itself where all tensors of a row share it: then nothing needs staging.

#pragma once

#include <cstdint>

#include "cpu_loops.h"

namespace dgg {
namespace {

// h of equation (1): the gradient, and the replay gradient where it is mixed in here.
template <typename T, typename S, bool kReplayed>
struct Gradient {
  const S* grad;
  const S* replay;
  T weight;

  DGG_HOST_DEVICE void prefetch_from(int64_t i) const {
    prefetch(grad + i);
    if constexpr (kReplayed) prefetch(replay + i);
  }

  DGG_HOST_DEVICE T at(int64_t i) const {
    if constexpr (kReplayed) return real_gradient(widen<T>(grad[i]), widen<T>(replay[i]), weight);
    return widen<T>(grad[i]);
  }
};

// The anchor, or with kByRoute u itself, and the importance.
template <typename T, typename S, int kPulled>
struct Pull {
  const S* anchor;
  const S* importance;

  DGG_HOST_DEVICE void prefetch_from(int64_t i) const {
    if constexpr (kPulled != kNotPulled) prefetch(anchor + i);
    if constexpr (kPulled == kByImportance) prefetch(importance + i);
  }

  DGG_HOST_DEVICE T anchor_at(int64_t i) const {
    if constexpr (kPulled != kNotPulled) return widen<T>(anchor[i]);
    return T(0);
  }

  DGG_HOST_DEVICE T importance_at(int64_t i) const {
    if constexpr (kPulled == kByImportance) return widen<T>(importance[i]);
    return T(0);
  }
};

template <typename T, typename S, int kPulled, bool kReplayed, bool kAmsgrad>
struct AdamLoop {
  S* param;
  Gradient<T, S, kReplayed> gradient;
  S* exp_avg;
  S* exp_avg_sq;
  S* max_exp_avg_sq;
  Pull<T, S, kPulled> pull;
  int64_t n;
  AdamScalars<T> scalars;

  DGG_HOST_DEVICE void operator()() const { stream(*this); }

  DGG_HOST_DEVICE void prefetch_from(int64_t i) const {
    prefetch(param + i);
    gradient.prefetch_from(i);
    prefetch(exp_avg + i);
    prefetch(exp_avg_sq + i);
    if constexpr (kAmsgrad) prefetch(max_exp_avg_sq + i);
    pull.prefetch_from(i);
  }

  DGG_HOST_DEVICE void element(int64_t i) const {
    T p = widen<T>(param[i]), m = widen<T>(exp_avg[i]), v = widen<T>(exp_avg_sq[i]);
    T x = T(0);
    if constexpr (kAmsgrad) x = widen<T>(max_exp_avg_sq[i]);
    adam<kPulled, kAmsgrad>(scalars, p, gradient.at(i), m, v, x, pull.anchor_at(i),
                            pull.importance_at(i));
    param[i] = narrow<S>(p);
    exp_avg[i] = narrow<S>(m);
    exp_avg_sq[i] = narrow<S>(v);
    if constexpr (kAmsgrad) max_exp_avg_sq[i] = narrow<S>(x);
  }
};

template <typename T, typename S, int kPulled, bool kReplayed, bool kMomentum>
struct SgdLoop {
  S* param;
  Gradient<T, S, kReplayed> gradient;
  S* buffer;
  Pull<T, S, kPulled> pull;
  int64_t n;
  SgdScalars<T> scalars;

  DGG_HOST_DEVICE void operator()() const { stream(*this); }

  DGG_HOST_DEVICE void prefetch_from(int64_t i) const {
    prefetch(param + i);
    gradient.prefetch_from(i);
    if constexpr (kMomentum) prefetch(buffer + i);
    pull.prefetch_from(i);
  }

  DGG_HOST_DEVICE void element(int64_t i) const {
    T p = widen<T>(param[i]), b = T(0);
    if constexpr (kMomentum) b = widen<T>(buffer[i]);
    sgd<kPulled, kMomentum>(scalars, p, gradient.at(i), b, pull.anchor_at(i),
                            pull.importance_at(i));
    param[i] = narrow<S>(p);
    if constexpr (kMomentum) buffer[i] = narrow<S>(b);
  }
};

template <typename T, typename S, int kPulled>
struct GuideLoop {
  const S* param;
  Gradient<T, S, false> gradient;
  Pull<T, S, kPulled> pull;
  S* out;
  int64_t n;
  GuideScalars<T> scalars;

  DGG_HOST_DEVICE void operator()() const { stream(*this); }

  DGG_HOST_DEVICE void prefetch_from(int64_t i) const {
    gradient.prefetch_from(i);
    if constexpr (kPulled != kNotPulled) prefetch(param + i);
    pull.prefetch_from(i);
  }

  DGG_HOST_DEVICE void element(int64_t i) const {
    T p = T(0);
    if constexpr (kPulled != kNotPulled) p = widen<T>(param[i]);
    out[i] = narrow<S>(
        guide<kPulled>(scalars, p, gradient.at(i), pull.anchor_at(i), pull.importance_at(i)));
  }
};

}  // namespace
}  // namespace dgg
