// SPDX-License-Identifier: BSD-3-Clause
//
// The GPU kernels. A launch serves all rows of the table that share a dtype combination and has a
// block per chunk of kLaunchChunk elements. A block reads its row's addresses and scalars, then
// walks the chunk: groups in which every thread has kElements neighbours are read and written with
// 128-bit accesses, several at once; what is left, and rows that are not aligned, element by
// element, with the same arithmetic (update.h). The last block of a row to finish writes what
// belongs to all of it: norms, distances, step counts; the last of a norm pass also the
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
// An address out of a table: without this the compiler does not know what memory it means.
#define DGG_GLOBAL(address) __builtin_assume(__isGlobal(address))
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
#include <cstring>
#include <type_traits>

#include "table.h"
#include "update.h"

#define DGG_DEVICE __device__ __forceinline__

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

struct CoefficientArguments {
  const double* squares;
  double* out;
  int64_t table_rows;
  double max_grad_norm;
  bool clipped;
  bool scaling;
  bool per_tensor;
};

struct NormArguments {
  Launch launch;
  double* distances;
  double* squares;
  const uint8_t* gate;
  const float* grad_scale;
  int64_t table_rows;
  int which;
  CoefficientArguments coefficients;  // made by the last block of all, unless `out` is null
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
cudaError_t launch_adam(const UpdateArguments& arguments, cudaStream_t stream);
cudaError_t launch_sgd(const UpdateArguments& arguments, cudaStream_t stream);
cudaError_t launch_guide(const UpdateArguments& arguments, cudaStream_t stream);
cudaError_t launch_draw_flags(const DrawArguments& arguments, cudaStream_t stream);

namespace {

// Storage. `Any` is a storage type known only at run time.

struct Any {};

DGG_HOST_DEVICE constexpr int size_of(int code) {
  return code == kFloat32 ? 4 : code == kFloat64 ? 8 : 2;
}

template <typename S>
constexpr int stored_size() {
  return sizeof(S);
}

// Four elements of Any are loaded as one vector of the widest type that may be there.
template <>
constexpr int stored_size<Any>() {
  return 4;
}

template <typename T>
DGG_DEVICE T wide_from_bits(uint32_t low, uint32_t high) {
  const uint64_t bits = static_cast<uint64_t>(high) << 32 | low;
  double x;
  memcpy(&x, &bits, sizeof(x));
  return static_cast<T>(x);
}

// kElements neighbouring elements in registers, as they are stored.
template <typename S, int kElements>
struct Pack {
  uint32_t words[kElements * (std::is_same<S, Any>::value ? 8 : stored_size<S>()) / 4];
};

template <typename S, typename T>
DGG_DEVICE T unpack(const uint32_t* words, int j) {
  if constexpr (sizeof(S) == 2) {
    const uint32_t pair = words[j / 2];
    return widen<T>(S{static_cast<uint16_t>(j % 2 ? pair >> 16 : pair)});
  } else if constexpr (sizeof(S) == 4) {
    return static_cast<T>(float_from_bits(words[j]));
  } else {
    return wide_from_bits<T>(words[2 * j], words[2 * j + 1]);
  }
}

// Elements are packed in ascending order, into a pack that is not read from.
template <typename S>
DGG_DEVICE void pack(uint32_t* words, int j, S x) {
  if constexpr (sizeof(S) == 2) {
    words[j / 2] = j % 2 ? words[j / 2] | static_cast<uint32_t>(x.bits) << 16 : x.bits;
  } else if constexpr (sizeof(S) == 4) {
    words[j] = bits_from_float(x);
  } else {
    uint64_t bits;
    memcpy(&bits, &x, sizeof(bits));
    words[2 * j] = static_cast<uint32_t>(bits);
    words[2 * j + 1] = static_cast<uint32_t>(bits >> 32);
  }
}

// Whether a stream is wanted again soon. What is not makes room in the cache first.
enum Reuse : bool { kOnce, kAgain };

template <Reuse kReuse>
DGG_DEVICE void load_quad(uint32_t* words, const void* address) {
  const uint4* const from = static_cast<const uint4*>(address);
  const uint4 quad = kReuse == kOnce ? __ldcs(from) : __ldg(from);
  words[0] = quad.x;
  words[1] = quad.y;
  words[2] = quad.z;
  words[3] = quad.w;
}

template <Reuse kReuse>
DGG_DEVICE void store_quad(void* address, const uint32_t* words) {
  const uint4 quad = make_uint4(words[0], words[1], words[2], words[3]);
  if (kReuse == kOnce) {
    __stcs(static_cast<uint4*>(address), quad);
  } else {
    DGG_GLOBAL(address);
    *static_cast<uint4*>(address) = quad;
  }
}

// A tensor's chunk.
template <typename S>
struct Stream {
  S* data;

