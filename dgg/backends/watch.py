# SPDX-License-Identifier: BSD-3-Clause
"""A look at whether tensors still have their memory, natively where the library can."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dgg import sharding
from dgg.backends import libraries, native


class MemoryWatch:
    """Tells whether tensors still have the memory, size, order and dtype of the beginning.

    Keeps state alive, so that an equal address means the same memory. Of parameters it has nothing
    but their Python objects: whoever exchanges what is inside of one (`torch.utils.swap_tensors`,
    `to_empty`) asks that nobody else has it.

    Args:
        params: Parameters.
        tensors: Other tensors.
        anchors: For each of as many of the first parameters the place of its anchor among
            ``tensors``, or -1: their versions are looked at, too.
    """

    def __init__(
        self, params: Sequence[Tensor], tensors: Sequence[Tensor], anchors: Sequence[int] = ()
    ) -> None:
        self._params = [sharding.local(p) for p in params]
        tensors = [sharding.local(x) for x in tensors]
        self._anchors = [(row, tensors[place]) for row, place in enumerate(anchors) if place >= 0]
        self._dicts: list[tuple[dict, dict]] | None = None
        self._handle: int | None = None
        self._library: native.Library | None = None
        if libraries.cpp_error is None:
            self._handle = torch.ops.dgg.watch(tensors)
            weakref.finalize(self, torch.ops.dgg.unwatch, self._handle)
            self._library = native.load()
        self._tensors = [] if self._handle is not None else [(x, self._place(x)) for x in tensors]
        if self._library is not None:
            native.watch_params(self._library, self._handle, self._params, anchors)
        else:
            self._tensors += [(p, self._place(p)) for p in self._params]
        self._versions = [x._version for _, x in self._anchors]

    def unmoved(self) -> bool:
        """Returns whether nothing moved, changed its size, its order or its dtype."""
        if self._library is not None:
            return bool(self._library.unmoved(self._handle))
        if self._handle is not None and not torch.ops.dgg.unmoved.default(self._handle):
            return False
        return all([self._place(x) == place for x, place in self._tensors])

    def rewritten(self) -> list[int]:
        """Returns which parameters' anchors were written since the last look.

        The native look at the gradients keeps an account of its own.
        """
        now = [x._version for _, x in self._anchors]
        if now == self._versions:
            return []
        changed = [
            row
            for (row, _), old, new in zip(self._anchors, self._versions, now, strict=True)
            if old != new
        ]
        self._versions = now
        return changed

    def keep_dicts(self, dicts: Sequence[dict]) -> None:
        """Looks at dicts, too, in `same_dicts`: they, their keys and their values stay alive."""
        self._dicts = [(each, dict(each)) for each in dicts]
        if self._library is not None:
            native.watch_dicts(self._library, self._handle, dicts)

    def same_dicts(self) -> bool:
        """Returns whether every dict has the keys and values, by identity, of the beginning."""
        if self._library is not None:
            return bool(self._library.same_dicts(self._handle))
        return all(
            [
                len(now) == len(before)
                and all([now.get(key, self) is value for key, value in before.items()])
                for now, before in self._dicts
            ]
        )

    def native_gradients(
        self, params: Sequence[Tensor], *memory: Any
    ) -> native.NativeGradients | None:
        """Returns what takes up the gradients of ``params``, or None where Python has to.

        Args:
            params: The first parameters of this watch, in its order.
            memory: What `NativeGradients` takes after the handle.
        """
        if self._library is None or not native.takes(params):
            return None
        return native.NativeGradients(self._library, self._handle, *memory)

    @staticmethod
    def _place(x: Tensor) -> tuple:
        order = None if x.is_contiguous() else (x.shape, x.stride())
        return id(x), x.data_ptr(), x.numel(), order, x.dtype
