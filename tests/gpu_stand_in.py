# SPDX-License-Identifier: BSD-3-Clause
"""A stand-in for a GPU's host side: memory, streams, events and CUDA graphs, without a GPU.

Kernels run in Triton's interpreter, all memory is the CPU's; what is modelled is who may touch
what, and when.

- *Memory.* Everything that is allocated comes from an allocator that never hands memory out twice.
  What is freed is filled with NaN (-1 as an integer), and `StandIn.check` tells whether somebody
  has written there since. Memory that a stream was given by ``record_stream`` is freed when that
  stream is there.
- *Host and device.* Tensors made with ``device="cuda"``, and what is computed from them, say that
  they are on "cuda:0"; all others are the host's. Operations that mix the two raise, as on a GPU.
- *Streams.* Work on the current stream runs at once; work on any other waits until somebody waits
  for it, which is the latest that a GPU could get to it. Entering a `torch.Stream` twice raises, as
  it does up to torch 2.10.
- *Graphs.* Under a capture nothing of the device's runs: operations, copies and launches are
  written down with the *addresses* of what they work on. A replay runs them. It fails where an
  address is no longer allocated; only what was allocated during the capture is kept by the graph.
  What waits for the device, and allocating pinned memory, raises under a capture.
"""

from __future__ import annotations

import contextlib
import importlib
import types
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from dgg.backends import libraries

DEVICE = torch.device("cuda", 0)
_CPU = torch.device("cpu")
_ALIGNMENT = 64
_POISON = 0xFF
# What waits for the device to read its memory on the host.
_WAITS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.nonzero.default,
}
_READERS = {Tensor.tolist, Tensor.numpy, Tensor.__array__}
_GETTERS = {
    Tensor.device.__get__: lambda here: DEVICE if here else _CPU,
    Tensor.is_cuda.__get__: bool,
    Tensor.is_cpu.__get__: lambda here: not here,
}


class FreedMemory(AssertionError):
    """Something works on memory that was freed."""


class Block:
    """Memory of one allocation, which is never used for another one."""

    def __init__(self, size: int, *, here: bool, pinned: bool) -> None:
        room = np.empty(size + _ALIGNMENT, dtype=np.uint8)
        begin = -room.ctypes.data % _ALIGNMENT
        self.bytes = room[begin : begin + size]
        self.address = self.bytes.ctypes.data
        self.here, self.pinned, self.freed = here, pinned, False
        # Streams that go on using it after it was freed.
        self.lent: set[Stream] = set()

    def poison(self) -> None:
        self.bytes[:] = _POISON

    def handle(self) -> np.ndarray:
        """Returns what is alive as long as a tensor has this memory."""
        return self.bytes[:]


class Address:
    """A tensor as a graph knows it: an address and how to walk from there."""

    def __init__(self, x: Tensor, block: Block) -> None:
        self.block = block
        self.dtype, self.place = x.dtype, (x.storage_offset(), x.size(), x.stride())
        self.lazy = x.is_neg(), x.is_conj()

    def tensor(self) -> Tensor:
        if self.block.freed:
            raise FreedMemory(
                f"{self.dtype} {tuple(self.place[1])}: this memory was freed after it was captured"
            )
        storage = torch.from_numpy(self.block.bytes).untyped_storage()
        x = torch.empty(0, dtype=self.dtype).set_(storage, *self.place)
        x = torch._neg_view(x) if self.lazy[0] else x
        return x.conj() if self.lazy[1] else x


class Work:
    """Operations, copies and launches, written down to be run later."""

    def __init__(self, gpu: StandIn) -> None:
        self.gpu = gpu
        self.nodes: list[tuple[Any, tuple, dict, Any]] = []
        self.copies = 0  # from the host

    def add(self, function, args, kwargs, result=None) -> None:
        self.nodes.append(
            (function, *tree_map(self._by_address, (args, kwargs)), self._by_address(result))
        )

    def _by_address(self, x):
        if not isinstance(x, Tensor):
            return x
        block = self.gpu.block_of(x)
        if block is None or (not block.here and not block.pinned):
            return x.detach().clone()  # numbers of the host are passed by value
        return Address(x, block)

    def run(self) -> None:
        with self.gpu.off():
            for node in self.nodes:
                self.run_node(*node)

    @staticmethod
    def run_node(function, *rest) -> None:
        args, kwargs, result = tree_map(lambda x: x.tensor() if isinstance(x, Address) else x, rest)
        found = function(*args, **kwargs)
        if result is not None:
            for mine, theirs in zip(result, tree_leaves(found), strict=True):
                mine.copy_(theirs)


