# SPDX-License-Identifier: BSD-3-Clause
"""Brings anchors that are kept off the device to it, window by window, on a stream of its own.

With ``anchor_device="cpu"`` the anchors lie in pinned memory. They are wanted on the steps that
inject and on no others, and the draws say one step ahead which those are. The device holds two
buffers; every anchor belongs to one window, every window to one buffer, so an anchor's address on
the device never changes, and at most two windows are there at a time. A pass over all windows goes
through them in the opposite order of the pass before, which finds the last two still in place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from dgg import _ranges

# Bytes of a buffer; one that a single anchor does not fit is as long as that anchor.
WINDOW = 128 * 2**20
# Anchors begin at multiples of this: what 128-bit accesses need, and more.
_ALIGNMENT = 256


def is_away(anchor: Tensor | None, param: Tensor) -> bool:
    """Returns whether an anchor is kept on another device than its parameter."""
    return anchor is not None and anchor.device != param.device


class Windows:
    """The windows of one device's anchors, and which of them are there.

    Args:
        anchors: Anchor of every row, None for rows that have none or have it on the device.
        device: The device of the parameters.
        size: Bytes of a window.

    Attributes:
        of_row: Number of every row's window, -1 for rows without.
        addresses: Address of every row's anchor on the device, 0 for rows without.
    """

    def __init__(
        self, anchors: Sequence[Tensor | None], device: torch.device, size: int | None = None
    ) -> None:
        size = WINDOW if size is None else size
        self._device = device
        self.of_row = [-1] * len(anchors)
        places: list[list[tuple[int, Tensor, int]]] = []
        used, longest = size, 1
        for row, anchor in enumerate(anchors):
            if anchor is None:
                continue
            length = anchor.numel() * anchor.element_size()
            if not places or (used + length > size and used > 0):
                places.append([])
                used = 0
            places[-1].append((row, anchor, used))
            self.of_row[row] = len(places) - 1
            used += -(-length // _ALIGNMENT) * _ALIGNMENT
            longest = max(longest, used)
        self.count = len(places)
        self._buffers = [
            torch.empty(longest, dtype=torch.uint8, device=device)
            for _ in range(min(2, self.count))
        ]
        self.addresses = [0] * len(anchors)
        self._copies: list[list[tuple[Tensor, Tensor]]] = []
        for number, window in enumerate(places):
            buffer = self._buffers[number % 2]
            copies = []
            for row, anchor, begin in window:
                target = buffer[begin : begin + anchor.numel() * anchor.element_size()]
                # The elements in memory order, which the parameter's kernels walk in.
                flat = _in_memory_order(anchor)
                copies.append((target.view(flat.dtype), flat))
                self.addresses[row] = target.data_ptr()
            self._copies.append(copies)
        self._held: list[int | None] = [None] * len(self._buffers)
        self._upwards = True
        self._stream = None
        self._is_aside = False
        if device.type != "cpu":
            self._stream = torch.Stream(device)
            for buffer in self._buffers:
                buffer.record_stream(self._stream)
            # Their memory may have been another tensor's, which work under way still reads.
            self.follow()
        # Of each buffer: when it was filled, and when it was last read.
        self._filled: list[torch.Event | None] = [None] * len(self._buffers)
        self._read: list[torch.Event | None] = [None] * len(self._buffers)
        self._pending: torch.Event | None = None

    @property
    def bytes(self) -> int:
        """Bytes on the device, whatever the anchors' size."""
        return sum(buffer.numel() for buffer in self._buffers)

    def forget(self) -> None:
        """Takes nothing on the device for current: the anchors were written."""
        self._held = [None] * len(self._buffers)

    def order(self) -> list[int]:
        """Returns the windows in the order of the next pass."""
        numbers = list(range(self.count))
        if not self._upwards:
            numbers.reverse()
        self._upwards = not self._upwards
        return numbers

    def fetch(self, number: int) -> None:
        """Starts bringing a window, on the side stream; whoever reads it calls `wait` first."""
        place = number % 2
        if self._held[place] == number:
            return
        with _ranges.record("dgg.prefetch"), self.aside():
            if self._stream is not None and self._read[place] is not None:
                self._stream.wait_event(self._read[place])
            for target, source in self._copies[number]:
                target.copy_(source, non_blocking=True)
            self._filled[place] = self._mark(self._stream)
        self._held[place] = number

    def wait(self, number: int) -> None:
        """Lets the current stream wait until a window is there."""
        event = self._filled[number % 2]
        if event is not None:
            torch.accelerator.current_stream(self._device).wait_event(event)

    def done(self, number: int) -> None:
        """Notes that what the current stream was given so far reads a window for the last time."""
        if self._stream is not None:
            current = torch.accelerator.current_stream(self._device)
            self._read[number % 2] = self._mark(current)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Within it work goes to the side stream; a context in such a context changes nothing."""
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
        """Lets the side stream wait for all that the current stream was given so far."""
        if self._stream is not None:
            current = torch.accelerator.current_stream(self._device)
            self._stream.wait_event(self._mark(current))

    def lend(self, tensors: Iterable[Tensor]) -> None:
        """Has the memory of tensors that work on the side stream uses reused only after it."""
        if self._stream is not None:
            for x in tensors:
                x.record_stream(self._stream)

    def leave(self) -> None:
        """Notes work on the side stream that `join` is to wait for."""
        self._pending = self._mark(self._stream)

    def join(self) -> None:
        """Lets the current stream wait for the work noted by `leave`."""
        if self._pending is not None:
            torch.accelerator.current_stream(self._device).wait_event(self._pending)
            self._pending = None

    def _mark(self, stream: torch.Stream | None) -> torch.Event | None:
        return None if stream is None else stream.record_event()


def _in_memory_order(x: Tensor) -> Tensor:
    """Returns a dense tensor as one dimension, in the order of its memory."""
    x = torch.view_as_real(x) if x.is_complex() else x
    return x.as_strided((x.numel(),), (1,))
