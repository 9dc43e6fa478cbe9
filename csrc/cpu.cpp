// SPDX-License-Identifier: BSD-3-Clause
//
// The CPU operators. Tensors are cut into chunks of a fixed size, threads take chunks, and a chunk
// is walked in blocks that stay in the first-level cache. What already has the arithmetic's dtype
// is used in place; everything else (16-bit storage, replay gradients, element masks) is staged
// through a block-sized buffer, so one loop per rule serves all combinations.
//
// Chunks and blocks do not depend on the number of threads, and sums are formed in their order:
// float32 (float64) in a fixed number of lanes within a block, float64 beyond. Results are the
// same bits for every thread count and instruction set.

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu_arguments.h"
#include "cpu_chunks.h"
#include "cpu_loops.h"
#include "cpu_squares.h"
#include "cpu_updates.h"

namespace dgg {
namespace {

// Norms.

// What is asked for of a row; `of_grad`: the norm of the gradient itself.
struct NormRow : Row {
  bool total, of_grad, distance;

  NormRow(const Rows& rows, int64_t i, bool total, bool of_grad, bool distance)
      : Row(rows, i), total(total), of_grad(of_grad), distance(distance) {}
};

struct Squares {
  double total = 0, grad = 0, distance = 0;
};

// Calls f(begin, n) for every block of a stretch of elements.
template <typename F>
void for_each_block(int64_t begin, int64_t end, const F& f) {
  for (; begin < end; begin += kBlock) f(begin, std::min(kBlock, end - begin));
}

// ||g||^2 of a chunk; independent of what else is computed, or a resumed run would differ.
template <typename T>
double square_of_gradient(const Row& row, const Chunk& chunk) {
  double sum = 0;
  int64_t begin = chunk.begin;
  const int64_t end = begin + chunk.count;
  if (row.grad.dtype == code_of<T>()) {
    const int64_t gap = chunk.count / (kWays * kBlock) * kBlock;
    for (const int64_t stop = begin + gap; begin < stop; begin += kBlock) {
      sum += sum_squares_of_ways(row.grad.at<T>(begin), gap);
    }
    begin = chunk.begin + kWays * gap;
  }
  T buffer[kBlock];
  for_each_block(begin, end, [&](int64_t at, int64_t n) {
    sum += sum_squares<T>(row.grad.stage<T>(at, n, buffer), n);
  });
  return sum;
}

// F of a block and its weight; no address where the row has none.
template <typename S>
Weighting<S> weighting(const Row& row, int64_t begin, int64_t n, S* buffer) {
  const S* const importance =
      row.importance ? row.importance.template stage<S>(begin, n, buffer) : nullptr;
  return {importance, 1 - row.weight, row.weight};
}

template <typename T>
Squares norm_chunk(const NormRow& row, const Chunk& chunk) {
  const int64_t end = chunk.begin + chunk.count;
  Squares sums;
  if (row.grad && (row.of_grad || (row.total && !row.replay))) {
    sums.grad = square_of_gradient<T>(row, chunk);
  }
  T first[kBlock], second[kBlock], third[kBlock];
  if (!row.replay) {
    sums.total = sums.grad;
  } else if (row.total) {
    for_each_block(chunk.begin, end, [&](int64_t begin, int64_t n) {
      sums.total += sum_squares<T>(stage_gradient<T>(row, begin, n, first, second), n);
    });
  }
  if (row.distance) {
    for_each_block(chunk.begin, end, [&](int64_t begin, int64_t n) {
      const T* const param = stage_param(row, begin, n, first);
      const T* const anchor = row.anchor.stage<T>(begin, n, second);
      sums.distance += sum_squared_pulls<T>(param, anchor, n, weighting(row, begin, n, third));
    });
  }
  return sums;
}

}  // namespace

void compute_norms(const Rows& rows, double* distances, int64_t which, double* squares) {
  const int64_t n = rows.n;
  std::fill_n(squares, 3 * n, 0.0);
  std::vector<NormRow>& work = scratch<NormRow>(n);
  Plan plan(rows.n);
  for (int64_t i = 0; i < n; ++i) {
    if (!rows.active(i)) continue;
    const bool anchored = rows.anchored(i);
    const bool total = (which & kTotalNorm) != 0;
    const bool grad = (which & kGradNorm) && anchored;
    // Not `>= 0`: a distance of NaN is known, too.
    const bool distance = (which & kDistance) && anchored && distances[i] < 0;
    if (distance) distances[i] = 0;
    if (!(total || grad || distance)) continue;
    plan.add(work.size(), rows.row(i)[kColumnNumel]);
    work.emplace_back(rows, i, total, grad, distance);
  }
  std::vector<Squares> partials(plan.size());
  plan.for_each(false, [&](int64_t k, const Chunk& chunk) {
    const NormRow& row = work[chunk.row];
    partials[k] = row.param.dtype == kFloat64 ? norm_chunk<double>(row, chunk)
                                              : norm_chunk<float>(row, chunk);
  });
  for (size_t k = 0; k < plan.size(); ++k) {
    const NormRow& row = work[plan[k].row];
    if (row.total) squares[row.number] += partials[k].total;
    if (row.of_grad) squares[n + row.number] += partials[k].grad;
    if (row.distance) distances[row.number] += partials[k].distance;
  }
  const double scale = rows.grad_scale * rows.grad_scale;
  for (int64_t i = 0; i < n; ++i) {
    if (rows.grad_scale != 1) {
      squares[i] /= scale;
      squares[n + i] /= scale;
    }
    if ((which & kDistance) && rows.active(i) && rows.anchored(i))
      squares[2 * n + i] = distances[i];
  }
}

namespace {

// Updates.

template <typename Scalars>
struct UpdateRow : Row {
  Stream state[3];
  Scalars scalars;
  bool look_ahead;
  bool stochastic;

