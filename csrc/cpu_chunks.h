// SPDX-License-Identifier: BSD-3-Clause
//
// Rows and their chunks: how a chunk's elements are staged in blocks, which words are drawn for
// them, and how threads share the chunks. Included by cpu.cpp and cpu_products.cpp.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "cpu_arguments.h"
#include "cpu_loops.h"

namespace dgg {
namespace {

constexpr int64_t kChunk = 32768;
// Below this many elements waking other threads costs more than they save.
constexpr int64_t kSerial = 32768;

// Types the arithmetic itself is done in.
template <typename S>
constexpr bool is_wide() {
  return std::is_floating_point<S>::value;
}

// A tensor of a row: an address and how to read it.
struct Stream {
  char* data = nullptr;
  int dtype = kFloat32;

  explicit operator bool() const { return data != nullptr; }

  template <typename S>
  S* at(int64_t begin) const {
    return reinterpret_cast<S*>(data) + begin;
  }

  // Elements begin .. begin + n as S: in place where they are stored so, else copied to `buffer`.
  template <typename S>
  S* stage(int64_t begin, int64_t n, S* buffer) const {
    if constexpr (is_wide<S>()) {
      if (dtype != code_of<S>()) {
        load(begin, n, buffer);
        return buffer;
      }
    }
    return at<S>(begin);
  }

  // Corrects the masters of elements begin .. begin + n by this, the parameter they belong to.
  template <typename T>
  void adopt(int64_t begin, int64_t n, T* masters) const {
    if (dtype == kBFloat16) run(Adopt<T, bfloat16>{at<bfloat16>(begin), masters, n});
    if (dtype == kFloat16) run(Adopt<T, float16>{at<float16>(begin), masters, n});
  }

  // Writes back what `stage` copied; nothing to do where it did not.
  template <typename S>
  void unstage(int64_t begin, int64_t n, const S* buffer) const {
    if constexpr (is_wide<S>()) {
      if (dtype != code_of<S>()) save(begin, n, buffer);
    }
  }

 private:
  // Apart, or the loop over the states of a block would be too long to be unrolled, and the
  // addresses be waited for that it has stored an instant ago.
  template <typename S>
  DGG_APART void load(int64_t begin, int64_t n, S* buffer) const {
    as_stored(dtype, [&](auto s) { convert(at<decltype(s)>(begin), buffer, n); });
  }

  template <typename S>
  DGG_APART void save(int64_t begin, int64_t n, const S* buffer) const {
    as_stored(dtype, [&](auto s) { convert(buffer, at<decltype(s)>(begin), n); });
  }
};

Stream stream_of(const Rows& rows, int64_t i, int64_t address, int slot) {
  return {reinterpret_cast<char*>(static_cast<intptr_t>(address)), rows.dtype(i, slot)};
}

// What every pass needs of an active row. Rows are made in place, without zeroing and copying
// them first: with tiny tensors that shows.
struct Row {
  Stream param, grad, replay, anchor;
  Stream importance;  // nothing where the pull is not weighted
  Stream copy;        // of a master weight
  int64_t number;     // among the rows of the call
  int64_t numel;
  int64_t index, base, stretch, stride;
  double replay_weight;
  double weight;  // i of equation (3)
  bool guided = false;
  bool masked = false;
  bool routed = false;  // the pull enters elsewhere than in the gradient
  uint32_t threshold = 0;
  int staging = kFloat32;  // S of the updates' loops

  Row(const Rows& rows, int64_t i) : Row(rows, i, rows.row(i)) {}

 private:
  Row(const Rows& rows, int64_t i, const int64_t* r)
      : param(stream_of(rows, i, r[kColumnParam], kSlotParam)),
        grad(stream_of(rows, i, rows.grads[i], kSlotGrad)),
        replay(stream_of(rows, i, rows.replay(i), kSlotReplay)),
        anchor(stream_of(rows, i, r[kColumnAnchor], kSlotAnchor)),
        importance(
            stream_of(rows, i, rows.importance != 0 ? r[kColumnImportance] : 0, kSlotImportance)),
        copy(stream_of(rows, i, r[kColumnCopy], kSlotCopy)),
        number(i),
        numel(r[kColumnNumel]),
        index(r[kColumnIndex]),
        base(r[kColumnBase]),
        stretch(r[kColumnStretch]),
        stride(r[kColumnStride]),
        replay_weight(rows.replay_weight),
        weight(rows.importance) {}
};

// What an update prefetches where blocks are staged. Converting a block reads it in no time and
// computing reads no memory, so while this block is computed the next one is asked for.
class Ahead {
 public:
  // Of a block of n elements. After a short one there is no other, and with tiny tensors it shows
  // to look for it.
  explicit Ahead(int64_t n = 0) : more_(n == kBlock) {}

