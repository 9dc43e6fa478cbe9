// SPDX-License-Identifier: BSD-3-Clause
//
// The gradient edit on a GPU, for an optimizer of someone else's: every gradient becomes G.

#include "cuda_update.cuh"

namespace dgg {
namespace {

struct Guide {
  template <typename T>
  using Scalars = GuideScalars<T>;
  static constexpr int kStates = 0, kOptionalStates = 0;
  static constexpr bool kWritesParam = false, kCountsSteps = false;
  static constexpr int kHypers = kGuideHypers, kStrength = kGuideStrength,
                       kThreshold = kGuideThreshold;

  DGG_DEVICE static bool maximizes(const double*) { return false; }
  DGG_DEVICE static bool uses_optional_state(const double*) { return false; }
  DGG_DEVICE static double prepare(const UpdateArguments&, const RowView&, int) { return 0; }

  // Whatever the route: the pull stays in the gradient.
  DGG_DEVICE static GuideScalars<double> scalars(const double* hyper, double factor, double pull,
                                                 int, double importance, int, const double*) {
    return guide_scalars(hyper, factor, pull, importance);
  }

  template <typename T>
  DGG_DEVICE static T missing() {
    return T(0);
  }

  template <typename K, typename T>
  DGG_DEVICE static void element(const GuideScalars<T>& s, T& p, T& g, T*, T a, T f, bool inject) {
    g = guide<K::kPulled>(s, p, g, a, f, inject);
  }
};

template <typename T, typename G>
using Plain = Kind<T, G, G, G, G, void, false, false, false, false>;
template <typename T, typename P, typename G = P, typename A = P>
using Guided = Kind<T, P, G, P, A, void, true, false, false, false>;
template <typename P>
using Replayed = Kind<float, P, P, P, P, void, true, true, false, false>;

// Weighted by importance, with a replay gradient or without.
template <typename P>
using Weighted = Kind<float, P, P, P, P, void, true, true, false, false, P>;

#ifdef DGG_ONLY  // for tests that look at a few kernels' machine code
using GuideKinds = Kinds<DGG_ONLY>;
#else
// What is not in this list is served by the last six, which know all types at run time.
using GuideKinds =
    Kinds<Plain<float, float>, Plain<float, bfloat16>, Plain<float, float16>, Plain<double, double>,
          Guided<float, float>, Guided<float, bfloat16>, Guided<float, float16>,
          Guided<double, double>, Guided<float, float, bfloat16>, Guided<float, bfloat16, float>,
          Guided<float, bfloat16, bfloat16, float>, Guided<float, float, float, bfloat16>,
          Replayed<float>, Replayed<bfloat16>, Weighted<float>, Weighted<bfloat16>,
          //
          AnyKind<float, false>, AnyKind<float, true>, AnyKind<float, true, Any>,
          AnyKind<double, false>, AnyKind<double, true>, AnyKind<double, true, Any> >;
#endif

}  // namespace

cudaError_t launch_guide(const UpdateArguments& arguments, cudaStream_t stream) {
  return launch_update<Guide>(arguments, stream, GuideKinds());
}

}  // namespace dgg
