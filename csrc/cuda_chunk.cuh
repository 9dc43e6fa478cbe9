// SPDX-License-Identifier: BSD-3-Clause
//
// The GPU kernels. A launch serves all rows of the table that share a dtype combination and has a
// block per chunk of kLaunchChunk elements. A block reads its row's addresses and scalars, then
// walks the chunk: groups in which every thread has kElements neighbours are read and written with
// 128-bit accesses, several at once; what is left, and rows that are not aligned, element by
// element, with the same arithmetic (update.h). The last block of a row to finish writes what
// belongs to all of it: norms, products, distances, step counts; the last of a norm pass also the
// coefficients.
//
// Sums do not depend on scheduling, alignment, dtype combination or kernel: a chunk has kLanes
// lanes of four neighbouring elements each, summed in order, and everything beyond is summed in
// float64 in a fixed tree. So a distance measured while updating equals the one a norm pass would
// find.
//
// Nothing here knows of torch. tests/cuda_on_host.h runs these kernels on a CPU.

#pragma once

#ifndef DGG_LAUNCH
#include <cuda_runtime.h>
#define DGG_LAUNCH(kernel, blocks, stream, arguments) \
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(arguments)
// Counts one more in and returns how many there were. Whoever counts later, and has a fence behind
// that, sees what this thread, and those it met at a barrier, did before. Only the last one needs
// the fence.
__device__ __forceinline__ int count_and_release(int* counter) {
  int before;
  asm volatile("atom.release.gpu.global.add.s32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(counter))
               : "memory");
  return before;
}
#endif

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cuda_streams.cuh"
#include "table.h"
#include "update.h"

namespace dgg {

constexpr int kThreads = 256;
constexpr int kLanes = 2 * kThreads;

// Arguments, passed by value.

struct Launch {
  const int64_t* table;
  const int32_t* rows;
  const int32_t* chunks;
  const int32_t* starts;
  double* partials;
  int32_t* counters;  // of each row's chunks, and last of the rows; zero between launches
  const int64_t* grads;
  const int64_t* replays;  // null: no replay gradients at all
  int64_t chunk_count;
  int64_t row_count;
  uint64_t dtypes;
  double replay_weight;
};

// What coefficients are made of.
struct CoefficientArguments {
  const double* sums;  // squares, or with a guard products
  double* out;
  int64_t table_rows;
  double max_grad_norm;
  bool clipped;
  bool scaling;  // a guard always scales
  bool per_tensor;
  bool maximize;  // of a guard
};

struct NormArguments {
  Launch launch;
  double* distances;
  double* squares;
  const uint8_t* gate;
  const float* grad_scale;
  int64_t table_rows;
  int which;
  double importance;                  // i of equation (3)
  CoefficientArguments coefficients;  // made by the last block of all, unless `out` is null
};

struct ProductArguments {
  Launch launch;
  const uint8_t* flags;
  double* products;
  const float* grad_scale;
  double importance;
  CoefficientArguments guard;  // as the coefficients above
};

struct UpdateArguments {
  Launch launch;
  const double* coefficients;
  const uint8_t* flags;
  const double* hyper;
  double* distances;
  const float* grad_scale;
  const float* found_inf;
  const int64_t* draw_index;
  uint64_t seed;
  uint32_t draw;
  int variant;
  double importance;
};

struct DrawArguments {
  const int64_t* table;
  const double* hyper;
  const int64_t* draw_index;
  uint8_t* flags;
  uint8_t* gate;
  int64_t table_rows;
  int64_t hypers;
  uint64_t seed;
  int granularity;
  int threshold_column;
  int strength_column;
};

// The launches, one translation unit each; they return what cudaGetLastError says.
cudaError_t launch_norms(const NormArguments& arguments, cudaStream_t stream);
cudaError_t launch_coefficients(const CoefficientArguments& arguments, cudaStream_t stream);
cudaError_t launch_products(const ProductArguments& arguments, cudaStream_t stream);
cudaError_t launch_guard(const CoefficientArguments& arguments, cudaStream_t stream);
cudaError_t launch_adam(const UpdateArguments& arguments, cudaStream_t stream);
cudaError_t launch_sgd(const UpdateArguments& arguments, cudaStream_t stream);
cudaError_t launch_guide(const UpdateArguments& arguments, cudaStream_t stream);
cudaError_t launch_draw_flags(const DrawArguments& arguments, cudaStream_t stream);

namespace {

// Vectors.

// Elements a thread takes at once, of tensors with so many bytes an element: 128 bits of the
// narrowest type, and at least a quad.
template <typename... Size>
constexpr int elements_at_once(Size... sizes) {
  return ((sizes == 2) || ...) ? 8 : 4;
}

// Groups to read before the first is computed, so that enough is on its way from memory.
constexpr int groups_at_once(int loads) {
  return loads >= 5 ? 1 : loads >= 3 ? 2 : 4;
}

// Walks a chunk of `count` elements. body.batch(i, stretch) is to take kBatch groups, of which
// the thread has the elements from i on, `stretch` apart; body.quad(i, n) n <= 4 elements.
template <int kElements, int kBatch, typename Body>
DGG_DEVICE void walk(Body& body, int count, bool aligned) {
  constexpr int kGroup = kThreads * kElements;
  const int own = static_cast<int>(threadIdx.x) * kElements;
  int done = 0;
  if (aligned) {
#pragma unroll 1
    for (; done + kBatch * kGroup <= count; done += kBatch * kGroup) body.batch(done + own);
  }
#pragma unroll 1
  for (int i = done + own; i < count; i += kGroup) {
#pragma unroll 1
    for (int quad = i; quad < i + kElements && quad < count; quad += 4) {
      body.quad(quad, count - quad < 4 ? count - quad : 4);
    }
  }
}

// Draws.

// Four words for the quad of elements from i on, i a multiple of four.
DGG_DEVICE void quad_words(uint32_t* words, int64_t i, uint32_t draw, uint32_t stream,
                           uint64_t seed) {
  const uint64_t counter = static_cast<uint64_t>(i) / 4;
  words[0] = static_cast<uint32_t>(counter);
  words[1] = static_cast<uint32_t>(counter >> 32);
  words[2] = draw;
  words[3] = stream;
  philox(words[0], words[1], words[2], words[3], seed);
}

DGG_DEVICE uint32_t element_word(int64_t i, uint32_t draw, uint32_t stream, uint64_t seed) {
  uint32_t words[4];
  quad_words(words, i & ~int64_t{3}, draw, stream, seed);
  const uint32_t low = i & 1 ? words[1] : words[0], high = i & 1 ? words[3] : words[2];
  return i & 2 ? high : low;
}

// Sums of squares.

template <typename T>
DGG_DEVICE T add_square(T x, T sum) {
  return std::fma(x, x, sum);
}

// The two lanes of a thread. Quad number k of a chunk belongs to lane k modulo kLanes, whoever
// takes it: with four elements at once thread t has lanes t and t + kThreads, with eight 2 t and
// 2 t + 1.
template <typename T, int kElements>
struct Lanes {
  T sums[2] = {T(0), T(0)};

