// SPDX-License-Identifier: BSD-3-Clause
//
// The kernel behind every update: a rule (Adam, SGD, or the gradient edit) says which tensors it
// has and what happens to an element, this file how a chunk is walked. A step is one launch per
// dtype combination.

#pragma once

#include "cuda_chunk.cuh"

namespace dgg {
namespace {

// What a block keeps of its row, in shared memory.
template <typename T, typename Scalars>
struct RowOfBlock {
  char *param, *grad, *replay, *state[3], *anchor, *copy;
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
// there is no copy. In a kernel of Any everything optional is decided at run time.
template <typename T_, typename P_, typename G_, typename M_, typename A_, typename C_,
          bool kAnchor_, bool kReplay_, bool kDraws_, bool kState_>
struct Kind {
  using T = T_;
  using P = P_;
  using G = G_;
  using M = M_;
  using A = A_;
  using C = C_;
  static constexpr bool kAnchor = kAnchor_, kReplay = kReplay_, kDraws = kDraws_, kState = kState_;
  static constexpr bool kCopy = !std::is_void<C_>::value;
  static constexpr bool kAny = std::is_same<P_, Any>::value;
};

template <typename T, bool kAnchor>
using AnyKind = Kind<T, Any, Any, Any, Any, Any, kAnchor, true, true, true>;

template <typename Rule, typename K>
struct Body {
  using T = typename K::T;
  using P = typename K::P;
  using G = typename K::G;
  using M = typename K::M;
  using A = typename K::A;
  using C = std::conditional_t<K::kCopy, typename K::C, P>;
  using R = G;
  using Scalars = typename Rule::template Scalars<T>;
  using Row = RowOfBlock<T, Scalars>;

  static constexpr int kStates = Rule::kStates + (K::kState ? Rule::kOptionalStates : 0);
  static constexpr int kSlots = kStates > 0 ? kStates : 1;  // an array needs one
  static constexpr bool kReadsParam = Rule::kWritesParam || K::kAnchor;
  static constexpr bool kDraws = K::kDraws && kReadsParam;

  using NarrowP = std::conditional_t<kReadsParam, P, G>;
  using NarrowM = std::conditional_t<(kStates > 0), M, G>;
  using NarrowA = std::conditional_t<K::kAnchor, A, G>;
  using NarrowC = std::conditional_t<K::kCopy, C, G>;
  static constexpr int kElements = elements_at_once<G, NarrowP, NarrowM, NarrowA, NarrowC>();
  // 128-bit loads of a thread per group.
  static constexpr int kLoads =
      kElements *
      (stored_size<G>() * (K::kReplay ? 2 : 1) + (kReadsParam ? stored_size<P>() : 0) +
       kStates * stored_size<M>() + (K::kAnchor ? stored_size<A>() : 0) +
       (K::kCopy ? stored_size<C>() : 0)) /
      16;
  static constexpr int kBatch = K::kAny ? 1 : groups_at_once(kLoads);

  Stream<P> param;
  Stream<G> grad;
  Stream<R> replay;
  Stream<M> state[kSlots];
  Stream<A> anchor;
  Stream<C> copy;
  const Row& row;
  Scalars scalars;
  T replay_weight;
  uint64_t seed;
  bool guided, masked, look_ahead, reads_anchor, state_used, stochastic;
  Lanes<T, kElements> lanes;

  DGG_DEVICE static Stream<M> state_of(const Row& row, uint64_t dtypes, int s) {
    return {row.state[s], code_at(dtypes, kSlotExpAvg + s)};
  }

  DGG_DEVICE Body(const Row& row, const UpdateArguments& a)
      : Body(row, a, std::make_integer_sequence<int, kSlots>()) {}

