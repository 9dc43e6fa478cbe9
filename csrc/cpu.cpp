// SPDX-License-Identifier: BSD-3-Clause
//
// The CPU operators. Tensors are cut into chunks of a fixed size, threads take chunks, and a chunk
// is walked in blocks that stay in the first-level cache. What already has the arithmetic's dtype
// is used in place; everything else (16-bit storage, replay gradients, element masks) is staged
// through a block-sized buffer, so one loop per rule serves all combinations.
//
// Chunks and blocks do not depend on the number of threads, and sums are formed in their order:
// float32 (float64) in a fixed number of lanes within a block, float64 beyond. Results are the
// same bits for every thread count and instruction set.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "table.h"
#include "update.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define DGG_X86_VARIANTS 1
#include <cpuid.h>
#include <immintrin.h>
#endif

#if defined(_MSC_VER)
#define DGG_PRAGMA_SIMD
#define DGG_COLD __declspec(noinline)
#else
#define DGG_PRAGMA_SIMD _Pragma("omp simd")
#define DGG_COLD __attribute__((noinline, cold))
#endif

namespace dgg {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using TensorList = std::vector<Tensor>;

constexpr int64_t kBlock = 1024;
constexpr int64_t kChunk = 32768;
constexpr int kLanes = 32;
// Below this many elements waking other threads costs more than they save.
constexpr int64_t kSerial = 32768;

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

// How far ahead memory is asked for. The hardware's prefetchers stop at every page, and all streams
// of a tensor cross pages together. On a Zen 3, 512 bytes make a guided step 6 % faster than 2048
// and 10 % faster than none; on a Xeon with AVX-512, 1024 bytes 2 % and 20 %.
int64_t detect_ahead_bytes() {
#ifdef DGG_X86_VARIANTS
  __builtin_cpu_init();
  if (__builtin_cpu_is("amd")) return 512;
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

template <typename T, typename S>
struct Widen {
  const S* in;
  T* out;
  int64_t n;

  DGG_HOST_DEVICE void operator()() const { stream(*this); }
  DGG_HOST_DEVICE void prefetch_from(int64_t i) const { prefetch(in + i); }
  DGG_HOST_DEVICE void element(int64_t i) const { out[i] = widen<T>(in[i]); }
};

template <typename S, typename T>
struct NarrowInto {
  const T* in;
  S* out;
  int64_t n;

  DGG_HOST_DEVICE void operator()() const { stream(*this); }
  DGG_HOST_DEVICE void prefetch_from(int64_t) const {}
  DGG_HOST_DEVICE void element(int64_t i) const { out[i] = narrow<S, T>(in[i]); }
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
    // What is narrowed was computed just now.
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

// out = in, of another type.
template <typename T, typename S>
void convert(const T* in, S* out, int64_t n) {
#ifdef DGG_X86_VARIANTS
  constexpr bool widens = std::is_same<T, float16>::value && std::is_same<S, float>::value;
  constexpr bool narrows = std::is_same<T, float>::value && std::is_same<S, float16>::value;
  if constexpr (widens || narrows) {
    if (kF16c) return convert_by_f16c(in, out, n);
  }
#endif
  if constexpr (std::is_floating_point<S>::value) {
    run(Widen<S, T>{in, out, n});
  } else {
    run(NarrowInto<S, T>{in, out, n});
  }
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

// G of equation (5) where each element has a draw of its own: selected, not multiplied away, or the
// difference of a weight that is infinite would be NaN where nothing pulls.
template <typename T>
struct GuideDrawn {
  const T* param;
  const T* grad;
  const T* anchor;
  T* out;
  const uint32_t* words;
  uint32_t threshold;
  int64_t n;
  GuideScalars<T> scalars;

  DGG_HOST_DEVICE void operator()() const { stream(*this); }
  DGG_HOST_DEVICE void prefetch_from(int64_t i) const {
    prefetch(grad + i);
    prefetch(param + i);
    prefetch(anchor + i);
  }
  DGG_HOST_DEVICE void element(int64_t i) const {
    out[i] = guide<true>(scalars, param[i], grad[i], anchor[i], words[i] < threshold);
  }
};

// sum (x - y)^2, or sum x^2. The lanes are explicit so that their number is not the compiler's
// choice.
// A is the arithmetic's type, T that of the sums.
template <typename T, typename S, bool kDifference, typename A = T>
struct SquareSum {
  const S* x;
  const S* y;
  int64_t n;
  double* sum;

  DGG_HOST_DEVICE void operator()() const {
    const SquareSum self = *this;
    T lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= self.n; i += kLanes) {
      prefetch(self.x + i);
      if constexpr (kDifference) prefetch(self.y + i);
      DGG_PRAGMA_SIMD
      for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += self.square(i + lane);
    }
    int rest = 0;
    for (; i + rest + kShortStrip <= self.n; rest += kShortStrip) {
      DGG_PRAGMA_SIMD
      for (int lane = 0; lane < kShortStrip; ++lane) {
        lanes[rest + lane] += self.square(i + rest + lane);
      }
    }
    for (; i + rest < self.n; ++rest) lanes[rest] += self.square(i + rest);
    // Lanes beyond the elements hold zeros; adding them would change nothing.
    int used = kLanes;
    while (used / 2 >= self.n && used > 1) used /= 2;
    double sums[kLanes];
    for (int lane = 0; lane < used; ++lane) sums[lane] = lanes[lane];
    for (int half = used / 2; half > 0; half /= 2) {
      for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
    }
    *self.sum = sums[0];
  }

  DGG_HOST_DEVICE T square(int64_t i) const {
    A value = widen<A>(x[i]);
    if constexpr (kDifference) value -= widen<A>(y[i]);
    return static_cast<T>(value) * static_cast<T>(value);
  }
};

// Sum of the squares of kWays blocks that lie `gap` apart, read together: one stream from memory
// does not keep a core's memory requests going, several do.
constexpr int kWays = 4;
constexpr int kWayLanes = 16;

template <typename T>
struct SquareSumOfWays {
  const T* x;
  int64_t gap;
  double* sum;

  DGG_HOST_DEVICE void operator()() const {
    const SquareSumOfWays self = *this;
    T lanes[kWays][kWayLanes] = {};
    for (int64_t i = 0; i < kBlock; i += kWayLanes) {
      for (int way = 0; way < kWays; ++way) {
        const T* const block = self.x + way * self.gap + i;
        prefetch<kWayLanes>(block);
        DGG_PRAGMA_SIMD
        for (int lane = 0; lane < kWayLanes; ++lane) lanes[way][lane] += block[lane] * block[lane];
      }
    }
    double total = 0;
    for (int way = 0; way < kWays; ++way) {
      for (int lane = 0; lane < kWayLanes; ++lane) total += lanes[way][lane];
    }
    *self.sum = total;
  }
};

// float32 has no room for the squares of large and small numbers. A sum that one of them could have
// spoiled is formed once more, in float64 and out of the cache.
template <typename T>
bool may_be_spoiled(double sum) {
  return std::is_same<T, float>::value && !square_sum_is_reliable(sum);
}

// Apart, so that the function in which it is needed once in a thousand million years is inlined.
template <typename T, typename S, bool kDifference>
DGG_COLD double sum_squares_again(const S* x, const S* y, int64_t n) {
  double sum;
  run(SquareSum<double, S, kDifference, T>{x, y, n, &sum});
  return sum;
}

template <typename T, typename S, bool kDifference>
double sum_squares_of(const S* x, const S* y, int64_t n) {
  double sum;
  run(SquareSum<T, S, kDifference>{x, y, n, &sum});
  return may_be_spoiled<T>(sum) ? sum_squares_again<T, S, kDifference>(x, y, n) : sum;
}

template <typename T, typename S>
double sum_squares(const S* x, int64_t n) {
  return sum_squares_of<T, S, false>(x, nullptr, n);
}

// The one function behind both the norm pass and the look-ahead, so that they agree bit for bit.
template <typename T, typename S>
double sum_squared_differences(const S* x, const S* y, int64_t n) {
  return sum_squares_of<T, S, true>(x, y, n);
}

template <typename T>
double sum_squares_of_ways(const T* x, int64_t gap) {
  double sum;
  run(SquareSumOfWays<T>{x, gap, &sum});
  if (!may_be_spoiled<T>(sum)) return sum;
  sum = 0;
  for (int way = 0; way < kWays; ++way) sum += sum_squares<double>(x + way * gap, kBlock);
  return sum;
}

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

// The updates read and write S and compute in T. S is T where blocks are staged, and the storage
// type itself where all tensors of a row share it: then nothing needs staging.

template <typename T, typename S, bool kGuided, bool kAmsgrad>
struct AdamLoop {
  S* param;
  const S* grad;
  S* exp_avg;
  S* exp_avg_sq;
  S* max_exp_avg_sq;
  const S* anchor;
  int64_t n;
  AdamScalars<T> scalars;

  DGG_HOST_DEVICE void operator()() const { stream(*this); }

  DGG_HOST_DEVICE void prefetch_from(int64_t i) const {
    prefetch(param + i);
    prefetch(grad + i);
    prefetch(exp_avg + i);
    prefetch(exp_avg_sq + i);
    if constexpr (kAmsgrad) prefetch(max_exp_avg_sq + i);
    if constexpr (kGuided) prefetch(anchor + i);
  }

  DGG_HOST_DEVICE void element(int64_t i) const {
    T p = widen<T>(param[i]), m = widen<T>(exp_avg[i]), v = widen<T>(exp_avg_sq[i]);
    T x = T(0), a = T(0);
    if constexpr (kAmsgrad) x = widen<T>(max_exp_avg_sq[i]);
    if constexpr (kGuided) a = widen<T>(anchor[i]);
    adam<kGuided, kAmsgrad>(scalars, p, widen<T>(grad[i]), m, v, x, a);
    param[i] = narrow<S>(p);
    exp_avg[i] = narrow<S>(m);
    exp_avg_sq[i] = narrow<S>(v);
    if constexpr (kAmsgrad) max_exp_avg_sq[i] = narrow<S>(x);
  }
};

template <typename T, typename S, bool kGuided, bool kMomentum>
struct SgdLoop {
  S* param;
  const S* grad;
  S* buffer;
  const S* anchor;
  int64_t n;
  SgdScalars<T> scalars;

  DGG_HOST_DEVICE void operator()() const { stream(*this); }

  DGG_HOST_DEVICE void prefetch_from(int64_t i) const {
    prefetch(param + i);
    prefetch(grad + i);
    if constexpr (kMomentum) prefetch(buffer + i);
    if constexpr (kGuided) prefetch(anchor + i);
  }

  DGG_HOST_DEVICE void element(int64_t i) const {
    T p = widen<T>(param[i]), b = T(0), a = T(0);
    if constexpr (kMomentum) b = widen<T>(buffer[i]);
    if constexpr (kGuided) a = widen<T>(anchor[i]);
    sgd<kGuided, kMomentum>(scalars, p, widen<T>(grad[i]), b, a);
    param[i] = narrow<S>(p);
    if constexpr (kMomentum) buffer[i] = narrow<S>(b);
  }
};

template <typename T, typename S, bool kGuided>
struct GuideLoop {
  const S* param;
  const S* grad;
  const S* anchor;
  S* out;
  int64_t n;
  GuideScalars<T> scalars;

  DGG_HOST_DEVICE void operator()() const { stream(*this); }

  DGG_HOST_DEVICE void prefetch_from(int64_t i) const {
    prefetch(grad + i);
    if constexpr (kGuided) {
      prefetch(param + i);
      prefetch(anchor + i);
    }
  }

  DGG_HOST_DEVICE void element(int64_t i) const {
    T p = T(0), a = T(0);
    if constexpr (kGuided) {
      p = widen<T>(param[i]);
      a = widen<T>(anchor[i]);
    }
    out[i] = narrow<S>(guide<kGuided>(scalars, p, widen<T>(grad[i]), a));
  }
};

// Types the arithmetic itself is done in.
template <typename S>
constexpr bool is_wide() {
  return std::is_floating_point<S>::value;
}

int64_t size_of(int dtype) {
  return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2;
}

// A tensor of a row: an address and how to read it.
struct Stream {
  char* data = nullptr;
  int dtype = kFloat32;

  explicit operator bool() const { return data != nullptr; }

  template <typename S>
  S* at(int64_t begin) const {
    return reinterpret_cast<S*>(data) + begin;
  }

  // Elements begin .. begin + n as S: in place where they are stored so, else copied to `buffer`.
  template <typename S>
  S* stage(int64_t begin, int64_t n, S* buffer) const {
    if constexpr (is_wide<S>()) {
      if (dtype != code_of<S>()) {
        visit([&](auto* stored) {
          using Stored = std::remove_pointer_t<decltype(stored)>;
          convert(at<Stored>(begin), buffer, n);
        });
        return buffer;
      }
    }
    return at<S>(begin);
  }

  // Corrects the masters of elements begin .. begin + n by this, the parameter they belong to.
  template <typename T>
  void adopt(int64_t begin, int64_t n, T* masters) const {
    if (dtype == kBFloat16) run(Adopt<T, bfloat16>{at<bfloat16>(begin), masters, n});
    if (dtype == kFloat16) run(Adopt<T, float16>{at<float16>(begin), masters, n});
  }

  // Writes back what `stage` copied; nothing to do where it did not.
  template <typename S>
  void unstage(int64_t begin, int64_t n, const S* buffer) const {
    if constexpr (is_wide<S>()) {
      if (dtype == code_of<S>()) return;
      visit([&](auto* stored) {
        using Stored = std::remove_pointer_t<decltype(stored)>;
        convert(buffer, at<Stored>(begin), n);
      });
    }
  }

 private:
  // Calls f with a null pointer of the storage type.
  template <typename F>
  void visit(const F& f) const {
    switch (dtype) {
      case kFloat32:
        return f(static_cast<float*>(nullptr));
      case kBFloat16:
        return f(static_cast<bfloat16*>(nullptr));
      case kFloat16:
        return f(static_cast<float16*>(nullptr));
      default:
        return f(static_cast<double*>(nullptr));
    }
  }
};

// The arguments all table operators share, checked once.
struct Rows {
  const int64_t* table;
  const int64_t* grads;
  const int64_t* replays;  // null: no replay gradients at all
  int64_t n;
  double replay_weight;
  double grad_scale;

  const int64_t* row(int64_t i) const { return table + i * kColumns; }
  int64_t replay(int64_t i) const { return replays ? replays[i] : 0; }
  bool active(int64_t i) const { return grads[i] != 0 || replay(i) != 0; }
  bool anchored(int64_t i) const { return row(i)[kColumnAnchor] != 0; }

  Stream stream(int64_t i, int64_t address, int slot) const {
    return {reinterpret_cast<char*>(static_cast<intptr_t>(address)),
            code_at(static_cast<uint64_t>(row(i)[kColumnDtypes]), slot)};
  }
};

// What every pass needs of an active row. Rows are made in place, without zeroing and copying
// them first: with tiny tensors that shows.
struct Row {
  Stream param, grad, replay, anchor;
  Stream copy;  // of a master weight
  int64_t numel;
  int64_t index, base, stretch, stride;
  double replay_weight;
  bool guided = false;
  bool masked = false;
  uint32_t threshold = 0;
  int staging = kFloat32;  // S of the updates' loops

  Row(const Rows& rows, int64_t i) : Row(rows, i, rows.row(i)) {}

 private:
  Row(const Rows& rows, int64_t i, const int64_t* r)
      : param(rows.stream(i, r[kColumnParam], kSlotParam)),
        grad(rows.stream(i, rows.grads[i], kSlotGrad)),
        replay(rows.stream(i, rows.replay(i), kSlotReplay)),
        anchor(rows.stream(i, r[kColumnAnchor], kSlotAnchor)),
        copy(rows.stream(i, r[kColumnCopy], kSlotCopy)),
        numel(r[kColumnNumel]),
        index(r[kColumnIndex]),
        base(r[kColumnBase]),
        stretch(r[kColumnStretch]),
        stride(r[kColumnStride]),
        replay_weight(rows.replay_weight) {}
};

// What an update prefetches where blocks are staged. Converting a block reads it in no time and
// computing reads no memory, so while this block is computed the next one is asked for.
class Ahead {
 public:
  // A stream that is staged as S, or always (`staged`); else the loop reads it where it is.
  template <typename S>
  void add(const Stream& stream, int64_t begin, bool staged = false) {
    if (!stream) return;
    staged = staged || stream.dtype != code_of<S>();
    wanted_ = wanted_ || staged;
    const int64_t size = size_of(stream.dtype);
    next_[count_] = reinterpret_cast<uintptr_t>(stream.data) +
                    (staged ? (begin + kBlock) * size : begin * size + kAheadBytes);
    sizes_[count_++] = size;
  }

  // Whether anything is staged.
  bool wanted() const { return wanted_; }

  DGG_HOST_DEVICE void prefetch_from(int64_t i) const {
    for (int k = 0; k < count_; ++k) {
      prefetch_lines(next_[k] + static_cast<uintptr_t>(i * sizes_[k]), kStrip * sizes_[k]);
    }
  }

 private:
  uintptr_t next_[kSlots];
  int64_t sizes_[kSlots];
  int count_ = 0;
  bool wanted_ = false;
};

template <typename Loop>
struct Staged {
  Loop loop;
  Ahead ahead;
  int64_t n;

  DGG_HOST_DEVICE void operator()() const { stream(*this); }
  DGG_HOST_DEVICE void prefetch_from(int64_t i) const { ahead.prefetch_from(i); }
  DGG_HOST_DEVICE void element(int64_t i) const { loop.element(i); }
};

template <typename Loop>
void run(const Loop& loop, const Ahead& ahead) {
  if (!ahead.wanted()) return run(loop);
  run(Staged<Loop>{loop, ahead, loop.n});
}

// h of equation (1) without the gradient scale. Uses `other` only for mixing.
template <typename S>
const S* stage_gradient(const Row& row, int64_t begin, int64_t n, S* buffer, S* other) {
  if constexpr (is_wide<S>()) {
    if (row.replay) {
      const S* grad = buffer;
      if (row.grad) {
        grad = row.grad.stage<S>(begin, n, buffer);
      } else {
        std::fill_n(buffer, n, S(0));
      }
      const S* replay = row.replay.stage<S>(begin, n, other);
      run(RealGradient<S>{grad, replay, buffer, static_cast<S>(row.replay_weight), n});
      return buffer;
    }
  }
  return row.grad.stage<S>(begin, n, buffer);
}

// The type a row's blocks are staged in: bfloat16 if that is what all its tensors are and nothing
// is mixed in, else that of the arithmetic. Converting float16 costs so much more that it gains
// nothing by happening in registers.
int staging_of(const Row& row, const Stream* states, int count, bool anchored) {
  const int dtype = row.param.dtype;
  if (dtype == kFloat64) return kFloat64;
  if (dtype != kBFloat16 || row.replay || row.masked || row.grad.dtype != dtype) return kFloat32;
  if (anchored && row.anchor.dtype != dtype) return kFloat32;
  for (int s = 0; s < count; ++s) {
    if (states[s] && states[s].dtype != dtype) return kFloat32;
  }
  return dtype;
}

// Calls f with null pointers of the arithmetic's type and of the staging type.
template <typename F>
auto with_types(int staging, const F& f) {
  switch (staging) {
    case kFloat64:
      return f(static_cast<double*>(nullptr), static_cast<double*>(nullptr));
    case kBFloat16:
      return f(static_cast<float*>(nullptr), static_cast<bfloat16*>(nullptr));
    default:
      return f(static_cast<float*>(nullptr), static_cast<float*>(nullptr));
  }
}

struct Draws {
  uint64_t seed;
  uint32_t draw;
};

// The words of elements begin .. begin + n in one of the streams of elements. Where a shard's
// elements are not consecutive in the unsharded parameter, a run ends with the stretch that is.
void draw_words(const Row& row, const Draws& draws, uint32_t stream, int64_t begin, int64_t n,
                uint32_t* words) {
  uint32_t quads[kBlock + 8];
  for (int64_t done = 0; done < n;) {
    const int64_t l = begin + done;
    const int64_t i = unsharded_index(l, row.base, row.stretch, row.stride);
    const int64_t count = std::min(n - done, row.stretch - l % row.stretch);
    const int64_t first = i / 4;
    const int64_t counters = (i + count - 1) / 4 - first + 1;
    run(Philox{quads, first, counters, draws.draw, stream + static_cast<uint32_t>(row.index),
               draws.seed});
    std::memcpy(words + done, quads + i % 4, static_cast<size_t>(count) * sizeof(uint32_t));
    done += count;
  }
}

// G of a row that is drawn element by element, for loops that guide nothing themselves.
template <typename T>
void guide_drawn(const Row& row, const Draws& draws, const GuideScalars<T>& scalars, int64_t begin,
                 int64_t n, const T* param, const T* grad, const T* anchor, T* out,
                 const Ahead& ahead = {}) {
  uint32_t words[kBlock];
  draw_words(row, draws, kStreamElement, begin, n, words);
  run(GuideDrawn<T>{param, grad, anchor, out, words, row.threshold, n, scalars}, ahead);
}

// A list that keeps its memory from call to call: for hundreds of tiny tensors getting it anew
// takes longer than updating them.
template <typename T, int kUse = 0>
std::vector<T>& scratch(size_t capacity) {
  static thread_local std::vector<T> list;
  list.clear();
  list.reserve(capacity);
  return list;
}

// Work, in chunks.

struct Chunk {
  int64_t begin;
  int32_t count;
  int32_t row;
};

class Plan {
 public:
  explicit Plan(size_t rows) : chunks_(scratch<Chunk>(rows)) {}

  void add(size_t row, int64_t numel) {
    for (int64_t begin = 0; begin < numel; begin += kChunk) {
      const int64_t count = std::min(kChunk, numel - begin);
      chunks_.push_back({begin, static_cast<int32_t>(count), static_cast<int32_t>(row)});
    }
    elements_ += numel;
  }

  size_t size() const { return chunks_.size(); }
  const Chunk& operator[](size_t i) const { return chunks_[i]; }

  // Calls f(chunk number, chunk). Every thread gets an equal stretch of elements, and when it has
  // finished takes chunks of those that have not. Backwards, a pass begins where the one before
  // it ended, in what the cache still holds.
  template <typename F>
  void for_each(bool backwards, const F& f) const {
    const auto total = static_cast<int64_t>(chunks_.size());
    int64_t threads = 1;
    if (elements_ > kSerial && total > 1) {
      threads = std::min<int64_t>(torch::stable::get_num_threads(), total);
    }
    if (threads == 1) {
      for (int64_t i = 0; i < total; ++i) {
        const int64_t k = backwards ? total - 1 - i : i;
        f(k, chunks_[k]);
      }
      return;
    }
    struct alignas(64) Share {
      std::atomic<int64_t> next;
      int64_t begin, end;
    };
    std::unique_ptr<Share[]> shares(new Share[threads]);
    int64_t chunk = 0;
    int64_t passed = 0;
    for (int64_t t = 0; t < threads; ++t) {
      shares[t].next = 0;
      shares[t].begin = chunk;
      // In floating point: elements times threads could overflow, and only balance depends on it.
      const double target = static_cast<double>(elements_) * (t + 1) / threads;
      while (chunk < total && (t + 1 == threads || passed < target))
        passed += chunks_[chunk++].count;
      shares[t].end = chunk;
    }
    torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
      for (int64_t own = first; own < last; ++own) {
        for (int64_t t = 0; t < threads; ++t) {
          Share& share = shares[(own + t) % threads];
          const int64_t count = share.end - share.begin;
          for (int64_t i; (i = share.next.fetch_add(1, std::memory_order_relaxed)) < count;) {
            const int64_t k = backwards ? share.end - 1 - i : share.begin + i;
            f(k, chunks_[k]);
          }
        }
      }
    });
  }

 private:
  std::vector<Chunk>& chunks_;
  int64_t elements_ = 0;
};

// Norms.

struct NormRow {
  Row row;
  bool total, grad, distance;
  int64_t number;

