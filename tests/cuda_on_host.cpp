// SPDX-License-Identifier: BSD-3-Clause
//
// Entries to the kernels that cuda_on_host.h runs, for ctypes: addresses and integers in one array,
// floating-point numbers in another.

#include "../csrc/cuda_chunk.cuh"

namespace cuda_on_host {

Place thread_place, block_place, grid_size;
unsigned block_order = 0;
int64_t vector_accesses = 0;
std::vector<Fiber> fibers;
jmp_buf scheduler;
std::function<void()> job;
Fiber* running = nullptr;
std::vector<int> arrived_in_warp;
int arrived = 0;

}  // namespace cuda_on_host

namespace {

// Reads the array of integers one after another.
struct Reader {
  const int64_t* next;

  operator int64_t() { return *next++; }
  operator int() { return static_cast<int>(*next++); }
  operator bool() { return *next++ != 0; }
  operator uint32_t() { return static_cast<uint32_t>(*next++); }
  operator uint64_t() { return static_cast<uint64_t>(*next++); }
  template <typename T>
  operator T*() {
    return reinterpret_cast<T*>(*next++);
  }
};

dgg::Launch read_launch(Reader& in, double replay_weight) {
  return {in, in, in, in, in, in, in, in, in, in, in, replay_weight};
}

}  // namespace

#define DGG_ENTRY extern "C" __attribute__((visibility("default")))

DGG_ENTRY void set_block_order(unsigned order) {
  cuda_on_host::block_order = order;
}

DGG_ENTRY int64_t count_vector_accesses() {
  const int64_t count = cuda_on_host::vector_accesses;
  cuda_on_host::vector_accesses = 0;
  return count;
}

DGG_ENTRY int norms(const int64_t* integers, const double* numbers) {
  Reader in{integers};
  const dgg::Launch launch = read_launch(in, numbers[0]);
  return dgg::launch_norms(
      {launch, in, in, in, in, in, in, numbers[2], {in, in, in, numbers[1], in, in, in, false}},
      nullptr);
}

DGG_ENTRY int products(const int64_t* integers, const double* numbers) {
  Reader in{integers};
  const dgg::Launch launch = read_launch(in, numbers[0]);
  return dgg::launch_products(
      {launch, in, in, in, numbers[2], {in, in, in, numbers[1], in, true, in, in}}, nullptr);
}

DGG_ENTRY int guard(const int64_t* integers, const double* numbers) {
  Reader in{integers};
  return dgg::launch_guard({in, in, in, numbers[0], in, true, in, in}, nullptr);
}

DGG_ENTRY int update(const int64_t* integers, const double* numbers) {
  Reader in{integers};
  const dgg::Launch launch = read_launch(in, numbers[0]);
  const dgg::UpdateArguments arguments{launch, in, in, in, in, in, in, in, in, in, in, numbers[1]};
  const int rule = in;
  return rule == 0   ? dgg::launch_adam(arguments, nullptr)
         : rule == 1 ? dgg::launch_sgd(arguments, nullptr)
                     : dgg::launch_guide(arguments, nullptr);
}

DGG_ENTRY int coefficients(const int64_t* integers, const double* numbers) {
  Reader in{integers};
  return dgg::launch_coefficients({in, in, in, numbers[0], in, in, in, false}, nullptr);
}

DGG_ENTRY int draw_flags(const int64_t* integers, const double*) {
  Reader in{integers};
  return dgg::launch_draw_flags({in, in, in, in, in, in, in, in, in, in, in}, nullptr);
}