  template <int... kIndices>
  DGG_DEVICE Body(const Row& row, const UpdateArguments& a, std::integer_sequence<int, kIndices...>)
      : param(row.param, code_at(a.launch.dtypes, kSlotParam)),
        grad(row.grad, code_at(a.launch.dtypes, kSlotGrad)),
        replay(row.replay, code_at(a.launch.dtypes, kSlotReplay)),
        state{state_of(row, a.launch.dtypes, kIndices)...},
        anchor(row.anchor, code_at(a.launch.dtypes, kSlotAnchor)),
        copy(row.copy, code_at(a.launch.dtypes, kSlotCopy)),
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
    if (kDraws) {
      stochastic = stochastic && (row.copy ? copy.is_bfloat16() : param.is_bfloat16());
    }
  }

  // Whether the state is there for the row: the optional ones at run time.
  DGG_DEVICE bool has_state(int s) const {
    return s < kStates && (s < Rule::kStates || state_used);
  }

  DGG_DEVICE int64_t unsharded(int i) const {
    const int64_t l = row.first + i;
    // Most parameters are whole, and a 64-bit division is long.
    return row.stretch >= row.first + row.count
               ? row.base + l
               : unsharded_index(l, row.base, row.stretch, row.stride);
  }

  DGG_DEVICE void batch(int begin) {
    constexpr int kGroup = kThreads * kElements;
    Pack<P, kElements> params[kBatch];
    Pack<G, kElements> grads[kBatch];
    Pack<R, kElements> replays[kBatch];
    Pack<M, kElements> states[kSlots][kBatch];
    Pack<A, kElements> anchors[kBatch];
    Pack<C, kElements> copies[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int i = begin + b * kGroup;
      if (K::kCopy && row.copy) copy.template load<kOnce>(copies[b], i);
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
        T a = T(0), p = T(0), states_of[kSlots];
        if constexpr (K::kAnchor) a = anchor.template get<T>(anchors[b], j);
        if constexpr (kReadsParam) p = param.template get<T>(params[b], j);
        if (K::kCopy && row.copy) {
          p = adopted(p, copy.rounded(p), copy.template get<T>(copies[b], j));
        }
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
          states_of[s] = has_state(s) ? state[s].template get<T>(states[s][b], j)
                                      : Rule::template missing<T>();
        }
        const bool inject = guided && (!masked || draws[j % 4] < row.threshold);
        Rule::template element<K>(scalars, p, g, states_of, a, inject);
        if constexpr (!Rule::kWritesParam) {
          grad.set(new_grads, j, g);
        } else {
#pragma unroll
          for (int s = 0; s < kSlots; ++s) {
            if (has_state(s)) state[s].set(new_states[s], j, states_of[s]);
          }
          if (kDraws && stochastic && !(K::kCopy && row.copy)) {
            pack(new_params.words, j, narrow_stochastically(static_cast<float>(p), dither[j % 4]));
          } else {
            param.set(new_params, j, p);
          }
          if (K::kCopy && row.copy) {
            if (kDraws && stochastic) {
              pack(new_copies.words, j,
                   narrow_stochastically(static_cast<float>(p), dither[j % 4]));
            } else {
              copy.set(new_copies, j, p);
            }
          }
          if constexpr (K::kAnchor) {
            // As stored: what a norm pass would read.
            square = add_square(param.template get<T>(new_params, j) - a, square);
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
        if (K::kCopy && row.copy) copy.template store<kAgain>(new_copies, i);
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
          if (has_state(s)) state[s].template store<kOnce>(new_states[s], i);
        }
      }
    }
  }

