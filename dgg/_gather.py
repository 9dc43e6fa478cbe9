# SPDX-License-Identifier: BSD-3-Clause
"""Takes up gradients and version counters natively, for optimizers of many small tensors.

Reading ``p.grad``, its address, dtype and order, and the versions, of 448 parameters in Python
costs more than all the arithmetic of their step. csrc/watch.cpp does it in one call, by functions
of torch that its stable interface does not have. They are therefore tried here before their first
use, against what Python says, and only in releases of torch that are known to have them as they
are declared there; everywhere else nothing is lost but time.
"""

from __future__ import annotations

import array
import ctypes
import functools
import pathlib
import re
from collections.abc import Sequence

import torch
from torch import Tensor

# First and last release of torch whose declarations of these functions were read.
_READ = ((2, 10), (2, 14))
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


class Library:
    """The native functions; called with Python's lock held, unlike operators.

    Args:
        path: The compiled library, which torch has loaded.

    Raises:
        AttributeError: The library has no such functions.
        OSError: It cannot be loaded.
    """

    def __init__(self, path: str) -> None:
        library = ctypes.PyDLL(path)
        number, address, flag = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32
        self.possible = library.dgg_gather_possible
        self.possible.argtypes, self.possible.restype = (), flag
        self.begin = library.dgg_gather
        self.begin.argtypes = (number, number, address, address, address, flag)
        self.begin.restype = number
        self.end = library.dgg_gather_end
        self.end.argtypes = (number, number, address, address, flag, flag)
        self.end.restype = number


class Gather:
    """What one list of parameters brings to a step.

    Args:
        library: The native functions.
        handle: A watch whose first tensors are the parameters; must outlive this.
        addresses: int64 [n], receives the gradients' addresses.
        distances: float64 [n], -1 is written where the parameter was changed.

    Attributes:
        versions: The parameters' versions; see `begin`.
    """

    def __init__(self, library: Library, handle: int, addresses: Tensor, distances: Tensor) -> None:
        count = len(addresses)
        self._memory = addresses, distances
        self.versions = array.array("q", bytes(8 * count))
        places = addresses.data_ptr(), self.versions.buffer_info()[0]
        self._begin = functools.partial(library.begin, handle, count, *places, distances.data_ptr())
        self._end = functools.partial(library.end, handle, count, *places)

    def begin(self, known: bool) -> int:
        """Takes up and keeps the gradients that stand in ``.grad``; reads the versions.

        Args:
            known: ``versions`` are those at which the distances were measured. Where one has moved
                the distance is dropped.

        Returns:
            How many parameters have a gradient; negative if a watched tensor moved or a gradient
            is anything but contiguous and of its parameter's device, dtype and size.
        """
        return self._begin(known)

    def end(self, *, written: bool, ahead: bool) -> None:
        """Lets go of the gradients.

        Args:
            written: Parameters with a gradient were written: bump their versions, which hides
                nothing from autograd.
            ahead: Count that in ``versions``.
        """
        if self._end(written, ahead) != 0:
            raise RuntimeError("a parameter's version counter cannot be moved: inference tensor?")


def takes(params: Sequence[Tensor]) -> bool:
    """Returns whether ``.grad`` of all these is torch's own and not a subclass's."""
    return all([type(p) in _PLAIN_TYPES for p in params])


@functools.cache
def load() -> Library | None:
    """Returns the native functions, or None if they cannot be relied on."""
    release = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if release is None or not _READ[0] <= tuple(map(int, release.groups())) <= _READ[1]:
        return None
    try:
        library = Library(str(next(pathlib.Path(__file__).parent.glob("_C.*so"))))
    except (AttributeError, OSError, StopIteration):
        return None
    try:
        return library if library.possible() and agrees(library) else None
    except RuntimeError:  # a mode in which tensors are none, such as FakeTensorMode
        return None


def agrees(library: Library) -> bool:
    """Returns whether the native functions say of some tensors what Python says."""
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        params = [
            torch.zeros(3),
            torch.zeros(2, 3),
            torch.zeros(()),
            torch.zeros(0, 2),
            torch.zeros(4, dtype=torch.float64),
            torch.zeros(5).requires_grad_(),
        ]
        for row, param in enumerate(params):
            if row != 1:
                param.grad = torch.ones_like(param)
            for _ in range(row):
                param.add_(1)
        handle = torch.ops.dgg.watch(params)
        addresses = torch.zeros(len(params), dtype=torch.int64)
        distances = torch.ones(len(params), dtype=torch.float64)
        gather = Gather(library, handle, addresses, distances)
        try:
            return _says_the_same(gather, params, addresses, distances)
        finally:
            torch.ops.dgg.unwatch(handle)


def _says_the_same(gather: Gather, params, addresses: Tensor, distances: Tensor) -> bool:
    present = [p for p in params if p.grad is not None]
    if gather.begin(known=False) != len(present):
        return False
    versions = [p._version for p in params]
    expected = [0 if p.grad is None else p.grad.data_ptr() or 1 for p in params]
    if addresses.tolist() != expected or list(gather.versions) != versions:
        return False
    gather.end(written=True, ahead=True)
    bumped = [v + (p.grad is not None) for v, p in zip(versions, params, strict=True)]
    if [p._version for p in params] != bumped or list(gather.versions) != bumped:
        return False
    params[0].add_(1)
    params[1].grad = torch.ones(6).view(2, 3).t().contiguous().t()
    if gather.begin(known=True) >= 0 or distances.tolist() != [-1.0] + [1.0] * (len(params) - 1):
        return False
    params[1].grad = None
    moved = params[0].data
    params[0].data = moved.clone()
    return gather.begin(known=True) < 0
