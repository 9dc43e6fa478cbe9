// SPDX-License-Identifier: BSD-3-Clause
//
// Adam and AdamW on a GPU.

#include "cuda_update.cuh"

namespace dgg {
namespace {

struct Adam {
  template <typename T>
  using Scalars = AdamScalars<T>;
  static constexpr int kStates = 2, kOptionalStates = 1;  // max_exp_avg_sq with amsgrad
  static constexpr bool kWritesParam = true, kCountsSteps = true;
  static constexpr int kHypers = kAdamHypers, kStrength = kAdamStrength,
                       kThreshold = kAdamThreshold;

  DGG_DEVICE static bool maximizes(const double* hyper) { return hyper[kAdamMaximize] != 0; }
  DGG_DEVICE static bool uses_optional_state(const double* hyper) {
    return hyper[kAdamAmsgrad] != 0;
  }

  // One bias correction a thread.
  DGG_DEVICE static double prepare(const UpdateArguments& a, const RowView& view, int which) {
    const double beta = a.hyper[view.columns[kColumnGroup] * kAdamHypers + kAdamBeta1 + which];
    return bias_correction(beta, *step_of(view) + 1.0f);
  }

  DGG_DEVICE static AdamScalars<double> scalars(const double* hyper, double factor, double pull,
                                                int route, double importance, int,
                                                const double* biases) {
    AdamScalars<double> s = adam_scalars(hyper, factor, biases[0], biases[1]);
    set_pull(s.guide, pull, hyper[kAdamLr], route, importance);
    return s;
  }

  // A largest second moment that never is the larger one.
  template <typename T>
  DGG_DEVICE static T missing() {
    return -static_cast<T>(INFINITY);
  }

  template <typename K, typename T>
  DGG_DEVICE static void element(const AdamScalars<T>& s, T& p, T g, T* states, T a, T f,
                                 bool inject) {
    T unused = T(0);
    T& largest = K::kState ? states[K::kState ? 2 : 0] : unused;
    if constexpr (K::kRouted) {
      const T u = pull_of<kByImportance>(s.guide, p, a, f);
      adam<kByRoute, K::kState>(s, p, g, states[0], states[1], largest, u, f, inject);
    } else {
      adam<K::kPulled, K::kState>(s, p, g, states[0], states[1], largest, a, f, inject);
    }
  }
};

template <typename T, typename P, typename G, typename M, typename A = P>
using Plain = Kind<T, P, G, M, A, void, false, false, false, false>;
template <typename T, typename P, typename G, typename M, typename A = P>
using Guided = Kind<T, P, G, M, A, void, true, false, false, false>;
template <typename T, typename P, typename G, typename M, typename A = P>
using Replayed = Kind<T, P, G, M, A, void, true, true, false, false>;
// Element draws or stochastic rounding.
template <typename T, typename P, typename G, typename M, typename A = P>
using Drawn = Kind<T, P, G, M, A, void, true, false, true, false>;
template <typename T, typename P, typename G, typename M, typename A = P>
using Rounded = Kind<T, P, G, M, A, void, false, false, true, false>;
// Weighted by importance, or by another route than the gradient; with a replay gradient or without.
template <typename P, typename M = P>
using Routed = Kind<float, P, P, M, P, void, true, true, false, false, P>;
// Master weights in float32.
template <typename G, bool kAnchor, bool kDraws>
using Master = Kind<float, float, G, float, float, G, kAnchor, false, kDraws, false>;

#ifdef DGG_ONLY  // for tests that look at a few kernels' machine code
using AdamKinds = Kinds<DGG_ONLY>;
#else
// What is not in this list is served by the last six, which know all types at run time.
using AdamKinds =
    Kinds<Plain<float, float, float, float>, Guided<float, float, float, float>,
          Replayed<float, float, float, float>, Drawn<float, float, float, float>,
          Guided<float, float, float, float, bfloat16>,
          // 16 bits throughout
          Plain<float, bfloat16, bfloat16, bfloat16>, Guided<float, bfloat16, bfloat16, bfloat16>,
          Replayed<float, bfloat16, bfloat16, bfloat16>, Drawn<float, bfloat16, bfloat16, bfloat16>,
          Rounded<float, bfloat16, bfloat16, bfloat16>, Plain<float, float16, float16, float16>,
          Guided<float, float16, float16, float16>,
          // 16-bit parameters with moments in float32
          Plain<float, bfloat16, bfloat16, float>, Guided<float, bfloat16, bfloat16, float>,
          Guided<float, bfloat16, bfloat16, float, float>,
          Rounded<float, bfloat16, bfloat16, float>, Drawn<float, bfloat16, bfloat16, float>,
          Plain<float, float16, float16, float>, Guided<float, float16, float16, float, float>,
          Plain<float, bfloat16, float, float>, Guided<float, bfloat16, float, float>,
          Rounded<float, bfloat16, float, float>,
          // float32 parameters with 16-bit gradients
          Plain<float, float, bfloat16, float>, Guided<float, float, bfloat16, float>,
          Plain<float, float, float16, float>, Guided<float, float, float16, float>,
          Master<bfloat16, false, false>, Master<bfloat16, true, false>,
          Master<bfloat16, false, true>, Master<float16, false, false>,
          Master<float16, true, false>, Routed<float>, Routed<bfloat16>, Routed<bfloat16, float>,
          //
          Plain<double, double, double, double>, Guided<double, double, double, double>,
          AnyKind<float, false>, AnyKind<float, true>, AnyKind<float, true, Any>,
          AnyKind<double, false>, AnyKind<double, true>, AnyKind<double, true, Any> >;
#endif

}  // namespace

cudaError_t launch_adam(const UpdateArguments& arguments, cudaStream_t stream) {
  return launch_update<Adam>(arguments, stream, AdamKinds());
}

}  // namespace dgg