  DGG_DEVICE void quad(int begin, int n) {
    T square = T(0);
#pragma unroll 1
    for (int i = begin; i < begin + n; ++i) {
      const int64_t u = kDraws && (masked || stochastic) ? unsharded(i) : 0;
      T g = !K::kReplay || grad ? element_of<T>(grad, i) : T(0);
      if (K::kReplay && replay) g = real_gradient(g, element_of<T>(replay, i), replay_weight);
      T a = T(0), p = T(0), states_of[kSlots];
      if (K::kAnchor && reads_anchor) a = element_of<T>(anchor, i);
      if (kReadsParam && (Rule::kWritesParam || reads_anchor)) p = element_of<T>(param, i);
      if (K::kCopy && row.copy) p = adopted(p, copy.rounded(p), element_of<T>(copy, i));
#pragma unroll
      for (int s = 0; s < kSlots; ++s) {
        states_of[s] = has_state(s) ? element_of<T>(state[s], i) : Rule::template missing<T>();
      }
      bool inject = guided;
      if (kDraws && masked) {
        inject =
            guided && element_word(u, row.draw, kStreamElement + row.index, seed) < row.threshold;
      }
      Rule::template element<K>(scalars, p, g, states_of, a, inject);
      if constexpr (!Rule::kWritesParam) {
        write(grad, i, g);
      } else {
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
          if (has_state(s)) write(state[s], i, states_of[s]);
        }
        const uint32_t word =
            kDraws && stochastic ? element_word(u, row.draw, kStreamRounding + row.index, seed) : 0;
        if (kDraws && stochastic && !(K::kCopy && row.copy)) {
          write_stochastically(param, i, static_cast<float>(p), word);
        } else {
          write(param, i, p);
        }
        if (K::kCopy && row.copy) {
          if (kDraws && stochastic) {
            write_stochastically(copy, i, static_cast<float>(p), word);
          } else {
            write(copy, i, p);
          }
        }
        if (K::kAnchor && look_ahead) square = add_square(element_of<T>(param, i) - a, square);
      }
    }
    if (K::kAnchor && look_ahead) {
      lanes.add(Lanes<T, kElements>::second(begin), square);
    }
  }
};

// Fills `row`; thread 0 alone.
template <typename Rule, typename K, typename Row>
DGG_DEVICE void set_row(const UpdateArguments& a, const ChunkView& chunk, const RowView& view,
                        Row& row, const double* prepared) {
  using T = typename K::T;
  const uint64_t dtypes = a.launch.dtypes;
  const int64_t* const c = view.columns;
  const double* const hyper = a.hyper + c[kColumnGroup] * Rule::kHypers;
  const double strength = hyper[Rule::kStrength], threshold = hyper[Rule::kThreshold];
  const int flags = a.flags[chunk.row];
  const Guidance guidance = guidance_of(flags, K::kAnchor && view.anchored(),
                                        a.coefficients[kScales + chunk.row], strength, threshold);
  const double factor =
      gradient_factor(a.coefficients[kClip], scale_at(a.grad_scale), Rule::maximizes(hyper));
  row.scalars = Rule::scalars(hyper, factor, guidance.pull, flags, prepared).template as<T>();
  row.guided = guidance.guided;
  row.masked = guidance.masked;
  row.threshold = guidance.threshold;
  row.look_ahead = K::kAnchor && view.anchored() && (a.variant & kLookAheadBit) != 0;
  row.state_used = K::kState && Rule::uses_optional_state(hyper);
  row.count = chunk.count;
  row.first = chunk.first;
  row.base = c[kColumnBase];
  row.stretch = c[kColumnStretch];
  row.stride = c[kColumnStride];
  row.index = static_cast<uint32_t>(c[kColumnIndex]);
  row.draw = a.draw_index ? static_cast<uint32_t>(*a.draw_index) : a.draw;
  row.replay_weight = static_cast<T>(a.launch.replay_weight);

  const bool reads_anchor = row.guided || row.look_ahead;
  const bool copied = K::kCopy && (a.variant & kCopyBit) != 0;
  int64_t used = view.grad | view.replay;
  row.grad = chunk.at(view.grad, dtypes, kSlotGrad);
  row.replay = chunk.at(view.replay, dtypes, kSlotReplay);
  row.param = chunk.at(c[kColumnParam], dtypes, kSlotParam);
  if (Rule::kWritesParam || reads_anchor) used |= c[kColumnParam];
#pragma unroll
  for (int s = 0; s < 3; ++s) {
    const bool there =
        s < Rule::kStates || (s < Rule::kStates + Rule::kOptionalStates && row.state_used);
    row.state[s] = there ? chunk.at(c[kColumnExpAvg + s], dtypes, kSlotExpAvg + s) : nullptr;
    if (there) used |= c[kColumnExpAvg + s];
  }
  row.anchor = reads_anchor ? chunk.at(c[kColumnAnchor], dtypes, kSlotAnchor) : nullptr;
  if (reads_anchor) used |= c[kColumnAnchor];
  row.copy = copied ? chunk.at(c[kColumnCopy], dtypes, kSlotCopy) : nullptr;
  if (copied) used |= c[kColumnCopy];
  row.aligned = is_aligned(used);
  if (K::kDraws && (row.masked || (a.variant & kStochasticBit))) {
    // A thread's quads must be quads of the unsharded parameter, too.
    const bool whole = row.stretch >= c[kColumnNumel];
    if (row.base % 4 != 0 || (!whole && (row.stretch % 4 != 0 || row.stride % 4 != 0))) {
      row.aligned = false;
    }
  }
  row.work = Rule::works(view, row, factor);
}

