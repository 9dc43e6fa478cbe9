// SPDX-License-Identifier: BSD-3-Clause
//
// What is looked at inside of torch's and Python's objects, for watch.cpp alone: where a tensor's
// memory is, its gradient and its version.
//
// The stable interface of torch does not know gradients and version counters. The three functions
// for them are looked up by name in the torch that is loaded. Nor does it know Python's objects and
// lazy negation, for which it is found out where the words stand that tell. dgg/backends/native.py
// tries all of it before its first use and does the work in Python wherever something is missing or
// different.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

#if !defined(_WIN32)
#include <dlfcn.h>
#endif

namespace dgg {
namespace {

// Sizes, then strides.
using Layout = std::vector<int64_t>;

// Where a tensor's elements lie, and what they are.
struct Place {
  const void* address = nullptr;
  int64_t numel = 0;
  int32_t dtype = 0;
  bool contiguous = false;
  // Of a tensor that is not contiguous: a view of the same memory in another order is another
  // tensor to the kernels.
  std::unique_ptr<Layout> layout;
};

bool has_layout(AtenTensorHandle handle, const Layout& layout) {
  int64_t dims = 0;
  int64_t *sizes = nullptr, *strides = nullptr;
  return !aoti_torch_get_dim(handle, &dims) && 2 * dims == static_cast<int64_t>(layout.size()) &&
         !aoti_torch_get_sizes(handle, &sizes) && !aoti_torch_get_strides(handle, &strides) &&
         std::equal(sizes, sizes + dims, layout.begin()) &&
         std::equal(strides, strides + dims, layout.begin() + dims);
}

// Null if torch does not tell.
std::unique_ptr<Layout> layout_of(AtenTensorHandle handle) {
  int64_t dims = 0;
  int64_t *sizes = nullptr, *strides = nullptr;
  if (aoti_torch_get_dim(handle, &dims) || aoti_torch_get_sizes(handle, &sizes) ||
      aoti_torch_get_strides(handle, &strides)) {
    return nullptr;
  }
  auto layout = std::make_unique<Layout>(sizes, sizes + dims);
  layout->insert(layout->end(), strides, strides + dims);
  return layout;
}

bool place_of(AtenTensorHandle handle, Place& place) {
  if (torch_get_const_data_ptr(handle, &place.address) ||
      aoti_torch_get_numel(handle, &place.numel) || aoti_torch_get_dtype(handle, &place.dtype) ||
      aoti_torch_is_contiguous(handle, &place.contiguous)) {
    return false;
  }
  if (!place.contiguous) place.layout = layout_of(handle);
  return place.contiguous || place.layout != nullptr;
}

// A tensor handle of the stable interface is a pointer to an at::Tensor, whose only member is the
// pointer to its TensorImpl: an array of such pointers is one of tensors, without a cache line for
// each. What rests on this is tried by dgg/backends/native.py before anybody relies on it.
using Impl = const void*;

Impl impl_of(AtenTensorHandle tensor) {
  return *reinterpret_cast<const Impl*>(tensor);
}
AtenTensorHandle handle_of(Impl& impl) {
  return reinterpret_cast<AtenTensorHandle>(&impl);
}

// How to look into Python's objects; found out by dgg/backends/native.py.
struct Python {
  int64_t impl_offset = 0;  // of the pointer to the TensorImpl in a tensor's Python object
  int64_t keys_offset = 0;  // of the word of a TensorImpl that says what it is lazily
  uint64_t lazy = 0;        // bits of that word: negated, conjugated
  int (*next)(void* dict, intptr_t* position, void** key, void** value) = nullptr;  // PyDict_Next
  const void* none = nullptr;
};

Python python;

Impl impl_in(const void* object) {
  return *reinterpret_cast<const Impl*>(static_cast<const char*>(object) + python.impl_offset);
}

bool is_lazy(Impl impl) {
  const char* const word = static_cast<const char*>(impl) + python.keys_offset;
  return (*reinterpret_cast<const uint64_t*>(word) & python.lazy) != 0;
}

// Nor may a tensor be negated or conjugated lazily, which its memory does not show. Compared part
// by part: a whole Place, made for each of some 2,000 tensors, would be a tenth of their step.
inline bool unmoved(Impl impl, const Place& place) {
  const void* address = nullptr;
  int64_t numel = 0;
  int32_t dtype = 0;
  bool contiguous = false;
  const AtenTensorHandle handle = handle_of(impl);
  if (torch_get_const_data_ptr(handle, &address) || address != place.address ||
      aoti_torch_get_numel(handle, &numel) || numel != place.numel ||
      aoti_torch_get_dtype(handle, &dtype) || dtype != place.dtype ||
      aoti_torch_is_contiguous(handle, &contiguous) || contiguous != place.contiguous) {
    return false;
  }
  return !is_lazy(impl) && (contiguous || has_layout(handle, *place.layout));
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

// Prefetches what `unmoved` looks at, for most tensors watched are only looked at: the
// pointer to the storage, the size and the order in a TensorImpl, then the address in the storage.
void prefetch_place(Impl impl) {
  for (const int byte : {16, 152, 184}) prefetch(static_cast<const char*>(impl) + byte);
}

void prefetch_storage(Impl impl) {
  const auto storage = static_cast<const char*>(static_cast<const void* const*>(impl)[2]);
  for (const int byte : {16, 72}) prefetch(storage + byte);
}

}  // namespace
}  // namespace dgg