  UpdateRow(const Rows& rows, int64_t i, bool look_ahead, bool stochastic)
      : Row(rows, i),
        look_ahead(look_ahead && rows.anchored(i)),
        stochastic(stochastic && param.dtype == kBFloat16) {}

  // What is written twice, or with other words than its own, is staged in the arithmetic's type.
  void choose_staging(int count) {
    staging = staging_of(*this, state, count, guided || look_ahead);
    if (staging == kBFloat16 && (stochastic || copy)) staging = kFloat32;
  }
};

// Stores updated elements: in the parameter, and in its copy if it is a master weight.
template <typename S, typename Scalars>
void store(const UpdateRow<Scalars>& row, const Draws& draws, int64_t begin, int64_t n,
           const S* updated) {
  if constexpr (is_wide<S>()) {
    if (row.stochastic) {
      uint32_t words[kBlock];
      draw_words(row, draws, kStreamRounding, begin, n, words);
      run(RoundInto<S>{updated, words, row.param.template at<bfloat16>(begin), n});
      return;
    }
    if (row.copy && row.copy.dtype == code_of<S>()) {
      std::copy_n(updated, n, row.copy.template at<S>(begin));
    } else if (row.copy) {
      row.copy.template unstage<S>(begin, n, updated);
    }
  }
  row.param.template unstage<S>(begin, n, updated);
}

// What a rule's loop reads of a block beside the parameter and the state. Without replay gradient
// the gradient is h already.
template <typename T, typename S>
struct Inputs {
  const S* grad;
  const S* replay;
  T replay_weight;
  const S* anchor;
  const S* importance;

  // Made where the loop is, and without what it does not read: a copy would load at once what was
  // stored in parts an instant ago, and waiting for that takes as long as updating a tiny tensor.
  template <bool kReplayed>
  Gradient<T, S, kReplayed> gradient() const {
    if constexpr (kReplayed) return {grad, replay, replay_weight};
    return {grad, nullptr, T(0)};
  }

  template <int kPulled>
  Pull<T, S, kPulled> pull() const {
    if constexpr (kPulled == kNotPulled) return {nullptr, nullptr};
    return {anchor, kPulled == kByImportance ? importance : nullptr};
  }
};

struct AdamRule {
  using Row = UpdateRow<AdamScalars<double>>;
  static constexpr const char* kOp = "adam_table_";
  static constexpr int kHypers = kAdamHypers, kStates = 3;
  static constexpr auto* kCompute = compute_adam;

