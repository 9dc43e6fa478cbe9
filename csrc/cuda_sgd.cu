// SPDX-License-Identifier: BSD-3-Clause
//
// SGD on a GPU.

#include "cuda_update.cuh"

namespace dgg {
namespace {

struct Sgd {
  template <typename T>
  using Scalars = SgdScalars<T>;
  static constexpr int kStates = 0, kOptionalStates = 1;  // the buffer with momentum
  static constexpr bool kWritesParam = true, kCountsSteps = false;
  static constexpr int kHypers = kSgdHypers, kStrength = kSgdStrength, kThreshold = kSgdThreshold;

  DGG_DEVICE static bool maximizes(const double* hyper) { return hyper[kSgdMaximize] != 0; }
  DGG_DEVICE static bool uses_optional_state(const double* hyper) {
    return hyper[kSgdMomentum] != 0;
  }

  DGG_DEVICE static double prepare(const UpdateArguments&, const RowView&, int) { return 0; }

  DGG_DEVICE static SgdScalars<double> scalars(const double* hyper, double factor, double pull,
                                               int route, double importance, int flags,
                                               const double*) {
    SgdScalars<double> s = sgd_scalars(hyper, factor, (flags & kFirstStep) != 0);
    set_pull(s.guide, pull, hyper[kSgdLr], route, importance);
    if (!uses_optional_state(hyper)) {
      // In a kernel with momentum: set the buffer, which nobody will store, and take it as it is.
      s.first = 1;
      s.nesterov = 0;
    }
    return s;
  }

  template <typename T>
  DGG_DEVICE static T missing() {
    return T(0);
  }

  template <typename K, typename T>
  DGG_DEVICE static void element(const SgdScalars<T>& s, T& p, T g, T* states, T a, T f,
                                 bool inject) {
    if constexpr (K::kRouted) {
      const T u = pull_of<kByImportance>(s.guide, p, a, f);
      sgd<kByRoute, K::kState>(s, p, g, states[0], u, f, inject);
    } else {
      sgd<K::kPulled, K::kState>(s, p, g, states[0], a, f, inject);
    }
  }
};

template <bool kState, typename T, typename P, typename G = P, typename M = P>
using Plain = Kind<T, P, G, M, P, void, false, false, false, kState>;
template <bool kState, typename T, typename P, typename G = P, typename M = P>
using Guided = Kind<T, P, G, M, P, void, true, false, false, kState>;
template <typename P, typename M = P>
using Replayed = Kind<float, P, P, M, P, void, true, true, false, true>;
template <typename P, typename M = P>
using Rounded = Kind<float, P, P, M, P, void, false, false, true, true>;
template <typename P, typename M = P>
using Drawn = Kind<float, P, P, M, P, void, true, false, true, true>;

// Weighted by importance, or decoupled; with a replay gradient or without.
template <typename P>
using Routed = Kind<float, P, P, P, P, void, true, true, false, true, P>;

#ifdef DGG_ONLY  // for tests that look at a few kernels' machine code
using SgdKinds = Kinds<DGG_ONLY>;
#else
// What is not in this list is served by the last six, which know all types at run time.
using SgdKinds = Kinds<
    Plain<true, float, float>, Guided<true, float, float>, Plain<false, float, float>,
    Guided<false, float, float>, Replayed<float>, Drawn<float>,
    //
    Plain<true, float, bfloat16>, Guided<true, float, bfloat16>, Plain<false, float, bfloat16>,
    Guided<false, float, bfloat16>, Replayed<bfloat16>, Rounded<bfloat16>, Drawn<bfloat16>,
    //
    Plain<true, float, float16>, Guided<true, float, float16>,
    //
    Plain<true, float, bfloat16, bfloat16, float>, Guided<true, float, bfloat16, bfloat16, float>,
    Plain<true, float, float, bfloat16, float>, Guided<true, float, float, bfloat16, float>,
    //
    Plain<true, double, double>, Guided<true, double, double>,
    //
    Routed<float>, Routed<bfloat16>,
    //
    AnyKind<float, false>, AnyKind<float, true>, AnyKind<float, true, Any>, AnyKind<double, false>,
    AnyKind<double, true>, AnyKind<double, true, Any> >;
#endif

}  // namespace

cudaError_t launch_sgd(const UpdateArguments& arguments, cudaStream_t stream) {
  return launch_update<Sgd>(arguments, stream, SgdKinds());
}

}  // namespace dgg
