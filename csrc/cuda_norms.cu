// SPDX-License-Identifier: BSD-3-Clause
//
// What happens before an update: the squares of norms, the numbers made of them, the draws.

#include "cuda_chunk.cuh"

namespace dgg {
namespace {

// What squares are summed of: of the gradient; of h, made of it and a replay gradient; of the
// difference of parameter and anchor; of u of equation (3), for rows some of which have importance.
// Of one without it u is the difference, and no weight changes a bit of it.
enum Squared : int { kOfGradient, kOfReal, kOfDifference, kOfPull };

// A sum of squares over a chunk, of one to three tensors.
template <typename T, Squared kOf, typename X, typename Y = X, typename F = X>
struct Squares {
  static constexpr int kElements =
      elements_at_once(stored_size<X>(), stored_size<Y>(), stored_size<F>());
  static constexpr int kBytes = stored_size<X>() + (kOf != kOfGradient ? stored_size<Y>() : 0) +
                                (kOf == kOfPull ? stored_size<F>() : 0);
  static constexpr int kBatch =
      std::is_same<X, Any>::value ? 1 : groups_at_once(kElements * kBytes / 16);

  Stream<X> x;  // of h perhaps absent: 0
  Stream<Y> y;
  T replay_weight = T(0);
  Stream<F> importance;
  GuideScalars<T> scalars{};
  Lanes<T, kElements> lanes{};

  DGG_DEVICE bool has_x() const { return kOf != kOfReal || x; }

  DGG_DEVICE T value(T x, T y, T f) const {
    if (kOf == kOfGradient) return x;
    if (kOf == kOfReal) return real_gradient(x, y, replay_weight);
    return pull_of<kOf == kOfPull ? kByImportance : kByAnchor>(scalars, x, y, f);
  }

  DGG_DEVICE void batch(int begin) {
    constexpr int kGroup = kThreads * kElements;
    Pack<X, kElements> xs[kBatch];
    Pack<Y, kElements> ys[kBatch];
    Pack<F, kElements> importances[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int i = begin + b * kGroup;
      importances[b] = {};
      if (has_x()) x.template load<kAgain>(xs[b], i);
      if (kOf != kOfGradient) y.template load<kAgain>(ys[b], i);
      if (kOf == kOfPull && importance) importance.template load<kAgain>(importances[b], i);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      T square = T(0);
#pragma unroll
      for (int j = 0; j < kElements; ++j) {
        const T first = has_x() ? x.template get<T>(xs[b], j) : T(0);
        const T second = kOf != kOfGradient ? y.template get<T>(ys[b], j) : T(0);
        const T f = kOf == kOfPull ? importance.template get<T>(importances[b], j) : T(0);
        square = add_square(value(first, second, f), square);
        if (j % 4 == 3) {
          lanes.add(second_lane<kElements, kBatch>(b, j, begin + b * kGroup), square);
          square = T(0);
        }
      }
    }
  }

  DGG_DEVICE T value_at(int i) const {
    const T first = has_x() ? element_of<T>(x, i) : T(0);
    const T second = kOf != kOfGradient ? element_of<T>(y, i) : T(0);
    return value(first, second, kOf == kOfPull && importance ? element_of<T>(importance, i) : T(0));
  }

  DGG_DEVICE void quad(int begin, int n) {
    T square = T(0);
#pragma unroll 1
    for (int i = begin; i < begin + n; ++i) square = add_square(value_at(i), square);
    lanes.add(Lanes<T, kElements>::second(begin), square);
  }
};

// What is to be computed of a row. |g|^2 has a walk of its own, so that its bits do not depend on
// what else is asked for; without a replay gradient it is |h|^2, too.
struct Wanted {
  bool total, grad, distance;  // for the result
  int parts;                   // bits: 1 |h|^2, 2 |g|^2, 4 |u|^2