  NormRow(const Rows& rows, int64_t i, bool total, bool grad, bool distance)
      : row(rows, i), total(total), grad(grad), distance(distance), number(i) {}
};

struct Squares {
  double total = 0, grad = 0, distance = 0;
};

// Calls f(begin, n) for every block of a stretch of elements.
template <typename F>
void for_each_block(int64_t begin, int64_t end, const F& f) {
  for (; begin < end; begin += kBlock) f(begin, std::min(kBlock, end - begin));
}

// ||g||^2 of a chunk; independent of what else is computed, or a resumed run would differ.
template <typename T>
double square_of_gradient(const Row& row, const Chunk& chunk) {
  double sum = 0;
  int64_t begin = chunk.begin;
  const int64_t end = begin + chunk.count;
  if (row.grad.dtype == code_of<T>()) {
    const int64_t gap = chunk.count / (kWays * kBlock) * kBlock;
    for (const int64_t stop = begin + gap; begin < stop; begin += kBlock) {
      sum += sum_squares_of_ways(row.grad.at<T>(begin), gap);
    }
    begin = chunk.begin + kWays * gap;
  }
  T buffer[kBlock];
  for_each_block(begin, end, [&](int64_t at, int64_t n) {
    sum += sum_squares<T>(row.grad.stage<T>(at, n, buffer), n);
  });
  return sum;
}

template <typename T>
Squares norm_chunk(const NormRow& work, const Chunk& chunk) {
  const Row& row = work.row;
  const int64_t end = chunk.begin + chunk.count;
  Squares sums;
  if (row.grad && (work.grad || (work.total && !row.replay))) {
    sums.grad = square_of_gradient<T>(row, chunk);
  }
  T first[kBlock], second[kBlock];
  if (!row.replay) {
    sums.total = sums.grad;
  } else if (work.total) {
    for_each_block(chunk.begin, end, [&](int64_t begin, int64_t n) {
      sums.total += sum_squares<T>(stage_gradient<T>(row, begin, n, first, second), n);
    });
  }
  if (work.distance) {
    for_each_block(chunk.begin, end, [&](int64_t begin, int64_t n) {
      const T* param = row.param.stage<T>(begin, n, first);
      if (row.copy) {
        if (param != first) std::copy_n(param, n, first);
        row.copy.adopt(begin, n, first);
        param = first;
      }
      const T* const anchor = row.anchor.stage<T>(begin, n, second);
      sums.distance += sum_squared_differences<T>(param, anchor, n);
    });
  }
  return sums;
}

void compute_norms(const Rows& rows, double* distances, int64_t which, double* squares) {
  const int64_t n = rows.n;
  std::fill_n(squares, 3 * n, 0.0);
  std::vector<NormRow>& work = scratch<NormRow>(n);
  Plan plan(rows.n);
  for (int64_t i = 0; i < n; ++i) {
    if (!rows.active(i)) continue;
    const bool anchored = rows.anchored(i);
    const bool total = (which & kTotalNorm) != 0;
    const bool grad = (which & kGradNorm) && anchored;
    // Not `>= 0`: a distance of NaN is known, too.
    const bool distance = (which & kDistance) && anchored && distances[i] < 0;
    if (distance) distances[i] = 0;
    if (!(total || grad || distance)) continue;
    plan.add(work.size(), rows.row(i)[kColumnNumel]);
    work.emplace_back(rows, i, total, grad, distance);
  }
  std::vector<Squares> partials(plan.size());
  plan.for_each(false, [&](int64_t k, const Chunk& chunk) {
    const NormRow& row = work[chunk.row];
    partials[k] = row.row.param.dtype == kFloat64 ? norm_chunk<double>(row, chunk)
                                                  : norm_chunk<float>(row, chunk);
  });
  for (size_t k = 0; k < plan.size(); ++k) {
    const NormRow& row = work[plan[k].row];
    if (row.total) squares[row.number] += partials[k].total;
    if (row.grad) squares[n + row.number] += partials[k].grad;
    if (row.distance) distances[row.number] += partials[k].distance;
  }
  const double scale = rows.grad_scale * rows.grad_scale;
  for (int64_t i = 0; i < n; ++i) {
    if (rows.grad_scale != 1) {
      squares[i] /= scale;
      squares[n + i] /= scale;
    }
    if ((which & kDistance) && rows.active(i) && rows.anchored(i))
      squares[2 * n + i] = distances[i];
  }
}

// Updates.

template <typename Scalars>
struct UpdateRow : Row {
  Stream state[3];
  Scalars scalars;
  bool look_ahead;
  bool stochastic;
  int64_t number;

