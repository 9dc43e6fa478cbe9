// SPDX-License-Identifier: BSD-3-Clause
//
// What every native backend reads: the table of tensors, the hyper-parameters, and the numbers that
// go with them. And what it decides from them: which rows are guided and how, and the numbers an
// update needs. The arithmetic of one element is in update.h. Python and Triton have the same
// numbers in kernels/layout.py; tests/test_table_layout.py compares the two.
//
// The table is int64 [n, kColumns], a row per tensor. An address of 0 means absent. Gradients are
// not in it: `grads` and `replays` are int64 [n] addresses, and `replays` may be empty. A row with
// neither is left alone. The elements of all tensors of a row are dense and in the same order.

#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "update.h"

namespace dgg {

enum Column : int {
  kColumnParam,
  kColumnExpAvg,  // the momentum buffer of SGD
  kColumnExpAvgSq,
  kColumnMaxExpAvgSq,
  kColumnAnchor,
  kColumnStep,    // float32
  kColumnNumel,   // number of elements
  kColumnGroup,   // row of the hyper-parameters
  kColumnDtypes,  // codes of the tensors' dtypes, one in each DtypeSlot
  kColumnIndex,   // tensor index j
  // Where the elements are in the unsharded parameter: see unsharded_index in update.h.
  kColumnBase,
  kColumnStretch,
  kColumnStride,
  // With master weights kColumnParam is the master and this the parameter the model computes with,
  // to which every update is written as well, rounded to its dtype.
  kColumnCopy,
  kColumnImportance,  // F of equation (3)
  kColumns
};

// Position of a tensor's code within the dtype column, from the lowest bits up.
enum DtypeSlot : int {
  kSlotParam,
  kSlotGrad,
  kSlotReplay,
  kSlotExpAvg,
  kSlotExpAvgSq,
  kSlotMaxExpAvgSq,
  kSlotAnchor,
  kSlotCopy,
  kSlotImportance,
  kSlots
};

constexpr int kSlotBits = 4;
constexpr int kSlotMask = 0xF;

enum Dtype : int { kFloat32, kBFloat16, kFloat16, kFloat64, kDtypes };

// Every code is below kDtypes: of each slot no bit beyond the lowest two.
constexpr uint64_t kNoDtypes = 0xCCCCCCCCCCCCCCCCu;

DGG_HOST_DEVICE constexpr int code_at(uint64_t dtypes, int slot) {
  return static_cast<int>(dtypes >> (kSlotBits * slot) & kSlotMask);
}

DGG_HOST_DEVICE constexpr int size_of(int code) {
  return code == kFloat32 ? 4 : code == kFloat64 ? 8 : 2;
}

template <typename S>
constexpr int code_of() {
  return std::is_same<S, float>::value      ? kFloat32
         : std::is_same<S, double>::value   ? kFloat64
         : std::is_same<S, bfloat16>::value ? kBFloat16
                                            : kFloat16;
}

// Calls f with a zero of the storage type that has this code.
template <typename F>
DGG_HOST_DEVICE auto as_stored(int code, const F& f) {
  switch (code) {
    case kFloat32:
      return f(float());
    case kBFloat16:
      return f(bfloat16());
    case kFloat16:
      return f(float16());
    default:
      return f(double());
  }
}

// Bits of `flags`, one byte for each row.
enum Flag : int { kInject = 1, kInjectElements = 2, kFirstStep = 4 };

// Bits of `which`: the norms that are asked for.
enum Which : int { kTotalNorm = 1, kGradNorm = 2, kDistance = 4 };

// Places in `coefficients`; from kScales on there is one for each row.
enum Coefficient : int { kClip, kGradLength, kDistanceLength, kTotalLength, kScales };

// Rows of `products`: ||h||^2 of all tensors, then of the guided ones ||h||^2, ||u||^2, ||r||^2,
// <h, r> and <u, r>.
enum Product : int { kTotal, kGuided, kPull, kReplay, kHDotR, kUDotR, kProducts };

// Partial sums of a chunk at most: those of `products` but for the first.
constexpr int kPartials = 5;

// Behind the scales of a guarded step: its alignment and its pull.
constexpr int kGuardExtras = 2;

// Bits of `variant`: what a launch has to be compiled for.
enum Variant : int {
  kAnchorBit = 1,
  kElementsBit = 2,
  kLookAheadBit = 4,
  kStateBit = 8,
  kStochasticBit = 16,
  kCopyBit = 32,
  kImportanceBit = 64,
  kFirstMomentBit = 128,
  kDecoupledBit = 256
};

// Where the pull enters: in the gradient, in the first moment alone, or outside of the moments.
enum Route : int { kByGradient, kByFirstMoment, kByDecoupled };

// What a draw decides.
enum Granularity : int { kByStep, kByTensor, kByElement };

// Elements of a chunk on a device, where a launch has a block for each.
constexpr int kLaunchChunk = 8192;

// Columns of the hyper-parameters, a row per group.

enum AdamHyper : int {
  kAdamLr,
  kAdamBeta1,
  kAdamBeta2,
  kAdamEps,
  kAdamWeightDecay,
  kAdamDecoupled,
  kAdamAmsgrad,
  kAdamMaximize,
  kAdamStrength,
  kAdamThreshold,
  kAdamHypers
};

enum SgdHyper : int {
  kSgdLr,
  kSgdMomentum,
  kSgdDampening,
  kSgdWeightDecay,
  kSgdNesterov,
  kSgdMaximize,
  kSgdStrength,
  kSgdThreshold,
  kSgdHypers
};

enum GuideHyper : int { kGuideMaximize, kGuideStrength, kGuideThreshold, kGuideHypers };

// Word 3 of a Philox counter: one of these, plus the tensor index where there is a tensor.
constexpr uint32_t kStreamStep = 0;
constexpr uint32_t kStreamTensor = 1;
constexpr uint32_t kStreamElement = 0x80000000u;
constexpr uint32_t kStreamRounding = 0xC0000000u;

constexpr double kLargest = 1.7976931348623157e308;  // finite float64

// Equation (2).
DGG_HOST_DEVICE double clip_of(double max_grad_norm, double total) {
  const double clip = max_grad_norm / (total + 1e-6);
  return clip > 1 ? 1 : clip;  // NaN stays NaN
}

// Whether a sum of squares in float32 is what it ought to be: no square has overflowed, and those
// that have vanished (below 2^-149) are too small to matter beside the sum.
DGG_HOST_DEVICE bool square_sum_is_reliable(double sum) {
  return sum >= 0x1p-100 && sum <= kLargest;
}

// Equation (4) without the strength.
DGG_HOST_DEVICE double scale_of(double clip, double grad, double distance) {
  // Stated first: 0 / 0 is where backends would differ. Neither is there a direction in what is not
  // finite, and a NaN would go into all weights.
  if (grad == 0 || distance == 0 || !(grad <= kLargest) || !(distance <= kLargest)) return 0;
  const double ratio = clip * grad / distance;
  return ratio > 1 ? 1 : ratio;  // NaN stays NaN
}

// What equation (7) is made of: norms, not squares, of h and u, and the products.
struct Guard {
  double head, pull, h_dot_r, u_dot_r;
};

// Equation (7) without the strength: the a at which the step does not raise the loss of the
// replayed examples any more, but no longer a pull than the gradient.
DGG_HOST_DEVICE double guard_of(double clip, const Guard& g, bool maximize) {
  const double back = maximize ? -g.u_dot_r : g.u_dot_r;
  if (!(g.h_dot_r < 0 && back > 0 && g.pull > 0 && g.head <= kLargest && g.pull <= kLargest)) {
    return 0;
  }
  const double enough = -clip * g.h_dot_r / back, most = clip * g.head / g.pull;
  const double least = enough < most ? enough : most;
  return least <= kLargest ? least : 0;  // NaN, too
}

// c, with everything else that multiplies the real gradient.
DGG_HOST_DEVICE double gradient_factor(double clip, double grad_scale, bool negate) {
  const double factor = clip / grad_scale;
  return negate ? -factor : factor;
}

// b s of equation (5), and whether a row reads its anchor at all, and how.
struct Guidance {
  double pull;
  uint32_t threshold;
  bool guided;
  bool masked;  // each element has a draw of its own
};

DGG_HOST_DEVICE Guidance guidance_of(int flags, bool anchored, double scale, double strength,
                                     double threshold) {
  const double pull = strength * scale;
  if (!(flags & (kInject | kInjectElements)) || !anchored || pull == 0) return {0, 0, false, false};
  if (!(flags & kInjectElements)) return {pull, 0, true, false};
  if (threshold <= 0) return {0, 0, false, false};
  const bool masked = threshold < 4294967296.0;
  return {pull, masked ? static_cast<uint32_t>(threshold) : 0, true, masked};
}

DGG_HOST_DEVICE double bias_correction(double beta, double step) {
  return 1 - std::pow(beta, step);
}

// Without the pull, which is the row's own; see set_pull.
DGG_HOST_DEVICE AdamScalars<double> adam_scalars(const double* hyper, double factor, double bias1,
                                                 double bias2) {
  const double lr = hyper[kAdamLr], beta1 = hyper[kAdamBeta1], beta2 = hyper[kAdamBeta2];
  const bool decoupled = hyper[kAdamDecoupled] != 0;
  AdamScalars<double> s;
  s.guide = {factor, 0, 0, 0, 1, 0};
  s.l2 = decoupled ? 0 : hyper[kAdamWeightDecay];
  s.keep = decoupled ? 1 - lr * hyper[kAdamWeightDecay] : 1;
  s.weight1 = 1 - beta1;
  s.rest1 = beta1;
  s.beta2 = beta2;
  s.weight2 = 1 - beta2;
  s.inv_sqrt_bias2 = 1 / std::sqrt(bias2);
  s.eps = hyper[kAdamEps];
  s.step_size = lr / bias1;
  return s;
}

DGG_HOST_DEVICE SgdScalars<double> sgd_scalars(const double* hyper, double factor, bool first) {
  SgdScalars<double> s;
  s.guide = {factor, 0, 0, 0, 1, 0};
  s.l2 = hyper[kSgdWeightDecay];
  s.lr = hyper[kSgdLr];
  s.momentum = hyper[kSgdMomentum];
  s.undamped = 1 - hyper[kSgdDampening];
  s.nesterov = hyper[kSgdNesterov];
  s.first = first ? 1 : 0;
  return s;
}

// The other optimizer negates what it is given; the pull must survive that.
DGG_HOST_DEVICE GuideScalars<double> guide_scalars(const double* hyper, double factor, double pull,
                                                   double importance) {
  return {factor, hyper[kGuideMaximize] != 0 ? -pull : pull, 0, 0, 1 - importance, importance};
}

// Scalars of who only needs u of equation (3).
DGG_HOST_DEVICE GuideScalars<double> weights_of(double importance) {
  return {1, 0, 0, 0, 1 - importance, importance};
}

// The row's own part of the scalars: b s of equation (5) and where it enters, i of equation (3).
DGG_HOST_DEVICE void set_pull(GuideScalars<double>& s, double pull, double lr, int route,
                              double importance) {
  s.pull = route == kByDecoupled ? 0 : pull;
  s.squared = route == kByGradient ? pull : 0;
  s.shift = route == kByDecoupled ? lr * pull : 0;
  s.rest = 1 - importance;
  s.weight = importance;
}

}  // namespace dgg