  // A stream that is staged as S, or always (`staged`); else the loop reads it where it is.
  template <typename S>
  void add(const Stream& stream, int64_t begin, bool staged = false) {
    if (!more_ || !stream) return;
    staged = staged || stream.dtype != code_of<S>();
    wanted_ = wanted_ || staged;
    const int64_t size = size_of(stream.dtype);
    next_[count_] = reinterpret_cast<uintptr_t>(stream.data) +
                    (staged ? (begin + kBlock) * size : begin * size + kAheadBytes);
    sizes_[count_++] = size;
  }

  // Whether anything is staged.
  bool wanted() const { return wanted_; }

  DGG_HOST_DEVICE void prefetch_from(int64_t i) const {
    for (int k = 0; k < count_; ++k) {
      prefetch_lines(next_[k] + static_cast<uintptr_t>(i * sizes_[k]), kStrip * sizes_[k]);
    }
  }

 private:
  uintptr_t next_[kSlots];
  int64_t sizes_[kSlots];
  int count_ = 0;
  bool more_;
  bool wanted_ = false;
};

template <typename Loop>
struct Staged {
  Loop loop;
  Ahead ahead;
  int64_t n;

  DGG_HOST_DEVICE void operator()() const { stream(*this); }
  DGG_HOST_DEVICE void prefetch_from(int64_t i) const { ahead.prefetch_from(i); }
  DGG_HOST_DEVICE void element(int64_t i) const { loop.element(i); }
};

template <typename Loop>
void run(const Loop& loop, const Ahead& ahead) {
  if (!ahead.wanted()) return run(loop);
  run(Staged<Loop>{loop, ahead, loop.n});
}

template <typename S>
const S* stage_or_zeros(const Stream& stream, int64_t begin, int64_t n, S* buffer) {
  if (stream) return stream.stage<S>(begin, n, buffer);
  std::fill_n(buffer, n, S(0));
  return buffer;
}

// The parameter, or the master weight of one, corrected by it.
template <typename T>
const T* stage_param(const Row& row, int64_t begin, int64_t n, T* buffer) {
  const T* const param = row.param.stage<T>(begin, n, buffer);
  if (!row.copy) return param;
  if (param != buffer) std::copy_n(param, n, buffer);
  row.copy.adopt(begin, n, buffer);
  return buffer;
}

// h of equation (1) without the gradient scale. Uses `other` only for mixing.
template <typename S>
const S* stage_gradient(const Row& row, int64_t begin, int64_t n, S* buffer, S* other) {
  if constexpr (is_wide<S>()) {
    if (row.replay) {
      const S* const grad = stage_or_zeros(row.grad, begin, n, buffer);
      const S* const replay = row.replay.stage<S>(begin, n, other);
      run(RealGradient<S>{grad, replay, buffer, static_cast<S>(row.replay_weight), n});
      return buffer;
    }
  }
  return row.grad.stage<S>(begin, n, buffer);
}

// The type a row's blocks are staged in: bfloat16 if that is what all its tensors are and nothing
// is mixed in, else that of the arithmetic. Converting float16 costs so much more that it gains
// nothing by happening in registers.
[[maybe_unused]] int staging_of(const Row& row, const Stream* states, int count, bool anchored) {
  const int dtype = row.param.dtype;
  if (dtype == kFloat64) return kFloat64;
  if (dtype != kBFloat16 || row.replay || row.masked || row.routed || row.grad.dtype != dtype) {
    return kFloat32;
  }
  if (anchored && row.anchor.dtype != dtype) return kFloat32;
  if (anchored && row.importance && row.importance.dtype != dtype) return kFloat32;
  for (int s = 0; s < count; ++s) {
    if (states[s] && states[s].dtype != dtype) return kFloat32;
  }
  return dtype;
}

// Calls f with zeros of the arithmetic's type and of the staging type.
template <typename F>
auto with_types(int staging, const F& f) {
  switch (staging) {
    case kFloat64:
      return f(double(), double());
    case kBFloat16:
      return f(float(), bfloat16());
    default:
      return f(float(), float());
  }
}

// The words of elements begin .. begin + n in one of the streams of elements. Where a shard's
// elements are not consecutive in the unsharded parameter, a run ends with the stretch that is.
[[maybe_unused]] void draw_words(const Row& row, const Draws& draws, uint32_t stream, int64_t begin,
                                 int64_t n, uint32_t* words) {
  uint32_t quads[kBlock + 8];
  for (int64_t done = 0; done < n;) {
    const int64_t l = begin + done;
    const int64_t i = unsharded_index(l, row.base, row.stretch, row.stride);
    const int64_t count = std::min(n - done, row.stretch - l % row.stretch);
    const int64_t first = i / 4;
    const int64_t counters = (i + count - 1) / 4 - first + 1;
    run(Philox{quads, first, counters, draws.draw, stream + static_cast<uint32_t>(row.index),
               draws.seed});
    std::memcpy(words + done, quads + i % 4, static_cast<size_t>(count) * sizeof(uint32_t));
    done += count;
  }
}

// A list that keeps its memory from call to call: for hundreds of tiny tensors getting it anew
// takes longer than updating them.
template <typename T, int kUse = 0>
std::vector<T>& scratch(size_t capacity) {
  static thread_local std::vector<T> list;
  list.clear();
  list.reserve(capacity);
  return list;
}

// Work, in chunks.

struct Chunk {
  int64_t begin;
  int32_t count;
  int32_t row;
};

class Plan {
 public:
  explicit Plan(size_t rows) : chunks_(scratch<Chunk>(rows)) {}