  UpdateRow(const Rows& rows, int64_t i, bool look_ahead, bool stochastic)
      : Row(rows, i),
        look_ahead(look_ahead && rows.anchored(i)),
        stochastic(stochastic && param.dtype == kBFloat16),
        number(i) {}

  // What is written twice, or with other words than its own, is staged in the arithmetic's type.
  void choose_staging(int count) {
    staging = staging_of(*this, state, count, guided || look_ahead);
    if (staging == kBFloat16 && (stochastic || copy)) staging = kFloat32;
  }
};

// Stores updated elements: in the parameter, and in its copy if it is a master weight.
template <typename S, typename Scalars>
void store(const UpdateRow<Scalars>& row, const Draws& draws, int64_t begin, int64_t n,
           const S* updated) {
  if constexpr (is_wide<S>()) {
    if (row.stochastic) {
      uint32_t words[kBlock];
      draw_words(row, draws, kStreamRounding, begin, n, words);
      run(RoundInto<S>{updated, words, row.param.template at<bfloat16>(begin), n});
      return;
    }
    if (row.copy && row.copy.dtype == code_of<S>()) {
      std::copy_n(updated, n, row.copy.template at<S>(begin));
    } else if (row.copy) {
      row.copy.template unstage<S>(begin, n, updated);
    }
  }
  row.param.template unstage<S>(begin, n, updated);
}

struct AdamRule {
  using Row = UpdateRow<AdamScalars<double>>;
  static constexpr int kStates = 3;