class Stream(Work):
    """A stream beside the current one: its work runs when somebody waits for it."""

    def __init__(self, gpu: StandIn, name: str) -> None:
        super().__init__(gpu)
        self.name = name
        self._contexts: list[Stream] = []
        gpu.streams.add(self)

    def drain(self) -> None:
        with self.gpu.off():
            # Whatever is freed in the meantime waits for the nodes that are left.
            while self.nodes:
                self.run_node(*self.nodes[0])
                self.nodes.pop(0)

    # The interface of torch.Stream and torch.cuda.Stream.

    def record_event(self, event=None):
        return types.SimpleNamespace(stream=self, wait=lambda: None)

    def wait_event(self, event) -> None:
        # Work that others wait for has to be done first; whatever else there is may wait.
        if self.gpu.capture is None and event.stream is not self:
            event.stream.drain()

    def wait_stream(self, stream) -> None:
        self.wait_event(stream.record_event())

    def synchronize(self) -> None:
        self.gpu.wait("synchronize()")

    def __enter__(self):
        if self._contexts and self.gpu.strict_streams:
            raise RuntimeError("Stream's context should not be initialized.")
        self._contexts.append(self.gpu.stream)
        self.gpu.stream = self
        return self

    def __exit__(self, *_):
        self.gpu.stream = self._contexts.pop()


class Graph(Work):
    """A CUDA graph."""

    def __init__(self, gpu: StandIn) -> None:
        super().__init__(gpu)
        self.kept: list[Any] = []  # its private pool

    def replay(self) -> None:
        self.gpu.check()
        self.run()
        self.gpu.check()


def _is_device(x) -> bool:
    return isinstance(x, torch.device | str) and str(x).startswith("cuda")


def _is_view(func) -> bool:
    """Returns whether an operator's results are views of its arguments."""
    return any(
        result.alias_info is not None and not result.alias_info.is_write
        for result in func._schema.returns
    )


