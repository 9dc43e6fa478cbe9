// SPDX-License-Identifier: BSD-3-Clause
//
// Runs the CUDA kernels with all their threads at once, for ThreadSanitizer: see cuda_on_threads.h.
// An argument names what is left out of the order that CUDA makes. tests/test_cuda_tsan.py compiles
// this, with small blocks and chunks, so that rows of many chunks take few threads.

#include "cuda_chunk.cuh"

#include <cstdio>

namespace {

using namespace dgg;

constexpr int kStates = 3;

// Dtypes of parameter, gradient, replay, three moments, anchor, copy and importance; -1: none.
using Kind = std::vector<int>;

struct Problem {
  std::mt19937 random{1};
  std::vector<std::vector<double>> memory;
  std::vector<int64_t> table, grads, replays;
  std::vector<int32_t> rows, chunks, starts{0}, counters;
  std::vector<float> steps;
  std::vector<double> partials, distances, squares, products, coefficients;
  std::vector<uint8_t> flags;
  uint64_t dtypes = 0;

  explicit Problem(const Kind& kind) {
    // Of several chunks with a rest, of none, of less than one, and of exactly some.
    const std::vector<int64_t> sizes{5 * kLaunchChunk + 17, 0,   3, kLaunchChunk,
                                     2 * kLaunchChunk,      700, 1, kLaunchChunk + 1};
    const int n = static_cast<int>(sizes.size());
    steps.assign(n, 3.0f);
    for (int slot = 0; slot < kSlots; ++slot) {
      dtypes |= static_cast<uint64_t>(std::max(kind[slot], 0)) << (kSlotBits * slot);
    }
    for (int i = 0; i < n; ++i) {
      const int64_t size = sizes[i];
      // Every third row is not aligned and goes element by element.
      const auto fresh = [&](int slot) { return tensor(size, kind[slot], i % 3 == 2); };
      const int64_t param = fresh(kSlotParam);
      int64_t states[kStates];
      for (int s = 0; s < kStates; ++s) states[s] = fresh(kSlotExpAvg + s);
      const int64_t anchor = fresh(kSlotAnchor);
      const int64_t copy = kind[kSlotCopy] < 0 ? 0 : fresh(kSlotCopy);
      const int64_t importance = kind[kSlotImportance] < 0 ? 0 : fresh(kSlotImportance);
      const int64_t step = reinterpret_cast<int64_t>(&steps[i]);
      for (const int64_t cell :
           {param, states[0], states[1], states[2], anchor, step, size, int64_t(0),
            static_cast<int64_t>(dtypes), int64_t(i), int64_t(0), size, size, copy, importance}) {
        table.push_back(cell);
      }
      grads.push_back(i == 6 ? 0 : fresh(kSlotGrad));
      replays.push_back(i % 3 ? fresh(kSlotReplay) : 0);
      rows.push_back(i);
      const int count =
          std::max<int>(1, static_cast<int>((size + kLaunchChunk - 1) / kLaunchChunk));
      for (int k = 0; k < count; ++k) {
        chunks.push_back(i);
        chunks.push_back(k);
      }
      starts.push_back(starts.back() + count);
    }
    partials.resize(kPartials * static_cast<size_t>(starts.back()));
    counters.assign(n + 1, 0);
    distances.assign(n, -1.0);
    squares.assign(3 * n, 0.0);
    products.assign(kProducts * n, 0.0);
    coefficients.assign(kScales + n, 0.5);
    flags.assign(n, 0);
  }

  int64_t tensor(int64_t size, int dtype, bool off) {
    memory.emplace_back(size + 2);
    const int bytes = size_of(dtype);
    char* const data = reinterpret_cast<char*>(memory.back().data()) + (off ? bytes : 0);
    for (int64_t i = 0; i < size; ++i) {
      const float x = static_cast<float>(random() % 1000) / 1000.0f;
      if (dtype == kFloat64) reinterpret_cast<double*>(data)[i] = x;
      if (dtype == kFloat32) reinterpret_cast<float*>(data)[i] = x;
      if (dtype == kBFloat16) reinterpret_cast<bfloat16*>(data)[i] = narrow<bfloat16>(x);
      if (dtype == kFloat16) reinterpret_cast<float16*>(data)[i] = narrow<float16>(x);
    }
    return reinterpret_cast<int64_t>(data);
  }
};

int launches = 0;

void launched(cudaError_t error) {
  ++launches;
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "launch %d was refused\n", launches);
  std::exit(2);
}

