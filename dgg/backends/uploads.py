# SPDX-License-Identifier: BSD-3-Clause
"""Asynchronous uploads of small host arrays to a device, also inside of a captured graph."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor


class Uploads:
    """Small host arrays that are uploaded asynchronously when they change.

    A host buffer is pinned where the device has pinned memory; torch's allocator keeps it until
    the copy has happened. Inside a CUDA graph the copy becomes a node, which reads the buffer at
    every replay. So a graph has buffers of its own, on the host and on the device, which are kept
    for good. Pinned memory cannot be allocated during a capture, so it is allocated before.

    Args:
        device: Where the arrays go.
        capturable: Whether steps may be captured.
    """

    def __init__(self, device: torch.device, capturable: bool = False) -> None:
        self.device = device
        self._capturable = capturable
        # By name the buffer on the host and that on the device: of the steps outside of a graph,
        # for the next capture, and of the last capture.
        self._sent: dict[str, tuple[Tensor, Tensor]] = {}
        self._spare: dict[str, tuple[Tensor, Tensor]] = {}
        self._captured: dict[str, tuple[Tensor, Tensor]] = {}
        # The buffers of earlier graphs.
        self._kept: list[tuple[Tensor, Tensor]] = []

    def send(self, name: str, values: Tensor) -> Tensor:
        """Returns ``values`` (CPU, contiguous) on the device; each name has memory of its own.

        Args:
            name: Name of the array; a later one of this name takes the same memory.
            values: The array; it is copied before this returns and may be reused.

        Raises:
            RuntimeError: No step before a capture has allocated the memory that it needs.
        """
        if capturing(self.device):
            return self._record(name, values)
        if self._capturable and not _fits(self._spare.get(name), values):
            self._spare[name] = self._pinned(values), self._target(values)
        sent = self._sent.get(name)
        if _fits(sent, values) and torch.equal(sent[0], values):
            return sent[1]
        target = sent[1] if _fits(sent, values) else self._target(values)
        staged = self._pinned(values)
        staged.copy_(values)
        target.copy_(staged, non_blocking=True)
        self._sent[name] = staged, target
        return target

    def _record(self, name: str, values: Tensor) -> Tensor:
        """Makes the copy a node of the graph that is being captured.

        It is not known whether the same graph has copied these values already, so they are copied
        again, from the same memory.
        """
        recorded = self._captured.get(name)
        if not _fits(recorded, values) or not torch.equal(recorded[0], values):
            spare = self._spare.pop(name, None)
            if not _fits(spare, values):
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


def _fits(
    buffers: tuple[Tensor, Tensor] | None, values: Tensor
) -> TypeGuard[tuple[Tensor, Tensor]]:
    return buffers is not None and buffers[0].shape == values.shape


def without_waiting(x: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor of the host on a device, copied asynchronously."""
    if device.type == "cpu":
        return x
    return x.pin_memory().to(device, non_blocking=True)


def capturing(device: torch.device) -> bool:
    """Returns whether work on ``device`` is being recorded into a graph instead of run."""
    # Asking for the stream raises without a driver, and initialises the device.
    return (
        device.type == "cuda"
        and torch.cuda.is_initialized()
        and torch.cuda.is_current_stream_capturing()
    )