  template <typename T, typename S, bool kGuided>
  static void block(const AdamScalars<T>& scalars, S* param, const S* grad, S* const* state,
                    const S* anchor, int64_t n, const Ahead& ahead) {
    if (state[2]) {
      run(AdamLoop<T, S, kGuided, true>{param, grad, state[0], state[1], state[2], anchor, n,
                                        scalars},
          ahead);
    } else {
      run(AdamLoop<T, S, kGuided, false>{param, grad, state[0], state[1], nullptr, anchor, n,
                                         scalars},
          ahead);
    }
  }
};

struct SgdRule {
  using Row = UpdateRow<SgdScalars<double>>;
  static constexpr int kStates = 1;

  template <typename T, typename S, bool kGuided>
  static void block(const SgdScalars<T>& scalars, S* param, const S* grad, S* const* state,
                    const S* anchor, int64_t n, const Ahead& ahead) {
    if (state[0]) {
      run(SgdLoop<T, S, kGuided, true>{param, grad, state[0], anchor, n, scalars}, ahead);
    } else {
      run(SgdLoop<T, S, kGuided, false>{param, grad, nullptr, anchor, n, scalars}, ahead);
    }
  }
};

// Returns the look-ahead's share of the chunk.
template <typename Rule, typename T, typename S>
double update_chunk(const typename Rule::Row& row, const Draws& draws, const Chunk& chunk) {
  S buffers[Rule::kStates + 5][kBlock];
  S* const spare = buffers[Rule::kStates];
  const auto scalars = row.scalars.template as<T>();
  double distance = 0;
  for (int64_t offset = 0; offset < chunk.count; offset += kBlock) {
    const int64_t begin = chunk.begin + offset;
    const int64_t n = std::min<int64_t>(kBlock, chunk.count - offset);
    Ahead ahead;
    S* const param = row.param.template stage<S>(begin, n, spare);
    ahead.add<S>(row.param, begin);
    if constexpr (is_wide<S>()) {
      if (row.copy) row.copy.adopt(begin, n, param);
    }
    const S* const grad = stage_gradient<S>(row, begin, n, spare + kBlock, spare + 2 * kBlock);
    ahead.add<S>(row.grad, begin, row.replay || row.masked);
    ahead.add<S>(row.replay, begin, true);
    S* state[Rule::kStates];
    for (int s = 0; s < Rule::kStates; ++s) {
      state[s] = row.state[s] ? row.state[s].template stage<S>(begin, n, buffers[s]) : nullptr;
      ahead.add<S>(row.state[s], begin);
    }
    const S* anchor = nullptr;
    if (row.guided || row.look_ahead) {
      anchor = row.anchor.template stage<S>(begin, n, spare + 3 * kBlock);
      // Of a block that only looks ahead it is read after the loop, by one that prefetches it.
      if (row.guided) ahead.add<S>(row.anchor, begin, row.masked);
    }
    ahead.add<S>(row.copy, begin, true);
    if (row.masked) {
      if constexpr (is_wide<S>()) {
        S* const total = spare + 4 * kBlock;
        guide_drawn(row, draws, scalars.guide, begin, n, param, grad, anchor, total);
        auto guided = scalars;
        guided.guide.grad = T(1);
        Rule::template block<T, S, false>(guided, param, total, state, nullptr, n, ahead);
      }
    } else if (row.guided) {
      Rule::template block<T, S, true>(scalars, param, grad, state, anchor, n, ahead);
    } else {
      Rule::template block<T, S, false>(scalars, param, grad, state, nullptr, n, ahead);
    }
    store<S>(row, draws, begin, n, param);
    for (int s = 0; s < Rule::kStates; ++s) {
      if (row.state[s]) row.state[s].template unstage<S>(begin, n, state[s]);
    }
    if (row.look_ahead) {
      // Read again, as stored: what the next step's norm pass would see.
      const S* const stored = row.param.template stage<S>(begin, n, spare);
      distance += sum_squared_differences<T>(stored, anchor, n);
    }
  }
  return distance;
}

template <typename Rule>
void run_updates(const std::vector<typename Rule::Row>& work, const Draws& draws,
                 double* distances) {
  Plan plan(work.size());
  for (size_t i = 0; i < work.size(); ++i) {
    plan.add(i, work[i].numel);
    distances[work[i].number] = work[i].look_ahead ? 0.0 : -1.0;
  }
  std::vector<double> partials(plan.size());
  plan.for_each(true, [&](int64_t k, const Chunk& chunk) {
    const auto& row = work[chunk.row];
    partials[k] = with_types(row.staging, [&](auto* arithmetic, auto* staging) {
      using T = std::remove_pointer_t<decltype(arithmetic)>;
      using S = std::remove_pointer_t<decltype(staging)>;
      return update_chunk<Rule, T, S>(row, draws, chunk);
    });
  });
  for (size_t k = 0; k < plan.size(); ++k) {
    const auto& row = work[plan[k].row];
    if (row.look_ahead) distances[row.number] += partials[k];
  }
}

// Arguments of an update beside the rows.
struct Control {
  const double* coefficients;
  const uint8_t* flags;
  const double* hyper;
  int64_t groups;
  Draws draws;
};

// b s of equation (5); also notes in the row whether it reads its anchor at all, and how.
double set_guidance(const Rows& rows, const Control& control, int64_t i, double strength,
                    double threshold, Row& row) {
  const Guidance guidance = guidance_of(control.flags[i], rows.anchored(i),
                                        control.coefficients[kScales + i], strength, threshold);
  row.guided = guidance.guided;
  row.masked = guidance.masked;
  row.threshold = guidance.threshold;
  return guidance.pull;
}

double row_factor(const Rows& rows, const Control& control, bool negate) {
  return gradient_factor(control.coefficients[kClip], rows.grad_scale, negate);
}

void compute_adam(const Rows& rows, const Control& control, double* distances, bool look_ahead,
                  bool stochastic = false) {
  std::vector<AdamRule::Row>& work = scratch<AdamRule::Row>(rows.n);
  // What only the group and the step number decide: powers, roots and divisions would take longer
  // than the update of a tiny tensor, and the row before it very likely needed the same.
  const double* last_hyper = nullptr;
  double last_step = 0;
  AdamScalars<double> scalars{};
  for (int64_t i = 0; i < rows.n; ++i) {
    if (!rows.active(i)) continue;
    const int64_t* r = rows.row(i);
    const double* hyper = control.hyper + r[kColumnGroup] * kAdamHypers;
    AdamRule::Row& row = work.emplace_back(rows, i, look_ahead, stochastic);
    const bool amsgrad = hyper[kAdamAmsgrad] != 0;
    for (int s = 0; s < (amsgrad ? 3 : 2); ++s) {
      row.state[s] = rows.stream(i, r[kColumnExpAvg + s], kSlotExpAvg + s);
      STD_TORCH_CHECK(row.state[s] || row.numel == 0, "dgg::adam_table_: row ", i,
                      " of table has no address for moment ", s);
    }
    STD_TORCH_CHECK(r[kColumnStep] != 0, "dgg::adam_table_: row ", i, " of table has no step");
    const double step = *reinterpret_cast<const float*>(r[kColumnStep]) + 1.0f;
    if (hyper != last_hyper || step != last_step) {
      const double factor = row_factor(rows, control, hyper[kAdamMaximize] != 0);
      scalars = adam_scalars(hyper, factor, bias_correction(hyper[kAdamBeta1], step),
                             bias_correction(hyper[kAdamBeta2], step));
      last_hyper = hyper;
      last_step = step;
    }
    row.scalars = scalars;
    row.scalars.guide.pull =
        set_guidance(rows, control, i, hyper[kAdamStrength], hyper[kAdamThreshold], row);
    row.choose_staging(3);
  }
  // Only now, with everything checked, is anything written.
  for (const auto& row : work) {
    *reinterpret_cast<float*>(rows.row(row.number)[kColumnStep]) += 1.0f;
  }
  run_updates<AdamRule>(work, control.draws, distances);
}

void compute_sgd(const Rows& rows, const Control& control, double* distances, bool look_ahead,
                 bool stochastic = false) {
  std::vector<SgdRule::Row>& work = scratch<SgdRule::Row>(rows.n);
  for (int64_t i = 0; i < rows.n; ++i) {
    if (!rows.active(i)) continue;
    const int64_t* r = rows.row(i);
    const double* hyper = control.hyper + r[kColumnGroup] * kSgdHypers;
    SgdRule::Row& row = work.emplace_back(rows, i, look_ahead, stochastic);
    if (hyper[kSgdMomentum] != 0) {
      row.state[0] = rows.stream(i, r[kColumnExpAvg], kSlotExpAvg);
      STD_TORCH_CHECK(row.state[0] || row.numel == 0, "dgg::sgd_table_: row ", i,
                      " of table has no address for the momentum buffer");
    }
    const double pull =
        set_guidance(rows, control, i, hyper[kSgdStrength], hyper[kSgdThreshold], row);
    row.scalars = sgd_scalars(hyper, row_factor(rows, control, hyper[kSgdMaximize] != 0), pull,
                              (control.flags[i] & kFirstStep) != 0);
    row.choose_staging(1);
  }
  run_updates<SgdRule>(work, control.draws, distances);
}

template <typename T, typename S>
void guide_chunk(const Row& row, const GuideScalars<double>& wide, const Draws& draws,
                 const Chunk& chunk) {
  S buffers[4][kBlock];
  const auto scalars = wide.as<T>();
  for (int64_t offset = 0; offset < chunk.count; offset += kBlock) {
    const int64_t begin = chunk.begin + offset;
    const int64_t n = std::min<int64_t>(kBlock, chunk.count - offset);
    Ahead ahead;
    const S* const grad = stage_gradient<S>(row, begin, n, buffers[0], buffers[1]);
    ahead.add<S>(row.grad, begin, bool(row.replay));
    ahead.add<S>(row.replay, begin, true);
    S* const out = row.grad.dtype == code_of<S>() ? row.grad.at<S>(begin) : buffers[0];
    if (row.guided) {
      const S* const param = row.param.stage<S>(begin, n, buffers[2]);
      const S* const anchor = row.anchor.stage<S>(begin, n, buffers[3]);
      ahead.add<S>(row.param, begin);
      ahead.add<S>(row.anchor, begin);
      if constexpr (is_wide<S>()) {
        if (row.masked) guide_drawn(row, draws, scalars, begin, n, param, grad, anchor, out, ahead);
      }
      if (!row.masked) run(GuideLoop<T, S, true>{param, grad, anchor, out, n, scalars}, ahead);
    } else {
      run(GuideLoop<T, S, false>{nullptr, grad, nullptr, out, n, scalars}, ahead);
    }
    row.grad.unstage<S>(begin, n, out);
  }
}

void compute_guide(const Rows& rows, const Control& control) {
  struct GuideRow : Row {
    GuideScalars<double> scalars;
    using Row::Row;
  };
  std::vector<GuideRow>& work = scratch<GuideRow>(rows.n);
  Plan plan(rows.n);
  for (int64_t i = 0; i < rows.n; ++i) {
    if (!rows.active(i)) continue;
    STD_TORCH_CHECK(rows.grads[i] != 0, "dgg::guide_table_: row ", i,
                    " has a replay gradient but no gradient to write into");
    const double* hyper = control.hyper + rows.row(i)[kColumnGroup] * kGuideHypers;
    GuideRow row(rows, i);
    const double pull =
        set_guidance(rows, control, i, hyper[kGuideStrength], hyper[kGuideThreshold], row);
    row.scalars = guide_scalars(hyper, row_factor(rows, control, false), pull);
    if (!row.guided && !row.replay && row.scalars.grad == 1) continue;
    row.staging = staging_of(row, nullptr, 0, row.guided);
    plan.add(work.size(), row.numel);
    work.push_back(row);
  }
  plan.for_each(true, [&](int64_t, const Chunk& chunk) {
    const GuideRow& row = work[chunk.row];
    with_types(row.staging, [&](auto* arithmetic, auto* staging) {
      using T = std::remove_pointer_t<decltype(arithmetic)>;
      using S = std::remove_pointer_t<decltype(staging)>;
      guide_chunk<T, S>(row, row.scalars, control.draws, chunk);
    });
  });
}

// Operators on tables.

void check_tensor(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
                  int64_t numel) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == dtype && tensor.is_contiguous() &&
                      tensor.numel() == numel,
                  "dgg::", op, ": ", name, " must be a contiguous CPU tensor of dtype ",
                  dtype == ScalarType::Double ? "float64"
                  : dtype == ScalarType::Long ? "int64"
                                              : "uint8",
                  " with ", numel, " elements; it has ", tensor.numel());
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