  DGG_DEVICE Wanted(const NormArguments& a, const RowView& view, int64_t row) {
    const int which = a.gate && *a.gate == 0 ? a.which & kTotalNorm : a.which;
    const bool guided = view.active() && view.anchored();
    total = view.active() && (which & kTotalNorm);
    grad = guided && (which & kGradNorm);
    distance = guided && (which & kDistance);
    parts = (total && view.replay ? 1 : 0) |
            (view.grad && (grad || (total && !view.replay)) ? 2 : 0) |
            // Not `>= 0`: a distance of NaN is known, too.
            (distance && a.distances[row] < 0 ? 4 : 0);
  }
};

struct FinishNorms {
  const NormArguments& a;

  DGG_DEVICE int parts(int64_t row) const { return Wanted(a, RowView(a.launch, row), row).parts; }

  DGG_DEVICE void store(int64_t row, const double* sums) const {
    const RowView view(a.launch, row);
    const Wanted wanted(a, view, row);
    const double grad_scale = scale_at(a.grad_scale);
    const double scale = grad_scale * grad_scale;
    const double of_real = view.replay ? sums[0] : sums[1];
    double total = wanted.total ? of_real : 0;
    double grad = wanted.grad ? sums[1] : 0;
    if (grad_scale != 1) {
      total /= scale;
      grad /= scale;
    }
    if (wanted.parts & 4) a.distances[row] = sums[2];
    a.squares[row] = total;
    a.squares[a.table_rows + row] = grad;
    a.squares[2 * a.table_rows + row] = wanted.distance ? a.distances[row] : 0;
  }
};

// What one block makes of the squares: sums in a fixed order, whatever launches wrote them.
DGG_DEVICE void make_coefficients(const CoefficientArguments& a) {
  __shared__ double sums[3][kThreads];
  const int64_t n = a.table_rows;
  const int t = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int part = 0; part < 3; ++part) {
    double sum = 0;
    for (int64_t i = t; i < n; i += kThreads) sum += __ldcg(a.sums + part * n + i);
    sums[part][t] = sum;
  }
  __syncthreads();
#pragma unroll 1
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (t < half) {
#pragma unroll
      for (int part = 0; part < 3; ++part) sums[part][t] += sums[part][t + half];
    }
    __syncthreads();
  }
  const double total = std::sqrt(sums[0][0]), grad = std::sqrt(sums[1][0]),
               distance = std::sqrt(sums[2][0]);
  const double clip = a.clipped ? clip_of(a.max_grad_norm, total) : 1;
  if (t == 0) {
    a.out[kClip] = clip;
    a.out[kGradLength] = grad;
    a.out[kDistanceLength] = distance;
    a.out[kTotalLength] = total;
  }
  const double scale = a.scaling ? scale_of(clip, grad, distance) : 1;
  for (int64_t i = t; i < n; i += kThreads) {
    a.out[kScales + i] = a.scaling && a.per_tensor
                             ? scale_of(clip, std::sqrt(__ldcg(a.sums + n + i)),
                                        std::sqrt(__ldcg(a.sums + 2 * n + i)))
                             : scale;
  }
}

struct NormRow {
  char *grad, *replay, *param, *anchor, *importance;
  int parts, count;
};

// P is void where no distance is measured, F where it is not weighted.
template <typename T_, typename P_, typename G_, typename A_, bool kReplay_, typename F_ = void>
struct NormKind {
  using T = T_;
  using P = P_;
  using G = G_;
  using A = A_;
  using F = F_;
  static constexpr bool kReplay = kReplay_, kDistances = !std::is_void<P_>::value,
                        kWeighted = !std::is_void<F_>::value, kAny = std::is_same<G_, Any>::value;
};

