// SPDX-License-Identifier: BSD-3-Clause
//
// Schemas of the native operators, shared by every device library. Those named *_table take a
// table of addresses (table.h) and are what a step calls: reading 448 tensors out of lists costs
// more than updating them. A tensor passed as an address cannot be declared as mutated, so the
// twins without the suffix take lists and declare every mutation; torch.compile sees those.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(dgg, m) {
  m.def(
      "norms_table(Tensor table, Tensor grads, Tensor replays, Tensor(a!) distances, *, "
      "float replay_weight, float grad_scale, int which, float importance=0.0) -> Tensor");
  m.def(
      "coefficients(Tensor squares, *, float? max_grad_norm, bool scaling, bool per_tensor) "
      "-> Tensor");
  m.def(
      "adam_table_(Tensor table, Tensor grads, Tensor replays, Tensor coefficients, Tensor flags, "
      "Tensor hyper, Tensor(a!) distances, *, float replay_weight, float grad_scale, "
      "bool look_ahead, int seed, int draw, bool stochastic=False, float importance=0.0, "
      "int route=0) -> ()");
  m.def(
      "sgd_table_(Tensor table, Tensor grads, Tensor replays, Tensor coefficients, Tensor flags, "
      "Tensor hyper, Tensor(a!) distances, *, float replay_weight, float grad_scale, "
      "bool look_ahead, int seed, int draw, bool stochastic=False, float importance=0.0, "
      "int route=0) -> ()");
  m.def(
      "guide_table_(Tensor table, Tensor grads, Tensor replays, Tensor coefficients, Tensor flags, "
      "Tensor hyper, *, float replay_weight, float grad_scale, int seed, int draw, "
      "float importance=0.0) -> ()");
  m.def(
      "products_table(Tensor table, Tensor grads, Tensor replays, Tensor flags, *, "
      "float replay_weight, float grad_scale, float importance=0.0) -> Tensor");
  m.def(
      "guard_coefficients(Tensor products, *, float? max_grad_norm, bool per_tensor, "
      "bool maximize) -> Tensor");

  m.def(
      "norms(Tensor[] params, Tensor[] grads, Tensor[] replays, Tensor[] anchors, "
      "Tensor(a!) distances, *, float replay_weight, float grad_scale, int which, "
      "Tensor[]? importances=None, float importance=0.0) -> Tensor");
  m.def(
      "adam_(Tensor(a!)[] params, Tensor[] grads, Tensor[] replays, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, Tensor[] anchors, "
      "Tensor(e!)[] steps, Tensor(f!) distances, Tensor coefficients, Tensor flags, "
      "int[] indices, *, float lr, float beta1, float beta2, float eps, float weight_decay, "
      "bool decoupled, bool amsgrad, bool maximize, float strength, int threshold, "
      "float replay_weight, float grad_scale, bool look_ahead, int seed, int draw, "
      "Tensor[]? importances=None, float importance=0.0, int route=0) -> ()");
  m.def(
      "sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor[] replays, "
      "Tensor(b!)[] momentum_buffers, Tensor[] anchors, Tensor(c!) distances, "
      "Tensor coefficients, Tensor flags, int[] indices, *, float lr, float momentum, "
      "float dampening, float weight_decay, bool nesterov, bool maximize, float strength, "
      "int threshold, float replay_weight, float grad_scale, bool look_ahead, int seed, int draw, "
      "Tensor[]? importances=None, float importance=0.0, int route=0) -> ()");
  m.def(
      "guide_(Tensor[] params, Tensor(a!)[] grads, Tensor[] replays, Tensor[] anchors, "
      "Tensor coefficients, Tensor flags, int[] indices, *, bool maximize, float strength, "
      "int threshold, float replay_weight, float grad_scale, int seed, int draw, "
      "Tensor[]? importances=None, float importance=0.0) -> ()");
  m.def(
      "products(Tensor[] params, Tensor[] grads, Tensor[] replays, Tensor[] anchors, "
      "Tensor flags, *, float replay_weight, float grad_scale, Tensor[]? importances=None, "
      "float importance=0.0) -> Tensor");

  // On a device a step is launched: table and everything else lie there, and nothing waits for
  // them. One launch serves the rows of one dtype combination, cut into chunks
  // (dgg/backends/chunks.py); `dtypes` are their codes, `variant` says what the kernel must be able
  // to do. Tensors passed as addresses are written, too.
  m.def(
      "norms_launch(Tensor table, Tensor rows, Tensor chunks, Tensor starts, Tensor(a!) partials, "
      "Tensor(b!) counters, Tensor grads, Tensor replays, Tensor(c!) distances, "
      "Tensor(d!) squares, Tensor? gate, Tensor? grad_scale, Tensor(e!)? out, *, int dtypes, "
      "float replay_weight, int which, float? max_grad_norm, bool scaling, bool per_tensor, "
      "float importance=0.0) -> ()");
  m.def(
      "coefficients_launch(Tensor squares, Tensor(a!) out, *, float? max_grad_norm, bool scaling, "
      "bool per_tensor) -> ()");
  m.def(
      "products_launch(Tensor table, Tensor rows, Tensor chunks, Tensor starts, "
      "Tensor(a!) partials, Tensor(b!) counters, Tensor grads, Tensor replays, Tensor flags, "
      "Tensor(c!) products, Tensor? grad_scale, Tensor(d!)? out, *, int dtypes, "
      "float replay_weight, float importance, float? max_grad_norm, bool per_tensor, "
      "bool maximize) -> ()");
  m.def(
      "guard_coefficients_launch(Tensor products, Tensor(a!) out, *, float? max_grad_norm, "
      "bool per_tensor, bool maximize) -> ()");
  m.def(
      "adam_launch_(Tensor table, Tensor rows, Tensor chunks, Tensor starts, Tensor(a!) partials, "
      "Tensor(b!) counters, Tensor grads, Tensor replays, Tensor coefficients, Tensor flags, "
      "Tensor hyper, Tensor(c!) distances, Tensor? grad_scale, Tensor? found_inf, "
      "Tensor? draw_index, *, int dtypes, float replay_weight, int seed, int draw, int variant, "
      "float importance=0.0) -> ()");
  m.def(
      "sgd_launch_(Tensor table, Tensor rows, Tensor chunks, Tensor starts, Tensor(a!) partials, "
      "Tensor(b!) counters, Tensor grads, Tensor replays, Tensor coefficients, Tensor flags, "
      "Tensor hyper, Tensor(c!) distances, Tensor? grad_scale, Tensor? found_inf, "
      "Tensor? draw_index, *, int dtypes, float replay_weight, int seed, int draw, int variant, "
      "float importance=0.0) -> ()");
  m.def(
      "guide_launch_(Tensor table, Tensor rows, Tensor chunks, Tensor grads, Tensor replays, "
      "Tensor coefficients, Tensor flags, "
      "Tensor hyper, Tensor? grad_scale, Tensor? found_inf, Tensor? draw_index, *, int dtypes, "
      "float replay_weight, int seed, int draw, int variant, float importance=0.0) -> ()");
  m.def(
      "draw_flags_launch(Tensor table, Tensor hyper, Tensor draw_index, Tensor(a!) flags, "
      "Tensor(b!) gate, *, int seed, int granularity, int threshold_column, int strength_column) "
      "-> ()");

  m.def("philox_words(int seed, int draw, int stream, int n) -> Tensor");
  m.def("isa() -> str");

  // Whether tensors still lie where they lay when the watch began; the handle keeps them alive.
  m.def("watch(Tensor[] tensors) -> int");
  m.def("unmoved(int handle) -> bool");
  m.def("unwatch(int handle) -> ()");
}
