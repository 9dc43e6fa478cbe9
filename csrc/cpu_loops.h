// SPDX-License-Identifier: BSD-3-Clause
//
// The loops of the CPU passes that every rule shares: conversions, mixing, draws and sums, compiled
// for every instruction set. They know no tensors, only memory. Included by cpu.cpp and
// cpu_products.cpp.
//
// Sums are formed in a fixed order: float32 (float64) in a fixed number of lanes within a block,
// float64 beyond. Results are the same bits for every instruction set.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "table.h"
#include "update.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define DGG_X86_VARIANTS 1
#include <cpuid.h>
#include <immintrin.h>
#endif

#if defined(_MSC_VER)
#define DGG_PRAGMA_SIMD
#define DGG_APART __declspec(noinline)
#define DGG_COLD DGG_APART
#else
#define DGG_PRAGMA_SIMD _Pragma("omp simd")
#define DGG_APART __attribute__((noinline))
#define DGG_COLD __attribute__((noinline, cold))
#endif

namespace dgg {
namespace {

constexpr int64_t kBlock = 1024;
constexpr int kLanes = 32;

// Instruction sets. A loop is written as an object whose operator() is always inlined; running it
// inlines it into a function compiled for the chosen instruction set.

enum class Isa { kBaseline, kAvx2, kAvx512 };

#ifdef DGG_X86_VARIANTS
#define DGG_AVX2 "avx2,bmi2"
#if defined(__clang__)
#define DGG_AVX512 DGG_AVX2 ",avx512f,avx512bw,avx512cd,avx512dq,avx512vl"
#else
#define DGG_AVX512 DGG_AVX2 ",avx512f,avx512bw,avx512cd,avx512dq,avx512vl,prefer-vector-width=512"
#endif
#endif

Isa detect_isa() {
  Isa best = Isa::kBaseline;
#ifdef DGG_X86_VARIANTS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2")) {
    best = Isa::kAvx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      best = Isa::kAvx512;
    }
  }
  // For tests: an older path on a newer machine, never the reverse.
  if (const char* wanted = std::getenv("DGG_ISA")) {
    if (std::strcmp(wanted, "baseline") == 0) best = Isa::kBaseline;
    if (std::strcmp(wanted, "avx2") == 0) best = std::min(best, Isa::kAvx2);
  }
#endif
  return best;
}

const Isa kIsa = detect_isa();

template <typename Loop>
void run_baseline(const Loop& loop) {
  loop();
}

#ifdef DGG_X86_VARIANTS
template <typename Loop>
__attribute__((target(DGG_AVX2))) void run_avx2(const Loop& loop) {
  loop();
}

template <typename Loop>
__attribute__((target(DGG_AVX512))) void run_avx512(const Loop& loop) {
  loop();
}
#endif

template <typename Loop>
void run(const Loop& loop) {
#ifdef DGG_X86_VARIANTS
  if (kIsa == Isa::kAvx512) return run_avx512(loop);
  if (kIsa == Isa::kAvx2) return run_avx2(loop);
#endif
  run_baseline(loop);
}

// The loops. Element-wise ones say what happens to element i and which memory is read; `stream`
// walks them. Their number of elements is n.
// Elements between two prefetches; whole cache lines of every type, from one of 16-bit elements to
// four of float64.
constexpr int kStrip = 32;
// What is left is walked in these; a tiny tensor is often just one.
constexpr int kShortStrip = 8;
constexpr int64_t kLineBytes = 64;

// How far ahead memory is asked for: the hardware's prefetchers stop at every page, which all
// streams cross together. On a Zen 3, 512 bytes make a guided step 6 % faster than 2048 and 10 %
// than none; on a Zen 5, 1024 bytes up to 9 % faster than 512; on a Xeon with AVX-512, 1024 bytes 2
// % and 20 %.
int64_t detect_ahead_bytes() {
#ifdef DGG_X86_VARIANTS
  unsigned int a = 0, b = 0, c = 0, d = 0;
  __builtin_cpu_init();
  const bool amd = __builtin_cpu_is("amd") && __get_cpuid(1, &a, &b, &c, &d) != 0;
  if (amd && (a >> 8 & 0xF) + (a >> 20 & 0xFF) < 0x1A) return 512;  // a family before Zen 5's
#endif
  return 1024;
}

const int64_t kAheadBytes = detect_ahead_bytes();

// Asks for lines; past the end of a tensor they may be no addresses at all, which a prefetch does
// not mind.
DGG_HOST_DEVICE void prefetch_lines(uintptr_t begin, int64_t bytes) {
#if defined(__GNUC__) || defined(__clang__)
  for (int64_t line = 0; line < bytes; line += kLineBytes) {
    __builtin_prefetch(reinterpret_cast<const void*>(begin + line));
  }
#endif
}

template <int kElements = kStrip, typename T>
DGG_HOST_DEVICE void prefetch(const T* address) {
  prefetch_lines(reinterpret_cast<uintptr_t>(address) + kAheadBytes,
                 kElements * static_cast<int64_t>(sizeof(T)));
}

template <typename Loop>
DGG_HOST_DEVICE void stream(const Loop& original) {
  // A copy: a store through one of the loop's pointers could otherwise be taken to change them.
  const Loop loop = original;
  int64_t done = 0;
  for (; done + kStrip <= loop.n; done += kStrip) {
    loop.prefetch_from(done);
    DGG_PRAGMA_SIMD
    for (int64_t i = 0; i < kStrip; ++i) loop.element(done + i);
  }
  for (; done + kShortStrip <= loop.n; done += kShortStrip) {
    DGG_PRAGMA_SIMD
    for (int64_t i = 0; i < kShortStrip; ++i) loop.element(done + i);
  }
  for (; done < loop.n; ++done) loop.element(done);
}