class _Functions(TorchFunctionMode):
    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self.gpu.call(func, args, dict(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunction():
            return self.gpu.run(func, args, kwargs or {})


class StandIn:
    """The device; a context manager within which it is there.

    Args:
        monkeypatch: Pytest's.
        strict_streams: A `torch.Stream` may not be entered twice, as up to torch 2.10.

    Attributes:
        capture: The graph that is being captured, or None.
        waits: What has waited for the device so far.
        launched: The kernels that have been launched so far: ours, and torch's operators. As in
            `test_gpu.launches`, views, allocations and copies are none.
    """

    def __init__(self, monkeypatch, *, strict_streams: bool = True) -> None:
        self.blocks: dict[int, Block] = {}
        self.streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self.strict_streams = strict_streams
        self.main = Stream(self, "main")
        self.stream = self.main
        self.capture: Graph | None = None
        self.waits: list[str] = []
        self.launched: list[str] = []
        self._wanted: tuple[bool | None, bool] = (None, False)
        self._patch(monkeypatch)

    def _patch(self, monkeypatch) -> None:
        launches = importlib.import_module("dgg.kernels")
        functions = types.SimpleNamespace()
        for name in launches.__all__:
            if "launch" in name:
                setattr(functions, name, self._launcher(getattr(launches, name)))
        monkeypatch.setattr(libraries, "launchers", lambda backend: functions)
        monkeypatch.setattr(launches, "unavailable", lambda device: None)
        monkeypatch.setattr(torch, "Stream", lambda device=None: Stream(self, "side"))
        monkeypatch.setattr(torch.accelerator, "current_stream", lambda device=None: self.stream)
        monkeypatch.setattr(Tensor, "record_stream", lambda x, stream: self._lend(x, stream))
        for name, value in {
            "Stream": lambda *_, **__: Stream(self, "side"),
            "stream": lambda stream: stream if stream is not self.stream else _Here(),
            "current_stream": lambda device=None: self.stream,
            "synchronize": lambda device=None: self.wait("synchronize()"),
            "CUDAGraph": lambda: Graph(self),
            "graph": self.graph,
            "is_initialized": lambda: True,
            "is_current_stream_capturing": lambda: self.capture is not None,
            "current_device": lambda: 0,
            "_sleep": lambda cycles: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def __enter__(self):
        self._modes = contextlib.ExitStack()
        self._modes.enter_context(_Operators(self))
        self._modes.enter_context(_Functions(self))
        return self

    def __exit__(self, *error):
        self._modes.close()
        if error[0] is None:
            self.drain()
            self.check()

    @staticmethod
    @contextlib.contextmanager
    def off():
        """Within it tensors are what they always are."""
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            yield

    # -- memory -------------------------------------------------------------------------------

    def block_of(self, x: Tensor) -> Block | None:
        return self.blocks.get(x.untyped_storage().data_ptr())

    def is_here(self, x: Tensor) -> bool:
        """Returns whether a tensor lies on the device."""
        block = self.block_of(x)
        return block is not None and block.here

    def check(self) -> None:
        """Raises if freed memory was written."""
        for block in self.blocks.values():
            if block.freed and not block.lent and (block.bytes != _POISON).any():
                raise FreedMemory(f"{len(block.bytes)} bytes were written after they were freed")

    def _adopt(self, x, here: bool):
        """Returns a tensor in memory of this allocator, if it has memory of its own."""
        if not isinstance(x, Tensor) or x.device.type == "meta" or self.block_of(x) is not None:
            return x
        storage = x.untyped_storage()
        wanted, pinned = self._wanted
        block = Block(
            max(storage.nbytes(), 1), here=here if wanted is None else wanted, pinned=pinned
        )
        self.blocks[block.address] = block
        handle = block.handle()
        mine = torch.from_numpy(handle)
        if storage.nbytes():
            whole = (storage.nbytes(),), (1,)
            mine.copy_(torch.empty(0, dtype=torch.uint8).set_(storage, 0, *whole))
        weakref.finalize(handle, self._free, block).atexit = False
        if self.capture is not None and block.here:
            self.capture.kept.append(handle)
        elif self.stream is not self.main:
            block.lent.add(self.stream)
        place = x.storage_offset(), x.size(), x.stride()
        return torch.empty(0, dtype=x.dtype).set_(mine.untyped_storage(), *place)

    def _free(self, block: Block) -> None:
        pending = [stream for stream in block.lent if stream.nodes]
        if pending:
            pending[0].nodes.append((lambda: self._release(block), (), {}, None))
            return
        self._release(block)

    @staticmethod
    def _release(block: Block) -> None:
        block.poison()
        block.lent.clear()
        block.freed = True

    def _lend(self, x: Tensor, stream: Stream) -> None:
        block = self.block_of(x)
        if block is not None:
            block.lent.add(stream)

    # -- work ---------------------------------------------------------------------------------

    def wait(self, what: str) -> None:
        """Waits for the device, which nothing may do under a capture."""
        if self.capture is not None:
            raise RuntimeError(
                f"CUDA error: operation not permitted when stream is capturing: {what}"
            )
        self.waits.append(what)
        self.drain()

    def drain(self) -> None:
        for stream in list(self.streams):
            stream.drain()

    @property
    def recorder(self) -> Work | None:
        """What work is written down in; None where it runs at once."""
        if self.capture is not None:
            return self.capture
        return None if self.stream is self.main else self.stream

    def call(self, func, args, kwargs):
        """A call of torch's Python functions: says where what it makes is to lie."""
        if func in _GETTERS:
            return _GETTERS[func](self.is_here(args[0]))
        if func in _READERS and self.is_here(args[0]):
            self.wait(func.__name__)
        wanted = None
        for x in (*args, *kwargs.values()):
            if isinstance(x, torch.device) or (isinstance(x, str) and x in ("cpu", "cuda")):
                wanted = _is_device(x)
        if func in (Tensor.cpu, Tensor.cuda):
            wanted, func = func is Tensor.cuda, Tensor.cpu
        # Whoever takes the device of another tensor was told "cuda".
        args = [_CPU if _is_device(x) else x for x in args]
        kwargs = {name: _CPU if _is_device(x) else x for name, x in kwargs.items()}
        pinned = bool(kwargs.pop("pin_memory", False)) or func is Tensor.pin_memory
        if pinned and self.capture is not None:
            raise RuntimeError("CUDA error: cudaHostAlloc is not permitted under a capture")
        if func is Tensor.pin_memory:
            func = Tensor.clone
        before, self._wanted = self._wanted, (False if pinned else wanted, pinned)
        try:
            result = func(*args, **kwargs)
            if func in (Tensor.to, Tensor.cpu) and wanted not in (None, self.is_here(args[0])):
                x = args[0]
                if self.block_of(result) is self.block_of(x):
                    result = result.clone()
                source = self.block_of(x)
                if not kwargs.get("non_blocking") and x.numel():
                    self.wait("a copy between host and device")
                elif self.capture is not None and not (source is not None and source.pinned):
                    raise RuntimeError("CUDA error: a copy from pageable memory under a capture")
            return result
        finally:
            self._wanted = before

    def run(self, func, args, kwargs):
        """An operator: runs at once or is written down; its results lie where it is said."""
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        here = any(map(self.is_here, tensors))
        if func.namespace != "aten" or any(x.device.type == "meta" for x in tensors):
            return func(*args, **kwargs)
        if not here:
            result = func(*args, **kwargs)
            return tree_map(lambda x: self._adopt(x, here=False), result)
        copies = func is torch.ops.aten.copy_.default
        if not copies and not _is_view(func) and "empty" not in func.name():
            self.launched.append(func.name())
        if func in _WAITS or (copies and not self.is_here(args[0]) and args[0].numel()):
            self.wait(str(func))
        from_host = [x for x in tensors if not self.is_here(x) and x.dim() and x.numel()]
        if copies and from_host and self.recorder is not None:
            self.recorder.copies += 1
        if from_host and not copies and self._wanted[0] is None:
            raise RuntimeError(
                f"{func}: expected all tensors to be on the same device, found the host's, too"
            )
        if copies and from_host and self.capture is not None:
            if not kwargs.get("non_blocking", args[2] if len(args) > 2 else False):
                self.wait("a copy from the host")
            if not self.block_of(args[1]).pinned:
                raise RuntimeError("CUDA error: a copy from pageable memory under a capture")
        if self.recorder is None:
            result = func(*args, **kwargs)
            return tree_map(lambda x: self._adopt(x, here=True), result)
        if self.capture is None:
            # Torch keeps pinned memory until the copy has happened.
            for x in from_host:
                if (block := self.block_of(x)) is not None and block.pinned:
                    block.lent.add(self.stream)
        return self._write_down(func, args, kwargs)

    def _write_down(self, func, args, kwargs):
        if func._schema.is_mutable:
            self.recorder.add(func, args, kwargs)
            if "out" in kwargs:
                return kwargs["out"]
            return args[0] if func._schema.returns else None
        # What it would read is not there yet; only the memory of its results is.
        result = func(*args, **kwargs)
        made = tree_map(lambda x: self._adopt(x, here=True), result)
        olds, news = tree_leaves(result), tree_leaves(made)
        fresh = [old is not new for old, new in zip(olds, news, strict=True)]
        if any(fresh) and "empty" not in func.name():
            self.recorder.add(func, args, kwargs, news)
        return made

    def _launcher(self, function):
        def launch(*args, **kwargs):
            for x in args:
                if isinstance(x, Tensor) and x.numel() and not self.is_here(x):
                    raise RuntimeError(f"{function.__name__}: an argument lies on the host")
            self.launched.append(function.__name__)
            if self.recorder is not None:
                self.recorder.add(function, args, kwargs)
                return
            with self.off():
                function(*args, **kwargs)

        return launch

    @contextlib.contextmanager
    def graph(self, graph: Graph | None = None, stream: Stream | None = None):
        """Captures what the block does; yields the graph."""
        self.wait("the begin of a capture")
        self.capture = graph or Graph(self)
        try:
            yield self.capture
        finally:
            self.capture = None


class _Here(contextlib.nullcontext):
    """The context of a stream that is the current one already."""
