// SPDX-License-Identifier: BSD-3-Clause
//
// Watches tensors whose addresses stand in a table, and takes up the gradients of those among them
// that are parameters. share_memory_() and `.data =` take the memory from under a tensor that stays
// the same Python object, so every step asks whether any of them moved; asking 2,000 tensors from
// Python, and 448 for their gradients, would cost more than the step they take part in.
//
// The stable interface of torch does not know gradients and version counters. The three functions
// for them are looked up by name in the torch that is loaded. dgg/_gather.py tries them before
// their first use and does their work in Python wherever they are missing or do something else.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#if defined(_WIN32)
#define DGG_C_API extern "C" __declspec(dllexport)
#else
#include <dlfcn.h>
#define DGG_C_API extern "C" __attribute__((visibility("default")))
#endif

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

  // A view of the same memory in another order is another tensor to the kernels; what was not
  // contiguous is told from a contiguous one, which is the change that `.data =` makes.
  bool unmoved(AtenTensorHandle handle) const {
    const void* data = nullptr;
    int64_t elements = 0;
    bool in_order = false;
    return !torch_get_const_data_ptr(handle, &data) && data == address &&
           !aoti_torch_get_numel(handle, &elements) && elements == numel &&
           !aoti_torch_is_contiguous(handle, &in_order) && in_order == contiguous;
  }
};

// A tensor handle of the stable interface is a pointer to an at::Tensor, whose only member is the
// pointer to its TensorImpl: an array of such pointers is one of tensors, without a cache line for
// each. What rests on this is tried by dgg/_gather.py before anybody relies on it.
using Impl = const void*;

Impl impl_of(AtenTensorHandle tensor) {
  return *reinterpret_cast<const Impl*>(tensor);
}
AtenTensorHandle handle_of(Impl& impl) {
  return reinterpret_cast<AtenTensorHandle>(&impl);
}

struct List {
  std::vector<Watched> tensors;
  std::vector<Impl> impls;  // of `tensors`, which own them
  // The gradients of the step under way, which another thread may take from their parameters. An
  // array of at::Tensor; undefined where nothing is kept.
  std::vector<Impl> kept;
  std::vector<AtenTensorHandle> grads;  // where they stand, while they are taken up
  const torch::stable::Tensor nothing;

  ~List() { release(); }

  void release() {
    for (Impl& grad : kept) {
      if (grad != impl_of(nothing.get())) {
        aoti_torch_assign_tensors(nothing.get(), handle_of(grad));
      }
    }
  }
};

std::mutex mutex;
int64_t last_handle = 0;

std::unordered_map<int64_t, std::shared_ptr<List>>& lists() {
  // Never destroyed: tensors must not be released after torch itself is gone.
  static auto* const found = new std::unordered_map<int64_t, std::shared_ptr<List>>;
  return *found;
}

// The list stays as long as somebody works on it; nobody asks torch for anything under the lock.
std::shared_ptr<List> list_of(int64_t handle) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = lists().find(handle);
  return found == lists().end() ? nullptr : found->second;
}

int64_t watch(std::vector<torch::stable::Tensor> tensors) {
  auto list = std::make_shared<List>();
  list->tensors.reserve(tensors.size());
  for (auto& tensor : tensors) {
    list->tensors.emplace_back(tensor);
    list->impls.push_back(impl_of(tensor.get()));
  }
  const std::lock_guard<std::mutex> lock(mutex);
  lists()[++last_handle] = std::move(list);
  return last_handle;
}

bool all_unmoved(const List& list) {
  for (const auto& watched : list.tensors) {
    if (!watched.unmoved(watched.tensor.get())) return false;
  }
  return true;
}

bool unmoved(int64_t handle) {
  const auto list = list_of(handle);
  return list != nullptr && all_unmoved(*list);
}

void unwatch(int64_t handle) {
  std::shared_ptr<List> list;  // released outside the lock
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = lists().find(handle);
  if (found == lists().end()) return;
  list = std::move(found->second);
  lists().erase(found);
}

