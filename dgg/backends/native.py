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
import collections
import ctypes
import functools
import re
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dgg.backends.libraries import FOLDER

# First and last release of torch whose declarations of these functions were read.
_READ = ((2, 10), (2, 15))
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

        def function(name, result, *arguments):
            made = getattr(library, name)
            made.argtypes, made.restype = arguments, result
            return made

        self.possible = function("dgg_gather_possible", flag)
        self.python = function("dgg_python", None, number, number, ctypes.c_uint64, *[address] * 2)
        self.watch_params = function(
            "dgg_watch_params", number, number, address, number, address, number
        )
        self.watch_dicts = function("dgg_watch_dicts", number, number, address, number)
        self.same_dicts = function("dgg_same_dicts", flag, number)
        self.unmoved = function("dgg_unmoved", flag, number)
        self.begin = function("dgg_gather", number, number, number, *[address] * 7, flag)
        self.end = function("dgg_gather_end", number, number, number, address, flag)


class NativeGradients:
    """What one list of parameters brings to a step: its gradients and versions.

    Args:
        library: The native functions.
        handle: A watch whose first tensors are the parameters; must outlive this.
        addresses: int64 [n], receives the gradients' addresses.
        replay_addresses: int64 [n], receives the replay gradients' addresses.
        distances: float64 [n], -1 is written where the parameter or its anchor was changed.
        usual: For each parameter whether a gradient of its dtype and order (contiguous, or of the
            very strides) can be worked on as it is.
        row_major: The same where elements are counted in row-major order; ``usual`` if None.

    Attributes:
        versions: The parameters' versions; see `begin`.
    """

    def __init__(
        self,
        library: Library,
        handle: int,
        addresses: Tensor,
        replay_addresses: Tensor,
        distances: Tensor,
        usual: Sequence[bool],
        row_major: Sequence[bool] | None = None,
    ) -> None:
        count = len(usual)
        self._usual = bytes(usual), bytes(usual if row_major is None else row_major)
        self._odd = array.array("q", bytes(8 * (count + 1)))
        self._memory = addresses, replay_addresses, distances
        self.versions = array.array("q", bytes(8 * count))
        versions = self.versions.buffer_info()[0]
        self._begin = functools.partial(
            library.begin,
            handle,
            count,
            addresses.data_ptr(),
            replay_addresses.data_ptr(),
            versions,
            distances.data_ptr(),
            self._odd.buffer_info()[0],
        )
        self._end = functools.partial(library.end, handle, count, versions)

    def begin(
        self, known: bool, replays: Sequence[Tensor | None] = (), *, row_major: bool = False
    ) -> int:
        """Takes up and keeps the gradients that stand in ``.grad``; reads the versions.

        Args:
            known: ``versions`` are those at which the distances were measured. Where one, or an
                anchor's, has moved the distance is dropped.
            replays: Replay gradients, which the caller keeps; empty if there are none at all.
            row_major: Elements are counted in row-major order in this step.

        Returns:
            How many parameters have a gradient or a replay gradient; negative if a watched tensor
            moved.
        """
        usual = self._usual[row_major]
        if not replays:
            return self._begin(usual, None, known)
        objects = array.array("Q", map(id, replays))
        return self._begin(usual, objects.buffer_info()[0], known)

    def odd(self) -> Sequence[int]:
        """Returns the parameters whose addresses `begin` has left for the caller to find."""
        count = self._odd[0]
        return self._odd[1 : count + 1] if count else ()

    def end(self, *, written: bool) -> None:
        """Lets go of the gradients.

        Args:
            written: Parameters with a gradient were written: bump their versions, which hides
                nothing from autograd, and count that in ``versions``.
        """
        if self._end(written) != 0:
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
    # Dicts and gradients are looked at under Python's lock.
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return None
    try:
        library = Library(str(next(FOLDER.glob("_C.*so"))))
    except (AttributeError, OSError, StopIteration):
        return None
    try:
        places = _places() if library.possible() else None
        if places is None:
            return None
        next_item = ctypes.cast(ctypes.pythonapi.PyDict_Next, ctypes.c_void_p)
        library.python(*places, next_item, id(None))
        return library if agrees(library) else None
    except RuntimeError:  # a mode in which tensors are none, such as FakeTensorMode
        return None


# How far into an object is looked for a word: CPython's tensors and TensorImpl end behind that.
_OBJECT_WORDS, _IMPL_WORDS = 4, 26