  void add(size_t row, int64_t numel) {
    for (int64_t begin = 0; begin < numel; begin += kChunk) {
      const int64_t count = std::min(kChunk, numel - begin);
      chunks_.push_back({begin, static_cast<int32_t>(count), static_cast<int32_t>(row)});
    }
    elements_ += numel;
  }

  size_t size() const { return chunks_.size(); }
  const Chunk& operator[](size_t i) const { return chunks_[i]; }

  // Calls f(chunk number, chunk). Every thread gets an equal stretch of elements, and when it has
  // finished takes chunks of those that have not. Backwards, a pass begins where the one before
  // it ended, in what the cache still holds.
  template <typename F>
  void for_each(bool backwards, const F& f) const {
    const auto total = static_cast<int64_t>(chunks_.size());
    int64_t threads = 1;
    if (elements_ > kSerial && total > 1) {
      threads = std::min<int64_t>(torch::stable::get_num_threads(), total);
    }
    if (threads == 1) {
      for (int64_t i = 0; i < total; ++i) {
        const int64_t k = backwards ? total - 1 - i : i;
        f(k, chunks_[k]);
      }
      return;
    }
    struct alignas(64) Share {
      std::atomic<int64_t> next;
      int64_t begin, end;
    };
    std::unique_ptr<Share[]> shares(new Share[threads]);
    int64_t chunk = 0;
    int64_t passed = 0;
    for (int64_t t = 0; t < threads; ++t) {
      shares[t].next = 0;
      shares[t].begin = chunk;
      // In floating point: elements times threads could overflow, and only balance depends on it.
      const double target = static_cast<double>(elements_) * (t + 1) / threads;
      while (chunk < total && (t + 1 == threads || passed < target))
        passed += chunks_[chunk++].count;
      shares[t].end = chunk;
    }
    torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
      for (int64_t own = first; own < last; ++own) {
        for (int64_t t = 0; t < threads; ++t) {
          Share& share = shares[(own + t) % threads];
          const int64_t count = share.end - share.begin;
          for (int64_t i; (i = share.next.fetch_add(1, std::memory_order_relaxed)) < count;) {
            const int64_t k = backwards ? share.end - 1 - i : share.begin + i;
            f(k, chunks_[k]);
          }
        }
      }
    });
  }

 private:
  std::vector<Chunk>& chunks_;
  int64_t elements_ = 0;
};

}  // namespace
}  // namespace dgg
