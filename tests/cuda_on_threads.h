// SPDX-License-Identifier: BSD-3-Clause
//
// What cuda_on_host.h needs to run all blocks of a launch, and all threads of a block, at once:
// each is a thread of the CPU. For ThreadSanitizer, which then sees a race where nothing but luck
// orders two accesses. It knows only the order that is made here, and that is the weakest which
// CUDA promises: barriers order the threads that meet at them, a count releases, a fence behind it
// acquires, and everything else is relaxed.
//
// `__shared__ T x;` has to become `auto& x = cuda_on_host::shared<T>([] {});`, one for every block;
// no macro can do that, tests/test_cuda_tsan.py does.

#pragma once

#include <pthread.h>

#include <atomic>
#include <thread>

namespace cuda_on_host {

struct Place {
  unsigned x = 0;
};
inline thread_local Place thread_place, block_place;

constexpr int64_t kMostBlocks = 128;
inline pthread_barrier_t block_barriers[kMostBlocks], pair_barriers[kMostBlocks];

// What is left out, for controls: without it ThreadSanitizer has to find something.
enum Omission { kNothing, kRelease, kAcquire, kBarrier };
inline Omission omitted = kNothing;

// The lambda is a type of its own at every place, so that none shares the memory of another.
template <typename T, typename Tag>
T& shared(Tag) {
  struct alignas(16) Memory {
    char bytes[sizeof(T)];
  };
  static Memory memory[kMostBlocks];
  return *reinterpret_cast<T*>(memory[block_place.x].bytes);
}

template <typename F>
void launch(int64_t blocks, int threads, const F& kernel) {
  if (blocks > kMostBlocks) {
    std::fprintf(stderr, "%ld blocks\n", static_cast<long>(blocks));
    std::abort();
  }
  for (int64_t block = 0; block < blocks; ++block) {
    pthread_barrier_init(&block_barriers[block], nullptr, static_cast<unsigned>(threads));
    pthread_barrier_init(&pair_barriers[block], nullptr, 2);
  }
  std::vector<std::thread> all;
  for (int64_t block = 0; block < blocks; ++block) {
    for (int t = 0; t < threads; ++t) {
      all.emplace_back([&kernel, block, t] {
        block_place.x = static_cast<unsigned>(block);
        thread_place.x = static_cast<unsigned>(t);
        kernel();
      });
    }
  }
  for (std::thread& thread : all) thread.join();
  for (int64_t block = 0; block < blocks; ++block) {
    pthread_barrier_destroy(&block_barriers[block]);
    pthread_barrier_destroy(&pair_barriers[block]);
  }
}

template <typename T>
T load(const T* address) {
  return *address;
}

// The counter that this thread was the last to count at.
inline thread_local int* counted = nullptr;

}  // namespace cuda_on_host

#define threadIdx (cuda_on_host::thread_place)
#define blockIdx (cuda_on_host::block_place)

inline void __syncthreads() {
  if (cuda_on_host::omitted == cuda_on_host::kBarrier) return;
  pthread_barrier_wait(&cuda_on_host::block_barriers[cuda_on_host::block_place.x]);
}

// Only of the two threads that prepare a row.
inline void __syncwarp(unsigned mask) {
  if (mask != 3) std::abort();
  pthread_barrier_wait(&cuda_on_host::pair_barriers[cuda_on_host::block_place.x]);
}

inline int count_and_release(int* counter) {
  using namespace cuda_on_host;
  counted = counter;
  return __atomic_fetch_add(counter, 1, omitted == kRelease ? __ATOMIC_RELAXED : __ATOMIC_RELEASE);
}

// Behind an atomic a fence acquires. ThreadSanitizer does not know fences as such.
inline void __threadfence() {
  using namespace cuda_on_host;
  if (counted != nullptr && omitted != kAcquire) __atomic_load_n(counted, __ATOMIC_ACQUIRE);
}

inline int atomicOr(int* address, int value) {
  return __atomic_fetch_or(address, value, __ATOMIC_RELAXED);
}
