// SPDX-License-Identifier: BSD-3-Clause
//
// How an update walks a chunk: a rule (Adam, SGD, or the gradient edit) says which tensors it has
// and what happens to an element.

#pragma once

#include "cuda_chunk.cuh"

namespace dgg {
namespace {

// What a block keeps of its row, in shared memory.
template <typename T, typename Scalars>
struct RowOfBlock {
  char *param, *grad, *replay, *state[3], *anchor, *copy, *importance;
  int64_t first, base, stretch, stride;  // of the unsharded index
  Scalars scalars;
  T replay_weight;
  uint32_t index, threshold, draw;
  int count;
  bool work;  // false: nothing of this chunk is read or written
  bool aligned;
  bool guided, masked, look_ahead, state_used;
};

// Storage types and what a launch was compiled for. T is the arithmetic's type. C is void where
// there is no copy. F, the type of the importance, is void where the pull is not weighted and
// enters by the gradient; else both are decided at run time. In a kernel of Any everything optional
// is.
template <typename T_, typename P_, typename G_, typename M_, typename A_, typename C_,
          bool kAnchor_, bool kReplay_, bool kDraws_, bool kState_, typename F_ = void>
struct Kind {
  using T = T_;
  using P = P_;
  using G = G_;
  using M = M_;
  using A = A_;
  using C = C_;
  using F = F_;
  static constexpr bool kAnchor = kAnchor_, kReplay = kReplay_, kDraws = kDraws_, kState = kState_;
  static constexpr bool kCopy = !std::is_void<C_>::value, kRouted = !std::is_void<F_>::value;
  static constexpr bool kAny = std::is_same<P_, Any>::value;
  // How u is made.
  static constexpr int kPulled = kRouted ? kByImportance : kAnchor_ ? kByAnchor : kNotPulled;
};

template <typename T, bool kAnchor, typename F = void>
using AnyKind = Kind<T, Any, Any, Any, Any, Any, kAnchor, true, true, true, F>;

template <typename Rule, typename K>
struct Body {
  using T = typename K::T;
  using P = typename K::P;
  using G = typename K::G;
  using M = typename K::M;
  using A = typename K::A;
  using C = std::conditional_t<K::kCopy, typename K::C, P>;
  using F = std::conditional_t<K::kRouted, typename K::F, A>;
  using Scalars = typename Rule::template Scalars<T>;
  using Row = RowOfBlock<T, Scalars>;

  static constexpr int kStates = Rule::kStates + (K::kState ? Rule::kOptionalStates : 0);
  static constexpr int kSlots = kStates > 0 ? kStates : 1;  // an array needs one
  static constexpr bool kReadsParam = Rule::kWritesParam || K::kAnchor;
  static constexpr bool kDraws = K::kDraws && kReadsParam;

  // Bytes of an element of each tensor, 0 where there is none.
  static constexpr int kGradBytes = stored_size<G>(),
                       kParamBytes = kReadsParam ? stored_size<P>() : 0,
                       kStateBytes = kStates > 0 ? stored_size<M>() : 0,
                       kAnchorBytes = K::kAnchor ? stored_size<A>() : 0,
                       kCopyBytes = K::kCopy ? stored_size<C>() : 0,
                       kImportanceBytes = K::kRouted ? stored_size<F>() : 0;
  static constexpr int kElements = elements_at_once(kGradBytes, kParamBytes, kStateBytes,
                                                    kAnchorBytes, kCopyBytes, kImportanceBytes);
  // 128-bit loads of a thread per group.
  static constexpr int kLoads =
      kElements *
      (kGradBytes * (K::kReplay ? 2 : 1) + kParamBytes + kStates * kStateBytes + kAnchorBytes +
       kCopyBytes + kImportanceBytes) /
      16;
  static constexpr int kBatch = K::kAny ? 1 : groups_at_once(kLoads);

  Stream<P> param;
  Stream<G> grad, replay;
  Stream<M> state[kSlots];
  Stream<A> anchor;
  Stream<C> copy;
  Stream<F> importance;
  const Row& row;
  Scalars scalars;
  T replay_weight;
  uint64_t seed;
  bool guided, masked, look_ahead, reads_anchor, state_used, stochastic;
  Lanes<T, kElements> lanes;