def _places() -> tuple[int, int, int] | None:
    """Returns where the words stand that tell what a tensor is, or None if that is not clear.

    Returns:
        Offset in bytes of the pointer to the TensorImpl in a tensor's Python object; offset in a
        TensorImpl of the word that has a bit for lazily negated and one for lazily conjugated;
        these two bits.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        tensors = [torch.zeros(2), torch.nn.Parameter(torch.zeros(3)), torch.zeros(4).double()]
        real, imaginary = torch.zeros(5), torch.zeros(5, dtype=torch.complex64)
        pairs = (real, torch._neg_view(real)), (imaginary, imaginary.conj())
    impl = _only(
        [
            place
            for place in range(_OBJECT_WORDS)
            if all(_words(id(t), _OBJECT_WORDS)[place] == t._cdata for t in tensors)
        ]
    )
    # Only the dispatch keys differ by one bit of their own in either pair, and by none otherwise.
    changed = [
        [x ^ y for x, y in zip(*(_words(t._cdata, _IMPL_WORDS) for t in pair), strict=True)]
        for pair in pairs
    ]
    keys = [
        (place, negated | conjugated)
        for place, (negated, conjugated) in enumerate(zip(*changed, strict=True))
        if negated.bit_count() == 1 == conjugated.bit_count()
        and negated != conjugated
        and not any(
            _words(t._cdata, _IMPL_WORDS)[place] & (negated | conjugated) for t in (*tensors, real)
        )
    ]
    key = _only(keys)
    return None if impl is None or key is None else (8 * impl, 8 * key[0], key[1])


def _words(address: int, count: int) -> list[int]:
    return list((ctypes.c_uint64 * count).from_address(address))


def _only(candidates: list) -> Any:
    return candidates[0] if len(candidates) == 1 else None


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
            torch.zeros(4, 3).t(),
        ]
        for row, param in enumerate(params):
            if row != 1:
                param.grad = torch.ones_like(param)
            for _ in range(row):
                param.add_(1)
        anchor = torch.zeros(5)
        handle = torch.ops.dgg.watch([anchor])
        addresses = torch.zeros(2, len(params), dtype=torch.int64)
        distances = torch.ones(len(params), dtype=torch.float64)
        anchors = [-1] * 5 + [0, -1]
        watch_params(library, handle, params, anchors)
        usual, row_major = [True] * len(params), [p.is_contiguous() for p in params]
        gradients = NativeGradients(library, handle, *addresses, distances, usual, row_major)
        try:
            return (
                _says_the_same(gradients, params, addresses, distances, anchor)
                and _sees_dicts(library, handle)
                and _sees_what_is_exchanged(library, handle, gradients, params)
            )
        finally:
            torch.ops.dgg.unwatch(handle)


def watch_params(
    library: Library, handle: int, params: Sequence[Tensor], anchors: Sequence[int]
) -> None:
    """Lets a watch look at parameters, too, whom it does not keep alive.

    Args:
        library: The native functions.
        handle: The watch.
        params: The parameters; who has the watch keeps them.
        anchors: Of as many of the first parameters: the place of its anchor among the tensors of
            the watch, or -1.

    Raises:
        RuntimeError: One of the parameters has no memory.
    """
    objects, places = array.array("Q", map(id, params)), array.array("q", anchors)
    status = library.watch_params(
        handle, objects.buffer_info()[0], len(params), places.buffer_info()[0], len(anchors)
    )
    if status != 0:
        raise RuntimeError("a parameter without memory cannot be watched")


def watch_dicts(library: Library, handle: int, dicts: Sequence[dict]) -> None:
    """Lets a watch look at dicts, too; who has the watch keeps them, their keys and values."""
    objects = array.array("Q", map(id, dicts))
    library.watch_dicts(handle, objects.buffer_info()[0], len(dicts))


def _says_the_same(
    gradients: NativeGradients, params, addresses: Tensor, distances: Tensor, anchor
) -> bool:
    replays = [None, torch.ones(2, 3), *[None] * (len(params) - 2)]
    if gradients.begin(known=False, replays=replays) != len(params) or list(gradients.odd()):
        return False
    versions = [p._version for p in params]
    expected = [0 if p.grad is None else p.grad.data_ptr() or 1 for p in params]
    if addresses[0].tolist() != expected or list(gradients.versions) != versions:
        return False
    if addresses[1].tolist() != [0 if r is None else r.data_ptr() for r in replays]:
        return False
    gradients.end(written=True)
    bumped = [v + 1 for v in versions]
    if [p._version for p in params] != bumped or list(gradients.versions) != bumped:
        return False
    params[0].add_(1)
    anchor.add_(1)
    params[1].grad = torch.ones(6).view(2, 3).t().contiguous().t()
    if gradients.begin(known=True) != len(params) or list(gradients.odd()) != [1]:
        return False
    gradients.end(written=False)
    if distances.tolist() != [-1.0, 1.0, 1.0, 1.0, 1.0, -1.0, 1.0]:
        return False
    if gradients.begin(known=True, row_major=True) != len(params) or list(gradients.odd()) != [
        1,
        6,
    ]:
        return False
    gradients.end(written=False)
    params[6].grad = torch.ones(3, 4)
    if gradients.begin(known=True) != len(params) or list(gradients.odd()) != [1, 6]:
        return False
    gradients.end(written=False)
    params[1].grad = torch._neg_view(torch.ones(2, 3))
    return gradients.begin(known=True) == len(params) and list(gradients.odd()) == [1, 6]


def _sees_dicts(library: Library, handle: int) -> bool:
    entries = [{"a": object(), "b": object()}, collections.defaultdict(dict)]
    watch_dicts(library, handle, entries)
    same = [library.same_dicts(handle)]
    kept = entries[0].pop("a")
    same.append(library.same_dicts(handle))
    entries[0] |= {"b": entries[0].pop("b"), "a": kept}  # in another order
    same.append(library.same_dicts(handle))
    entries[0] |= {"a": entries[0].pop("a"), "b": entries[0].pop("b")}
    same.append(library.same_dicts(handle))
    entries[1][0] = kept
    same.append(library.same_dicts(handle))
    return list(map(bool, same)) == [True, False, False, True, False]


def _sees_what_is_exchanged(
    library: Library, handle: int, gradients: NativeGradients, params
) -> bool:
    params[1].grad = None
    if not library.unmoved(handle) or gradients.begin(known=True) != len(params) - 1:
        return False
    gradients.end(written=False)
    moved, other = params[0].data, torch.zeros(3)
    params[0].data = moved.clone()
    if library.unmoved(handle) or gradients.begin(known=True) >= 0:
        return False
    params[0].data = moved
    if not library.unmoved(handle):
        return False
    params[0].grad = None  # of which another tensor has no business
    torch.utils.swap_tensors(params[0], other)
    return not library.unmoved(handle) and gradients.begin(known=True) < 0
