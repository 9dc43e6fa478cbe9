# SPDX-License-Identifier: BSD-3-Clause
"""Checks whether tensors still have their memory, natively where the library can."""

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

    It keeps the state's tensors alive, so that an equal address means the same memory. It keeps
    only the Python objects of parameters: `torch.utils.swap_tensors` and `to_empty` demand that
    nobody else refers to what is inside.

    Args:
        params: Parameters.
        tensors: Other tensors.
        anchors: Of the first parameters: the place of each one's anchor among ``tensors``, or -1.
            The versions of anchors are compared, too.
        importances: The same of the importances, which the distances depend on, too; empty if
            there are none.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        tensors: Sequence[Tensor],
        anchors: Sequence[int] = (),
        importances: Sequence[int] = (),
    ) -> None:
        self._params = [sharding.local(p) for p in params]
        tensors = [sharding.local(x) for x in tensors]
        places = [*anchors, *importances]
        self._anchors = [
            (row % len(anchors), tensors[place]) for row, place in enumerate(places) if place >= 0
        ]
        self._dicts: list[tuple[dict, dict]] = []
        self._handle: Any = None  # the number of a native watch
        self._library: native.Library | None = None
        if libraries.cpp_error is None:
            handle = torch.ops.dgg.watch(tensors)
            weakref.finalize(self, torch.ops.dgg.unwatch, handle)
            self._handle, self._library = handle, native.load()
            if self._library is not None:
                native.watch_params(self._library, handle, self._params, places)
        self._tensors = [] if self._handle is not None else [(x, self._place(x)) for x in tensors]
        if self._library is None:
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
        """Returns the parameters whose anchors or importances were written since the last call."""
        versions = [x._version for _, x in self._anchors]
        if versions == self._versions:
            return []
        pairs = zip(self._anchors, self._versions, versions, strict=True)
        self._versions = versions
        return [row for (row, _), before, version in pairs if before != version]

    def keep_dicts(self, dicts: Sequence[dict]) -> None:
        """Keeps dicts alive, with their keys and values, for `same_dicts`."""
        self._dicts = [(each, dict(each)) for each in dicts]
        if self._library is not None:
            native.watch_dicts(self._library, self._handle, dicts)

    def same_dicts(self) -> bool:
        """Returns whether every dict has the keys and values, by identity, of the beginning."""
        if self._library is not None:
            return bool(self._library.same_dicts(self._handle))
        return all(
            [
                len(entry) == len(copy)
                and all([entry.get(key, self) is value for key, value in copy.items()])
                for entry, copy in self._dicts
            ]
        )

    def native_gradients(
        self, params: Sequence[Tensor], *memory: Any
    ) -> native.NativeGradients | None:
        """Returns the `NativeGradients` of the watch's first parameters; None if Python takes them.

        ``memory`` are its arguments after the handle.
        """
        # The ``.grad`` of any other class may not be torch's.
        plain = all([type(p) in (Tensor, torch.nn.Parameter) for p in params])
        if self._library is None or not plain:
            return None
        return native.NativeGradients(self._library, self._handle, *memory)

    @staticmethod
    def _place(x: Tensor) -> tuple:
        order = None if x.is_contiguous() else (x.shape, x.stride())
        return id(x), x.data_ptr(), x.numel(), order, x.dtype
