// SPDX-License-Identifier: BSD-3-Clause
//
// The CUDA operators: arguments are checked and handed to the launches of cuda_chunk.cuh, on the
// current stream of the tensors' device. Nothing here waits for the device or allocates memory on
// it.
//
// Built against the stable ABI of torch, with or without CUDA in that torch; where it has none,
// this library cannot be loaded for want of libtorch_cuda.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <optional>

#include "arguments.h"
#include "cuda_chunk.cuh"

#ifdef DGG_ON_HOST  // tests run the kernels, and these operators, on the CPU
#define DGG_DISPATCH_KEY CPU
#else
#define DGG_DISPATCH_KEY CUDA
#endif

namespace dgg {
namespace {

using OptionalTensor = std::optional<Tensor>;

#ifdef DGG_ON_HOST
struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};
void use_device(int32_t) {}

bool is_here(const Tensor& tensor) {
  return tensor.is_cpu();
}
cudaStream_t current_stream(int32_t) {
  return nullptr;
}
#else
using torch::stable::accelerator::DeviceGuard;

// The runtime in this library is not torch's and has a current device of its own.
void use_device(int32_t device) {
  cudaSetDevice(device);
}

bool is_here(const Tensor& tensor) {
  return tensor.is_cuda();
}

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  // Not the macro made for this: torch 2.11 and 2.13 call it by different names.
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS,
                  "dgg: torch has no current stream for CUDA device ", device);
  return static_cast<cudaStream_t>(stream);
}
#endif

// Checks arguments against the device of the first, which becomes the current one.
class Arguments {
 public:
  Arguments(const char* op, const Tensor& first)
      : op_(op), device_(first.get_device_index()), guard_(device_) {
    use_device(device_);
  }

  template <typename T>
  T* data(const char* name, const Tensor& tensor, int64_t numel) const {
    STD_TORCH_CHECK(is_here(tensor) && tensor.get_device_index() == device_, "dgg::", op_, ": ",
                    name, " must be on the device of the other arguments, number ", device_);
    STD_TORCH_CHECK(
        tensor.scalar_type() == dtype_of<T>() && tensor.is_contiguous() && tensor.numel() == numel,
        "dgg::", op_, ": ", name, " must be contiguous, of dtype ", name_of(dtype_of<T>()),
        " and have ", numel, " elements; it has ", tensor.numel());
    return static_cast<T*>(tensor.data_ptr());
  }

  template <typename T>
  T* data(const char* name, const OptionalTensor& tensor, int64_t numel) const {
    return tensor ? data<T>(name, *tensor, numel) : nullptr;
  }

  cudaStream_t stream() const { return current_stream(device_); }

  void finish(cudaError_t error) const {
    STD_TORCH_CHECK(error == cudaSuccess, "dgg::", op_, " on device ", device_, ": ",
                    cudaGetErrorString(error),
                    error == cudaErrorNoKernelImageForDevice
                        ? "; build dgg again with this device in TORCH_CUDA_ARCH_LIST"
                    : error == cudaErrorInsufficientDriver
                        ? "; install a newer driver, or build dgg with an older CUDA toolkit"
                        : "");
  }

 private:
  const char* op_;
  int32_t device_;
  DeviceGuard guard_;
};

struct Table {
  const Tensor &table, &rows, &chunks, &grads, &replays;
  const Tensor *starts, *partials, *counters;  // null: not needed
};

Launch make_launch(const char* op, const Arguments& arguments, const Table& t, int64_t dtypes,
                   double replay_weight) {
  const int64_t n = checked_rows(op, t.table), count = t.rows.numel(),
                chunks = t.chunks.numel() / 2;
  STD_TORCH_CHECK((static_cast<uint64_t>(dtypes) & kNoDtypes) == 0, "dgg::", op,
                  ": dtypes has an unknown dtype code");
  STD_TORCH_CHECK(chunks >= count && chunks <= INT32_MAX, "dgg::", op, ": ", chunks, " chunks for ",
                  count, " rows; a launch has at least one for each, up to ", INT32_MAX);
  return {
      arguments.data<const int64_t>("table", t.table, n * kColumns),
      arguments.data<const int32_t>("rows", t.rows, count),
      arguments.data<const int32_t>("chunks", t.chunks, 2 * chunks),
      t.starts ? arguments.data<const int32_t>("starts", *t.starts, count + 1) : nullptr,
      t.partials ? arguments.data<double>("partials", *t.partials, kPartials * chunks) : nullptr,
      t.counters ? arguments.data<int32_t>("counters", *t.counters, count + 1) : nullptr,
      arguments.data<const int64_t>("grads", t.grads, n),
      t.replays.numel() ? arguments.data<const int64_t>("replays", t.replays, n) : nullptr,
      chunks,
      count,
      static_cast<uint64_t>(dtypes),
      replay_weight};
}

CoefficientArguments coefficient_arguments(const double* sums, double* out, int64_t n,
                                           std::optional<double> max_grad_norm, bool scaling,
                                           bool per_tensor, bool maximize) {
  return {sums,    out,        n,       max_grad_norm.value_or(0), max_grad_norm.has_value(),
          scaling, per_tensor, maximize};
}

