// SPDX-License-Identifier: BSD-3-Clause
//
// Watches tensors whose addresses stand in a table, and takes up the gradients of those among them
// that are parameters. share_memory_() and `.data =` take the memory from under a tensor that stays
// the same Python object, so every step asks whether any of them moved; asking 2,000 tensors from
// Python, and 448 for their gradients, would cost more than the step they take part in.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "torch_inside.h"

#if defined(_WIN32)
#define DGG_C_API extern "C" __declspec(dllexport)
#else
#define DGG_C_API extern "C" __attribute__((visibility("default")))
#endif

namespace dgg {

// Where the gradients and versions of a list of parameters go; see dgg_gather. Python makes it, as
// words in this order.
struct Gathered {
  int64_t handle;
  int64_t count;
  int64_t* addresses;
  int64_t* replay_addresses;
  int64_t* versions;
  double* distances;
  int64_t* odd;  // how many, then which
};

namespace {

// A dict of Python, and what it held when the watch began: keys and values in turn.
struct Dict {
  void* object;
  std::vector<const void*> items;

  explicit Dict(void* dict) : object(dict) {
    intptr_t position = 0;
    for (void *key, *value; python.next(object, &position, &key, &value) != 0;) {
      items.push_back(key);
      items.push_back(value);
    }
  }

  bool same() const {
    intptr_t position = 0;
    size_t i = 0;
    for (void *key, *value; python.next(object, &position, &key, &value) != 0; i += 2) {
      if (i == items.size() || items[i] != key || items[i + 1] != value) return false;
    }
    return i == items.size();
  }
};

struct List {
  // Parameters come first. They belong to Python alone: whoever exchanges what is inside of a
  // tensor (swap_tensors, to_empty) asks that nobody else has it. Their Python objects are kept
  // alive by whoever watches, and are asked at each look whether they still have these.
  std::vector<const void*> objects;
  std::vector<Impl> impls;
  std::vector<Place> places;
  std::vector<torch::stable::Tensor> owned;  // of `impls` those behind the parameters
  // The gradients of the step under way, which another thread may take from their parameters. An
  // array of at::Tensor; undefined where nothing is kept.
  std::vector<Impl> kept;
  std::vector<AtenTensorHandle> grads;  // where they stand, while they are taken up
  std::vector<uint8_t> active;          // whether there is a gradient or a replay gradient
  // Place among `impls` of every parameter's anchor or -1, then perhaps of every one's importance;
  // and their versions.
  std::vector<int64_t> anchors;
  std::vector<int64_t> anchor_versions;
  std::vector<Dict> dicts;
  const torch::stable::Tensor nothing;

  ~List() { release(); }

  void release() {
    for (Impl& grad : kept) {
      if (grad != impl_of(nothing.get())) {
        aoti_torch_assign_tensors(nothing.get(), handle_of(grad));
      }
    }
  }

