// SPDX-License-Identifier: BSD-3-Clause
//
// Begins, asks and ends watches of ../csrc/watch.cpp on several threads at once, for
// ThreadSanitizer: what may be called without Python's lock. tests/test_cpu_tsan.py compiles this.

#include <torch/csrc/stable/library.h>

// The functions are called as such; there is no torch to register them with.
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) \
  [[maybe_unused]] static void never_called_##key(torch::stable::detail::StableLibrary& m)

#include "watch.cpp"

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdio>
#include <thread>

int main() {
  const int64_t size = 5;
  std::vector<torch::stable::Tensor> tensors;
  for (int i = 0; i < 3; ++i) tensors.push_back(torch::stable::empty({&size, 1}));
  const int64_t shared = dgg::watch(tensors);
  std::atomic<int> wrong{0};
  const auto work = [&] {
    for (int i = 0; i < 200; ++i) {
      const int64_t own = dgg::watch(tensors);
      if (!dgg::watch_unmoved(own) || !dgg::watch_unmoved(shared)) ++wrong;
      dgg::unwatch(own);
      if (dgg::watch_unmoved(own)) ++wrong;
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) threads.emplace_back(work);
  for (std::thread& thread : threads) thread.join();
  dgg::unwatch(shared);
  std::printf("watches: 801, wrong: %d\n", wrong.load());
  return wrong != 0;
}
