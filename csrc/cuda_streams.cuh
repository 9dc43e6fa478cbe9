// SPDX-License-Identifier: BSD-3-Clause
//
// How the GPU kernels read and write a tensor's chunk: as vectors of 128 bits or element by
// element, of a dtype known when compiling or only when running.

#pragma once

#ifndef DGG_GLOBAL
#include <cuda_runtime.h>
// An address out of a table: without this the compiler does not know what memory it means.
#define DGG_GLOBAL(address) __builtin_assume(__isGlobal(address))
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "table.h"
#include "update.h"

#define DGG_DEVICE __device__ __forceinline__

namespace dgg {
namespace {

// Storage. `Any` is a storage type known only at run time.

struct Any {};

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
  S* data = nullptr;

  Stream() = default;
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
  char* data = nullptr;
  int code = kFloat32;

  Stream() = default;
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
    return as_stored(code, [&](auto s) { return unpack<decltype(s), T>(pack.words, j); });
  }

  template <typename T, int kElements>
  DGG_DEVICE void set(Pack<Any, kElements>& into, int j, T x) const {
    as_stored(code, [&](auto s) { pack(into.words, j, narrow<decltype(s)>(x)); });
  }

  template <typename T>
  DGG_DEVICE T rounded(T x) const {
    return as_stored(code, [&](auto s) { return widen<T>(narrow<decltype(s)>(x)); });
  }

  DGG_DEVICE bool is_bfloat16() const { return code == kBFloat16; }
};

// One element, of any alignment that its type allows; the same conversions as in a vector.
template <typename T, typename S>
DGG_DEVICE T element_of(const Stream<S>& stream, int i) {
  DGG_GLOBAL(stream.data);
  return widen<T>(stream.data[i]);
}

template <typename T>
DGG_DEVICE T element_of(const Stream<Any>& stream, int i) {
  DGG_GLOBAL(stream.data);
  return as_stored(stream.code, [&](auto s) {
    return widen<T>(reinterpret_cast<const decltype(s)*>(stream.data)[i]);
  });
}

template <typename S, typename T>
DGG_DEVICE void write(const Stream<S>& stream, int i, T x) {
  DGG_GLOBAL(stream.data);
  stream.data[i] = narrow<S>(x);
}

template <typename T>
DGG_DEVICE void write(const Stream<Any>& stream, int i, T x) {
  DGG_GLOBAL(stream.data);
  as_stored(stream.code, [&](auto s) {
    reinterpret_cast<decltype(s)*>(stream.data)[i] = narrow<decltype(s)>(x);
  });
}

template <typename S>
DGG_DEVICE void write_stochastically(const Stream<S>& stream, int i, float x, uint32_t word) {
  DGG_GLOBAL(stream.data);
  reinterpret_cast<bfloat16*>(stream.data)[i] = narrow_stochastically(x, word);
}

}  // namespace
}  // namespace dgg
