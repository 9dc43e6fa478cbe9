# SPDX-License-Identifier: BSD-3-Clause
"""Copies anchors that are kept off the device to it, window by window, on a stream of its own.

With ``anchor_device="cpu"`` the anchors lie in pinned memory in the order in which they will lie on
the device, so that one copy moves a window. Only steps that inject need them, and the draws say one
step ahead which steps do. The device has two buffers. Every anchor belongs to one window and every
window to one buffer, so an anchor's address on the device never changes, and at most two windows
are on the device at a time. Each pass goes through the windows in the opposite order of the pass
before, whose last two windows are still in place.

Where the pull is weighted, an importance lies beside each anchor and comes in the same window.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from dgg import _ranges

# Bytes of a buffer; if an anchor is longer, the buffer is as long as that anchor.
WINDOW = 128 * 2**20
# Anchors begin at multiples of this, which is more than 128-bit accesses need.
_ALIGNMENT = 256


def is_away(anchor: Tensor | None, param: Tensor) -> bool:
    """Returns whether an anchor is kept on another device than its parameter."""
    return anchor is not None and anchor.device != param.device


def _aligned(length: int) -> int:
    """Returns how many bytes further the next anchor may begin."""
    return -(-length // _ALIGNMENT) * _ALIGNMENT


def _into_windows(lengths: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Returns for each window the number and the first byte of every anchor, given their bytes."""
    windows: list[list[tuple[int, int]]] = []
    end = 0
    for number, length in enumerate(lengths):
        if not windows or (end + length > WINDOW and end > 0):
            windows.append([])
            end = 0
        windows[-1].append((number, end))
        end += _aligned(length)
    return windows


def side_by_side(
    like: Sequence[Tensor], dtypes: Sequence[torch.dtype], *, pinned: bool = True
) -> list[Tensor]:
    """Returns uninitialised tensors on the CPU, of which one copy per window moves all to a device.

    There is one block of pinned memory per window, since torch rounds every block up to a power of
    two. The tensors share memory, but no version: a write to one is no write to the others.

    Args:
        like: Tensors with their shapes and strides.
        dtypes: Of every tensor.
        pinned: Whether the memory is pinned.
    """
    shapes = [
        torch.empty_like(x, dtype=dtype, device="meta", memory_format=torch.preserve_format)
        for x, dtype in zip(like, dtypes, strict=True)
    ]
    lengths = [x.nbytes for x in shapes]
    tensors = []
    for window in _into_windows(lengths):
        last, begin = window[-1]
        memory = torch.empty(
            begin + lengths[last], dtype=torch.uint8, device="cpu", pin_memory=pinned
        ).untyped_storage()
        for number, begin in window:
            x = shapes[number]
            place = begin // x.element_size(), x.size(), x.stride()
            tensors.append(torch.empty(0, dtype=x.dtype, device="cpu").set_(memory, *place))
    return tensors