  DGG_DEVICE Stream(char* address, int) : data(reinterpret_cast<S*>(address)) {}
  DGG_DEVICE explicit operator bool() const { return data != nullptr; }

  template <Reuse kReuse, int kElements>
  DGG_DEVICE void load(Pack<S, kElements>& pack, int i) const {
#pragma unroll
    for (int word = 0; word < kElements * static_cast<int>(sizeof(S)) / 4; word += 4) {
      load_quad<kReuse>(pack.words + word, reinterpret_cast<const char*>(data + i) + 4 * word);
    }
  }

  template <Reuse kReuse, int kElements>
  DGG_DEVICE void store(const Pack<S, kElements>& pack, int i) const {
#pragma unroll
    for (int word = 0; word < kElements * static_cast<int>(sizeof(S)) / 4; word += 4) {
      store_quad<kReuse>(reinterpret_cast<char*>(data + i) + 4 * word, pack.words + word);
    }
  }

  template <typename T, int kElements>
  DGG_DEVICE T get(const Pack<S, kElements>& pack, int j) const {
    return unpack<S, T>(pack.words, j);
  }

  template <typename T, int kElements>
  DGG_DEVICE void set(Pack<S, kElements>& into, int j, T x) const {
    pack(into.words, j, narrow<S>(x));
  }

  template <typename T>
  DGG_DEVICE T rounded(T x) const {
    return widen<T>(narrow<S>(x));
  }

  DGG_DEVICE bool is_bfloat16() const { return std::is_same<S, bfloat16>::value; }
};

template <>
struct Stream<Any> {
  char* data;
  int code;

  DGG_DEVICE Stream(char* address, int code) : data(address), code(code) {}
  DGG_DEVICE explicit operator bool() const { return data != nullptr; }

  // Loads only, so that those of all streams are on their way before the first is waited for.
  template <Reuse, int kElements>
  DGG_DEVICE void load(Pack<Any, kElements>& pack, int i) const {
    static_assert(kElements == 4, "as many as a vector of float32 has");
    const char* const from = data + static_cast<int64_t>(i) * size_of(code);
    if (size_of(code) == 2) {
      const uint2 pair = __ldcs(reinterpret_cast<const uint2*>(from));
      pack.words[0] = pair.x;
      pack.words[1] = pair.y;
    } else {
      load_quad<kOnce>(pack.words, from);
      if (size_of(code) == 8) load_quad<kOnce>(pack.words + 4, from + 16);
    }
  }

  template <Reuse, int kElements>
  DGG_DEVICE void store(const Pack<Any, kElements>& pack, int i) const {
    char* const to = data + static_cast<int64_t>(i) * size_of(code);
    DGG_GLOBAL(to);
    if (size_of(code) == 2) {
      *reinterpret_cast<uint2*>(to) = make_uint2(pack.words[0], pack.words[1]);
    } else {
      store_quad<kAgain>(to, pack.words);
      if (size_of(code) == 8) store_quad<kAgain>(to + 16, pack.words + 4);
    }
  }

  template <typename T, int kElements>
  DGG_DEVICE T get(const Pack<Any, kElements>& pack, int j) const {
    switch (code) {
      case kFloat32:
        return unpack<float, T>(pack.words, j);
      case kBFloat16:
        return unpack<bfloat16, T>(pack.words, j);
      case kFloat16:
        return unpack<float16, T>(pack.words, j);
      default:
        return unpack<double, T>(pack.words, j);
    }
  }

