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

from dgg import _device, _prefetch

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
    return _prefetch.Windows([torch.zeros(100) for _ in range(3)], META, size=512)


def test_a_buffer_is_filled_only_after_what_used_its_memory_before(log):
    made = windows()
    assert made.count == 3 and len(made._buffers) == 2
    begin = [entry for entry in log if entry[0] != "lend"]
    # Allocated on the main stream, so freed by work there that may not have run yet.
    assert begin == [("record", "main"), ("wait", "side", "main 1")]
    assert [entry[2] for entry in log if entry[0] == "lend"] == ["side"] * 2
    del log[:]
    made.fetch(0)
    assert log == [("enter", "side"), ("copy",), ("record", "side"), ("exit", "side")]


def test_a_window_waits_for_the_readers_of_the_one_before(log):
    made = windows()
    for number in (0, 1):
        made.fetch(number)
        made.wait(number)
        made.done(number)
    del log[:]
    made.fetch(2)  # into the buffer of window 0
    made.wait(2)
    assert log == [
        ("enter", "side"), ("wait", "side", "main 2"), ("copy",), ("record", "side"),
        ("exit", "side"), ("wait", "main", "side 3"),
    ]  # fmt: skip
    del log[:]
    made.fetch(1)  # still there
    assert log == []


def test_what_the_side_stream_measures_with_is_not_freed_under_it(log):
    functions = types.SimpleNamespace(norms_launch=lambda *_, **__: None)
    kernels = _device.Kernels(functions, META, 3, (0, 1, 2), windows())
    vector = torch.zeros(4, device=META)
    # Its anchors come within the measuring: a stream in a stream.
    launch = _device.Launch(0, *(vector.clone() for _ in range(5)), window=0)
    kernels.launches, kernels.table = [launch], torch.zeros(3, 14, device=META)
    distances = torch.zeros(3, device=META)
    del log[:]
    kernels.measure_ahead(distances)
    lent = {entry[1] for entry in log if entry[0] == "lend"}
    assert lent >= {id(x) for x in (*launch.tensors, kernels.table, distances)}
    begun = log.index(("enter", "side"))
    assert ("wait", "side", "main 2") in log[:begun], "it measures what the step has not written"
    assert all(entry[0] != "lend" for entry in log[begun:]), "too late: it is being used already"
    del log[:]
    kernels.join()
    assert log[-1][:2] == ("wait", "main") and kernels.windows._pending is None


def test_no_pinned_memory_is_freed_inside_a_capture(monkeypatch):
    """Freed there, torch's allocator would record an event into the graph and ask it later."""
    uploads = _device.Uploads(torch.device("cpu"), capturable=True)
    uploads.send("grads", torch.tensor([1, 2]))
    pinned = [weakref.ref(x) for x in (uploads._sent["grads"][0], uploads._spare["grads"][0])]
    with monkeypatch.context() as capture:
        capture.setattr(_device, "capturing", lambda device: True)
        uploads.send("grads", torch.tensor([3, 4]))
    assert all(x() is not None for x in pinned)


def test_without_a_device_nothing_waits():
    made = _prefetch.Windows([torch.ones(3), None], torch.device("cpu"))
    made.follow()
    made.lend([torch.zeros(1)])
    made.fetch(0)
    made.wait(0)
    made.done(0)
    made.leave()
    made.join()
    with made.aside(), made.aside():
        pass
    assert made.of_row == [0, -1]