void check_table(const char* op, const Tensor& table) {
  STD_TORCH_CHECK(table.dim() == 2 && table.size(1) == kColumns, "dgg::", op,
                  ": table must have shape [n, ", static_cast<int>(kColumns), "]");
}

Rows make_rows(const char* op, const Tensor& table, const Tensor& grads, const Tensor& replays,
               int64_t groups, double replay_weight, double grad_scale) {
  check_table(op, table);
  const int64_t n = table.size(0);
  check_tensor(op, "table", table, ScalarType::Long, n * kColumns);
  check_tensor(op, "grads", grads, ScalarType::Long, n);
  const bool any_replay = replays.numel() != 0;
  if (any_replay) check_tensor(op, "replays", replays, ScalarType::Long, n);
  Rows rows{data<const int64_t>(table),
            data<const int64_t>(grads),
            any_replay ? data<const int64_t>(replays) : nullptr,
            n,
            replay_weight,
            grad_scale};
  for (int64_t i = 0; i < n; ++i) {
    const int64_t* r = rows.row(i);
    STD_TORCH_CHECK(r[kColumnNumel] >= 0 && (r[kColumnNumel] == 0 || r[kColumnStretch] > 0) &&
                        r[kColumnGroup] >= 0 && r[kColumnGroup] < groups,
                    "dgg::", op, ": row ", i, " of table has numel ", r[kColumnNumel], ", stretch ",
                    r[kColumnStretch], ", group ", r[kColumnGroup], " of ", groups);
    // Places of elements are counted in 64 bits, and words are drawn by fours from their place on.
    constexpr int64_t kLast = int64_t{1} << 61;
    const int64_t turns = r[kColumnNumel] == 0 ? 0 : (r[kColumnNumel] - 1) / r[kColumnStretch];
    STD_TORCH_CHECK(r[kColumnBase] >= 0 && r[kColumnStride] >= 0 && r[kColumnBase] < kLast &&
                        r[kColumnNumel] < kLast && (turns == 0 || r[kColumnStride] < kLast / turns),
                    "dgg::", op, ": row ", i, " of table has base ", r[kColumnBase], ", stride ",
                    r[kColumnStride], ": its elements would lie at no place");
    STD_TORCH_CHECK((static_cast<uint64_t>(r[kColumnDtypes]) & kNoDtypes) == 0, "dgg::", op,
                    ": row ", i, " of table has an unknown dtype code");
  }
  return rows;
}