class AnchorWindows:
    """The windows of one device's anchors, and which of them are on the device.

    Args:
        anchors: Anchor of every row, None for rows that have none or have it on the device.
        device: The device of the parameters.
        importances: The same of every row's importance; empty if there are none at all.

    Attributes:
        of_row: Number of every row's window, -1 for rows without.
        addresses: Address of every row's anchor on the device, 0 for rows without.
        importance_addresses: The same of the importances.
    """

    def __init__(
        self, anchors: Sequence[Tensor | None], device: torch.device,
        importances: Sequence[Tensor | None] = (),
    ) -> None:  # fmt: skip
        self._device = device
        kinds = [anchors, importances or [None] * len(anchors)]
        self.of_row = [-1] * len(anchors)
        lengths = {
            row: sum(_aligned(x.nbytes) for x in pair if x is not None)
            for row, pair in enumerate(zip(*kinds, strict=True))
            if any(x is not None for x in pair)
        }
        rows = list(lengths)
        windows = _into_windows(list(lengths.values()))
        self.count = len(windows)
        ends = [begin + lengths[rows[last]] for *_, (last, begin) in windows]
        longest = max([_ALIGNMENT, *ends])
        self._buffers = [
            torch.empty(longest, dtype=torch.uint8, device=device) for _ in windows[:2]
        ]
        self.addresses, self.importance_addresses = addresses = [[0] * len(anchors) for _ in kinds]
        self._copies: list[list[tuple[Tensor, Tensor]]] = []
        for number, window in enumerate(windows):
            buffer = self._buffers[number % 2]
            placed, begin = [], 0
            # All anchors first: as they lie in memory, so that they are one piece, and so are the
            # importances behind them.
            for kind, known in zip(kinds, addresses, strict=True):
                for row in [rows[place] for place, _ in window]:
                    self.of_row[row] = number
                    x = kind[row]
                    if x is not None:
                        known[row] = buffer[begin : begin + x.nbytes].data_ptr()
                        placed.append((begin, x))
                        begin += _aligned(x.nbytes)
            self._copies.append(
                [(buffer[begin : begin + len(x)], x) for begin, x in _in_few_pieces(placed)]
            )
        self._contents: list[int | None] = [None] * len(self._buffers)
        self._upwards = True
        self._stream = None
        self._is_aside = False
        if device.type != "cpu":
            self._stream = torch.Stream(device)
            self.lend(self._buffers)
            # The buffers' memory may have been another tensor's, which queued work still reads.
            self.follow()
        # Events of each buffer: it was filled, it was read for the last time.
        self._filled: list[torch.Event | None] = [None] * len(self._buffers)
        self._read: list[torch.Event | None] = [None] * len(self._buffers)
        self._pending: torch.Event | None = None

    def forget(self) -> None:
        """Drops the windows on the device, because the anchors were written."""
        self._contents = [None] * len(self._buffers)

    def order(self) -> list[int]:
        """Returns the windows in the order of the next pass."""
        upwards, self._upwards = self._upwards, not self._upwards
        return list(range(self.count))[:: 1 if upwards else -1]

    def fetch(self, number: int) -> None:
        """Copies a window, on the side stream, for which the current stream waits."""
        place = number % 2
        if self._contents[place] != number:
            with _ranges.record("dgg.prefetch"), self.aside():
                read = self._read[place]
                if self._stream is not None and read is not None:
                    self._stream.wait_event(read)
                for target, source in self._copies[number]:
                    target.copy_(source, non_blocking=True)
                self._filled[place] = self._mark()
            self._contents[place] = number
        event = self._filled[place]
        if event is not None:
            torch.accelerator.current_stream(self._device).wait_event(event)

    def done(self, number: int) -> None:
        """Notes that the work queued on the current stream reads a window for the last time."""
        if self._stream is not None:
            current = torch.accelerator.current_stream(self._device)
            self._read[number % 2] = current.record_event()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Returns a context in which work goes to the side stream; contexts may be nested."""
        # Up to torch 2.10 a stream that is entered twice raises.
        if self._stream is None or self._is_aside:
            yield
            return
        self._is_aside = True
        try:
            with self._stream:
                yield
        finally:
            self._is_aside = False

    def follow(self) -> None:
        """Makes the side stream wait for the work queued on the current stream."""
        if self._stream is not None:
            current = torch.accelerator.current_stream(self._device)
            self._stream.wait_event(current.record_event())

    def lend(self, tensors: Iterable[Tensor]) -> None:
        """Keeps the memory of tensors from being reused before the side stream is done with it."""
        if self._stream is not None:
            for x in tensors:
                x.record_stream(self._stream)

    def leave(self) -> None:
        """Notes work on the side stream that `join` is to wait for."""
        self._pending = self._mark()

    def join(self) -> None:
        """Makes the current stream wait for the work noted by `leave`."""
        if self._pending is not None:
            torch.accelerator.current_stream(self._device).wait_event(self._pending)
            self._pending = None

    def _mark(self) -> torch.Event | None:
        return None if self._stream is None else self._stream.record_event()


def _in_few_pieces(anchors: Sequence[tuple[int, Tensor]]) -> list[tuple[int, Tensor]]:
    """Returns the bytes of dense anchors and where they go in the window, one copy for each.

    Anchors that lie side by side, as they will lie in the window, are one piece.
    """
    pieces: list[tuple[int, torch.UntypedStorage, int, int]] = []
    for begin, x in anchors:
        memory, first = x.untyped_storage(), int(x.storage_offset()) * x.element_size()
        if not x.nbytes:
            continue
        if pieces:
            start, piece, source, _ = pieces[-1]
            if piece.data_ptr() == memory.data_ptr() and first - source == begin - start:
                pieces[-1] = start, piece, source, first + x.nbytes - source
                continue
        pieces.append((begin, memory, first, x.nbytes))
    return [
        # The anchors may be on another GPU.
        (begin, torch.empty(0, dtype=torch.uint8, device=memory.device).set_(
            memory, first, (length,), (1,)
        ))
        for begin, memory, first, length in pieces
    ]  # fmt: skip