// Four blocks keep the memory busy, and leave enough registers.
template <typename K>
__global__ void __launch_bounds__(kThreads, 4) norms_kernel(const NormArguments a) {
  using T = typename K::T;
  using P = std::conditional_t<K::kDistances, typename K::P, typename K::G>;
  using G = typename K::G;
  using A = std::conditional_t<K::kDistances, typename K::A, typename K::G>;
  using F = std::conditional_t<K::kWeighted, typename K::F, typename K::G>;
  __shared__ NormRow row;
  __shared__ RowEnd end;
  const uint64_t dtypes = a.launch.dtypes;
  if (threadIdx.x == 0) {
    end.load(a.launch, number_from_behind(a.launch));
    const ChunkView chunk(a.launch, number_from_behind(a.launch));
    const RowView view(a.launch, chunk.row);
    row.parts = Wanted(a, view, chunk.row).parts;
    row.count = chunk.count;
    row.grad = chunk.at(view.grad, dtypes, kSlotGrad);
    row.replay = chunk.at(view.replay, dtypes, kSlotReplay);
    row.param = chunk.at(view.columns[kColumnParam], dtypes, kSlotParam);
    row.anchor = chunk.at(view.columns[kColumnAnchor], dtypes, kSlotAnchor);
    const int64_t importance = K::kWeighted ? view.columns[kColumnImportance] : 0;
    row.importance = chunk.at(importance, dtypes, kSlotImportance);
  }
  __syncthreads();
  const auto sum = [&](int part, auto body, bool aligned) {
    walk<body.kElements, body.kBatch>(body, row.count, aligned);
    const double sum =
        unspoiled<T>(sum_of_block(body.lanes), [&](int i) { return body.value_at(i); }, row.count);
    if (threadIdx.x != 0) return;
    a.launch.partials[part * a.launch.chunk_count + number_from_behind(a.launch)] = sum;
  };
  const Stream<G> grad(row.grad, code_at(dtypes, kSlotGrad));
  if (row.parts & 2) sum(1, Squares<T, kOfGradient, G>{grad}, are_aligned(row.grad));
  if constexpr (K::kReplay) {
    if (row.parts & 1) {
      const Stream<G> replay(row.replay, code_at(dtypes, kSlotReplay));
      sum(0, Squares<T, kOfReal, G>{grad, replay, static_cast<T>(a.launch.replay_weight)},
          are_aligned(row.grad, row.replay));
    }
  }
  if constexpr (K::kDistances) {
    if (row.parts & 4) {
      const Stream<P> param(row.param, code_at(dtypes, kSlotParam));
      const Stream<A> anchor(row.anchor, code_at(dtypes, kSlotAnchor));
      const bool aligned = are_aligned(row.param, row.anchor, row.importance);
      if constexpr (K::kWeighted) {
        const Stream<F> importance(row.importance, code_at(dtypes, kSlotImportance));
        const auto scalars = weights_of(row.importance ? a.importance : 0).template as<T>();
        sum(2, Squares<T, kOfPull, P, A, F>{param, anchor, T(0), importance, scalars}, aligned);
      } else {
        sum(2, Squares<T, kOfDifference, P, A>{param, anchor}, aligned);
      }
    }
  }
  if (!end.reach(a.launch)) return;
  finish_row<3>(a.launch, end, FinishNorms{a});
  if (a.coefficients.out != nullptr && end.reach_end(a.launch)) make_coefficients(a.coefficients);
}

template <typename K>
bool suits(const NormArguments& a) {
  const uint64_t dtypes = a.launch.dtypes;
  const auto is = [&](int slot, int code) { return code_at(dtypes, slot) == code; };
  if (std::is_same<typename K::T, double>::value != is(kSlotParam, kFloat64)) return false;
  const bool distances = (a.which & kDistance) != 0;
  if (K::kWeighted != (distances && a.importance != 0)) return false;
  if constexpr (!K::kAny) {
    const bool replay = a.launch.replays != nullptr;
    if (K::kReplay != replay || K::kDistances != distances) return false;
    if (!is(kSlotGrad, code_of<typename K::G>())) return false;
    if (replay && !is(kSlotReplay, code_of<typename K::G>())) return false;
    if constexpr (K::kWeighted) {
      if (!is(kSlotImportance, code_of<typename K::F>())) return false;
    }
    if constexpr (K::kDistances) {
      return is(kSlotParam, code_of<typename K::P>()) && is(kSlotAnchor, code_of<typename K::A>());
    }
  }
  return true;
}