Control make_control(const char* op, int64_t n, const Tensor& coefficients, const Tensor& flags,
                     const Tensor& hyper, int64_t hypers, int64_t seed, int64_t draw) {
  STD_TORCH_CHECK(hyper.dim() == 2 && hyper.size(1) == hypers, "dgg::", op,
                  ": hyper must have shape [groups, ", hypers, "]");
  check_tensor(op, "hyper", hyper, ScalarType::Double, hyper.numel());
  check_tensor(op, "coefficients", coefficients, ScalarType::Double, kScales + n);
  check_tensor(op, "flags", flags, ScalarType::Byte, n);
  return {data<const double>(coefficients),
          data<const uint8_t>(flags),
          data<const double>(hyper),
          hyper.size(0),
          {static_cast<uint64_t>(seed), static_cast<uint32_t>(draw)}};
}

Tensor empty_doubles(std::vector<int64_t> sizes) {
  return torch::stable::empty({sizes.data(), sizes.size()}, ScalarType::Double);
}

Tensor norms_table(const Tensor& table, const Tensor& grads, const Tensor& replays,
                   const Tensor& distances, double replay_weight, double grad_scale,
                   int64_t which) {
  const Rows rows =
      make_rows("norms_table", table, grads, replays, INT64_MAX, replay_weight, grad_scale);
  check_tensor("norms_table", "distances", distances, ScalarType::Double, rows.n);
  Tensor squares = empty_doubles({3, rows.n});
  compute_norms(rows, data<double>(distances), which, data<double>(squares));
  return squares;
}