  DGG_DEVICE Body(const Row& row, const UpdateArguments& a)
      : param(row.param, code_at(a.launch.dtypes, kSlotParam)),
        grad(row.grad, code_at(a.launch.dtypes, kSlotGrad)),
        replay(row.replay, code_at(a.launch.dtypes, kSlotReplay)),
        anchor(row.anchor, code_at(a.launch.dtypes, kSlotAnchor)),
        copy(row.copy, code_at(a.launch.dtypes, kSlotCopy)),
        importance(row.importance, code_at(a.launch.dtypes, kSlotImportance)),
        row(row),
        scalars(row.scalars),
        replay_weight(row.replay_weight),
        seed(a.seed),
        guided(K::kAnchor && row.guided),
        masked(K::kAnchor && kDraws && row.masked),
        look_ahead(K::kAnchor && row.look_ahead),
        reads_anchor(guided || look_ahead),
        state_used(K::kState && row.state_used),
        stochastic(kDraws && (a.variant & kStochasticBit) != 0) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      state[s] = {row.state[s], code_at(a.launch.dtypes, kSlotExpAvg + s)};
    }
    stochastic = stochastic && (row.copy ? copy.is_bfloat16() : param.is_bfloat16());
  }

  // Whether the state is there for the row: the optional ones at run time.
  DGG_DEVICE bool has_state(int s) const {
    return s < kStates && (s < Rule::kStates || state_used);
  }

  // u of equation (3), of an updated element.
  DGG_DEVICE T pull_at(T p, T a, T f) const { return pull_of<K::kPulled>(scalars.guide, p, a, f); }

  DGG_DEVICE int64_t unsharded(int i) const {
    const int64_t l = row.first + i;
    // Most parameters are whole, and a 64-bit division is long.
    return row.stretch >= row.first + row.count
               ? row.base + l
               : unsharded_index(l, row.base, row.stretch, row.stride);
  }