DGG_DEVICE float* step_of(const RowView& view) {
  float* const step = reinterpret_cast<float*>(static_cast<intptr_t>(view.columns[kColumnStep]));
  DGG_GLOBAL(step);
  return step;
}

// What the last block does for every row.
template <typename Rule>
struct FinishUpdate {
  const UpdateArguments& a;

  DGG_DEVICE bool measured(const RowView& view) const {
    return (a.variant & kAnchorBit) && (a.variant & kLookAheadBit) && view.anchored();
  }

  DGG_DEVICE int parts(int64_t row) const {
    const RowView view(a.launch, row);
    return view.active() && measured(view) ? 1 : 0;
  }

  DGG_DEVICE void store(int64_t row, const double* sums) const {
    const RowView view(a.launch, row);
    if (!view.active()) return;
    double distance = -1.0;
    if (measured(view)) {
      // What float32 may have spoiled is left to the next norm pass.
      const bool known = view.columns[kColumnNumel] == 0 || square_sum_is_reliable(sums[0]);
      if (known) distance = sums[0];
    }
    a.distances[row] = distance;
    if (Rule::kCountsSteps) {
      float* const step = step_of(view);
      *step += 1.0f;
    }
  }
};

// Blocks that are to fit on a multiprocessor with 64 Ki registers, so that together they have 56
// KiB on their way from memory: 8 TB/s for a microsecond, shared by 148 multiprocessors, are 53
// KiB. The rare kernels get the registers they want.
template <typename Rule, typename K>
constexpr int blocks_at_once() {
  constexpr int kBytes = kThreads * 16 * Body<Rule, K>::kLoads * Body<Rule, K>::kBatch;
  return K::kAny ? 1 : K::kDraws || K::kReplay ? 2 : (57344 + kBytes - 1) / kBytes;
}

