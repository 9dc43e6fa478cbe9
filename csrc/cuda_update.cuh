// SPDX-License-Identifier: BSD-3-Clause
//
// The kernel behind every update: what a block prepares for its row, the walk of cuda_body.cuh, and
// what the last block does. A step is one launch per dtype combination.

#pragma once

#include "cuda_body.cuh"

namespace dgg {
namespace {

DGG_DEVICE int route_of(int variant) {
  return variant & kDecoupledBit     ? kByDecoupled
         : variant & kFirstMomentBit ? kByFirstMoment
                                     : kByGradient;
}

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
  const bool weighted = K::kRouted && (a.variant & kImportanceBit) && c[kColumnImportance] != 0;
  row.scalars =
      Rule::scalars(hyper, factor, guidance.pull, K::kRouted ? route_of(a.variant) : kByGradient,
                    weighted ? a.importance : 0, flags, prepared)
          .template as<T>();
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
  row.grad = chunk.at(view.grad, dtypes, kSlotGrad);
  row.replay = chunk.at(view.replay, dtypes, kSlotReplay);
  row.param =
      Rule::kWritesParam || reads_anchor ? chunk.at(c[kColumnParam], dtypes, kSlotParam) : nullptr;
#pragma unroll
  for (int s = 0; s < 3; ++s) {
    const bool there =
        s < Rule::kStates || (s < Rule::kStates + Rule::kOptionalStates && row.state_used);
    row.state[s] = there ? chunk.at(c[kColumnExpAvg + s], dtypes, kSlotExpAvg + s) : nullptr;
  }
  row.anchor = reads_anchor ? chunk.at(c[kColumnAnchor], dtypes, kSlotAnchor) : nullptr;
  row.importance = K::kRouted && reads_anchor && (a.variant & kImportanceBit)
                       ? chunk.at(c[kColumnImportance], dtypes, kSlotImportance)
                       : nullptr;
  row.copy = copied ? chunk.at(c[kColumnCopy], dtypes, kSlotCopy) : nullptr;
  row.aligned = are_aligned(row.grad, row.replay, row.param, row.state[0], row.state[1],
                            row.state[2], row.anchor, row.importance, row.copy);
  if (K::kDraws && (row.masked || (a.variant & kStochasticBit))) {
    // A thread's quads must be quads of the unsharded parameter, too.
    const bool whole = row.stretch >= c[kColumnNumel];
    if (row.base % 4 != 0 || (!whole && (row.stretch % 4 != 0 || row.stride % 4 != 0))) {
      row.aligned = false;
    }
  }
  // An edit needs a gradient to write into, and something to change in it.
  row.work =
      Rule::kWritesParam || (view.grad != 0 && (row.guided || view.replay != 0 || factor != 1));
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
      if (Rule::kWritesParam) end.load(a.launch, blockIdx.x);
    }
  }
  __syncthreads();
  if (skip) return;
  const bool measures = K::kAnchor && (a.variant & kLookAheadBit) != 0;
  if (Rule::kWritesParam && !measures && threadIdx.x == 0) {
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
  if constexpr (Rule::kWritesParam) {
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
  const bool routed = anchor && (a.variant & (kImportanceBit | kFirstMomentBit | kDecoupledBit));
  if (K::kAnchor != anchor || K::kRouted != routed) return false;
  if (std::is_same<typename K::T, double>::value != (code_at(dtypes, kSlotParam) == kFloat64)) {
    return false;
  }
  if constexpr (!K::kAny) {
    const auto is = [&](int slot, int code) { return code_at(dtypes, slot) == code; };
    const bool replay = a.launch.replays != nullptr;
    // A routed kernel serves both: there are few of them.
    if ((K::kRouted ? replay && !K::kReplay : replay != K::kReplay) || K::kDraws != draws) {
      return false;
    }
    if (K::kState != ((a.variant & kStateBit) != 0) && Rule::kOptionalStates > 0) return false;
    if (K::kCopy != ((a.variant & kCopyBit) != 0) && Rule::kWritesParam) return false;
    if (Update::kReadsParam && !is(kSlotParam, code_of<typename K::P>())) return false;
    if (!is(kSlotGrad, code_of<typename K::G>())) return false;
    if (replay && !is(kSlotReplay, code_of<typename K::G>())) return false;
    for (int s = 0; s < Update::kStates; ++s) {
      if (!is(kSlotExpAvg + s, code_of<typename K::M>())) return false;
    }
    if (K::kAnchor && !is(kSlotAnchor, code_of<typename K::A>())) return false;
    if constexpr (K::kRouted) {
      const bool weighted = (a.variant & kImportanceBit) != 0;
      if (weighted && !is(kSlotImportance, code_of<typename K::F>())) return false;
    }
    if (K::kCopy && !is(kSlotCopy, code_of<typename Update::C>())) return false;
  }
  return true;
}

template <typename Rule, typename... K>
cudaError_t launch_update(const UpdateArguments& a, cudaStream_t stream, Kinds<K...>) {
  constexpr Candidate<UpdateArguments> kCandidates[] = {
      {suits<Rule, K>, update_kernel<Rule, K>}...};
  return launch_first(kCandidates, a, stream);
}

}  // namespace
}  // namespace dgg