Tensor make_coefficients(const Tensor& squares, std::optional<double> max_grad_norm, bool scaling,
                         bool per_tensor) {
  STD_TORCH_CHECK(squares.dim() == 2 && squares.size(0) == 3,
                  "dgg::coefficients: squares must have shape [3, n]");
  const int64_t n = squares.size(1);
  check_tensor("coefficients", "squares", squares, ScalarType::Double, 3 * n);
  const double* in = data<const double>(squares);
  double norms[3];
  for (int k = 0; k < 3; ++k) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += in[k * n + i];
    norms[k] = std::sqrt(sum);
  }
  Tensor result = empty_doubles({kScales + n});
  double* out = data<double>(result);
  const double clip = max_grad_norm ? clip_of(*max_grad_norm, norms[0]) : 1;
  out[kClip] = clip;
  out[kGradLength] = norms[1];
  out[kDistanceLength] = norms[2];
  out[kTotalLength] = norms[0];
  const double global = scaling ? scale_of(clip, norms[1], norms[2]) : 1;
  for (int64_t i = 0; i < n; ++i) {
    out[kScales + i] = scaling && per_tensor
                           ? scale_of(clip, std::sqrt(in[n + i]), std::sqrt(in[2 * n + i]))
                           : global;
  }
  return result;
}

void adam_table(const Tensor& table, const Tensor& grads, const Tensor& replays,
                const Tensor& coefficients, const Tensor& flags, const Tensor& hyper,
                const Tensor& distances, double replay_weight, double grad_scale, bool look_ahead,
                int64_t seed, int64_t draw, bool stochastic) {
  const char* const op = "adam_table_";
  check_table(op, table);
  const Control control =
      make_control(op, table.size(0), coefficients, flags, hyper, kAdamHypers, seed, draw);
  const Rows rows = make_rows(op, table, grads, replays, control.groups, replay_weight, grad_scale);
  check_tensor(op, "distances", distances, ScalarType::Double, rows.n);
  compute_adam(rows, control, data<double>(distances), look_ahead, stochastic);
}

void sgd_table(const Tensor& table, const Tensor& grads, const Tensor& replays,
               const Tensor& coefficients, const Tensor& flags, const Tensor& hyper,
               const Tensor& distances, double replay_weight, double grad_scale, bool look_ahead,
               int64_t seed, int64_t draw, bool stochastic) {
  const char* const op = "sgd_table_";
  check_table(op, table);
  const Control control =
      make_control(op, table.size(0), coefficients, flags, hyper, kSgdHypers, seed, draw);
  const Rows rows = make_rows(op, table, grads, replays, control.groups, replay_weight, grad_scale);
  check_tensor(op, "distances", distances, ScalarType::Double, rows.n);
  compute_sgd(rows, control, data<double>(distances), look_ahead, stochastic);
}

void guide_table(const Tensor& table, const Tensor& grads, const Tensor& replays,
                 const Tensor& coefficients, const Tensor& flags, const Tensor& hyper,
                 double replay_weight, double grad_scale, int64_t seed, int64_t draw) {
  const char* const op = "guide_table_";
  check_table(op, table);
  const Control control =
      make_control(op, table.size(0), coefficients, flags, hyper, kGuideHypers, seed, draw);
  compute_guide(make_rows(op, table, grads, replays, control.groups, replay_weight, grad_scale),
                control);
}

// Operators on lists: a table of one group, then the same functions.

class ListTable {
 public:
  ListTable(const char* op, const TensorList& params, const TensorList& grads,
            const TensorList& replays, const TensorList& anchors,
            const std::vector<int64_t>& indices)
      : op_(op), params_(params), table_(params.size() * kColumns, 0) {
    STD_TORCH_CHECK(indices.empty() || indices.size() == params.size(), "dgg::", op_,
                    ": indices has ", indices.size(), " entries, params ", params.size());
    add("params", params, kColumnParam, kSlotParam);
    add("anchors", anchors, kColumnAnchor, kSlotAnchor);
    grads_ = add("grads", grads, -1, kSlotGrad);
    replays_ = add("replays", replays, -1, kSlotReplay);
    if (grads_.empty()) grads_.assign(params.size(), 0);
    for (size_t i = 0; i < params.size(); ++i) {
      int64_t* row = &table_[i * kColumns];
      row[kColumnNumel] = row[kColumnStretch] = row[kColumnStride] = params[i].numel();
      row[kColumnIndex] = indices.empty() ? static_cast<int64_t>(i) : indices[i];
    }
  }

  // Checks a list and enters its addresses: in a column of the table, or else in the result.
  std::vector<int64_t> add(const char* name, const TensorList& list, int column, int slot) {
    std::vector<int64_t> addresses;
    if (list.empty()) return addresses;
    STD_TORCH_CHECK(list.size() == params_.size(), "dgg::", op_, ": ", name, " has ", list.size(),
                    " tensors, params ", params_.size());
    for (size_t i = 0; i < list.size(); ++i) {
      const Tensor& tensor = list[i];
      STD_TORCH_CHECK(tensor.is_cpu(), "dgg::", op_, ": ", name, "[", i, "] is not on the CPU");
      STD_TORCH_CHECK(tensor.is_contiguous(), "dgg::", op_, ": ", name, "[", i,
                      "] is not contiguous");
      const auto sizes = tensor.sizes(), expected = params_[i].sizes();
      STD_TORCH_CHECK(sizes.size() == expected.size() &&
                          std::equal(sizes.begin(), sizes.end(), expected.begin()),
                      "dgg::", op_, ": ", name, "[", i, "] has another shape than params[", i, "]");
      int64_t* row = &table_[i * kColumns];
      row[kColumnDtypes] |= code_of(name, i, tensor) << (kSlotBits * slot);
      const int64_t address = address_of(tensor);
      if (column < 0) {
        // An empty tensor may have no address, and is nonetheless there.
        addresses.push_back(address ? address : 1);
      } else {
        row[column] = address;
      }
    }
    return addresses;
  }

  void add_steps(const TensorList& steps) {
    STD_TORCH_CHECK(steps.size() == params_.size(), "dgg::", op_, ": steps has ", steps.size(),
                    " tensors, params ", params_.size());
    for (size_t i = 0; i < steps.size(); ++i) {
      STD_TORCH_CHECK(
          steps[i].is_cpu() && steps[i].numel() == 1 && steps[i].scalar_type() == ScalarType::Float,
          "dgg::", op_, ": steps[", i, "] must be one float32 number on the CPU");
      table_[i * kColumns + kColumnStep] = address_of(steps[i]);
    }
  }

  void require(const char* name, const TensorList& list) const {
    STD_TORCH_CHECK(list.size() == params_.size(), "dgg::", op_, ": ", name, " has ", list.size(),
                    " tensors, params ", params_.size());
  }

