// SPDX-License-Identifier: BSD-3-Clause
//
// The loops of the updates: what happens to element i of a block, and which memory is read. And
// what is drawn for a block first. Included by cpu.cpp alone.
//
// They read and write S and compute in T. S is T where blocks are staged, and the storage type
// itself where all tensors of a row share it: then nothing needs staging.

#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu_chunks.h"
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

// Where kDrawn, `words` says of each element whether it is pulled: selected, not multiplied away,
// or the difference of a weight that is infinite would be NaN where nothing pulls.
template <typename T, typename S, int kPulled, bool kDrawn = false>
struct GuideLoop {
  const S* param;
  Gradient<T, S, false> gradient;
  Pull<T, S, kPulled> pull;
  S* out;
  int64_t n;
  GuideScalars<T> scalars;
  const uint32_t* words = nullptr;
  uint32_t threshold = 0;

  DGG_HOST_DEVICE void operator()() const { stream(*this); }

  DGG_HOST_DEVICE void prefetch_from(int64_t i) const {
    gradient.prefetch_from(i);
    if constexpr (kPulled != kNotPulled) prefetch(param + i);
    pull.prefetch_from(i);
  }

  DGG_HOST_DEVICE void element(int64_t i) const {
    T p = T(0);
    if constexpr (kPulled != kNotPulled) p = widen<T>(param[i]);
    out[i] = narrow<S>(guide<kPulled>(scalars, p, gradient.at(i), pull.anchor_at(i),
                                      pull.importance_at(i), !kDrawn || words[i] < threshold));
  }
};

// u of equation (3); where kDrawn and `words` says that an element is not drawn, 0.
template <typename T, int kPulled, bool kDrawn>
struct PullDifference {
  const T* param;
  Pull<T, T, kPulled> pull;
  T* out;
  int64_t n;
  GuideScalars<T> scalars;
  const uint32_t* words;
  uint32_t threshold;

  DGG_HOST_DEVICE void operator()() const { stream(*this); }

  DGG_HOST_DEVICE void prefetch_from(int64_t i) const {
    prefetch(param + i);
    pull.prefetch_from(i);
  }

  DGG_HOST_DEVICE void element(int64_t i) const {
    const T u = pull_of<kPulled>(scalars, param[i], pull.anchor_at(i), pull.importance_at(i));
    out[i] = !kDrawn || words[i] < threshold ? u : T(0);
  }
};

// Calls f with how the pull of a row goes that reads its anchor: by importance, if there is any.
template <typename F>
void with_pulled(const void* importance, const F& f) {
  if (importance) {
    f(std::integral_constant<int, kByImportance>());
  } else {
    f(std::integral_constant<int, kByAnchor>());
  }
}

// G of a row that is drawn element by element, for loops that guide nothing themselves.
template <typename T>
void guide_drawn(const Row& row, const Draws& draws, const GuideScalars<T>& scalars, int64_t begin,
                 int64_t n, const T* param, const T* grad, const T* anchor, const T* importance,
                 T* out, const Ahead& ahead = Ahead()) {
  uint32_t words[kBlock];
  draw_words(row, draws, kStreamElement, begin, n, words);
  with_pulled(importance, [&](auto pulled) {
    run(GuideLoop<T, T, decltype(pulled)::value, true>{param,
                                                       {grad, nullptr, T(0)},
                                                       {anchor, importance},
                                                       out,
                                                       n,
                                                       scalars,
                                                       words,
                                                       row.threshold},
        ahead);
  });
}

// u of a row whose pull does not go by the gradient.
template <typename T>
void stage_pull(const Row& row, const Draws& draws, const GuideScalars<T>& scalars, int64_t begin,
                int64_t n, const T* param, const T* anchor, const T* importance, T* out) {
  uint32_t words[kBlock];
  if (row.masked) draw_words(row, draws, kStreamElement, begin, n, words);
  with_pulled(importance, [&](auto pulled) {
    const auto make = [&](auto drawn) {
      run(PullDifference<T, decltype(pulled)::value, decltype(drawn)::value>{
          param, {anchor, importance}, out, n, scalars, words, row.threshold});
    };
    row.masked ? make(std::true_type()) : make(std::false_type());
  });
}

}  // namespace
}  // namespace dgg
