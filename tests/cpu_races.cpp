// SPDX-License-Identifier: BSD-3-Clause
//
// Runs the CPU passes of ../csrc/cpu.cpp on threads, for ThreadSanitizer. Torch's own threads come
// from OpenMP, whose barriers are futex calls that ThreadSanitizer does not see: it would report
// the end of every pass. Here parallel_for starts a thread per share and joins them, which is the
// order that torch promises and nothing beyond it. tests/test_cpu_tsan.py compiles this.

#include <torch/csrc/stable/library.h>

// The passes are called as functions; there is no torch to register them with.
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) \
  [[maybe_unused]] static void never_called_##key(torch::stable::detail::StableLibrary& m)

#include "cpu.cpp"

#include <cstdio>
#include <random>
#include <thread>

constexpr int kThreads = 4;

AOTITorchError torch_get_num_threads(uint32_t* count) {
  *count = kThreads;
  return 0;
}

AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t, ParallelFunc f,
                                  void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = begin; i < end; ++i) threads.emplace_back(f, i, i + 1, context);
  for (std::thread& thread : threads) thread.join();
  return 0;
}

namespace {

using namespace dgg;

constexpr int kStates = 3;

// Rows of all dtypes, with everything a row can have.
struct Problem {
  std::mt19937 random;
  std::vector<std::vector<double>> memory;  // of the widest type, so that every type fits
  std::vector<int64_t> table, grads, replays;
  std::vector<float> steps;
  std::vector<double> distances, squares, coefficients;
  std::vector<uint8_t> flags;

  Problem(unsigned seed, bool replay) : random(seed) {
    // More chunks than threads, uneven shares, and rows of a part of a chunk.
    const std::vector<int64_t> sizes{5 * kChunk + 17, 3,   0,         kChunk,
                                     2 * kChunk + 1,  700, 9 * kChunk};
    const auto n = static_cast<int64_t>(sizes.size());
    steps.assign(n, 3.0f);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t size = sizes[i];
      int64_t codes = 0;
      const auto fresh = [&](int slot) {
        const int dtype = static_cast<int>((i + (i % 2 ? slot : 0)) % kDtypes);
        codes |= static_cast<int64_t>(dtype) << (kSlotBits * slot);
        return tensor(size, dtype);
      };
      const int64_t param = fresh(kSlotParam), grad = fresh(kSlotGrad), again = fresh(kSlotReplay);
      int64_t states[kStates];
      for (int s = 0; s < kStates; ++s) states[s] = fresh(kSlotExpAvg + s);
      const int64_t anchor = fresh(kSlotAnchor), copy = i % 3 ? 0 : fresh(kSlotCopy);
      const int64_t step = reinterpret_cast<int64_t>(&steps[i]);
      const int64_t stretch = i % 2 ? 1000 : size;
      for (const int64_t cell :
           {param, states[0], states[1], states[2], anchor, step, size, int64_t(0), codes, i,
            int64_t(0), stretch, stretch + 3, copy, int64_t(0)}) {
        table.push_back(cell);
      }
      grads.push_back(grad);
      if (replay) replays.push_back(again);
      flags.push_back(i % 2 ? kInjectElements : kInject);
    }
    distances.assign(n, -1.0);
    squares.assign(3 * n, 0.0);
    coefficients.assign(kScales + n, 0.5);
  }

  int64_t tensor(int64_t size, int dtype) {
    memory.emplace_back(size + 1);
    void* const data = memory.back().data();
    for (int64_t i = 0; i < size; ++i) {
      const float x = static_cast<float>(random() % 1000) / 1000.0f;
      if (dtype == kFloat64) static_cast<double*>(data)[i] = x;
      if (dtype == kFloat32) static_cast<float*>(data)[i] = x;
      if (dtype == kBFloat16) static_cast<bfloat16*>(data)[i] = narrow<bfloat16>(x);
      if (dtype == kFloat16) static_cast<float16*>(data)[i] = narrow<float16>(x);
    }
    return reinterpret_cast<int64_t>(data);
  }

  Rows rows() const {
    return {table.data(),
            grads.data(),
            replays.empty() ? nullptr : replays.data(),
            static_cast<int64_t>(grads.size()),
            0.6,
            2.0};
  }

  Control control(const double* hyper) const {
    return {coefficients.data(), flags.data(), hyper, 1, {12345, 7}};
  }

  void step(bool stochastic) {
    const double adam[kAdamHypers] = {0.01, 0.9, 0.99, 1e-8, 0.1, 1, 1, 0, 0.7, 2147483648.0};
    const double sgd[kSgdHypers] = {0.01, 0.9, 0.1, 0.1, 1, 0, 0.7, 2147483648.0};
    const double guide[kGuideHypers] = {0, 0.7, 2147483648.0};
    compute_norms(rows(), distances.data(), 7, squares.data());
    compute_adam(rows(), control(adam), distances.data(), true, stochastic);
    compute_norms(rows(), distances.data(), 7, squares.data());
    compute_sgd(rows(), control(sgd), distances.data(), true, stochastic);
    compute_guide(rows(), control(guide));
  }
};

}  // namespace

int main() {
  // Two threads with an optimizer each, as two models in one process have them.
  const auto work = [](unsigned seed) {
    for (int i = 0; i < 2; ++i) {
      Problem problem(seed + static_cast<unsigned>(i), i != 0);
      problem.step(false);
      problem.step(true);
    }
  };
  std::thread other(work, 1);
  work(2);
  other.join();
  std::puts("passes: 40");
}
