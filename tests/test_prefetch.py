# SPDX-License-Identifier: BSD-3-Clause
"""The order in which the streams of anchors kept off the device wait for each other.

Streams, events and the device are stand-ins that write down what they are asked; that a GPU does
it is for test_gpu.py.
"""

from __future__ import annotations

import types
import weakref

import pytest
import torch

from dgg.backends import launched, libraries, prefetch
from dgg.backends import uploads as uploads_of_rows

META = torch.device("meta")  # memory that is never touched, on a device that is not the CPU


class Stream:
    def __init__(self, name, log):
        self.name, self._log, self._events, self._entered = name, log, 0, False

    def record_event(self):
        self._events += 1
        self._log.append(("record", self.name))
        return f"{self.name} {self._events}"

    def wait_event(self, event):
        self._log.append(("wait", self.name, event))

    def __enter__(self):
        if self._entered:  # the rule up to torch 2.10
            raise RuntimeError("Stream's context should not be initialized.")
        self._entered = True
        self._log.append(("enter", self.name))

    def __exit__(self, *_):
        self._entered = False
        self._log.append(("exit", self.name))


@pytest.fixture
def log(monkeypatch):
    found = []
    main = Stream("main", found)
    monkeypatch.setattr(torch, "Stream", lambda device: Stream("side", found))
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: main)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda x, stream: found.append(("lend", id(x), stream.name))
    )
    copy = torch.Tensor.copy_
    monkeypatch.setattr(
        torch.Tensor, "copy_", lambda x, *a, **k: (found.append(("copy",)), copy(x, *a, **k))[1]
    )
    return found


def windows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefetch, "WINDOW", 512)
        return prefetch.AnchorWindows([torch.zeros(100) for _ in range(3)], META)


def bytes_of(windows):
    """Returns the bytes on the device."""
    return sum(buffer.numel() for buffer in windows._buffers)


def test_a_buffer_is_filled_only_after_what_used_its_memory_before(log):
    made = windows()
    assert made.count == 3 and len(made._buffers) == 2
    begin = [entry for entry in log if entry[0] != "lend"]
    # Allocated on the main stream, so freed by work there that may not have run yet.
    assert begin == [("record", "main"), ("wait", "side", "main 1")]
    assert [entry[2] for entry in log if entry[0] == "lend"] == ["side"] * 2
    del log[:]
    made.fetch(0)
    assert log == [
        ("enter", "side"), ("copy",), ("record", "side"), ("exit", "side"),
        ("wait", "main", "side 1"),
    ]  # fmt: skip


def test_a_window_waits_for_the_readers_of_the_one_before(log):
    made = windows()
    for number in (0, 1):
        made.fetch(number)
        made.done(number)
    del log[:]
    made.fetch(2)  # into the buffer of window 0
    assert log == [
        ("enter", "side"), ("wait", "side", "main 2"), ("copy",), ("record", "side"),
        ("exit", "side"), ("wait", "main", "side 3"),
    ]  # fmt: skip
    del log[:]
    made.fetch(1)  # still there
    assert log == [("wait", "main", "side 2")]


def test_what_the_side_stream_measures_with_is_not_freed_under_it(log, monkeypatch):
    functions = types.SimpleNamespace(norms_launch=lambda *_, **__: None)
    monkeypatch.setattr(libraries, "launchers", lambda backend: functions)
    monkeypatch.setattr(uploads_of_rows.Uploads, "_pinned", lambda self, x: torch.empty_like(x))
    # Its anchors come within the measuring: a stream in a stream.
    params, anchors = [torch.zeros(100, device=META)], [torch.zeros(100)]
    rows = launched.LaunchedRows("triton", params, [0], [0], anchors=anchors)
    rows.take_gradients([None], [], elementwise=False)
    del log[:]
    rows._measure_ahead(rows.windows)
    lent = {entry[1] for entry in log if entry[0] == "lend"}
    (launch,) = rows._launches
    assert lent >= {id(x) for x in (*launch.tensors, rows._device_table, rows.distances)}
    begun = log.index(("enter", "side"))
    assert ("wait", "side", "main 2") in log[:begun], "it measures what the step has not written"
    assert all(entry[0] != "lend" for entry in log[begun:]), "too late: it is being used already"
    del log[:]
    rows._join()
    assert log[-1][:2] == ("wait", "main") and rows.windows._pending is None


def test_no_pinned_memory_is_freed_inside_a_capture(monkeypatch):
    """Freed there, torch's allocator would record an event into the graph and ask it later."""
    uploads = uploads_of_rows.Uploads(torch.device("cpu"), capturable=True)
    uploads.send("grads", torch.tensor([1, 2]))
    pinned = [weakref.ref(x) for x in (uploads._sent["grads"][0], uploads._spare["grads"][0])]
    with monkeypatch.context() as capture:
        capture.setattr(uploads_of_rows, "capturing", lambda device: True)
        uploads.send("grads", torch.tensor([3, 4]))
    assert all(x() is not None for x in pinned)