  DGG_DEVICE static int second(int i) { return (kElements == 4 ? i / (4 * kThreads) : i / 4) & 1; }

  // Adds the sum of a quad. Which of the lanes is known when compiling if `second` is.
  DGG_DEVICE void add(int second, T quad) {
    if (second) {
      sums[1] += quad;
    } else {
      sums[0] += quad;
    }
  }
};

// Sum of one number of every thread, in every thread.
DGG_DEVICE double sum_of_threads(double sum) {
  __shared__ double sums[kThreads];
  const int t = static_cast<int>(threadIdx.x);
  __syncthreads();  // those who have not read the sum before this one
  sums[t] = sum;
  __syncthreads();
#pragma unroll 1
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (t < half) sums[t] += sums[t + half];
    __syncthreads();
  }
  return sums[0];
}

template <typename T, int kElements>
DGG_DEVICE double sum_of_block(const Lanes<T, kElements>& lanes) {
  __shared__ T all[kLanes];
  const int t = static_cast<int>(threadIdx.x);
  all[kElements == 4 ? t : 2 * t] = lanes.sums[0];
  all[kElements == 4 ? t + kThreads : 2 * t + 1] = lanes.sums[1];
  __syncthreads();
  return sum_of_threads(static_cast<double>(all[t]) + static_cast<double>(all[t + kThreads]));
}

// A sum of squares over a chunk, or, where float32 may have spoiled it, the same formed once more
// in float64 out of the cache; value(i) is what is squared.
template <typename T, typename Value>
DGG_DEVICE double unspoiled(double sum, const Value& value, int count) {
  if (!std::is_same<T, float>::value || square_sum_is_reliable(sum)) return sum;
  double again = 0;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    again = add_square(static_cast<double>(value(i)), again);
  }
  return sum_of_threads(again);
}

// Which lane a quad of a batch belongs to, at compile time where it can be.
template <int kElements, int kBatch>
DGG_DEVICE int second_lane(int group, int j, int i) {
  if (kElements == 8) return j / 4;
  return kBatch % 2 == 0 ? group % 2 : Lanes<float, kElements>::second(i);
}

// The end of a launch.

// Sum of a row's partials begin, begin + stride ... before end.
DGG_DEVICE double sum_partials(const double* partials, int begin, int end, int stride) {
  constexpr int kAtOnce = 8;
  double sum = 0;
  int64_t i = begin;
#pragma unroll 1
  for (; i + (kAtOnce - 1) * stride < end; i += kAtOnce * stride) {
    double values[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) values[k] = __ldcg(partials + i + k * stride);
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) sum += values[k];
  }
#pragma unroll 1
  for (; i < end; i += stride) sum += __ldcg(partials + i);
  return sum;
}