void run(const Kind& kind, bool replay, int flag) {
  Problem p(kind);
  const int64_t n = static_cast<int64_t>(p.rows.size()), total = p.starts.back();
  const Launch launch{p.table.data(),
                      p.rows.data(),
                      p.chunks.data(),
                      p.starts.data(),
                      p.partials.data(),
                      p.counters.data(),
                      p.grads.data(),
                      replay ? p.replays.data() : nullptr,
                      total,
                      n,
                      p.dtypes,
                      0.6};
  const double adam[kAdamHypers] = {0.01, 0.9, 0.99, 1e-8, 0.1, 1, 1, 0, 0.7, 2147483648.0};
  const double sgd[kSgdHypers] = {0.01, 0.9, 0.1, 0.1, 1, 0, 0.7, 2147483648.0};
  const double guide[kGuideHypers] = {0, 0.7, 2147483648.0};
  uint8_t gate = 1;
  const int64_t draw = 5;
  const float scale = 2.0f, found = 0.0f;
  // Updates that measure hand sums over, others only wait for all to have read the step.
  const int measures = flag == kInject ? kLookAheadBit : 0;
  int variant = kStateBit | measures;
  if (flag) variant |= kAnchorBit;
  if (flag == kInjectElements) variant |= kElementsBit;
  if (kind[kSlotCopy] >= 0) variant |= kCopyBit;
  // Where pulls are weighted there are no draws by element and no stochastic rounding in the
  // kernels of their own.
  const double importance = kind[kSlotImportance] < 0 ? 0 : 0.7;
  if (flag && importance != 0) variant |= kImportanceBit | (replay ? kDecoupledBit : 0);
  if (kind[kSlotParam] == kBFloat16 && importance == 0) variant |= kStochasticBit;
  const auto update = [&](const double* hyper, int variant) {
    return UpdateArguments{launch,
                           p.coefficients.data(),
                           p.flags.data(),
                           hyper,
                           p.distances.data(),
                           &scale,
                           &found,
                           &draw,
                           1,
                           5,
                           variant,
                           importance};
  };
  for (int twice = 0; twice < 2; ++twice) {
    CoefficientArguments made{
        p.squares.data(), p.coefficients.data(), n, 1.0, true, true, twice != 0, false};
    // Once by the norm pass itself, and once by a launch of its own: the same, in the same memory.
    launched(launch_norms(
        {launch, p.distances.data(), p.squares.data(), &gate, &scale, n, 7, importance, made},
        nullptr));
    const std::vector<double> by_the_pass = p.coefficients;
    p.coefficients.assign(p.coefficients.size(), 0.5);
    launched(launch_coefficients(made, nullptr));
    if (by_the_pass != p.coefficients) {
      std::fprintf(stderr, "coefficients of the norm pass are not those of the squares\n");
      std::exit(4);
    }
    // So are the products, of rows of which some are guided.
    for (int64_t i = 0; i < n; ++i) p.flags[i] = i % 4 ? kInject : 0;
    std::vector<double> guarded(kScales + n + kGuardExtras);
    const CoefficientArguments guard{p.products.data(), guarded.data(), n, 1.0, true, true,
                                     twice != 0,        false};
    launched(launch_products({launch, p.flags.data(), p.products.data(), &scale, importance, guard},
                             nullptr));
    const std::vector<double> guarded_by_the_pass = guarded;
    guarded.assign(guarded.size(), 0.5);
    launched(launch_guard(guard, nullptr));
    if (guarded_by_the_pass != guarded) {
      std::fprintf(stderr, "coefficients of the products pass are not those of the products\n");
      std::exit(5);
    }
    launched(launch_draw_flags({p.table.data(), adam, &draw, p.flags.data(), &gate, n, kAdamHypers,
                                1, 1 + twice, kAdamThreshold, kAdamStrength},
                               nullptr));
    std::fill(p.flags.begin(), p.flags.end(), static_cast<uint8_t>(flag));
    launched(launch_adam(update(adam, variant), nullptr));
    launched(launch_sgd(update(sgd, variant), nullptr));
    if (!replay) {  // a row without a gradient has nothing to guide
      launched(launch_guide(update(guide, variant & (kAnchorBit | kElementsBit)), nullptr));
    }
  }
  for (const int32_t counter : p.counters) {
    if (counter != 0) {
      std::fprintf(stderr, "a counter was left at %d\n", counter);
      std::exit(3);
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  const std::string left_out = count > 1 ? arguments[1] : "";
  if (left_out == "release") cuda_on_host::omitted = cuda_on_host::kRelease;
  if (left_out == "acquire") cuda_on_host::omitted = cuda_on_host::kAcquire;
  if (left_out == "barrier") cuda_on_host::omitted = cuda_on_host::kBarrier;
  constexpr int f = kFloat32, b = kBFloat16, h = kFloat16, d = kFloat64;
  const std::vector<Kind> kinds{
      {f, f, f, f, f, f, f, -1, -1},  // vectors of four
      {b, b, b, b, b, b, b, -1, -1},  // of eight, stochastic rounding
      {f, f, f, f, f, f, f, -1, f},   // weighted pulls
      {b, b, b, b, b, b, b, -1, b},   //
      {f, b, b, f, f, f, f, b, -1},   // master weights
      {f, h, b, d, b, f, h, -1, -1},  // the kernels that know types only at run time
      {f, h, b, d, b, f, h, -1, d},   //
  };
  for (const Kind& kind : kinds) {
    for (const bool replay : {false, true}) {
      for (const int flag : {0, int(kInject), int(kInjectElements)}) {
        if (left_out.empty() || flag == kInject) run(kind, replay, flag);
      }
    }
  }
  std::printf("launches: %d\n", launches);
}