// out = in, of another type.
template <typename T, typename S>
struct Convert {
  const T* in;
  S* out;
  int64_t n;

  DGG_HOST_DEVICE void operator()() const { stream(*this); }
  DGG_HOST_DEVICE void prefetch_from(int64_t i) const {
    // What is narrowed was computed just now.
    if constexpr (std::is_floating_point<S>::value) prefetch(in + i);
  }
  DGG_HOST_DEVICE void element(int64_t i) const {
    if constexpr (std::is_floating_point<S>::value) {
      out[i] = widen<S>(in[i]);
    } else {
      out[i] = narrow<S>(in[i]);
    }
  }
};

#ifdef DGG_X86_VARIANTS
// The processor converts float16 by itself, but compilers let it do so for one number at a time:
// the only vector code that is written by hand here. The bits are those of update.h, and what is
// left is converted as eight of which the last are not used.
constexpr int64_t kEight = 8;

bool detect_f16c() {
  unsigned int a = 0, b = 0, c = 0, d = 0;
  return kIsa != Isa::kBaseline && __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}

const bool kF16c = detect_f16c();

#define DGG_F16C __attribute__((target("avx,f16c")))

DGG_F16C inline void convert_eight(const float16* in, float* out) {
  const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in));
  _mm256_storeu_ps(out, _mm256_cvtph_ps(eight));
}

DGG_F16C inline void convert_eight(const float* in, float16* out) {
  const __m128i eight = _mm256_cvtps_ph(_mm256_loadu_ps(in), _MM_FROUND_TO_NEAREST_INT);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), eight);
}

template <typename T, typename S>
DGG_F16C void convert_by_f16c(const T* in, S* out, int64_t n) {
  int64_t i = 0;
  for (; i + kStrip <= n; i += kStrip) {
    if constexpr (std::is_same<T, float16>::value) prefetch(in + i);
    for (int64_t j = i; j < i + kStrip; j += kEight) convert_eight(in + j, out + j);
  }
  for (; i + kEight <= n; i += kEight) convert_eight(in + i, out + i);
  if (i == n) return;
  T rest[kEight] = {};
  S converted[kEight];
  std::copy_n(in + i, n - i, rest);
  convert_eight(rest, converted);
  std::copy_n(converted, n - i, out + i);
}
#endif

template <typename T, typename S>
void convert(const T* in, S* out, int64_t n) {
#ifdef DGG_X86_VARIANTS
  constexpr bool widens = std::is_same<T, float16>::value && std::is_same<S, float>::value;
  constexpr bool narrows = std::is_same<T, float>::value && std::is_same<S, float16>::value;
  if constexpr (widens || narrows) {
    if (kF16c) return convert_by_f16c(in, out, n);
  }
#endif
  run(Convert<T, S>{in, out, n});
}

// bfloat16 by stochastic rounding.
template <typename T>
struct RoundInto {
  const T* in;
  const uint32_t* words;
  bfloat16* out;
  int64_t n;

  DGG_HOST_DEVICE void operator()() const { stream(*this); }
  DGG_HOST_DEVICE void prefetch_from(int64_t) const {}
  DGG_HOST_DEVICE void element(int64_t i) const {
    out[i] = narrow_stochastically(static_cast<float>(in[i]), words[i]);
  }
};

template <typename T>
struct RealGradient {
  const T* grad;
  const T* replay;
  T* out;
  T replay_weight;
  int64_t n;

  DGG_HOST_DEVICE void operator()() const { stream(*this); }
  DGG_HOST_DEVICE void prefetch_from(int64_t i) const {
    prefetch(grad + i);
    prefetch(replay + i);
  }
  DGG_HOST_DEVICE void element(int64_t i) const {
    out[i] = real_gradient(grad[i], replay[i], replay_weight);
  }
};

// words[4 i .. 4 i + 3] are the words of counter first + i.
struct Philox {
  uint32_t* words;
  int64_t first;
  int64_t n;
  uint32_t draw;
  uint32_t stream_word;
  uint64_t seed;

  DGG_HOST_DEVICE void operator()() const { stream(*this); }
  DGG_HOST_DEVICE void prefetch_from(int64_t) const {}
  DGG_HOST_DEVICE void element(int64_t i) const {
    const auto counter = static_cast<uint64_t>(first + i);
    uint32_t w0 = static_cast<uint32_t>(counter), w1 = static_cast<uint32_t>(counter >> 32);
    uint32_t w2 = draw, w3 = stream_word;
    philox(w0, w1, w2, w3, seed);
    words[4 * i] = w0;
    words[4 * i + 1] = w1;
    words[4 * i + 2] = w2;
    words[4 * i + 3] = w3;
  }
};

// Masters, corrected by the parameters that they belong to.
template <typename T, typename S>
struct Adopt {
  const S* copy;
  T* master;
  int64_t n;

  DGG_HOST_DEVICE void operator()() const { stream(*this); }
  DGG_HOST_DEVICE void prefetch_from(int64_t i) const { prefetch(copy + i); }
  DGG_HOST_DEVICE void element(int64_t i) const {
    master[i] = adopted(master[i], widen<T>(narrow<S>(master[i])), widen<T>(copy[i]));
  }
};

}  // namespace
}  // namespace dgg
