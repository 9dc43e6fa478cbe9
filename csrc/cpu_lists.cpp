// SPDX-License-Identifier: BSD-3-Clause
//
// The CPU operators on lists, for torch.compile, which sees what they mutate: a table of one group,
// then the passes of the operators on tables.

#include <optional>

#include "cpu_arguments.h"

namespace dgg {
namespace {

using TensorList = std::vector<Tensor>;
using OptionalList = std::optional<TensorList>;

class ListTable {
 public:
  ListTable(const char* op, const TensorList& params, const TensorList& grads,
            const TensorList& replays, const TensorList& anchors, const OptionalList& importances,
            const std::vector<int64_t>& indices)
      : op_(op), params_(params), table_(params.size() * kColumns, 0) {
    STD_TORCH_CHECK(indices.empty() || indices.size() == params.size(), "dgg::", op_,
                    ": indices has ", indices.size(), " entries, params ", params.size());
    add("params", params, kColumnParam, kSlotParam);
    add("anchors", anchors, kColumnAnchor, kSlotAnchor);
    if (importances) add("importances", *importances, kColumnImportance, kSlotImportance);
    grads_ = add("grads", grads, -1, kSlotGrad);
    replays_ = add("replays", replays, -1, kSlotReplay);
    if (grads_.empty()) grads_.assign(params.size(), 0);
    for (size_t i = 0; i < params.size(); ++i) {
      int64_t* row = &table_[i * kColumns];
      row[kColumnNumel] = row[kColumnStretch] = row[kColumnStride] = params[i].numel();
      row[kColumnIndex] = indices.empty() ? static_cast<int64_t>(i) : indices[i];
    }
  }

  // Checks a list and enters its addresses: in a column of the table, or else in the result.
  std::vector<int64_t> add(const char* name, const TensorList& list, int column, int slot) {
    std::vector<int64_t> addresses;
    if (list.empty()) return addresses;
    require(name, list);
    for (size_t i = 0; i < list.size(); ++i) {
      const Tensor& tensor = list[i];
      STD_TORCH_CHECK(tensor.is_cpu(), "dgg::", op_, ": ", name, "[", i, "] is not on the CPU");
      STD_TORCH_CHECK(tensor.is_contiguous(), "dgg::", op_, ": ", name, "[", i,
                      "] is not contiguous");
      const auto sizes = tensor.sizes(), expected = params_[i].sizes();
      STD_TORCH_CHECK(sizes.size() == expected.size() &&
                          std::equal(sizes.begin(), sizes.end(), expected.begin()),
                      "dgg::", op_, ": ", name, "[", i, "] has another shape than params[", i, "]");
      int64_t* row = &table_[i * kColumns];
      row[kColumnDtypes] |= code_of(name, i, tensor) << (kSlotBits * slot);
      const int64_t address = address_of(tensor);
      if (column < 0) {
        // An empty tensor may have no address, and is nonetheless there.
        addresses.push_back(address ? address : 1);
      } else {
        row[column] = address;
      }
    }
    return addresses;
  }

  void add_steps(const TensorList& steps) {
    require("steps", steps);
    for (size_t i = 0; i < steps.size(); ++i) {
      STD_TORCH_CHECK(
          steps[i].is_cpu() && steps[i].numel() == 1 && steps[i].scalar_type() == ScalarType::Float,
          "dgg::", op_, ": steps[", i, "] must be one float32 number on the CPU");
      table_[i * kColumns + kColumnStep] = address_of(steps[i]);
    }
  }

  void require(const char* name, const TensorList& list) const {
    STD_TORCH_CHECK(list.size() == params_.size(), "dgg::", op_, ": ", name, " has ", list.size(),
                    " tensors, params ", params_.size());
  }

  Rows rows(double replay_weight, double grad_scale, double importance) const {
    return {table_.data(),
            grads_.data(),
            replays_.empty() ? nullptr : replays_.data(),
            static_cast<int64_t>(params_.size()),
            replay_weight,
            grad_scale,
            checked_importance(op_, importance)};
  }

 private:
  static int64_t address_of(const Tensor& tensor) {
    return static_cast<int64_t>(reinterpret_cast<intptr_t>(tensor.data_ptr()));
  }

  int64_t code_of(const char* name, size_t i, const Tensor& tensor) const {
    switch (tensor.scalar_type()) {
      case ScalarType::Float:
        return kFloat32;
      case ScalarType::BFloat16:
        return kBFloat16;
      case ScalarType::Half:
        return kFloat16;
      case ScalarType::Double:
        return kFloat64;
      default:
        STD_TORCH_CHECK(false, "dgg::", op_, ": ", name, "[", i,
                        "] must be float32, bfloat16, float16 or float64");
        return -1;
    }
  }