template <typename Rule, typename K>
__global__ void __launch_bounds__(kThreads, (blocks_at_once<Rule, K>()))
    update_kernel(const UpdateArguments a) {
  using Update = Body<Rule, K>;
  __shared__ typename Update::Row row;
  __shared__ double prepared[2];
  __shared__ bool skip;
  __shared__ RowEnd end;
  if (threadIdx.x < 2) {
    // The first two threads do this together: Adam has a power for each to compute.
    const bool found = a.found_inf != nullptr && *a.found_inf != 0;
    bool work = !found;
    if (work) {
      const ChunkView chunk(a.launch, blockIdx.x);
      const RowView view(a.launch, chunk.row);
      work = view.active();
      if (work) {
        prepared[threadIdx.x] = Rule::prepare(a, view, static_cast<int>(threadIdx.x));
        __syncwarp(3);
        if (threadIdx.x == 0) set_row<Rule, K>(a, chunk, view, row, prepared);
      }
    }
    if (threadIdx.x == 0) {
      if (!work) row.work = false;
      skip = found;
      if (Rule::kFinishes) end.load(a.launch, blockIdx.x);
    }
  }
  __syncthreads();
  if (skip) return;
  const bool measures = K::kAnchor && (a.variant & kLookAheadBit) != 0;
  if (Rule::kFinishes && !measures && threadIdx.x == 0) {
    // Nothing is handed over. All blocks of a row have read its step before the last one writes it,
    // and count now, when nothing is on its way to memory that a release would wait for.
    const bool last = Rule::kCountsSteps
                          ? is_last(a.launch.counters + end.position, end.end - end.begin)
                          : end.begin == static_cast<int>(blockIdx.x);
    if (last) FinishUpdate<Rule>{a}.store(a.launch.rows[end.position], nullptr);
  }
  if (row.work) {
    Update body(row, a);
    walk<Update::kElements, Update::kBatch>(body, row.count, row.aligned);
    if (K::kAnchor && body.look_ahead) {
      const double sum = sum_of_block(body.lanes);
      if (threadIdx.x == 0) a.launch.partials[blockIdx.x] = sum;
    }
  }
  if constexpr (Rule::kFinishes) {
    if (measures && end.reach(a.launch)) {
      finish_row<1>(a.launch, end, FinishUpdate<Rule>{a});
    }
  }
}

// Whether a kernel of this kind does what the launch asks for.
template <typename Rule, typename K>
bool suits(const UpdateArguments& a) {
  using Update = Body<Rule, K>;
  const uint64_t dtypes = a.launch.dtypes;
  const bool anchor = (a.variant & kAnchorBit) != 0;
  const bool draws = (a.variant & kStochasticBit) || (anchor && (a.variant & kElementsBit));
  if (K::kAnchor != anchor) return false;
  if (std::is_same<typename K::T, double>::value != (code_at(dtypes, kSlotParam) == kFloat64)) {
    return false;
  }
  if constexpr (!K::kAny) {
    const auto is = [&](int slot, int code) { return code_at(dtypes, slot) == code; };
    if (K::kReplay != (a.launch.replays != nullptr) || K::kDraws != draws) return false;
    if (K::kState != ((a.variant & kStateBit) != 0) && Rule::kOptionalStates > 0) return false;
    if (K::kCopy != ((a.variant & kCopyBit) != 0) && Rule::kWritesParam) return false;
    if (Update::kReadsParam && !is(kSlotParam, code_of<typename K::P>())) return false;
    if (!is(kSlotGrad, code_of<typename K::G>())) return false;
    if (K::kReplay && !is(kSlotReplay, code_of<typename K::G>())) return false;
    for (int s = 0; s < Update::kStates; ++s) {
      if (!is(kSlotExpAvg + s, code_of<typename K::M>())) return false;
    }
    if (K::kAnchor && !is(kSlotAnchor, code_of<typename K::A>())) return false;
    if (K::kCopy && !is(kSlotCopy, code_of<typename Update::C>())) return false;
  }
  return true;
}

template <typename... K>
struct Kinds {};

template <typename Rule>
cudaError_t launch_update(const UpdateArguments&, cudaStream_t, Kinds<>) {
  return cudaErrorInvalidValue;
}

// Launches the first kernel in the list that suits.
template <typename Rule, typename K, typename... Others>
cudaError_t launch_update(const UpdateArguments& a, cudaStream_t stream, Kinds<K, Others...>) {
  if (!suits<Rule, K>(a)) return launch_update<Rule>(a, stream, Kinds<Others...>());
  DGG_LAUNCH((update_kernel<Rule, K>), a.launch.chunk_count, stream, a);
  return cudaGetLastError();
}

}  // namespace
}  // namespace dgg