  template <typename T, int kElements>
  DGG_DEVICE void set(Pack<Any, kElements>& into, int j, T x) const {
    switch (code) {
      case kFloat32:
        return pack(into.words, j, narrow<float>(x));
      case kBFloat16:
        return pack(into.words, j, narrow<bfloat16>(x));
      case kFloat16:
        return pack(into.words, j, narrow<float16>(x));
      default:
        return pack(into.words, j, narrow<double>(x));
    }
  }

  template <typename T>
  DGG_DEVICE T rounded(T x) const {
    switch (code) {
      case kFloat32:
        return widen<T>(narrow<float>(x));
      case kBFloat16:
        return widen<T>(narrow<bfloat16>(x));
      case kFloat16:
        return widen<T>(narrow<float16>(x));
      default:
        return widen<T>(narrow<double>(x));
    }
  }

  DGG_DEVICE bool is_bfloat16() const { return code == kBFloat16; }
};

// One element, of any alignment that its type allows; the same conversions as in a vector.
template <typename S, typename T>
DGG_DEVICE T read(const Stream<S>& stream, int i) {
  DGG_GLOBAL(stream.data);
  return widen<T>(stream.data[i]);
}

template <typename T>
DGG_DEVICE T read_any(const Stream<Any>& stream, int i) {
  DGG_GLOBAL(stream.data);
  switch (stream.code) {
    case kFloat32:
      return widen<T>(reinterpret_cast<const float*>(stream.data)[i]);
    case kBFloat16:
      return widen<T>(reinterpret_cast<const bfloat16*>(stream.data)[i]);
    case kFloat16:
      return widen<T>(reinterpret_cast<const float16*>(stream.data)[i]);
    default:
      return widen<T>(reinterpret_cast<const double*>(stream.data)[i]);
  }
}

template <typename T, typename S>
DGG_DEVICE T element_of(const Stream<S>& stream, int i) {
  if constexpr (std::is_same<S, Any>::value) {
    return read_any<T>(stream, i);
  } else {
    return read<S, T>(stream, i);
  }
}

template <typename S, typename T>
DGG_DEVICE void write(const Stream<S>& stream, int i, T x) {
  DGG_GLOBAL(stream.data);
  if constexpr (!std::is_same<S, Any>::value) {
    stream.data[i] = narrow<S>(x);
  } else {
    switch (stream.code) {
      case kFloat32:
        reinterpret_cast<float*>(stream.data)[i] = narrow<float>(x);
        return;
      case kBFloat16:
        reinterpret_cast<bfloat16*>(stream.data)[i] = narrow<bfloat16>(x);
        return;
      case kFloat16:
        reinterpret_cast<float16*>(stream.data)[i] = narrow<float16>(x);
        return;
      default:
        reinterpret_cast<double*>(stream.data)[i] = narrow<double>(x);
    }
  }
}

template <typename S>
DGG_DEVICE void write_stochastically(const Stream<S>& stream, int i, float x, uint32_t word) {
  DGG_GLOBAL(stream.data);
  reinterpret_cast<bfloat16*>(stream.data)[i] = narrow_stochastically(x, word);
}

// Vectors.

// Elements a thread takes at once: 128 bits of the narrowest type, and at least a quad.
template <typename... S>
constexpr int elements_at_once() {
  int narrowest = 8;
  ((narrowest = stored_size<S>() < narrowest ? stored_size<S>() : narrowest), ...);
  return narrowest == 2 ? 8 : 4;
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
  __shared__ double lanes[kThreads];
  const int t = static_cast<int>(threadIdx.x);
  const int64_t row = launch.rows[at.position];
  const int parts = finish.parts(row);
  double sums[kParts];
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    sums[part] = 0;
    if (!(parts >> part & 1)) continue;
    lanes[t] =
        sum_partials(launch.partials + part * launch.chunk_count, at.begin + t, at.end, kThreads);
    __syncthreads();
#pragma unroll 1
    for (int half = kThreads / 2; half > 0; half /= 2) {
      if (t < half) lanes[t] += lanes[t + half];
      __syncthreads();
    }
    sums[part] = lanes[0];
    __syncthreads();
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

DGG_DEVICE bool is_aligned(int64_t addresses) {
  return (addresses & 15) == 0;
}

DGG_DEVICE double scale_at(const float* grad_scale) {
  return grad_scale ? *grad_scale : 1.0;
}

}  // namespace
}  // namespace dgg
