# SPDX-License-Identifier: BSD-3-Clause
"""Small host arrays on their way to a device, also inside of a captured graph; nobody waits."""

from __future__ import annotations

import torch
from torch import Tensor


class Uploads:
    """Small host arrays on their way to a device: sent when they change, never waited for.

    A host buffer is pinned where the device has pinned memory; torch's allocator keeps it until
    the copy has happened. Inside a CUDA graph the copy becomes a node, which reads the buffer at
    every replay: what a graph reads is apart from what other steps send, in both memories, and is
    kept for good. As pinned memory cannot be had during a capture, it is made ready before.

    Args:
        device: Where the arrays go.
        capturable: Whether steps may be captured.
    """

    def __init__(self, device: torch.device, capturable: bool = False) -> None:
        self.device = device
        self._capturable = capturable
        # By name: what was sent and where to; the same for the next capture and of the last one.
        self._sent: dict[str, tuple[Tensor, Tensor]] = {}
        self._spare: dict[str, tuple[Tensor, Tensor]] = {}
        self._captured: dict[str, tuple[Tensor, Tensor]] = {}
        # What earlier graphs read.
        self._kept: list[tuple[Tensor, Tensor]] = []

    def send(self, name: str, values: Tensor) -> Tensor:
        """Returns ``values`` (CPU, contiguous) on the device, in memory that is the name's own.

        Args:
            name: What the array is; a later one of this name takes the same memory.
            values: The array; it is copied before this returns and may be reused.

        Raises:
            RuntimeError: A capture needs what no step before it has made room for.
        """
        if capturing(self.device):
            return self._record(name, values)
        if self._capturable and not _alike(self._spare.get(name), values):
            self._spare[name] = self._pinned(values), self._target(values)
        known = self._sent.get(name)
        if not _alike(known, values):
            target = self._target(values)
        elif torch.equal(known[0], values):
            return known[1]
        else:
            target = known[1]
        staged = self._pinned(values)
        staged.copy_(values)
        target.copy_(staged, non_blocking=True)
        self._sent[name] = staged, target
        return target

    def _record(self, name: str, values: Tensor) -> Tensor:
        """Makes the copy a node of the graph that is being captured.

        Where a graph begins is not known, so there is one node more rather than one too few: the
        same values are sent again, from the same memory.
        """
        recorded = self._captured.get(name)
        if not _alike(recorded, values) or not torch.equal(recorded[0], values):
            spare = self._spare.pop(name, None)
            if not _alike(spare, values):
                raise RuntimeError(
                    f"what a step needs to know of its {name} changed during a capture and there "
                    "is no memory to send it from; run a step outside of the graph before each "
                    "capture"
                )
            if recorded is not None:
                self._kept.append(recorded)
            spare[0].copy_(values)
            self._captured[name] = recorded = spare
        staged, target = recorded
        target.copy_(staged, non_blocking=True)
        return target

    def _pinned(self, like: Tensor) -> Tensor:
        return torch.empty_like(like, pin_memory=self.device.type != "cpu")

    def _target(self, like: Tensor) -> Tensor:
        return torch.empty_like(like, device=self.device, pin_memory=False)


def _alike(known: tuple[Tensor, Tensor] | None, values: Tensor) -> bool:
    return known is not None and known[0].shape == values.shape


def without_waiting(x: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor of the host on a device; nobody waits for the copy."""
    if device.type == "cpu":
        return x
    return x.pin_memory().to(device, non_blocking=True)


def capturing(device: torch.device) -> bool:
    """Returns whether work on ``device`` is being recorded into a graph instead of run."""
    # Before its first use of a device torch has no stream, and without a driver it raises if asked.
    return (
        device.type == "cuda"
        and torch.cuda.is_initialized()
        and torch.cuda.is_current_stream_capturing()
    )