SHAPES = [(100,), (3, 5, 7), (0,), (), (1000,), (17,), (64,), (2, 3)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.complex64]


@pytest.mark.parametrize("size", [256, 1024, 8192])
def test_anchors_side_by_side_come_in_one_copy_a_window(size, monkeypatch, log):
    monkeypatch.setattr(prefetch, "WINDOW", size)
    like = [torch.zeros(shape) for shape in SHAPES]
    like[1] = torch.zeros(7, 5, 3).permute(2, 1, 0)
    dtypes = [DTYPES[place % 4] for place in range(len(like))]
    together = prefetch.side_by_side(like, dtypes, pinned=False)
    for place, (x, anchor, dtype) in enumerate(zip(like, together, dtypes, strict=True)):
        assert (anchor.shape, anchor.stride(), anchor.dtype) == (x.shape, x.stride(), dtype)
        before = [other._version for other in together]
        anchor.fill_(place + 1)
        before[place] += 1
        assert [other._version for other in together] == before, "the distances of others hold"
    alone = [anchor.clone() for anchor in together]
    found = []
    for anchors in (together, alone):
        real = [torch.view_as_real(x) if x.is_complex() else x for x in anchors]
        made = prefetch.AnchorWindows([real[0], None, *real[1:]], torch.device("cpu"))
        assert made.of_row[1] == -1 and bytes_of(made) <= 2 * max(size, 8192)
        copies, bits = [], []
        for number in range(made.count):
            del log[:]
            made.fetch(number)
            copies.append(len(log))
            for row, x in enumerate([real[0], None, *real[1:]]):
                if x is None or made.of_row[row] != number or not x.numel():
                    continue
                begin = made.addresses[row] - made._buffers[number % 2].data_ptr()
                brought = made._buffers[number % 2][begin : begin + x.nbytes]
                flat = x.as_strided((x.numel(),), (1,))
                assert torch.equal(brought.view(x.dtype), flat)
                bits.append((row, brought.tolist()))
        found.append((copies, bits))
    assert found[0][1] == found[1][1]
    assert set(found[0][0]) == {1}
    assert sum(found[1][0]) == len(SHAPES) - 1, "all but the empty one"


@pytest.mark.parametrize("size", [256, 1024, 8192])
def test_an_importance_comes_in_the_window_of_its_anchor(size, monkeypatch):
    monkeypatch.setattr(prefetch, "WINDOW", size)
    like = [torch.zeros(shape) for shape in SHAPES]
    kinds = []
    for base, dtypes in ((100, DTYPES[:3]), (200, DTYPES[1::-1])):
        made = prefetch.side_by_side(
            like, [dtypes[place % len(dtypes)] for place in range(len(like))], pinned=False
        )
        for place, x in enumerate(made):
            x.fill_(base + place)
        kinds.append(made)
    anchors, importances = kinds
    importances[4] = None  # an anchor without
    anchors[5] = None  # on the device already
    anchors[6] = importances[6] = None
    made = prefetch.AnchorWindows(anchors, torch.device("cpu"), importances=importances)
    assert made.of_row[6] == -1 and min(x for x in made.of_row[:6]) >= 0
    assert (made.addresses[5], made.importance_addresses[4]) == (0, 0)
    found = 0
    for number in made.order():
        made.fetch(number)
        buffer = made._buffers[number % 2]
        taken = []
        for tensors, addresses in (
            (anchors, made.addresses), (importances, made.importance_addresses)
        ):  # fmt: skip
            for row, x in enumerate(tensors):
                if x is None or made.of_row[row] != number or not x.numel():
                    continue
                begin = addresses[row] - buffer.data_ptr()
                assert begin % 256 == 0
                assert torch.equal(buffer[begin : begin + x.nbytes].view(x.dtype), x.flatten())
                taken.append((begin, begin + x.nbytes))
                found += 1
        taken.sort()
        assert all(a[1] <= b[0] for a, b in zip(taken, taken[1:], strict=False)), "they overlap"
    assert found == 2 * (len(SHAPES) - 1) - 4


def test_memory_of_anchors_is_as_long_as_they_are():
    like = [torch.zeros(100) for _ in range(9)]
    made = prefetch.side_by_side(like, [torch.bfloat16] * 9, pinned=False)
    (memory,) = {x.untyped_storage().data_ptr() for x in made}
    assert made[0].untyped_storage().nbytes() == 8 * 256 + 200 and made[0].data_ptr() == memory


def test_anchors_of_another_gpu_are_brought_from_there():
    made = prefetch.AnchorWindows([torch.zeros(3, device=META)], torch.device("cpu"))
    assert [(x.device, y.device) for x, y in made._copies[0]] == [(torch.device("cpu"), META)]


def test_without_a_device_nothing_waits():
    made = prefetch.AnchorWindows([torch.ones(3), None], torch.device("cpu"))
    made.follow()
    made.lend([torch.zeros(1)])
    made.fetch(0)
    made.done(0)
    made.leave()
    made.join()
    with made.aside(), made.aside():
        pass
    assert made.of_row == [0, -1]
