// SPDX-License-Identifier: BSD-3-Clause
//
// The arithmetic of dgg, written once for every native backend: storage conversions, Philox, and
// the updates of one element. Nothing here allocates, branches on data or knows about tensors, so
// the same lines compile for a CPU vector loop and for a GPU thread. Equation numbers are those of
// dgg/reference/.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define DGG_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define DGG_HOST_DEVICE __forceinline
#else
#define DGG_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace dgg {

// Storage types. The 16-bit ones are converted with integer arithmetic only, so that compilers
// vectorise the conversion on every instruction set and all of them give the same bits.

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

DGG_HOST_DEVICE float float_from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

DGG_HOST_DEVICE uint32_t bits_from_float(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

template <typename T, typename S>
DGG_HOST_DEVICE T widen(S x) {
  return static_cast<T>(x);
}

template <typename T>
DGG_HOST_DEVICE T widen(bfloat16 x) {
  return static_cast<T>(float_from_bits(static_cast<uint32_t>(x.bits) << 16));
}

template <typename T>
DGG_HOST_DEVICE T widen(float16 x) {
#if defined(__CUDA_ARCH__)
  // The same function in one instruction.
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return static_cast<T>(wide);
#else
  // Both the normal and the subnormal reading are computed and one is selected. Shifted left by
  // one, the sign is gone and the exponent's place no longer depends on it.
  const uint32_t word = static_cast<uint32_t>(x.bits) << 16;
  const uint32_t sign = word & 0x80000000u;
  const uint32_t twice = word + word;
  const float normal = float_from_bits((twice >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
  const float subnormal = float_from_bits((twice >> 17) | (126u << 23)) - 0.5f;
  const uint32_t magnitude = bits_from_float(twice < (1u << 27) ? subnormal : normal);
  return static_cast<T>(float_from_bits(sign | magnitude));
#endif
}

// Round to nearest even. NaN is cut off instead: rounding could carry its payload into the
// exponent. Arithmetic only makes quiet ones, whose first bit of the payload stays.
DGG_HOST_DEVICE bfloat16 bfloat16_of(float x) {
#if defined(__CUDA_ARCH__)
  // The same function in one instruction, but for the payload of NaN.
  bfloat16 near;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(near.bits) : "f"(x));
  return near;
#else
  const uint32_t bits = bits_from_float(x);
  const uint32_t half = 0x7FFFu + ((bits >> 16) & 1u);
  return {static_cast<uint16_t>((bits + (x != x ? 0u : half)) >> 16)};
#endif
}

// Round to nearest even by an addition whose alignment shifts the superfluous bits out; values that
// overflow pass through infinity on the way. The two scalings must not be merged.
DGG_HOST_DEVICE float16 float16_of(float x) {
#if defined(__CUDA_ARCH__)
  float16 near;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(near.bits) : "f"(x));
  return near;
#else
  const uint32_t bits = bits_from_float(x);
  const uint32_t sign = bits & 0x80000000u;
  const uint32_t twice = bits + bits;
  const float magnitude = (float_from_bits(bits & 0x7FFFFFFFu) * 0x1.0p+112f) * 0x1.0p-110f;
  const uint32_t exponent = twice & 0xFF000000u;
  const uint32_t bias = exponent < 0x71000000u ? 0x71000000u : exponent;
  const uint32_t sum = bits_from_float(float_from_bits((bias >> 1) + 0x07800000u) + magnitude);
  const uint32_t half = ((sum >> 13) & 0x7C00u) + (sum & 0xFFFu);
  return {static_cast<uint16_t>((sign >> 16) | (twice > 0xFF000000u ? 0x7E00u : half))};
#endif
}

template <typename S, typename T>
DGG_HOST_DEVICE S narrow(T x) {
  if constexpr (std::is_same<S, bfloat16>::value) {
    return bfloat16_of(static_cast<float>(x));
  } else if constexpr (std::is_same<S, float16>::value) {
    return float16_of(static_cast<float>(x));
  } else {
    return static_cast<S>(x);
  }
}

// Stochastic rounding: up with the probability of what is cut off, so that the expected value is x.
DGG_HOST_DEVICE bfloat16 narrow_stochastically(float x, uint32_t word) {
  const uint32_t bits = bits_from_float(x);
  const bool finite = (bits & 0x7F800000u) != 0x7F800000u;
  const uint32_t moved = (bits + (word & 0xFFFFu)) >> 16;
  return {finite ? static_cast<uint16_t>(moved) : bfloat16_of(x).bits};
}

// Philox4x32-10 (Salmon et al., SC 2011): c becomes the four output words of the counter.
DGG_HOST_DEVICE void philox(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed);
  uint32_t k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
    const uint64_t p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// Row-major index in the unsharded parameter of element l of a shard.
DGG_HOST_DEVICE int64_t unsharded_index(int64_t l, int64_t base, int64_t stretch, int64_t stride) {
  return base + (l / stretch) * stride + l % stretch;
}

// A master weight, given its rounding and the parameter that ought to be just that: where it is
// something else somebody has written it, and it takes the master's place.
template <typename T>
DGG_HOST_DEVICE T adopted(T master, T rounded, T seen) {
  return rounded == seen ? master : seen;
}

// Equation (1), before the division by the gradient scale.
template <typename T>
DGG_HOST_DEVICE T real_gradient(T grad, T replay, T replay_weight) {
  return grad + replay_weight * replay;
}

// What the two gradient terms of equation (5) are multiplied with: `grad` is c, divided by the
// gradient scale and negated to maximize; `pull` is b s.
template <typename T>
struct GuideScalars {
  T grad;
  T pull;     // in G, of which the first moment is made
  T squared;  // the same of what the second moment is made of
  T shift;    // what the parameter is moved by, outside of the moments
  T rest;     // 1 - i of equation (3)
  T weight;   // i

  template <typename U>
  DGG_HOST_DEVICE GuideScalars<U> as() const {
    return {static_cast<U>(grad),  static_cast<U>(pull), static_cast<U>(squared),
            static_cast<U>(shift), static_cast<U>(rest), static_cast<U>(weight)};
  }
};

// How an update is pulled: not at all; along param - anchor; along that, weighted by importance; or
// along a u that was made before, by whatever route.
enum Pulled : int { kNotPulled, kByAnchor, kByImportance, kByRoute };

// u of equation (3). With kByRoute the anchor is u already.
template <int kPulled, typename T>
DGG_HOST_DEVICE T pull_of(const GuideScalars<T>& s, T param, T anchor, T importance) {
  if (kPulled == kByRoute) return anchor;
  const T difference = param - anchor;
  return kPulled == kByImportance ? difference * (s.rest + s.weight * importance) : difference;
}

// Equation (5). `inject` is for those who learn only at run time, element by element, whether the
// anchor pulls.
template <int kPulled, typename T>
DGG_HOST_DEVICE T guide(const GuideScalars<T>& s, T param, T grad, T anchor, T importance,
                        bool inject = true) {
  const T scaled = s.grad * grad;
  if (kPulled == kNotPulled || !inject) return scaled;
  const T u = pull_of<kPulled>(s, param, anchor, importance);
  // Not an unconditional addition: 0 * inf would be NaN.
  if (kPulled == kByRoute) return s.pull != T(0) ? scaled + s.pull * u : scaled;
  return scaled + s.pull * u;
}

template <typename T>
struct AdamScalars {
  GuideScalars<T> guide;
  T l2;              // weight decay added to the gradient (Adam)
  T keep;            // factor on the parameter (AdamW), 1 - lr * weight_decay
  T weight1;         // 1 - beta1
  T rest1;           // beta1
  T beta2;           //
  T weight2;         // 1 - beta2
  T inv_sqrt_bias2;  // 1 / sqrt(1 - beta2^step)
  T eps;             //
  T step_size;       // lr / (1 - beta1^step)

  template <typename U>
  DGG_HOST_DEVICE AdamScalars<U> as() const {
    return {guide.template as<U>(),  static_cast<U>(l2),
            static_cast<U>(keep),    static_cast<U>(weight1),
            static_cast<U>(rest1),   static_cast<U>(beta2),
            static_cast<U>(weight2), static_cast<U>(inv_sqrt_bias2),
            static_cast<U>(eps),     static_cast<U>(step_size)};
  }
};

// Equation (6), torch.optim.Adam and AdamW. The first moment is a lerp taken from the nearer end,
// as torch.lerp is, so beta1 = 0 gives exactly the gradient.
template <int kPulled, bool kAmsgrad, typename T>
DGG_HOST_DEVICE void adam(const AdamScalars<T>& s, T& param, T grad, T& exp_avg, T& exp_avg_sq,
                          T& max_exp_avg_sq, T anchor, T importance, bool inject = true) {
  T total = guide<kPulled>(s.guide, param, grad, anchor, importance, inject);
  T squared = total;
  if (kPulled == kByRoute) {
    squared = s.guide.grad * grad;
    squared = inject && s.guide.squared != T(0) ? squared + s.guide.squared * anchor : squared;
    squared = s.l2 != T(0) ? squared + s.l2 * param : squared;
  }
  // Not an unconditional addition: 0 * inf would be NaN where torch has none.
  total = s.l2 != T(0) ? total + s.l2 * param : total;
  if (kPulled != kByRoute) squared = total;
  const T gap = total - exp_avg;
  exp_avg = s.weight1 < T(0.5) ? exp_avg + s.weight1 * gap : total - s.rest1 * gap;
  exp_avg_sq = s.beta2 * exp_avg_sq + s.weight2 * squared * squared;
  T second = exp_avg_sq;
  if (kAmsgrad) {
    // The first comparison fails for NaN in either place, the second lets a new one in.
    second =
        (exp_avg_sq > max_exp_avg_sq || exp_avg_sq != exp_avg_sq) ? exp_avg_sq : max_exp_avg_sq;
    max_exp_avg_sq = second;
  }
  const T denom = std::sqrt(second) * s.inv_sqrt_bias2 + s.eps;
  if (kPulled == kByRoute) {
    const T kept = param * s.keep;
    const T moved = inject && s.guide.shift != T(0) ? kept - s.guide.shift * anchor : kept;
    param = moved - s.step_size * exp_avg / denom;
  } else {
    param = param * s.keep - s.step_size * exp_avg / denom;
  }
}

template <typename T>
struct SgdScalars {
  GuideScalars<T> guide;
  T l2;
  T lr;
  T momentum;
  T undamped;  // 1 - dampening
  // Conditions as numbers of the arithmetic's type: what a vector loop can select by.
  T nesterov;
  T first;  // the buffer is not read but set

  template <typename U>
  DGG_HOST_DEVICE SgdScalars<U> as() const {
    return {guide.template as<U>(),   static_cast<U>(l2),       static_cast<U>(lr),
            static_cast<U>(momentum), static_cast<U>(undamped), static_cast<U>(nesterov),
            static_cast<U>(first)};
  }
};

// Equation (6), torch.optim.SGD.
template <int kPulled, bool kMomentum, typename T>
DGG_HOST_DEVICE void sgd(const SgdScalars<T>& s, T& param, T grad, T& buffer, T anchor,
                         T importance, bool inject = true) {
  T total = guide<kPulled>(s.guide, param, grad, anchor, importance, inject);
  total = s.l2 != T(0) ? total + s.l2 * param : total;
  if (kMomentum) {
    buffer = s.first != T(0) ? total : s.momentum * buffer + s.undamped * total;
    total = s.nesterov != T(0) ? total + s.momentum * buffer : buffer;
  }
  if (kPulled == kByRoute) {
    param = inject && s.guide.shift != T(0) ? param - s.guide.shift * anchor : param;
  }
  param = param - s.lr * total;
}

}  // namespace dgg