  bool same_params() const {
    for (size_t i = 0; i < objects.size(); ++i) {
      if (impl_in(objects[i]) != impls[i]) return false;
    }
    return true;
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
  for (const auto& tensor : tensors) {
    list->impls.push_back(impl_of(tensor.get()));
    Place place;
    STD_TORCH_CHECK(place_of(tensor.get(), place), "dgg::watch: a tensor without memory");
    list->places.push_back(std::move(place));
  }
  list->owned = std::move(tensors);
  const std::lock_guard<std::mutex> lock(mutex);
  lists()[++last_handle] = std::move(list);
  return last_handle;
}

// Only with Python's lock held if parameters are watched, too.
bool all_unmoved(const List& list) {
  if (!list.same_params()) return false;
  for (size_t i = 0; i < list.impls.size(); ++i) {
    if (!unmoved(list.impls[i], list.places[i])) return false;
  }
  return true;
}

bool watch_unmoved(int64_t handle) {
  const auto list = list_of(handle);
  return list != nullptr && list->objects.empty() && all_unmoved(*list);
}

void unwatch(int64_t handle) {
  std::shared_ptr<List> list;  // released outside the lock
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = lists().find(handle);
  if (found == lists().end()) return;
  list = std::move(found->second);
  lists().erase(found);
}

constexpr int64_t kMoved = -1;
constexpr int64_t kUnusual = -2;
// Stands for the address of an empty gradient, which has none but is there: 0 means absent.
constexpr int64_t kNowhere = 1;

using Device = std::pair<int32_t, int32_t>;  // type and index

bool device_of(AtenTensorHandle tensor, Device& device) {
  return !aoti_torch_get_device_type(tensor, &device.first) &&
         !aoti_torch_get_device_index(tensor, &device.second);
}

// Whether a gradient can be worked on as it is; writes its address.
bool take(AtenTensorHandle grad, const Device& device, const Place& param, int64_t& address) {
  if (is_lazy(impl_of(grad))) return false;
  int32_t layout = 0, dtype = 0;
  Device found;
  int64_t numel = 0;
  bool contiguous = false;
  const void* data = nullptr;
  // In this order: what has no strides has no contiguity either, and torch would log an error.
  if (aoti_torch_get_layout(grad, &layout) || layout != aoti_torch_layout_strided() ||
      !device_of(grad, found) || found != device || aoti_torch_get_dtype(grad, &dtype) ||
      dtype != param.dtype || aoti_torch_get_numel(grad, &numel) || numel != param.numel ||
      torch_get_const_data_ptr(grad, &data)) {
    return false;
  }
  if (param.layout) {
    if (!has_layout(grad, *param.layout)) return false;
  } else if (aoti_torch_is_contiguous(grad, &contiguous) || !contiguous) {
    return false;
  }
  address = reinterpret_cast<int64_t>(data);
  if (address != 0) return true;
  address = kNowhere;
  return numel == 0;
}

int64_t take_up(List& list, const Gathered& to, const uint8_t* usual, const void* const* replays,
                bool known) {
  const Torch& torch = Torch::get();
  const auto n = static_cast<int64_t>(list.impls.size());
  const int64_t count = to.count;
  if (!torch.complete() || count > static_cast<int64_t>(list.objects.size())) return kUnusual;
  list.release();
  if (!list.same_params()) return kMoved;
  const Impl undefined = impl_of(list.nothing.get());
  list.kept.resize(count, undefined);
  list.grads.resize(count);
  list.active.assign(count, 0);
  for (int64_t i = 0; i < count; ++i) {
    prefetch_impl(list.impls[std::min(i + 2 * kAhead, n - 1)]);
    prefetch_members(list.impls[std::min(i + kAhead, n - 1)]);
    list.grads[i] = torch.grad(list.impls[i]);
    prefetch_impl(impl_of(list.grads[i]));
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t version = torch.version(handle_of(list.impls[i]));
    if (known && version != to.versions[i]) to.distances[i] = -1.0;
    to.versions[i] = version;
    // Not in the loop before: counting a reference waits for everything that was asked for.
    if (impl_of(list.grads[i]) == undefined) continue;
    aoti_torch_assign_tensors(list.grads[i], handle_of(list.kept[i]));
    prefetch_members(list.kept[i]);
  }
  for (size_t i = 0; i < list.anchors.size(); ++i) {
    if (list.anchors[i] < 0) continue;
    const int64_t version = torch.version(handle_of(list.impls[list.anchors[i]]));
    if (version == list.anchor_versions[i]) continue;
    to.distances[i % count] = -1.0;
    list.anchor_versions[i] = version;
  }
  for (int64_t i = 0; i < n; ++i) {
    prefetch_place(list.impls[std::min(i + 2 * kAhead, n - 1)]);
    prefetch_storage(list.impls[std::min(i + kAhead, n - 1)]);
    if (!unmoved(list.impls[i], list.places[i])) return kMoved;
    prefetch(list.places[i].address);  // the step reads it next: of a tiny tensor all there is
  }
  int64_t present = 0;
  to.odd[0] = 0;
  Device device;  // the rows of one table are on one device
  if (count > 0 && !device_of(handle_of(list.impls[0]), device)) return kUnusual;
  for (int64_t i = 0; i < count; ++i) {
    const auto enter = [&](Impl grad, int64_t& address) {
      address = 0;
      if (grad == undefined) return true;
      list.active[i] = 1;
      if (!usual[i] || !take(handle_of(grad), device, list.places[i], address)) {
        return false;
      }
      prefetch(reinterpret_cast<const void*>(address));
      return true;
    };
    bool plain = enter(list.kept[i], to.addresses[i]);
    if (replays != nullptr) {
      const Impl replay = replays[i] == python.none ? undefined : impl_in(replays[i]);
      plain = enter(replay, to.replay_addresses[i]) && plain;
    }
    if (!plain) to.odd[++to.odd[0]] = i;
    present += list.active[i];
  }
  return present;
}

// Calls f with the list, for functions that Python calls, into which nothing may be thrown.
template <typename F>
int64_t with_list(int64_t handle, const F& f) {
  try {
    const auto list = list_of(handle);
    return list == nullptr ? kMoved : f(*list);
  } catch (...) {
    return kUnusual;
  }
}

}  // namespace
}  // namespace dgg

// The next ones are called with Python's lock held: no other thread of Python can take a gradient
// from its parameter between the look at it and the moment it is kept, or change a dict.

// Whether the torch that is loaded has the functions that the others need.
DGG_C_API int32_t dgg_gather_possible() {
  return dgg::Torch::get().complete();
}

// Says how to look into Python's objects (see `Python`); once, before everything else.
DGG_C_API void dgg_python(int64_t impl_offset, int64_t keys_offset, uint64_t lazy, void* next,
                          const void* none) {
  dgg::python = {impl_offset, keys_offset, lazy,
                 reinterpret_cast<decltype(dgg::Python::next)>(next), none};
}

// Watches parameters, too, given by their Python objects, in front of what the watch has. The
// objects must outlive it. `anchors` has for each of the first `anchored` of them the place of its
// anchor among the watch's own tensors, or -1, and may have the same of the importances behind
// that. Returns 0, or -2 if one has no memory.
DGG_C_API int64_t dgg_watch_params(int64_t handle, const void* const* objects, int64_t count,
                                   const int64_t* anchors, int64_t anchored) {
  return dgg::with_list(handle, [&](dgg::List& list) -> int64_t {
    std::vector<dgg::Impl> impls;
    std::vector<dgg::Place> places(count);
    for (int64_t i = 0; i < count; ++i) {
      impls.push_back(dgg::impl_in(objects[i]));
      if (!dgg::place_of(dgg::handle_of(impls[i]), places[i])) return dgg::kUnusual;
    }
    list.impls.insert(list.impls.begin(), impls.begin(), impls.end());
    list.places.insert(list.places.begin(), std::make_move_iterator(places.begin()),
                       std::make_move_iterator(places.end()));
    list.objects.assign(objects, objects + count);
    for (int64_t i = 0; i < anchored; ++i) {
      const int64_t place = anchors[i] < 0 ? -1 : anchors[i] + count;
      list.anchors.push_back(place);
      list.anchor_versions.push_back(
          place < 0 ? 0 : dgg::Torch::get().version(dgg::handle_of(list.impls[place])));
    }
    return 0;
  });
}

// Watches dicts: from now on `dgg_same_dicts` says whether each has the same keys and values, by
// identity and in the same order. Dicts, keys and values must outlive the watch.
DGG_C_API int64_t dgg_watch_dicts(int64_t handle, void* const* dicts, int64_t count) {
  return dgg::with_list(handle, [&](dgg::List& list) -> int64_t {
    list.dicts.reserve(count);
    for (int64_t i = 0; i < count; ++i) list.dicts.emplace_back(dicts[i]);
    return 0;
  });
}

DGG_C_API int32_t dgg_same_dicts(int64_t handle) {
  const auto list = dgg::list_of(handle);
  return list != nullptr && std::all_of(list->dicts.begin(), list->dicts.end(),
                                        [](const dgg::Dict& dict) { return dict.same(); });
}

// Whether nothing that is watched moved, changed its size, order or dtype.
DGG_C_API int32_t dgg_unmoved(int64_t handle) {
  const auto list = dgg::list_of(handle);
  return list != nullptr && dgg::all_unmoved(*list);
}

// Takes up the gradients of the first `count` parameters of a watch and keeps them until
// `dgg_gather_end`: their addresses (0: none), and the parameters' versions. The known distance of
// a parameter whose version, or whose anchor's, moved is dropped. Replay gradients are given by
// their Python objects (null: none at all) and are the caller's to keep. A row that is not `usual`,
// or whose gradients are not of the parameter's order (contiguous, or its strides), device, dtype
// and size and free of lazy negation, is named in `odd`: its addresses are the caller's to find.
// Returns how many have a gradient or a replay gradient, or -1 if a watched tensor moved, or -2 if
// this is not possible; then nothing is to be used.
DGG_C_API int64_t dgg_gather(const dgg::Gathered* to, const uint8_t* usual,
                             const void* const* replays, int32_t known) {
  return dgg::with_list(to->handle, [&](dgg::List& list) {
    const int64_t present = dgg::take_up(list, *to, usual, replays, known != 0);
    if (present < 0) list.release();
    return present;
  });
}

// Ends the step: tells autograd that the parameters with a gradient were written, if `written`, and
// counts that in `versions`; lets go of the gradients. Returns 0, or -2 on an error.
DGG_C_API int64_t dgg_gather_end(const dgg::Gathered* to, int32_t written) {
  return dgg::with_list(to->handle, [&](dgg::List& list) -> int64_t {
    const dgg::Torch& torch = dgg::Torch::get();
    if (to->count > static_cast<int64_t>(list.active.size())) return dgg::kUnusual;
    for (int64_t i = 0; written && i < to->count; ++i) {
      if (list.active[i] == 0) continue;
      torch.bump(dgg::handle_of(list.impls[i]));
      ++to->versions[i];
    }
    list.release();
    return 0;
  });
}

STABLE_TORCH_LIBRARY_IMPL(dgg, CompositeExplicitAutograd, m) {
  m.impl("watch", TORCH_BOX(&dgg::watch));
  m.impl("unmoved", TORCH_BOX(&dgg::watch_unmoved));
  m.impl("unwatch", TORCH_BOX(&dgg::unwatch));
}