struct Torch {
  AtenTensorHandle (*grad)(const void* impl) = nullptr;  // a reference to an at::Tensor
  int64_t (*version)(AtenTensorHandle) = nullptr;
  void (*bump)(AtenTensorHandle) = nullptr;

  Torch() {
#if !defined(_WIN32)
    Dl_info place;
    if (dladdr(reinterpret_cast<void*>(&aoti_torch_get_dtype), &place) == 0) return;
    void* const library = dlopen(place.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) return;
    const auto find = [library](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
    };
    find(grad, "_ZNK3c1010TensorImpl4gradEv");
    find(version, "_ZNK2at10TensorBase8_versionEv");
    find(bump, "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE");
#endif
  }

  bool complete() const { return grad != nullptr && version != nullptr && bump != nullptr; }

  static const Torch& get() {
    static const Torch found;
    return found;
  }
};

// Between two steps a model's worth of memory has gone through the caches, and to wait for every
// tensor's lines one after the other takes longer than everything else here. Nothing but time rests
// on what stands where: a prefetch takes any address.
constexpr int64_t kImplLines = 4;
constexpr int64_t kLineBytes = 64;
constexpr int64_t kAhead = 12;

void prefetch(const void* address) {
#if defined(__GNUC__) || defined(__clang__)
  __builtin_prefetch(address);
#endif
}

void prefetch_impl(Impl impl) {
  for (int64_t line = 0; line < kImplLines; ++line) {
    prefetch(static_cast<const char*>(impl) + line * kLineBytes);
  }
}

// Prefetches what a TensorImpl points to behind its vtable and counts: storage, version counter,
// ...
void prefetch_members(Impl impl) {
  for (int word = 2; word < 6; ++word) prefetch(static_cast<const void* const*>(impl)[word]);
}

// Prefetches what `Watched::unmoved` looks at, for most tensors watched are only looked at: the
// pointer to the storage, the size and the order in a TensorImpl, then the address in the storage.
void prefetch_place(Impl impl) {
  for (const int byte : {16, 152, 184}) prefetch(static_cast<const char*>(impl) + byte);
}

void prefetch_storage(Impl impl) {
  const auto storage = static_cast<const char*>(static_cast<const void* const*>(impl)[2]);
  for (const int byte : {16, 72}) prefetch(storage + byte);
}

constexpr int64_t kMoved = -1;
constexpr int64_t kUnusual = -2;
// Stands for the address of an empty gradient, which has none but is there: 0 means absent.
constexpr int64_t kNowhere = 1;

// Whether a gradient can be worked on as it is; writes its address.
bool take(AtenTensorHandle grad, AtenTensorHandle like, const Watched& param, int64_t& address) {
  int32_t layout = 0, device = 0, index = 0, dtype = 0, found = 0;
  int64_t numel = 0;
  bool contiguous = false;
  const void* data = nullptr;
  // In this order: what has no strides has no contiguity either, and torch would log an error.
  if (aoti_torch_get_layout(grad, &layout) || layout != aoti_torch_layout_strided() ||
      aoti_torch_get_device_type(like, &device) || aoti_torch_get_device_type(grad, &found) ||
      found != device || aoti_torch_get_device_index(like, &index) ||
      aoti_torch_get_device_index(grad, &found) || found != index ||
      aoti_torch_get_dtype(like, &dtype) || aoti_torch_get_dtype(grad, &found) || found != dtype ||
      aoti_torch_get_numel(grad, &numel) || numel != param.numel ||
      aoti_torch_is_contiguous(grad, &contiguous) || !contiguous ||
      torch_get_const_data_ptr(grad, &data)) {
    return false;
  }
  address = reinterpret_cast<int64_t>(data);
  if (address != 0) return true;
  address = kNowhere;
  return numel == 0;
}