  DGG_DEVICE void batch(int begin) {
    constexpr int kGroup = kThreads * kElements;
    const bool copied = K::kCopy && row.copy;
    Pack<P, kElements> params[kBatch];
    Pack<G, kElements> grads[kBatch], replays[kBatch];
    Pack<M, kElements> states[kSlots][kBatch];
    Pack<A, kElements> anchors[kBatch];
    Pack<C, kElements> copies[kBatch];
    Pack<F, kElements> importances[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int i = begin + b * kGroup;
      if (copied) copy.template load<kOnce>(copies[b], i);
      if constexpr (Rule::kWritesParam) {
        param.template load<kOnce>(params[b], i);
      } else if constexpr (kReadsParam) {
        params[b] = {};
        // The optimizer behind the edit reads it next.
        if (reads_anchor) param.template load<kAgain>(params[b], i);
      }
      if (!K::kReplay || grad) {
        grad.template load<kOnce>(grads[b], i);
      }
      if (K::kReplay && replay) replay.template load<kOnce>(replays[b], i);
#pragma unroll
      for (int s = 0; s < kSlots; ++s) {
        if (has_state(s)) state[s].template load<kOnce>(states[s][b], i);
      }
      if constexpr (K::kAnchor) {
        // Zeros where there is nothing to read: what follows has no branches then, of which the
        // compiler would make copies.
        anchors[b] = {};
        if (reads_anchor) anchor.template load<kOnce>(anchors[b], i);
      }
      if constexpr (K::kRouted) {
        importances[b] = {};
        if (importance) importance.template load<kOnce>(importances[b], i);
      }
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int i = begin + b * kGroup;
      // Not in place: an element of 16 bits is packed over its neighbour.
      Pack<P, kElements> new_params;
      Pack<C, kElements> new_copies;
      Pack<G, kElements> new_grads;
      Pack<M, kElements> new_states[kSlots];
      uint32_t draws[4], dither[4];
      T square = T(0);
#pragma unroll
      for (int j = 0; j < kElements; ++j) {
        if (kDraws && j % 4 == 0) {
          const int64_t u = unsharded(i + j);
          if (masked) quad_words(draws, u, row.draw, kStreamElement + row.index, seed);
          if (stochastic) quad_words(dither, u, row.draw, kStreamRounding + row.index, seed);
        }
        T g = !K::kReplay || grad ? grad.template get<T>(grads[b], j) : T(0);
        if (K::kReplay && replay) {
          g = real_gradient(g, replay.template get<T>(replays[b], j), replay_weight);
        }
        T a = T(0), f = T(0), p = T(0), states_of[kSlots];
        if constexpr (K::kAnchor) a = anchor.template get<T>(anchors[b], j);
        if constexpr (K::kRouted) f = importance.template get<T>(importances[b], j);
        if constexpr (kReadsParam) p = param.template get<T>(params[b], j);
        if (copied) p = adopted(p, copy.rounded(p), copy.template get<T>(copies[b], j));
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
          states_of[s] = has_state(s) ? state[s].template get<T>(states[s][b], j)
                                      : Rule::template missing<T>();
        }
        const bool inject = guided && (!masked || draws[j % 4] < row.threshold);
        Rule::template element<K>(scalars, p, g, states_of, a, f, inject);
        if constexpr (!Rule::kWritesParam) {
          grad.set(new_grads, j, g);
        } else {
#pragma unroll
          for (int s = 0; s < kSlots; ++s) {
            if (has_state(s)) state[s].set(new_states[s], j, states_of[s]);
          }
          const auto put = [&](const auto& stream, auto& into, bool dithered) {
            if (kDraws && dithered) {
              pack(into.words, j, narrow_stochastically(static_cast<float>(p), dither[j % 4]));
            } else {
              stream.set(into, j, p);
            }
          };
          put(param, new_params, stochastic && !copied);
          if (copied) put(copy, new_copies, stochastic);
          if constexpr (K::kAnchor) {
            // As stored: what a norm pass would read.
            square = add_square(pull_at(param.template get<T>(new_params, j), a, f), square);
            if (j % 4 == 3) {
              lanes.add(second_lane<kElements, kBatch>(b, j, i), look_ahead ? square : T(0));
              square = T(0);
            }
          }
        }
      }
      if constexpr (!Rule::kWritesParam) {
        grad.template store<kAgain>(new_grads, i);
      } else {
        param.template store<kAgain>(new_params, i);
        if (copied) copy.template store<kAgain>(new_copies, i);
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
          if (has_state(s)) state[s].template store<kOnce>(new_states[s], i);
        }
      }
    }
  }

  DGG_DEVICE void quad(int begin, int n) {
    const bool copied = K::kCopy && row.copy;
    T square = T(0);
#pragma unroll 1
    for (int i = begin; i < begin + n; ++i) {
      const int64_t u = kDraws && (masked || stochastic) ? unsharded(i) : 0;
      T g = !K::kReplay || grad ? element_of<T>(grad, i) : T(0);
      if (K::kReplay && replay) g = real_gradient(g, element_of<T>(replay, i), replay_weight);
      T a = T(0), f = T(0), p = T(0), states_of[kSlots];
      if (K::kAnchor && reads_anchor) a = element_of<T>(anchor, i);
      if (K::kRouted && importance) f = element_of<T>(importance, i);
      if (kReadsParam && (Rule::kWritesParam || reads_anchor)) p = element_of<T>(param, i);
      if (copied) p = adopted(p, copy.rounded(p), element_of<T>(copy, i));
#pragma unroll
      for (int s = 0; s < kSlots; ++s) {
        states_of[s] = has_state(s) ? element_of<T>(state[s], i) : Rule::template missing<T>();
      }
      bool inject = guided;
      if (kDraws && masked) {
        inject =
            guided && element_word(u, row.draw, kStreamElement + row.index, seed) < row.threshold;
      }
      Rule::template element<K>(scalars, p, g, states_of, a, f, inject);
      if constexpr (!Rule::kWritesParam) {
        write(grad, i, g);
      } else {
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
          if (has_state(s)) write(state[s], i, states_of[s]);
        }
        const uint32_t word =
            kDraws && stochastic ? element_word(u, row.draw, kStreamRounding + row.index, seed) : 0;
        const auto put = [&](const auto& stream, bool dithered) {
          if (kDraws && dithered) {
            write_stochastically(stream, i, static_cast<float>(p), word);
          } else {
            write(stream, i, p);
          }
        };
        put(param, stochastic && !copied);
        if (copied) put(copy, stochastic);
        if (K::kAnchor && look_ahead) {
          square = add_square(pull_at(element_of<T>(param, i), a, f), square);
        }
      }
    }
    if (K::kAnchor && look_ahead) {
      lanes.add(Lanes<T, kElements>::second(begin), square);
    }
  }
};

}  // namespace
}  // namespace dgg