  template <int kPulled, bool kReplayed, bool kAmsgrad, typename T, typename S>
  DGG_HOST_DEVICE static void block(const AdamScalars<T>& scalars, S* param, const Inputs<T, S>& in,
                                    S* const* state, int64_t n, const Ahead& ahead) {
    run(AdamLoop<T, S, kPulled, kReplayed, kAmsgrad>{param, in.template gradient<kReplayed>(),
                                                     state[0], state[1],
                                                     kAmsgrad ? state[2] : nullptr,
                                                     in.template pull<kPulled>(), n, scalars},
        ahead);
  }
};

struct SgdRule {
  using Row = UpdateRow<SgdScalars<double>>;
  static constexpr const char* kOp = "sgd_table_";
  static constexpr int kHypers = kSgdHypers, kStates = 1;
  static constexpr auto* kCompute = compute_sgd;

  template <int kPulled, bool kReplayed, bool kMomentum, typename T, typename S>
  DGG_HOST_DEVICE static void block(const SgdScalars<T>& scalars, S* param, const Inputs<T, S>& in,
                                    S* const* state, int64_t n, const Ahead& ahead) {
    run(SgdLoop<T, S, kPulled, kReplayed, kMomentum>{param, in.template gradient<kReplayed>(),
                                                     state[0], in.template pull<kPulled>(), n,
                                                     scalars},
        ahead);
  }
};

// One rule's loop over a block, with or without the last state, which not every group has.
// This and what is around it is inlined by force: a loop's scalars are then put into it from
// registers, where a copy would wait for what was stored an instant ago (see Inputs).
template <typename Rule, int kPulled, bool kReplayed, typename T, typename S, typename Scalars>
DGG_HOST_DEVICE void run_states(const Scalars& scalars, S* param, const Inputs<T, S>& in,
                                S* const* state, int64_t n, const Ahead& ahead) {
  if (state[Rule::kStates - 1]) {
    Rule::template block<kPulled, kReplayed, true>(scalars, param, in, state, n, ahead);
  } else {
    Rule::template block<kPulled, kReplayed, false>(scalars, param, in, state, n, ahead);
  }
}

// The same, with or without a replay gradient that is mixed in it.
template <typename Rule, int kPulled, typename T, typename S, typename Scalars>
DGG_HOST_DEVICE void run_block(const Scalars& scalars, S* param, const Inputs<T, S>& in,
                               S* const* state, int64_t n, const Ahead& ahead) {
  if constexpr (is_wide<S>() && kPulled != kByRoute) {
    if (in.replay) return run_states<Rule, kPulled, true>(scalars, param, in, state, n, ahead);
  }
  run_states<Rule, kPulled, false>(scalars, param, in, state, n, ahead);
}

// Returns the look-ahead's share of the chunk.
template <typename Rule, typename T, typename S>
double update_chunk(const typename Rule::Row& row, const Draws& draws, const Chunk& chunk) {
  S buffers[Rule::kStates + 6][kBlock];
  S* const spare = buffers[Rule::kStates];
  const auto scalars = row.scalars.template as<T>();
  double distance = 0;
  for (int64_t offset = 0; offset < chunk.count; offset += kBlock) {
    const int64_t begin = chunk.begin + offset;
    const int64_t n = std::min<int64_t>(kBlock, chunk.count - offset);
    Ahead ahead(n);
    S* const param = row.param.template stage<S>(begin, n, spare);
    ahead.add<S>(row.param, begin);
    if constexpr (is_wide<S>()) {
      if (row.copy) row.copy.adopt(begin, n, param);
    }
    Inputs<T, S> in{};
    // Where both are stored as S the loop mixes them, which spares a walk over the block.
    if (row.replay && !row.masked && !row.routed && row.grad.dtype == code_of<S>() && row.grad &&
        row.replay.dtype == code_of<S>()) {
      in.grad = row.grad.template at<S>(begin);
      in.replay = row.replay.template at<S>(begin);
      in.replay_weight = static_cast<T>(row.replay_weight);
      ahead.add<S>(row.grad, begin);
      ahead.add<S>(row.replay, begin);
    } else {
      in.grad = stage_gradient<S>(row, begin, n, spare + kBlock, spare + 2 * kBlock);
      ahead.add<S>(row.grad, begin, row.replay || row.masked);
      ahead.add<S>(row.replay, begin, true);
    }
    S* state[Rule::kStates];
    for (int s = 0; s < Rule::kStates; ++s) {
      state[s] = row.state[s] ? row.state[s].template stage<S>(begin, n, buffers[s]) : nullptr;
      ahead.add<S>(row.state[s], begin);
    }
    const S* anchor = nullptr;
    Weighting<S> by{};
    if (row.guided || row.look_ahead) {
      anchor = row.anchor.template stage<S>(begin, n, spare + 3 * kBlock);
      by = weighting(row, begin, n, spare + 5 * kBlock);
      // Of a block that only looks ahead they are read after the loop, by one that prefetches them.
      if (row.guided) {
        ahead.add<S>(row.anchor, begin, row.masked || row.routed);
        ahead.add<S>(row.importance, begin, row.masked || row.routed);
      }
    }
    ahead.add<S>(row.copy, begin, true);
    if (row.guided && row.routed) {
      if constexpr (is_wide<S>()) {
        S* const pull = spare + 4 * kBlock;
        stage_pull(row, draws, scalars.guide, begin, n, param, anchor, by.importance, pull);
        in.anchor = pull;
        run_block<Rule, kByRoute>(scalars, param, in, state, n, ahead);
      }
    } else if (row.masked) {
      if constexpr (is_wide<S>()) {
        S* const total = spare + 4 * kBlock;
        guide_drawn(row, draws, scalars.guide, begin, n, param, in.grad, anchor, by.importance,
                    total);
        in.grad = total;
        auto guided = scalars;
        guided.guide.grad = T(1);
        run_block<Rule, kNotPulled>(guided, param, in, state, n, ahead);
      }
    } else if (row.guided) {
      in.anchor = anchor;
      in.importance = by.importance;
      if (by.importance) {
        run_block<Rule, kByImportance>(scalars, param, in, state, n, ahead);
      } else {
        run_block<Rule, kByAnchor>(scalars, param, in, state, n, ahead);
      }
    } else {
      run_block<Rule, kNotPulled>(scalars, param, in, state, n, ahead);
    }
    store<S>(row, draws, begin, n, param);
    for (int s = 0; s < Rule::kStates; ++s) {
      if (row.state[s]) row.state[s].template unstage<S>(begin, n, state[s]);
    }
    if (row.look_ahead) {
      // Read again, as stored: what the next step's norm pass would see.
      const S* const stored = row.param.template stage<S>(begin, n, spare);
      distance += sum_squared_pulls<T>(stored, anchor, n, by);
    }
  }
  return distance;
}

template <typename Rule>
void run_updates(const std::vector<typename Rule::Row>& work, const Draws& draws,
                 double* distances) {
  Plan plan(work.size());
  for (size_t i = 0; i < work.size(); ++i) {
    plan.add(i, work[i].numel);
    distances[work[i].number] = work[i].look_ahead ? 0.0 : -1.0;
  }
  std::vector<double> partials(plan.size());
  plan.for_each(true, [&](int64_t k, const Chunk& chunk) {
    const auto& row = work[chunk.row];
    partials[k] = with_types(row.staging, [&](auto t, auto s) {
      return update_chunk<Rule, decltype(t), decltype(s)>(row, draws, chunk);
    });
  });
  for (size_t k = 0; k < plan.size(); ++k) {
    const auto& row = work[plan[k].row];
    if (row.look_ahead) distances[row.number] += partials[k];
  }
}

// b s of equation (5); also notes in the row whether it reads its anchor at all, and how.
double set_guidance(const Rows& rows, const Control& control, int64_t i, double strength,
                    double threshold, Row& row) {
  const Guidance guidance = guidance_of(control.flags[i], rows.anchored(i),
                                        control.coefficients[kScales + i], strength, threshold);
  row.guided = guidance.guided;
  row.masked = guidance.masked;
  row.threshold = guidance.threshold;
  row.routed = guidance.guided && control.route != kByGradient;
  return guidance.pull;
}

double row_factor(const Rows& rows, const Control& control, bool negate) {
  return gradient_factor(control.coefficients[kClip], rows.grad_scale, negate);
}

template <typename T, typename S>
void guide_chunk(const Row& row, const GuideScalars<double>& wide, const Draws& draws,
                 const Chunk& chunk) {
  S buffers[5][kBlock];
  const auto scalars = wide.as<T>();
  for (int64_t offset = 0; offset < chunk.count; offset += kBlock) {
    const int64_t begin = chunk.begin + offset;
    const int64_t n = std::min<int64_t>(kBlock, chunk.count - offset);
    Ahead ahead(n);
    const S* const grad = stage_gradient<S>(row, begin, n, buffers[0], buffers[1]);
    ahead.add<S>(row.grad, begin, bool(row.replay));
    ahead.add<S>(row.replay, begin, true);
    S* const out = row.grad.dtype == code_of<S>() ? row.grad.at<S>(begin) : buffers[0];
    const S *param = nullptr, *anchor = nullptr, *importance = nullptr;
    const auto guide = [&](auto pulled) {
      run(
          GuideLoop<T, S, decltype(pulled)::value>{
              param, {grad, nullptr, T(0)}, {anchor, importance}, out, n, scalars},
          ahead);
    };
    if (row.guided) {
      param = row.param.stage<S>(begin, n, buffers[2]);
      anchor = row.anchor.stage<S>(begin, n, buffers[3]);
      importance = weighting(row, begin, n, buffers[4]).importance;
      ahead.add<S>(row.param, begin);
      ahead.add<S>(row.anchor, begin);
      ahead.add<S>(row.importance, begin);
      if (!row.masked) {
        with_pulled(importance, guide);
      } else if constexpr (is_wide<S>()) {
        guide_drawn(row, draws, scalars, begin, n, param, grad, anchor, importance, out, ahead);
      }
    } else {
      guide(std::integral_constant<int, kNotPulled>());
    }
    row.grad.unstage<S>(begin, n, out);
  }
}

}  // namespace

// The passes over all rows.

void compute_adam(const Rows& rows, const Control& control, double* distances, bool look_ahead,
                  bool stochastic) {
  std::vector<AdamRule::Row>& work = scratch<AdamRule::Row>(rows.n);
  // What only the group and the step number decide: powers, roots and divisions would take longer
  // than the update of a tiny tensor, and the row before it very likely needed the same.
  const double* last_hyper = nullptr;
  double last_step = 0;
  AdamScalars<double> scalars{};
  for (int64_t i = 0; i < rows.n; ++i) {
    if (!rows.active(i)) continue;
    const int64_t* r = rows.row(i);
    const double* hyper = control.hyper + r[kColumnGroup] * kAdamHypers;
    AdamRule::Row& row = work.emplace_back(rows, i, look_ahead, stochastic);
    const bool amsgrad = hyper[kAdamAmsgrad] != 0;
    for (int s = 0; s < (amsgrad ? 3 : 2); ++s) {
      row.state[s] = stream_of(rows, i, r[kColumnExpAvg + s], kSlotExpAvg + s);
      STD_TORCH_CHECK(row.state[s] || row.numel == 0, "dgg::adam_table_: row ", i,
                      " of table has no address for moment ", s);
    }
    STD_TORCH_CHECK(r[kColumnStep] != 0, "dgg::adam_table_: row ", i, " of table has no step");
    const double step = *reinterpret_cast<const float*>(r[kColumnStep]) + 1.0f;
    if (hyper != last_hyper || step != last_step) {
      const double factor = row_factor(rows, control, hyper[kAdamMaximize] != 0);
      scalars = adam_scalars(hyper, factor, bias_correction(hyper[kAdamBeta1], step),
                             bias_correction(hyper[kAdamBeta2], step));
      last_hyper = hyper;
      last_step = step;
    }
    row.scalars = scalars;
    const double pull =
        set_guidance(rows, control, i, hyper[kAdamStrength], hyper[kAdamThreshold], row);
    set_pull(row.scalars.guide, pull, hyper[kAdamLr], control.route, rows.importance);
    row.choose_staging(3);
  }
  // Only now, with everything checked, is anything written.
  for (const auto& row : work) {
    *reinterpret_cast<float*>(rows.row(row.number)[kColumnStep]) += 1.0f;
  }
  run_updates<AdamRule>(work, control.draws, distances);
}

void compute_sgd(const Rows& rows, const Control& control, double* distances, bool look_ahead,
                 bool stochastic) {
  std::vector<SgdRule::Row>& work = scratch<SgdRule::Row>(rows.n);
  for (int64_t i = 0; i < rows.n; ++i) {
    if (!rows.active(i)) continue;
    const int64_t* r = rows.row(i);
    const double* hyper = control.hyper + r[kColumnGroup] * kSgdHypers;
    SgdRule::Row& row = work.emplace_back(rows, i, look_ahead, stochastic);
    if (hyper[kSgdMomentum] != 0) {
      row.state[0] = stream_of(rows, i, r[kColumnExpAvg], kSlotExpAvg);
      STD_TORCH_CHECK(row.state[0] || row.numel == 0, "dgg::sgd_table_: row ", i,
                      " of table has no address for the momentum buffer");
    }
    const double pull =
        set_guidance(rows, control, i, hyper[kSgdStrength], hyper[kSgdThreshold], row);
    row.scalars = sgd_scalars(hyper, row_factor(rows, control, hyper[kSgdMaximize] != 0),
                              (control.flags[i] & kFirstStep) != 0);
    set_pull(row.scalars.guide, pull, hyper[kSgdLr], control.route, rows.importance);
    row.choose_staging(1);
  }
  run_updates<SgdRule>(work, control.draws, distances);
}

void compute_guide(const Rows& rows, const Control& control) {
  struct GuideRow : Row {
    GuideScalars<double> scalars;
    using Row::Row;
  };
  std::vector<GuideRow>& work = scratch<GuideRow>(rows.n);
  Plan plan(rows.n);
  for (int64_t i = 0; i < rows.n; ++i) {
    if (!rows.active(i)) continue;
    STD_TORCH_CHECK(rows.grads[i] != 0, "dgg::guide_table_: row ", i,
                    " has a replay gradient but no gradient to write into");
    const double* hyper = control.hyper + rows.row(i)[kColumnGroup] * kGuideHypers;
    GuideRow row(rows, i);
    const double pull =
        set_guidance(rows, control, i, hyper[kGuideStrength], hyper[kGuideThreshold], row);
    row.scalars = guide_scalars(hyper, row_factor(rows, control, false), pull, rows.importance);
    if (!row.guided && !row.replay && row.scalars.grad == 1) continue;
    row.staging = staging_of(row, nullptr, 0, row.guided);
    plan.add(work.size(), row.numel);
    work.push_back(row);
  }
  plan.for_each(true, [&](int64_t, const Chunk& chunk) {
    const GuideRow& row = work[chunk.row];
    with_types(row.staging, [&](auto t, auto s) {
      guide_chunk<decltype(t), decltype(s)>(row, row.scalars, control.draws, chunk);
    });
  });
}

namespace {

// Operators.

Tensor norms_table(const Tensor& table, const Tensor& grads, const Tensor& replays,
                   const Tensor& distances, double replay_weight, double grad_scale, int64_t which,
                   double importance) {
  const Rows rows = make_rows("norms_table", table, grads, replays, INT64_MAX, replay_weight,
                              grad_scale, importance);
  double* const known = checked<double>("norms_table", "distances", distances, rows.n);
  Tensor squares = empty_doubles({3, rows.n});
  compute_norms(rows, known, which, doubles_of(squares));
  return squares;
}

Tensor make_coefficients(const Tensor& squares, std::optional<double> max_grad_norm, bool scaling,
                         bool per_tensor) {
  const int64_t n = checked_sums("coefficients", "squares", squares, 3);
  const double* const in = checked<const double>("coefficients", "squares", squares, 3 * n);
  double norms[3];
  for (int k = 0; k < 3; ++k) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += in[k * n + i];
    norms[k] = std::sqrt(sum);
  }
  Tensor result = empty_doubles({kScales + n});
  double* const out = doubles_of(result);
  const double clip = max_grad_norm ? clip_of(*max_grad_norm, norms[0]) : 1;
  out[kClip] = clip;
  out[kGradLength] = norms[1];
  out[kDistanceLength] = norms[2];
  out[kTotalLength] = norms[0];
  const double global = scaling ? scale_of(clip, norms[1], norms[2]) : 1;
  for (int64_t i = 0; i < n; ++i) {
    out[kScales + i] = scaling && per_tensor
                           ? scale_of(clip, std::sqrt(in[n + i]), std::sqrt(in[2 * n + i]))
                           : global;
  }
  return result;
}

template <typename Rule>
void update_table(const Tensor& table, const Tensor& grads, const Tensor& replays,
                  const Tensor& coefficients, const Tensor& flags, const Tensor& hyper,
                  const Tensor& distances, double replay_weight, double grad_scale, bool look_ahead,
                  int64_t seed, int64_t draw, bool stochastic, double importance, int64_t route) {
  const char* const op = Rule::kOp;
  const Control control = make_control(op, checked_rows(op, table), coefficients, flags, hyper,
                                       Rule::kHypers, seed, draw, route);
  const Rows rows =
      make_rows(op, table, grads, replays, control.groups, replay_weight, grad_scale, importance);
  Rule::kCompute(rows, control, checked<double>(op, "distances", distances, rows.n), look_ahead,
                 stochastic);
}

void guide_table(const Tensor& table, const Tensor& grads, const Tensor& replays,
                 const Tensor& coefficients, const Tensor& flags, const Tensor& hyper,
                 double replay_weight, double grad_scale, int64_t seed, int64_t draw,
                 double importance) {
  const char* const op = "guide_table_";
  const Control control = make_control(op, checked_rows(op, table), coefficients, flags, hyper,
                                       kGuideHypers, seed, draw, 0);
  compute_guide(
      make_rows(op, table, grads, replays, control.groups, replay_weight, grad_scale, importance),
      control);
}

Tensor philox_words(int64_t seed, int64_t draw, int64_t stream, int64_t n) {
  STD_TORCH_CHECK(n >= 0, "dgg::philox_words: n is ", n);
  Tensor result = torch::stable::empty({&n, 1}, ScalarType::Long);
  auto* const out = static_cast<int64_t*>(result.data_ptr());
  uint32_t words[kBlock];
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t count = std::min(kBlock, n - begin);
    run(Philox{words, begin / 4, (count + 3) / 4, static_cast<uint32_t>(draw),
               static_cast<uint32_t>(stream), static_cast<uint64_t>(seed)});
    std::copy_n(words, count, out + begin);
  }
  return result;
}

std::string isa() {
  switch (kIsa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace
}  // namespace dgg

STABLE_TORCH_LIBRARY_IMPL(dgg, CPU, m) {
  m.impl("norms_table", TORCH_BOX(&dgg::norms_table));
  m.impl("coefficients", TORCH_BOX(&dgg::make_coefficients));
  m.impl("adam_table_", TORCH_BOX(&dgg::update_table<dgg::AdamRule>));
  m.impl("sgd_table_", TORCH_BOX(&dgg::update_table<dgg::SgdRule>));
  m.impl("guide_table_", TORCH_BOX(&dgg::guide_table));
}

// Without a tensor among the arguments the dispatcher finds no device.
STABLE_TORCH_LIBRARY_IMPL(dgg, CompositeExplicitAutograd, m) {
  m.impl("philox_words", TORCH_BOX(&dgg::philox_words));
  m.impl("isa", TORCH_BOX(&dgg::isa));
}
