// SPDX-License-Identifier: BSD-3-Clause
//
// The pass and the numbers behind alpha="auto": squares and products of gradient, replay gradient
// and pull, in one walk over all of them, and the strength of equation (7) that follows.

#include "cuda_chunk.cuh"

namespace dgg {
namespace {

// The sums of a chunk, in the order of `Product` from kGuided on.
enum Sum : int { kHead, kOfPull, kOfReplay, kHeadReplay, kPullReplay };
static_assert(kPullReplay + 1 == kPartials && kPullReplay + 1 == kUDotR, "as table.h has them");

// Those of them that a row has: only guided ones have a pull, and not all a replay gradient.
constexpr int kHeadParts = 1 << kHead, kPullParts = 1 << kOfPull,
              kReplayParts = 1 << kOfReplay | 1 << kHeadReplay | 1 << kPullReplay;

template <typename A, typename T>
DGG_DEVICE void add_products(A (&sums)[kPartials], T head, T pull, T replay) {
  const A h = static_cast<A>(head), u = static_cast<A>(pull), r = static_cast<A>(replay);
  sums[kHead] = add_square(h, sums[kHead]);
  sums[kOfPull] = add_square(u, sums[kOfPull]);
  sums[kOfReplay] = add_square(r, sums[kOfReplay]);
  sums[kHeadReplay] = std::fma(h, r, sums[kHeadReplay]);
  sums[kPullReplay] = std::fma(u, r, sums[kPullReplay]);
}

// F is void where the pull is not weighted. What a row does not have counts as 0.
template <typename T_, typename P_, typename G_, typename A_, typename F_ = void>
struct ProductKind {
  using T = T_;
  using P = P_;
  using G = G_;
  using A = A_;
  using F = F_;
  static constexpr bool kWeighted = !std::is_void<F_>::value, kAny = std::is_same<G_, Any>::value;
};

struct ProductRow {
  char *grad, *replay, *param, *anchor, *importance;  // the last three only where the row is guided
  int parts, count;
};

template <typename K>
struct Products {
  using T = typename K::T;
  using P = typename K::P;
  using G = typename K::G;
  using A = typename K::A;
  using F = std::conditional_t<K::kWeighted, typename K::F, A>;
  static constexpr int kElements =
      elements_at_once(stored_size<P>(), stored_size<G>(), stored_size<A>(), stored_size<F>());
  static constexpr int kLoads = kElements *
                                (2 * stored_size<G>() + stored_size<P>() + stored_size<A>() +
                                 (K::kWeighted ? stored_size<F>() : 0)) /
                                16;
  static constexpr int kBatch = K::kAny ? 1 : groups_at_once(kLoads);

  Stream<G> grad, replay;
  Stream<P> param;
  Stream<A> anchor;
  Stream<F> importance;
  GuideScalars<T> scalars;
  T replay_weight;
  Lanes<T, kElements> lanes[kPartials];

  DGG_DEVICE Products(const ProductRow& row, const ProductArguments& a)
      : grad(row.grad, code_at(a.launch.dtypes, kSlotGrad)),
        replay(row.replay, code_at(a.launch.dtypes, kSlotReplay)),
        param(row.param, code_at(a.launch.dtypes, kSlotParam)),
        anchor(row.anchor, code_at(a.launch.dtypes, kSlotAnchor)),
        importance(row.importance, code_at(a.launch.dtypes, kSlotImportance)),
        scalars(weights_of(K::kWeighted && row.importance ? a.importance : 0).template as<T>()),
        replay_weight(static_cast<T>(a.launch.replay_weight)) {}

  DGG_DEVICE T pull(T p, T a, T f) const {
    return pull_of<K::kWeighted ? kByImportance : kByAnchor>(scalars, p, a, f);
  }

  DGG_DEVICE void batch(int begin) {
    constexpr int kGroup = kThreads * kElements;
    Pack<G, kElements> grads[kBatch], replays[kBatch];
    Pack<P, kElements> params[kBatch];
    Pack<A, kElements> anchors[kBatch];
    Pack<F, kElements> importances[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int i = begin + b * kGroup;
      grads[b] = {};
      replays[b] = {};
      params[b] = {};
      anchors[b] = {};
      importances[b] = {};
      // All are wanted again by the update.
      if (grad) grad.template load<kAgain>(grads[b], i);
      if (replay) replay.template load<kAgain>(replays[b], i);
      if (anchor) {
        param.template load<kAgain>(params[b], i);
        anchor.template load<kAgain>(anchors[b], i);
      }
      if (K::kWeighted && importance) importance.template load<kAgain>(importances[b], i);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      T sums[kPartials] = {};
#pragma unroll
      for (int j = 0; j < kElements; ++j) {
        const T r = replay.template get<T>(replays[b], j);
        const T f = K::kWeighted ? importance.template get<T>(importances[b], j) : T(0);
        const T u =
            pull(param.template get<T>(params[b], j), anchor.template get<T>(anchors[b], j), f);
        add_products(sums, real_gradient(grad.template get<T>(grads[b], j), r, replay_weight), u,
                     r);
        if (j % 4 == 3) {
          const int second = second_lane<kElements, kBatch>(b, j, begin + b * kGroup);
#pragma unroll
          for (int part = 0; part < kPartials; ++part) {
            lanes[part].add(second, sums[part]);
            sums[part] = T(0);
          }
        }
      }
    }
  }