void norms_launch(const Tensor& table, const Tensor& rows, const Tensor& chunks,
                  const Tensor& starts, const Tensor& partials, const Tensor& counters,
                  const Tensor& grads, const Tensor& replays, const Tensor& distances,
                  const Tensor& squares, const OptionalTensor& gate,
                  const OptionalTensor& grad_scale, const OptionalTensor& out, int64_t dtypes,
                  double replay_weight, int64_t which, std::optional<double> max_grad_norm,
                  bool scaling, bool per_tensor, double importance) {
  const char* const op = "norms_launch";
  const Arguments a(op, table);
  const Launch launch =
      make_launch(op, a, {table, rows, chunks, grads, replays, &starts, &partials, &counters},
                  dtypes, replay_weight);
  const int64_t n = table.size(0);
  STD_TORCH_CHECK(launch.row_count > 0 || !out, "dgg::", op,
                  ": the last row's block makes `out`, and there is no row");
  double* const data = a.data<double>("squares", squares, 3 * n);
  double* const made = a.data<double>("out", out, kScales + n);
  const NormArguments arguments{
      launch,
      a.data<double>("distances", distances, n),
      data,
      a.data<const uint8_t>("gate", gate, 1),
      a.data<const float>("grad_scale", grad_scale, 1),
      n,
      static_cast<int>(which),
      checked_importance(op, importance),
      coefficient_arguments(data, made, n, max_grad_norm, scaling, per_tensor, false)};
  if (launch.row_count > 0) a.finish(launch_norms(arguments, a.stream()));
}

void coefficients_launch(const Tensor& squares, const Tensor& out,
                         std::optional<double> max_grad_norm, bool scaling, bool per_tensor) {
  const char* const op = "coefficients_launch";
  const Arguments a(op, squares);
  const int64_t n = checked_sums(op, "squares", squares, 3);
  a.finish(
      launch_coefficients(coefficient_arguments(a.data<const double>("squares", squares, 3 * n),
                                                a.data<double>("out", out, kScales + n), n,
                                                max_grad_norm, scaling, per_tensor, false),
                          a.stream()));
}

void products_launch(const Tensor& table, const Tensor& rows, const Tensor& chunks,
                     const Tensor& starts, const Tensor& partials, const Tensor& counters,
                     const Tensor& grads, const Tensor& replays, const Tensor& flags,
                     const Tensor& products, const OptionalTensor& grad_scale,
                     const OptionalTensor& out, int64_t dtypes, double replay_weight,
                     double importance, std::optional<double> max_grad_norm, bool per_tensor,
                     bool maximize) {
  const char* const op = "products_launch";
  const Arguments a(op, table);
  const Launch launch =
      make_launch(op, a, {table, rows, chunks, grads, replays, &starts, &partials, &counters},
                  dtypes, replay_weight);
  const int64_t n = table.size(0);
  STD_TORCH_CHECK(launch.row_count > 0 || !out, "dgg::", op,
                  ": the last row's block makes `out`, and there is no row");
  double* const data = a.data<double>("products", products, kProducts * n);
  double* const made = a.data<double>("out", out, kScales + n + kGuardExtras);
  const ProductArguments arguments{
      launch,
      a.data<const uint8_t>("flags", flags, n),
      data,
      a.data<const float>("grad_scale", grad_scale, 1),
      checked_importance(op, importance),
      coefficient_arguments(data, made, n, max_grad_norm, true, per_tensor, maximize)};
  if (launch.row_count > 0) a.finish(launch_products(arguments, a.stream()));
}

void guard_coefficients_launch(const Tensor& products, const Tensor& out,
                               std::optional<double> max_grad_norm, bool per_tensor,
                               bool maximize) {
  const char* const op = "guard_coefficients_launch";
  const Arguments a(op, products);
  const int64_t n = checked_sums(op, "products", products, kProducts);
  a.finish(
      launch_guard(coefficient_arguments(a.data<const double>("products", products, kProducts * n),
                                         a.data<double>("out", out, kScales + n + kGuardExtras), n,
                                         max_grad_norm, true, per_tensor, maximize),
                   a.stream()));
}

// The rules as the operators know them.
struct Rule {
  const char* op;
  cudaError_t (*run)(const UpdateArguments&, cudaStream_t);
  int hypers;
};

constexpr Rule kAdam{"adam_launch_", launch_adam, kAdamHypers};
constexpr Rule kSgd{"sgd_launch_", launch_sgd, kSgdHypers};
constexpr Rule kGuide{"guide_launch_", launch_guide, kGuideHypers};

