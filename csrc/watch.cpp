// SPDX-License-Identifier: BSD-3-Clause
//
// Watches tensors whose addresses stand in a table. share_memory_() and `.data =` take the memory
// from under a tensor that stays the same Python object, so every step asks whether any of them
// moved; asking 2,000 tensors from Python would cost more than the step they take part in.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace dgg {
namespace {

struct Watched {
  torch::stable::Tensor tensor;
  const void* address;
  int64_t numel;
  bool contiguous;

  explicit Watched(const torch::stable::Tensor& watched)
      : tensor(watched),
        address(watched.const_data_ptr()),
        numel(watched.numel()),
        contiguous(watched.is_contiguous()) {}

  bool unmoved() const {
    // A view of the same memory in another order is another tensor to the kernels; what was not
    // contiguous is told from a contiguous one, which is the change that `.data =` makes.
    return tensor.const_data_ptr() == address && tensor.numel() == numel &&
           tensor.is_contiguous() == contiguous;
  }
};

std::mutex mutex;
int64_t last_handle = 0;

std::unordered_map<int64_t, std::vector<Watched>>& lists() {
  // Never destroyed: tensors must not be released after torch itself is gone.
  static auto* const found = new std::unordered_map<int64_t, std::vector<Watched>>;
  return *found;
}

int64_t watch(std::vector<torch::stable::Tensor> tensors) {
  std::vector<Watched> list;
  list.reserve(tensors.size());
  for (auto& tensor : tensors) {
    list.emplace_back(tensor);
  }
  const std::lock_guard<std::mutex> lock(mutex);
  lists()[++last_handle] = std::move(list);
  return last_handle;
}

bool unmoved(int64_t handle) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = lists().find(handle);
  if (found == lists().end()) return false;
  for (const auto& watched : found->second) {
    if (!watched.unmoved()) return false;
  }
  return true;
}

void unwatch(int64_t handle) {
  std::vector<Watched> list;  // released outside the lock
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = lists().find(handle);
  if (found == lists().end()) return;
  list = std::move(found->second);
  lists().erase(found);
}

}  // namespace
}  // namespace dgg

STABLE_TORCH_LIBRARY_IMPL(dgg, CompositeExplicitAutograd, m) {
  m.impl("watch", TORCH_BOX(&dgg::watch));
  m.impl("unmoved", TORCH_BOX(&dgg::unmoved));
  m.impl("unwatch", TORCH_BOX(&dgg::unwatch));
}