  template <typename Sums>
  DGG_DEVICE void add_element(Sums& sums, int i) const {
    const T g = grad ? element_of<T>(grad, i) : T(0);
    const T r = replay ? element_of<T>(replay, i) : T(0);
    T u = T(0);
    if (anchor) {
      const T f = K::kWeighted && importance ? element_of<T>(importance, i) : T(0);
      u = pull(element_of<T>(param, i), element_of<T>(anchor, i), f);
    }
    add_products(sums, real_gradient(g, r, replay_weight), u, r);
  }

  DGG_DEVICE void quad(int begin, int n) {
    T sums[kPartials] = {};
#pragma unroll 1
    for (int i = begin; i < begin + n; ++i) add_element(sums, i);
    const int second = Lanes<T, kElements>::second(begin);
#pragma unroll
    for (int part = 0; part < kPartials; ++part) lanes[part].add(second, sums[part]);
  }
};

DGG_DEVICE int parts_of(const ProductArguments& a, const RowView& view, int64_t row) {
  if (!view.active()) return 0;
  if (!(a.flags[row] & kInject) || !view.anchored()) return kHeadParts;
  return kHeadParts | kPullParts | (view.replay ? kReplayParts : 0);
}

struct FinishProducts {
  const ProductArguments& a;

  DGG_DEVICE int parts(int64_t row) const { return parts_of(a, RowView(a.launch, row), row); }