template <typename... K>
cudaError_t launch_norms_of(const NormArguments& a, cudaStream_t stream, Kinds<K...>) {
  constexpr Candidate<NormArguments> kCandidates[] = {{suits<K>, norms_kernel<K>}...};
  return launch_first(kCandidates, a, stream);
}

template <typename G>
using Gradients = NormKind<float, void, G, void, false>;
template <typename G>
using Replayed = NormKind<float, void, G, void, true>;
template <typename P, typename G = P, typename A = P>
using Measured = NormKind<float, P, G, A, false>;
template <typename P>
using Weighted = NormKind<float, P, P, P, false, P>;
template <typename T, typename F = void>
using AnyNorms = NormKind<T, Any, Any, Any, true, F>;

#ifdef DGG_ONLY  // for tests that look at a few kernels' machine code
using NormKinds = Kinds<DGG_ONLY>;
#else
// What is not in this list is served by the last four, which know all types at run time.
using NormKinds =
    Kinds<Gradients<float>, Gradients<bfloat16>, Gradients<float16>,
          NormKind<double, void, double, void, false>, Replayed<float>, Replayed<bfloat16>,
          Measured<float>, Measured<bfloat16>, Measured<float16>,
          NormKind<double, double, double, double, false>, Measured<float, bfloat16>,
          Measured<float, float, bfloat16>, Measured<bfloat16, float>,
          Measured<bfloat16, bfloat16, float>, Weighted<float>, Weighted<bfloat16>, AnyNorms<float>,
          AnyNorms<double>, AnyNorms<float, Any>, AnyNorms<double, Any> >;
#endif

// One block: for squares that have been summed over ranks since.
__global__ void __launch_bounds__(kThreads) coefficients_kernel(const CoefficientArguments a) {
  make_coefficients(a);
}

// One block: the draws of a step that was recorded before its index was known.
__global__ void __launch_bounds__(kThreads) draw_flags_kernel(const DrawArguments a) {
  __shared__ int any;
  if (threadIdx.x == 0) any = 0;
  __syncthreads();
  const uint32_t draw = static_cast<uint32_t>(*a.draw_index);
  int drawn = 0;
  for (int64_t i = threadIdx.x; i < a.table_rows; i += kThreads) {
    const int64_t* const columns = a.table + i * kColumns;
    const double* const hyper = a.hyper + columns[kColumnGroup] * a.hypers;
    double threshold = hyper[a.threshold_column];
    if (!(hyper[a.strength_column] > 0) || columns[kColumnAnchor] == 0) threshold = 0;
    int flag = 0;
    if (a.granularity == kByElement) {
      flag = threshold >= 4294967296.0 ? kInject : threshold > 0 ? kInjectElements : 0;
    } else {
      uint32_t word = 0, w1 = 0, w2 = draw, w3 = kStreamStep;
      if (a.granularity == kByTensor)
        w3 = kStreamTensor + static_cast<uint32_t>(columns[kColumnIndex]);
      philox(word, w1, w2, w3, a.seed);
      flag = static_cast<double>(word) < threshold ? kInject : 0;
    }
    a.flags[i] = static_cast<uint8_t>((a.flags[i] & kFirstStep) | flag);
    drawn |= flag;
  }
  if (drawn) atomicOr(&any, 1);
  __syncthreads();
  if (threadIdx.x == 0 && a.gate) *a.gate = static_cast<uint8_t>(any);
}

}  // namespace

cudaError_t launch_norms(const NormArguments& arguments, cudaStream_t stream) {
  return launch_norms_of(arguments, stream, NormKinds());
}

cudaError_t launch_coefficients(const CoefficientArguments& arguments, cudaStream_t stream) {
  DGG_LAUNCH(coefficients_kernel, 1, stream, arguments);
  return cudaGetLastError();
}

cudaError_t launch_draw_flags(const DrawArguments& arguments, cudaStream_t stream) {
  DGG_LAUNCH(draw_flags_kernel, 1, stream, arguments);
  return cudaGetLastError();
}

}  // namespace dgg