void launch_rule(const Rule& rule, const Arguments& a, const Launch& launch, int64_t n,
                 const Tensor& coefficients, const Tensor& flags, const Tensor& hyper,
                 const Tensor* distances, const OptionalTensor& grad_scale,
                 const OptionalTensor& found_inf, const OptionalTensor& draw_index, int64_t seed,
                 int64_t draw, int64_t variant, double importance) {
  check_hyper(rule.op, hyper, rule.hypers);
  const UpdateArguments arguments{launch,
                                  a.data<const double>("coefficients", coefficients, kScales + n),
                                  a.data<const uint8_t>("flags", flags, n),
                                  a.data<const double>("hyper", hyper, hyper.numel()),
                                  distances ? a.data<double>("distances", *distances, n) : nullptr,
                                  a.data<const float>("grad_scale", grad_scale, 1),
                                  a.data<const float>("found_inf", found_inf, 1),
                                  a.data<const int64_t>("draw_index", draw_index, 1),
                                  static_cast<uint64_t>(seed),
                                  static_cast<uint32_t>(draw),
                                  static_cast<int>(variant),
                                  checked_importance(rule.op, importance)};
  if (launch.row_count > 0) a.finish(rule.run(arguments, a.stream()));
}

template <const Rule& kRule>
void update_launch(const Tensor& table, const Tensor& rows, const Tensor& chunks,
                   const Tensor& starts, const Tensor& partials, const Tensor& counters,
                   const Tensor& grads, const Tensor& replays, const Tensor& coefficients,
                   const Tensor& flags, const Tensor& hyper, const Tensor& distances,
                   const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
                   const OptionalTensor& draw_index, int64_t dtypes, double replay_weight,
                   int64_t seed, int64_t draw, int64_t variant, double importance) {
  const Arguments a(kRule.op, table);
  const Launch launch =
      make_launch(kRule.op, a, {table, rows, chunks, grads, replays, &starts, &partials, &counters},
                  dtypes, replay_weight);
  launch_rule(kRule, a, launch, table.size(0), coefficients, flags, hyper, &distances, grad_scale,
              found_inf, draw_index, seed, draw, variant, importance);
}

void guide_launch(const Tensor& table, const Tensor& rows, const Tensor& chunks,
                  const Tensor& grads, const Tensor& replays, const Tensor& coefficients,
                  const Tensor& flags, const Tensor& hyper, const OptionalTensor& grad_scale,
                  const OptionalTensor& found_inf, const OptionalTensor& draw_index, int64_t dtypes,
                  double replay_weight, int64_t seed, int64_t draw, int64_t variant,
                  double importance) {
  const Arguments a(kGuide.op, table);
  const Launch launch =
      make_launch(kGuide.op, a, {table, rows, chunks, grads, replays, nullptr, nullptr, nullptr},
                  dtypes, replay_weight);
  // The other bits are for updates.
  const int64_t known = variant & (kAnchorBit | kElementsBit | kImportanceBit);
  launch_rule(kGuide, a, launch, table.size(0), coefficients, flags, hyper, nullptr, grad_scale,
              found_inf, draw_index, seed, draw, known, importance);
}

void draw_flags_launch(const Tensor& table, const Tensor& hyper, const Tensor& draw_index,
                       const Tensor& flags, const Tensor& gate, int64_t seed, int64_t granularity,
                       int64_t threshold_column, int64_t strength_column) {
  const char* const op = "draw_flags_launch";
  const Arguments a(op, table);
  const int64_t n = checked_rows(op, table);
  STD_TORCH_CHECK(hyper.dim() == 2 && threshold_column >= 0 && threshold_column < hyper.size(1) &&
                      strength_column >= 0 && strength_column < hyper.size(1),
                  "dgg::", op, ": hyper must have shape [groups, columns], with columns ",
                  threshold_column, " and ", strength_column);
  STD_TORCH_CHECK(granularity >= kByStep && granularity <= kByElement, "dgg::", op,
                  ": granularity must be 0 (step), 1 (tensor) or 2 (element), not ", granularity);
  a.finish(
      launch_draw_flags({a.data<const int64_t>("table", table, n * kColumns),
                         a.data<const double>("hyper", hyper, hyper.numel()),
                         a.data<const int64_t>("draw_index", draw_index, 1),
                         a.data<uint8_t>("flags", flags, n), a.data<uint8_t>("gate", gate, 1), n,
                         hyper.size(1), static_cast<uint64_t>(seed), static_cast<int>(granularity),
                         static_cast<int>(threshold_column), static_cast<int>(strength_column)},
                        a.stream()));
}

}  // namespace
}  // namespace dgg

STABLE_TORCH_LIBRARY_IMPL(dgg, DGG_DISPATCH_KEY, m) {
  m.impl("norms_launch", TORCH_BOX(&dgg::norms_launch));
  m.impl("coefficients_launch", TORCH_BOX(&dgg::coefficients_launch));
  m.impl("products_launch", TORCH_BOX(&dgg::products_launch));
  m.impl("guard_coefficients_launch", TORCH_BOX(&dgg::guard_coefficients_launch));
  m.impl("adam_launch_", TORCH_BOX(&dgg::update_launch<dgg::kAdam>));
  m.impl("sgd_launch_", TORCH_BOX(&dgg::update_launch<dgg::kSgd>));
  m.impl("guide_launch_", TORCH_BOX(&dgg::guide_launch));
  m.impl("draw_flags_launch", TORCH_BOX(&dgg::draw_flags_launch));
}