int64_t take_up(List& list, int64_t count, int64_t* addresses, int64_t* versions, double* distances,
                bool known) {
  const Torch& torch = Torch::get();
  const auto n = static_cast<int64_t>(list.tensors.size());
  if (!torch.complete() || count > n) return kUnusual;
  list.release();
  const Impl undefined = impl_of(list.nothing.get());
  list.kept.resize(count, undefined);
  list.grads.resize(count);
  for (int64_t i = 0; i < count; ++i) {
    prefetch_impl(list.impls[std::min(i + 2 * kAhead, n - 1)]);
    prefetch_members(list.impls[std::min(i + kAhead, n - 1)]);
    list.grads[i] = torch.grad(list.impls[i]);
    prefetch_impl(impl_of(list.grads[i]));
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t version = torch.version(handle_of(list.impls[i]));
    if (known && version != versions[i]) distances[i] = -1.0;
    versions[i] = version;
    // Not in the loop before: counting a reference waits for everything that was asked for.
    if (impl_of(list.grads[i]) == undefined) continue;
    aoti_torch_assign_tensors(list.grads[i], handle_of(list.kept[i]));
    prefetch_members(list.kept[i]);
  }
  for (int64_t i = 0; i < n; ++i) {
    prefetch_place(list.impls[std::min(i + 2 * kAhead, n - 1)]);
    prefetch_storage(list.impls[std::min(i + kAhead, n - 1)]);
    if (!list.tensors[i].unmoved(handle_of(list.impls[i]))) return kMoved;
    prefetch(list.tensors[i].address);  // the step reads it next: of a tiny tensor all there is
  }
  int64_t present = 0;
  for (int64_t i = 0; i < count; ++i) {
    addresses[i] = 0;
    if (list.kept[i] == undefined) continue;
    const Watched& param = list.tensors[i];
    if (!take(handle_of(list.kept[i]), handle_of(list.impls[i]), param, addresses[i])) {
      return kUnusual;
    }
    prefetch(reinterpret_cast<const void*>(addresses[i]));
    ++present;
  }
  return present;
}

}  // namespace
}  // namespace dgg

// The next three are called with Python's lock held: no other thread of Python can take a gradient
// from its parameter between the look at it and the moment it is kept.

// Whether the torch that is loaded has the functions that the other two need.
DGG_C_API int32_t dgg_gather_possible() {
  return dgg::Torch::get().complete();
}

// Takes up the gradients of the first `count` tensors of a watch and keeps them until
// `dgg_gather_end`: their addresses (0: none), and the parameters' versions. The known distance of
// a parameter whose version moved is dropped. Returns how many have a gradient, or -1 if a watched
// tensor moved, or -2 if something is not as the kernels take it; then nothing is to be used.
DGG_C_API int64_t dgg_gather(int64_t handle, int64_t count, int64_t* addresses, int64_t* versions,
                             double* distances, int32_t known) {
  try {
    const auto list = dgg::list_of(handle);
    if (list == nullptr) return dgg::kMoved;
    const int64_t present = dgg::take_up(*list, count, addresses, versions, distances, known != 0);
    if (present < 0) list->release();
    return present;
  } catch (...) {
    return dgg::kUnusual;
  }
}

// Ends the step: tells autograd that the parameters with a gradient were written, if `written`;
// counts that in `versions`, if `ahead`; lets go of the gradients. Returns 0, or -2 on an error.
DGG_C_API int64_t dgg_gather_end(int64_t handle, int64_t count, const int64_t* addresses,
                                 int64_t* versions, int32_t written, int32_t ahead) {
  try {
    const auto list = dgg::list_of(handle);
    if (list == nullptr) return dgg::kMoved;
    const dgg::Torch& torch = dgg::Torch::get();
    for (int64_t i = 0; written && i < count; ++i) {
      if (addresses[i] == 0) continue;
      torch.bump(dgg::handle_of(list->impls[i]));
      if (ahead) ++versions[i];
    }
    list->release();
    return 0;
  } catch (...) {
    return dgg::kUnusual;
  }
}

STABLE_TORCH_LIBRARY_IMPL(dgg, CompositeExplicitAutograd, m) {
  m.impl("watch", TORCH_BOX(&dgg::watch));
  m.impl("unmoved", TORCH_BOX(&dgg::unmoved));
  m.impl("unwatch", TORCH_BOX(&dgg::unwatch));
}