  DGG_DEVICE void store(int64_t row, const double* sums) const {
    const int64_t n = a.guard.table_rows;
    const double scale = scale_at(a.grad_scale), squared = scale * scale;
    const bool guided = parts(row) & kPullParts;
    double* const out = a.products + row;
    out[kTotal * n] = sums[kHead] / squared;
    out[kGuided * n] = guided ? sums[kHead] / squared : 0;
    out[kPull * n] = sums[kOfPull];
    out[kReplay * n] = sums[kOfReplay] / squared;
    out[kHDotR * n] = sums[kHeadReplay] / squared;
    out[kUDotR * n] = sums[kPullReplay] / scale;
  }
};

// What one block makes of the products: sums in a fixed order, whatever launches wrote them.
DGG_DEVICE void make_guard(const CoefficientArguments& a) {
  const int64_t n = a.table_rows;
  const int t = static_cast<int>(threadIdx.x);
  const auto sum_of_rows = [&](int product) {
    double sum = 0;
    for (int64_t i = t; i < n; i += kThreads) sum += __ldcg(a.sums + product * n + i);
    return sum_of_threads(sum);
  };
  const double total = std::sqrt(sum_of_rows(kTotal)), head = std::sqrt(sum_of_rows(kGuided)),
               pull = std::sqrt(sum_of_rows(kPull)), replay = std::sqrt(sum_of_rows(kReplay)),
               h_dot_r = sum_of_rows(kHDotR), u_dot_r = sum_of_rows(kUDotR);
  const double clip = a.clipped ? clip_of(a.max_grad_norm, total) : 1;
  if (t == 0) {
    a.out[kClip] = clip;
    a.out[kGradLength] = head;
    a.out[kDistanceLength] = pull;
    a.out[kTotalLength] = total;
    a.out[kScales + n] = head * replay > 0 ? h_dot_r / (head * replay) : 0;
  }
  const double common = guard_of(clip, {head, pull, h_dot_r, u_dot_r}, a.maximize);
  double squares = 0;
  for (int64_t i = t; i < n; i += kThreads) {
    const double* const of_row = a.sums + i;
    const double square = __ldcg(of_row + kPull * n);
    double strength = common;
    if (a.per_tensor) {
      const Guard own{std::sqrt(__ldcg(of_row + kGuided * n)), std::sqrt(square),
                      __ldcg(of_row + kHDotR * n), __ldcg(of_row + kUDotR * n)};
      strength = guard_of(clip, own, a.maximize);
    }
    a.out[kScales + i] = strength;
    squares += strength * strength * square;
  }
  squares = sum_of_threads(squares);
  if (t == 0) a.out[kScales + n + 1] = head > 0 ? std::sqrt(squares) / head : 0;
}

// Three blocks keep the memory busy, and leave enough registers for five sums. The rare kernels get
// the registers they want.
template <typename K>
__global__ void __launch_bounds__(kThreads, (K::kAny ? 1 : 3))
    products_kernel(const ProductArguments a) {
  using T = typename K::T;
  __shared__ ProductRow row;
  __shared__ RowEnd end;
  const int64_t number = number_from_behind(a.launch);
  if (threadIdx.x == 0) {
    const uint64_t dtypes = a.launch.dtypes;
    end.load(a.launch, number);
    const ChunkView chunk(a.launch, number);
    const RowView view(a.launch, chunk.row);
    row.parts = parts_of(a, view, chunk.row);
    row.count = chunk.count;
    const bool guided = row.parts & kPullParts;
    const int64_t param = guided ? view.columns[kColumnParam] : 0;
    const int64_t anchor = guided ? view.columns[kColumnAnchor] : 0;
    const int64_t importance = K::kWeighted && guided ? view.columns[kColumnImportance] : 0;
    row.grad = chunk.at(view.grad, dtypes, kSlotGrad);
    row.replay = chunk.at(view.replay, dtypes, kSlotReplay);
    row.param = chunk.at(param, dtypes, kSlotParam);
    row.anchor = chunk.at(anchor, dtypes, kSlotAnchor);
    row.importance = chunk.at(importance, dtypes, kSlotImportance);
  }
  __syncthreads();
  if (row.parts != 0) {
    Products<K> body(row, a);
    walk<body.kElements, body.kBatch>(
        body, row.count, are_aligned(row.grad, row.replay, row.param, row.anchor, row.importance));
    double sums[kPartials];
    bool spoiled = false;
#pragma unroll
    for (int part = 0; part < kPartials; ++part) {
      if (!(row.parts >> part & 1)) continue;
      sums[part] = sum_of_block(body.lanes[part]);
      // A product is no larger than the squares of its factors: where these are sound, so is it.
      spoiled = spoiled || (part <= kOfReplay && !square_sum_is_reliable(sums[part]));
    }
    if (std::is_same<T, float>::value && spoiled) {
      double again[kPartials] = {};
#pragma unroll 1
      for (int i = static_cast<int>(threadIdx.x); i < row.count; i += kThreads) {
        body.add_element(again, i);
      }
#pragma unroll
      for (int part = 0; part < kPartials; ++part) sums[part] = sum_of_threads(again[part]);
    }
    if (threadIdx.x == 0) {
#pragma unroll
      for (int part = 0; part < kPartials; ++part) {
        if (!(row.parts >> part & 1)) continue;
        a.launch.partials[part * a.launch.chunk_count + number] = sums[part];
      }
    }
  }
  if (!end.reach(a.launch)) return;
  finish_row<kPartials>(a.launch, end, FinishProducts{a});
  if (a.guard.out != nullptr && end.reach_end(a.launch)) make_guard(a.guard);
}

template <typename K>
bool suits(const ProductArguments& a) {
  const uint64_t dtypes = a.launch.dtypes;
  const auto is = [&](int slot, int code) { return code_at(dtypes, slot) == code; };
  if (std::is_same<typename K::T, double>::value != is(kSlotParam, kFloat64)) return false;
  if constexpr (!K::kAny) {
    if (K::kWeighted != (a.importance != 0)) return false;
    if constexpr (K::kWeighted) {
      if (!is(kSlotImportance, code_of<typename K::F>())) return false;
    }
    return is(kSlotParam, code_of<typename K::P>()) && is(kSlotGrad, code_of<typename K::G>()) &&
           is(kSlotReplay, code_of<typename K::G>()) && is(kSlotAnchor, code_of<typename K::A>());
  }
  return true;
}

template <typename... K>
cudaError_t launch_products_of(const ProductArguments& a, cudaStream_t stream, Kinds<K...>) {
  constexpr Candidate<ProductArguments> kCandidates[] = {{suits<K>, products_kernel<K>}...};
  return launch_first(kCandidates, a, stream);
}

template <typename P, typename G = P, typename A = P>
using Plain = ProductKind<float, P, G, A>;
template <typename P, typename G = P, typename A = P>
using Weighted = ProductKind<float, P, G, A, P>;
template <typename T>
using AnyProducts = ProductKind<T, Any, Any, Any, Any>;

#ifdef DGG_ONLY  // for tests that look at a few kernels' machine code
using ProductKinds = Kinds<DGG_ONLY>;
#else
// What is not in this list is served by the last two, which know all types at run time.
using ProductKinds =
    Kinds<Plain<float>, Plain<bfloat16>, Plain<float16>, Plain<float, float, bfloat16>,
          Plain<float, bfloat16>, Weighted<float>, Weighted<bfloat16>, Weighted<float, bfloat16>,
          AnyProducts<float>, AnyProducts<double> >;
#endif

// One block: for products that have been summed over ranks since.
__global__ void __launch_bounds__(kThreads) guard_kernel(const CoefficientArguments a) {
  make_guard(a);
}

}  // namespace

cudaError_t launch_products(const ProductArguments& arguments, cudaStream_t stream) {
  return launch_products_of(arguments, stream, ProductKinds());
}

cudaError_t launch_guard(const CoefficientArguments& arguments, cudaStream_t stream) {
  DGG_LAUNCH(guard_kernel, 1, stream, arguments);
  return cudaGetLastError();
}

}  // namespace dgg