  Rows rows(double replay_weight, double grad_scale) const {
    return {table_.data(),
            grads_.data(),
            replays_.empty() ? nullptr : replays_.data(),
            static_cast<int64_t>(params_.size()),
            replay_weight,
            grad_scale};
  }

 private:
  static int64_t address_of(const Tensor& tensor) {
    return static_cast<int64_t>(reinterpret_cast<intptr_t>(tensor.data_ptr()));
  }

  int64_t code_of(const char* name, size_t i, const Tensor& tensor) const {
    switch (tensor.scalar_type()) {
      case ScalarType::Float:
        return kFloat32;
      case ScalarType::BFloat16:
        return kBFloat16;
      case ScalarType::Half:
        return kFloat16;
      case ScalarType::Double:
        return kFloat64;
      default:
        STD_TORCH_CHECK(false, "dgg::", op_, ": ", name, "[", i,
                        "] must be float32, bfloat16, float16 or float64");
        return -1;
    }
  }

  const char* op_;
  const TensorList& params_;
  std::vector<int64_t> table_, grads_, replays_;
};

Control list_control(const char* op, int64_t n, const Tensor& coefficients, const Tensor& flags,
                     const double* hyper, int64_t seed, int64_t draw) {
  check_tensor(op, "coefficients", coefficients, ScalarType::Double, kScales + n);
  check_tensor(op, "flags", flags, ScalarType::Byte, n);
  return {data<const double>(coefficients),
          data<const uint8_t>(flags),
          hyper,
          1,
          {static_cast<uint64_t>(seed), static_cast<uint32_t>(draw)}};
}

Tensor norms_list(const TensorList& params, const TensorList& grads, const TensorList& replays,
                  const TensorList& anchors, const Tensor& distances, double replay_weight,
                  double grad_scale, int64_t which) {
  const ListTable table("norms", params, grads, replays, anchors, {});
  const Rows rows = table.rows(replay_weight, grad_scale);
  check_tensor("norms", "distances", distances, ScalarType::Double, rows.n);
  Tensor squares = empty_doubles({3, rows.n});
  compute_norms(rows, data<double>(distances), which, data<double>(squares));
  return squares;
}

void adam_list(const TensorList& params, const TensorList& grads, const TensorList& replays,
               const TensorList& exp_avgs, const TensorList& exp_avg_sqs,
               const TensorList& max_exp_avg_sqs, const TensorList& anchors,
               const TensorList& steps, const Tensor& distances, const Tensor& coefficients,
               const Tensor& flags, const std::vector<int64_t>& indices, double lr, double beta1,
               double beta2, double eps, double weight_decay, bool decoupled, bool amsgrad,
               bool maximize, double strength, int64_t threshold, double replay_weight,
               double grad_scale, bool look_ahead, int64_t seed, int64_t draw) {
  const char* const op = "adam_";
  ListTable table(op, params, grads, replays, anchors, indices);
  table.require("exp_avgs", exp_avgs);
  table.require("exp_avg_sqs", exp_avg_sqs);
  if (amsgrad) table.require("max_exp_avg_sqs", max_exp_avg_sqs);
  table.add("exp_avgs", exp_avgs, kColumnExpAvg, kSlotExpAvg);
  table.add("exp_avg_sqs", exp_avg_sqs, kColumnExpAvgSq, kSlotExpAvgSq);
  table.add("max_exp_avg_sqs", max_exp_avg_sqs, kColumnMaxExpAvgSq, kSlotMaxExpAvgSq);
  table.add_steps(steps);
  const double hyper[kAdamHypers] = {lr,
                                     beta1,
                                     beta2,
                                     eps,
                                     weight_decay,
                                     double(decoupled),
                                     double(amsgrad),
                                     double(maximize),
                                     strength,
                                     static_cast<double>(threshold)};
  const Rows rows = table.rows(replay_weight, grad_scale);
  check_tensor(op, "distances", distances, ScalarType::Double, rows.n);
  compute_adam(rows, list_control(op, rows.n, coefficients, flags, hyper, seed, draw),
               data<double>(distances), look_ahead);
}

void sgd_list(const TensorList& params, const TensorList& grads, const TensorList& replays,
              const TensorList& momentum_buffers, const TensorList& anchors,
              const Tensor& distances, const Tensor& coefficients, const Tensor& flags,
              const std::vector<int64_t>& indices, double lr, double momentum, double dampening,
              double weight_decay, bool nesterov, bool maximize, double strength, int64_t threshold,
              double replay_weight, double grad_scale, bool look_ahead, int64_t seed,
              int64_t draw) {
  const char* const op = "sgd_";
  ListTable table(op, params, grads, replays, anchors, indices);
  if (momentum != 0) table.require("momentum_buffers", momentum_buffers);
  table.add("momentum_buffers", momentum_buffers, kColumnExpAvg, kSlotExpAvg);
  const double hyper[kSgdHypers] = {lr,
                                    momentum,
                                    dampening,
                                    weight_decay,
                                    double(nesterov),
                                    double(maximize),
                                    strength,
                                    static_cast<double>(threshold)};
  const Rows rows = table.rows(replay_weight, grad_scale);
  check_tensor(op, "distances", distances, ScalarType::Double, rows.n);
  compute_sgd(rows, list_control(op, rows.n, coefficients, flags, hyper, seed, draw),
              data<double>(distances), look_ahead);
}

void guide_list(const TensorList& params, const TensorList& grads, const TensorList& replays,
                const TensorList& anchors, const Tensor& coefficients, const Tensor& flags,
                const std::vector<int64_t>& indices, bool maximize, double strength,
                int64_t threshold, double replay_weight, double grad_scale, int64_t seed,
                int64_t draw) {
  const char* const op = "guide_";
  const ListTable table(op, params, grads, replays, anchors, indices);
  const double hyper[kGuideHypers] = {double(maximize), strength, static_cast<double>(threshold)};
  const Rows rows = table.rows(replay_weight, grad_scale);
  compute_guide(rows, list_control(op, rows.n, coefficients, flags, hyper, seed, draw));
}

Tensor philox_words(int64_t seed, int64_t draw, int64_t stream, int64_t n) {
  STD_TORCH_CHECK(n >= 0, "dgg::philox_words: n is ", n);
  Tensor result = torch::stable::empty({&n, 1}, ScalarType::Long);
  int64_t* out = data<int64_t>(result);
  uint32_t words[kBlock];
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t count = std::min(kBlock, n - begin);
    run(Philox{words, begin / 4, (count + 3) / 4, static_cast<uint32_t>(draw),
               static_cast<uint32_t>(stream), static_cast<uint64_t>(seed)});
    std::copy_n(words, count, out + begin);
  }
  return result;
}

std::string isa() {
  switch (kIsa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace
}  // namespace dgg

STABLE_TORCH_LIBRARY_IMPL(dgg, CPU, m) {
  m.impl("norms_table", TORCH_BOX(&dgg::norms_table));
  m.impl("coefficients", TORCH_BOX(&dgg::make_coefficients));
  m.impl("adam_table_", TORCH_BOX(&dgg::adam_table));
  m.impl("sgd_table_", TORCH_BOX(&dgg::sgd_table));
  m.impl("guide_table_", TORCH_BOX(&dgg::guide_table));
  m.impl("norms", TORCH_BOX(&dgg::norms_list));
  m.impl("adam_", TORCH_BOX(&dgg::adam_list));
  m.impl("sgd_", TORCH_BOX(&dgg::sgd_list));
  m.impl("guide_", TORCH_BOX(&dgg::guide_list));
}

// Without a tensor among the arguments the dispatcher finds no device.
STABLE_TORCH_LIBRARY_IMPL(dgg, CompositeExplicitAutograd, m) {
  m.impl("philox_words", TORCH_BOX(&dgg::philox_words));
  m.impl("isa", TORCH_BOX(&dgg::isa));
}