  const char* op_;
  const TensorList& params_;
  std::vector<int64_t> table_, grads_, replays_;
};

Tensor norms_list(const TensorList& params, const TensorList& grads, const TensorList& replays,
                  const TensorList& anchors, const Tensor& distances, double replay_weight,
                  double grad_scale, int64_t which, const OptionalList& importances,
                  double importance) {
  const ListTable table("norms", params, grads, replays, anchors, importances, {});
  const Rows rows = table.rows(replay_weight, grad_scale, importance);
  double* const known = checked<double>("norms", "distances", distances, rows.n);
  Tensor squares = empty_doubles({3, rows.n});
  compute_norms(rows, known, which, doubles_of(squares));
  return squares;
}

void adam_list(const TensorList& params, const TensorList& grads, const TensorList& replays,
               const TensorList& exp_avgs, const TensorList& exp_avg_sqs,
               const TensorList& max_exp_avg_sqs, const TensorList& anchors,
               const TensorList& steps, const Tensor& distances, const Tensor& coefficients,
               const Tensor& flags, const std::vector<int64_t>& indices, double lr, double beta1,
               double beta2, double eps, double weight_decay, bool decoupled, bool amsgrad,
               bool maximize, double strength, int64_t threshold, double replay_weight,
               double grad_scale, bool look_ahead, int64_t seed, int64_t draw,
               const OptionalList& importances, double importance, int64_t route) {
  const char* const op = "adam_";
  ListTable table(op, params, grads, replays, anchors, importances, indices);
  table.require("exp_avgs", exp_avgs);
  table.require("exp_avg_sqs", exp_avg_sqs);
  if (amsgrad) table.require("max_exp_avg_sqs", max_exp_avg_sqs);
  table.add("exp_avgs", exp_avgs, kColumnExpAvg, kSlotExpAvg);
  table.add("exp_avg_sqs", exp_avg_sqs, kColumnExpAvgSq, kSlotExpAvgSq);
  table.add("max_exp_avg_sqs", max_exp_avg_sqs, kColumnMaxExpAvgSq, kSlotMaxExpAvgSq);
  table.add_steps(steps);
  const double hyper[kAdamHypers] = {lr,
                                     beta1,
                                     beta2,
                                     eps,
                                     weight_decay,
                                     double(decoupled),
                                     double(amsgrad),
                                     double(maximize),
                                     strength,
                                     static_cast<double>(threshold)};
  const Rows rows = table.rows(replay_weight, grad_scale, importance);
  compute_adam(rows, make_control(op, rows.n, coefficients, flags, hyper, 1, seed, draw, route),
               checked<double>(op, "distances", distances, rows.n), look_ahead, false);
}

void sgd_list(const TensorList& params, const TensorList& grads, const TensorList& replays,
              const TensorList& momentum_buffers, const TensorList& anchors,
              const Tensor& distances, const Tensor& coefficients, const Tensor& flags,
              const std::vector<int64_t>& indices, double lr, double momentum, double dampening,
              double weight_decay, bool nesterov, bool maximize, double strength, int64_t threshold,
              double replay_weight, double grad_scale, bool look_ahead, int64_t seed, int64_t draw,
              const OptionalList& importances, double importance, int64_t route) {
  const char* const op = "sgd_";
  ListTable table(op, params, grads, replays, anchors, importances, indices);
  if (momentum != 0) table.require("momentum_buffers", momentum_buffers);
  table.add("momentum_buffers", momentum_buffers, kColumnExpAvg, kSlotExpAvg);
  const double hyper[kSgdHypers] = {lr,
                                    momentum,
                                    dampening,
                                    weight_decay,
                                    double(nesterov),
                                    double(maximize),
                                    strength,
                                    static_cast<double>(threshold)};
  const Rows rows = table.rows(replay_weight, grad_scale, importance);
  compute_sgd(rows, make_control(op, rows.n, coefficients, flags, hyper, 1, seed, draw, route),
              checked<double>(op, "distances", distances, rows.n), look_ahead, false);
}

void guide_list(const TensorList& params, const TensorList& grads, const TensorList& replays,
                const TensorList& anchors, const Tensor& coefficients, const Tensor& flags,
                const std::vector<int64_t>& indices, bool maximize, double strength,
                int64_t threshold, double replay_weight, double grad_scale, int64_t seed,
                int64_t draw, const OptionalList& importances, double importance) {
  const char* const op = "guide_";
  const ListTable table(op, params, grads, replays, anchors, importances, indices);
  const double hyper[kGuideHypers] = {double(maximize), strength, static_cast<double>(threshold)};
  const Rows rows = table.rows(replay_weight, grad_scale, importance);
  compute_guide(rows, make_control(op, rows.n, coefficients, flags, hyper, 1, seed, draw, 0));
}

Tensor products_list(const TensorList& params, const TensorList& grads, const TensorList& replays,
                     const TensorList& anchors, const Tensor& flags, double replay_weight,
                     double grad_scale, const OptionalList& importances, double importance) {
  const char* const op = "products";
  const ListTable table(op, params, grads, replays, anchors, importances, {});
  const Rows rows = table.rows(replay_weight, grad_scale, importance);
  Tensor sums = empty_doubles({kProducts, rows.n});
  compute_products(rows, checked<const uint8_t>(op, "flags", flags, rows.n), doubles_of(sums));
  return sums;
}

}  // namespace
}  // namespace dgg

STABLE_TORCH_LIBRARY_IMPL(dgg, CPU, m) {
  m.impl("norms", TORCH_BOX(&dgg::norms_list));
  m.impl("adam_", TORCH_BOX(&dgg::adam_list));
  m.impl("sgd_", TORCH_BOX(&dgg::sgd_list));
  m.impl("products", TORCH_BOX(&dgg::products_list));
  m.impl("guide_", TORCH_BOX(&dgg::guide_list));
}