// Whether all others of so many have counted; what they did before is then seen, and the counter is
// zero again.
DGG_DEVICE bool is_last(int32_t* counter, int members) {
  if (count_and_release(counter) != members - 1) return false;
  __threadfence();
  *counter = 0;
  return true;
}

// The row of a block among those of the launch, and the row's chunks. Read at the beginning, when
// there are other loads to wait for, and kept in shared memory.
struct RowEnd {
  int position, begin, end;
  bool last, very_last;

  DGG_DEVICE void load(const Launch& launch, int64_t number) {
    position = launch.chunks[2 * number];
    begin = launch.starts[position];
    end = launch.starts[position + 1];
  }

  // Returns, in every thread, whether this block is the last of the row to come here.
  DGG_DEVICE bool reach(const Launch& launch) {
    if (threadIdx.x == 0) last = is_last(launch.counters + position, end - begin);
    __syncthreads();
    return last;
  }

  // Returns, in every thread, whether this block is the last of all that come here, one of each
  // row.
  DGG_DEVICE bool reach_end(const Launch& launch) {
    if (threadIdx.x == 0) {
      very_last = is_last(launch.counters + launch.row_count, static_cast<int>(launch.row_count));
    }
    __syncthreads();
    return very_last;
  }
};

// Calls finish.store(row, sums), by one thread of the last block of a row, with the sums of the
// row's partials that finish.parts(row) names in its bits. How a row is summed depends on its
// number of chunks alone.
template <int kParts, typename Finish>
DGG_DEVICE void finish_row(const Launch& launch, const RowEnd& at, const Finish& finish) {
  const int t = static_cast<int>(threadIdx.x);
  const int64_t row = launch.rows[at.position];
  const int parts = finish.parts(row);
  double sums[kParts];
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    sums[part] = 0;
    if (!(parts >> part & 1)) continue;
    const double* const partials = launch.partials + part * launch.chunk_count;
    sums[part] = sum_of_threads(sum_partials(partials, at.begin + t, at.end, kThreads));
  }
  if (t == 0) finish.store(row, sums);
}

// What a launch knows of a row without looking at its chunks.
struct RowView {
  const int64_t* columns;
  int64_t grad, replay;

  DGG_DEVICE RowView(const Launch& launch, int64_t row)
      : columns(launch.table + row * kColumns),
        grad(launch.grads[row]),
        replay(launch.replays ? launch.replays[row] : 0) {}

  DGG_DEVICE bool active() const { return grad != 0 || replay != 0; }
  DGG_DEVICE bool anchored() const { return columns[kColumnAnchor] != 0; }
};

// One of the launch's chunks; a block works on one.
struct ChunkView {
  int64_t row, first;
  int count;

  DGG_DEVICE ChunkView(const Launch& launch, int64_t number) {
    const int2 chunk = reinterpret_cast<const int2*>(launch.chunks)[number];
    row = launch.rows[chunk.x];
    first = static_cast<int64_t>(chunk.y) * kLaunchChunk;
    const int64_t left = launch.table[row * kColumns + kColumnNumel] - first;
    count = left < kLaunchChunk ? static_cast<int>(left) : kLaunchChunk;
  }

  // Address of the chunk of a tensor that lies at `address`; absent stays absent.
  DGG_DEVICE char* at(int64_t address, uint64_t dtypes, int slot) const {
    const int64_t offset = first * size_of(code_at(dtypes, slot));
    return address ? reinterpret_cast<char*>(static_cast<intptr_t>(address) + offset) : nullptr;
  }
};

// The chunk of a block of a pass that only reads. The last come first: the pass then ends with what
// the update behind it begins with, which the cache still holds.
DGG_DEVICE int64_t number_from_behind(const Launch& launch) {
  return launch.chunk_count - 1 - static_cast<int64_t>(blockIdx.x);
}

// Whether vectors may be read and written there; what is absent does not matter.
template <typename... Pointer>
DGG_DEVICE bool are_aligned(Pointer... addresses) {
  return ((reinterpret_cast<uintptr_t>(addresses) | ...) & 15) == 0;
}

DGG_DEVICE double scale_at(const float* grad_scale) {
  return grad_scale ? *grad_scale : 1.0;
}

// A kernel, and whether it does what a launch asks for.
template <typename Arguments>
struct Candidate {
  bool (*suits)(const Arguments&);
  void (*kernel)(Arguments);
};

// Launches the first that suits.
template <typename Arguments, int kCount>
cudaError_t launch_first(const Candidate<Arguments> (&candidates)[kCount], const Arguments& a,
                         cudaStream_t stream) {
  for (const Candidate<Arguments>& candidate : candidates) {
    if (!candidate.suits(a)) continue;
    DGG_LAUNCH(candidate.kernel, a.launch.chunk_count, stream, a);
    return cudaGetLastError();
  }
  return cudaErrorInvalidValue;
}

// What kernels are compiled for.
template <typename... K>
struct Kinds {};

}  // namespace
}  // namespace dgg
