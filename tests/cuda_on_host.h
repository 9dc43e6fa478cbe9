// SPDX-License-Identifier: BSD-3-Clause
//
// Runs the CUDA kernels on a CPU, for tests: what a kernel needs of CUDA, made of C++. The threads
// of a block are fibers that take turns at every barrier; blocks run one after another, in an order
// that can be shuffled. To be included before a .cu file of ../csrc, which g++ then compiles. With
// CUDA_ON_THREADS all run at once (cuda_on_threads.h).

#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#ifndef CUDA_ON_THREADS
#define __shared__ static
#endif
#define __launch_bounds__(...)
#define DGG_GLOBAL(address)
#define DGG_LAUNCH(kernel, blocks, stream, arguments) \
  cuda_on_host::launch(blocks, kThreads, [&] { kernel(arguments); })

#define DGG_ON_HOST

enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorNoKernelImageForDevice,
  cudaErrorInsufficientDriver
};
using cudaStream_t = void*;
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) {
  return "no kernel for these arguments";
}

struct int2 {
  int x, y;
};
struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) {
  return {x, y};
}
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  return {x, y, z, w};
}

#ifdef CUDA_ON_THREADS
#include "cuda_on_threads.h"
#else

namespace cuda_on_host {

struct Place {
  unsigned x = 0;
};
extern Place thread_place, block_place, grid_size;
// 0 runs the blocks in order, another number in an order of its own.
extern unsigned block_order;
// Vector accesses so far: whether and how often the fast path was taken.
extern int64_t vector_accesses;

constexpr int kWarp = 32;

struct Fiber {
  ucontext_t start;
  jmp_buf place;
  std::unique_ptr<char[]> stack;
  unsigned number = 0;
  bool started = false, done = false;
  int block_barriers = 0, warp_barriers = 0;
};

extern std::vector<Fiber> fibers;
extern jmp_buf scheduler;
extern Fiber* running;
extern std::function<void()> job;
extern std::vector<int> arrived_in_warp;
extern int arrived;

// Contexts are made once; from then on fibers are left and entered with jumps, which unlike
// swapcontext make no system call.
inline void give_way() {
  if (_setjmp(running->place) == 0) _longjmp(scheduler, 1);
}

inline void resume(Fiber& fiber) {
  running = &fiber;
  thread_place.x = fiber.number;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

inline void work_forever() {
  for (;;) {
    job();
    running->done = true;
    give_way();
  }
}

// Waits until as many fibers as the barrier has members have come here as often as this one.
inline void wait(int& count, int& passed, int members) {
  const int turn = ++passed;
  ++count;
  while (count < turn * members) give_way();
}

inline void launch(int64_t blocks, int threads, std::function<void()> kernel) {
  constexpr size_t kStack = 128 * 1024;
  if (fibers.empty()) {
    fibers = std::vector<Fiber>(static_cast<size_t>(threads));
    for (unsigned t = 0; t < fibers.size(); ++t) {
      Fiber& fiber = fibers[t];
      fiber.number = t;
      fiber.stack.reset(new char[kStack]);
      getcontext(&fiber.start);
      fiber.start.uc_stack.ss_sp = fiber.stack.get();
      fiber.start.uc_stack.ss_size = kStack;
      fiber.start.uc_link = nullptr;
      makecontext(&fiber.start, &work_forever, 0);
    }
  }
  job = std::move(kernel);
  std::vector<unsigned> order(static_cast<size_t>(blocks));
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<unsigned>(i);
  if (block_order != 0) std::shuffle(order.begin(), order.end(), std::mt19937(block_order));
  grid_size.x = static_cast<unsigned>(blocks);
  for (const unsigned block : order) {
    block_place.x = block;
    arrived = 0;
    arrived_in_warp.assign(static_cast<size_t>(threads / kWarp), 0);
    for (Fiber& fiber : fibers) {
      fiber.done = false;
      fiber.block_barriers = fiber.warp_barriers = 0;
    }
    for (bool left = true; left;) {
      left = false;
      for (Fiber& fiber : fibers) {
        if (fiber.done) continue;
        resume(fiber);
        left = left || !fiber.done;
      }
    }
  }
}

template <typename T>
T load(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) {
    std::fprintf(stderr, "misaligned vector access\n");
    std::abort();
  }
  ++vector_accesses;
  return *address;
}

}  // namespace cuda_on_host

#define threadIdx (cuda_on_host::thread_place)
#define blockIdx (cuda_on_host::block_place)
#define gridDim (cuda_on_host::grid_size)

inline void __syncthreads() {
  cuda_on_host::wait(cuda_on_host::arrived, cuda_on_host::running->block_barriers,
                     static_cast<int>(cuda_on_host::fibers.size()));
}

// Of the whole warp, or of the threads in the mask, which are always the same ones.
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) {
  cuda_on_host::Fiber& self = *cuda_on_host::running;
  if (mask != 0xFFFFFFFFu) {
    // The two threads that prepare a row: both have written when both have been here.
    cuda_on_host::give_way();
    return;
  }
  cuda_on_host::wait(cuda_on_host::arrived_in_warp[self.number / cuda_on_host::kWarp],
                     self.warp_barriers, cuda_on_host::kWarp);
}

inline void __threadfence() {}

inline int count_and_release(int* counter) {
  return (*counter)++;
}

template <typename T>
T atomicOr(T* address, T value) {
  const T before = *address;
  *address |= value;
  return before;
}

#endif  // CUDA_ON_THREADS

template <typename T>
T __ldcs(const T* address) {
  return cuda_on_host::load(address);
}
template <typename T>
T __ldg(const T* address) {
  return cuda_on_host::load(address);
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
void __stcs(T* address, T value) {
  cuda_on_host::load(address);
  *address = value;
}
