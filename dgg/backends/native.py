# SPDX-License-Identifier: BSD-3-Clause
"""Native reading of gradients and version counters, for optimizers of many small tensors.

Reading ``p.grad``, its address, dtype and order, and the versions, of 448 parameters in Python
costs more than all the arithmetic of their step. csrc/watch.cpp does it in one call, with functions
of torch that are not in its stable interface. So this file compares their results with Python's
before their first use, and uses them only in releases of torch whose declarations are known.
Elsewhere Python reads, which only costs time.
"""

from __future__ import annotations

import array
import collections
import ctypes
import functools
import re
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from dgg.backends.libraries import FOLDER

# First and last release of torch whose declarations of these functions were read.
_READ = ((2, 10), (2, 15))


class Library:
    """The native functions. Unlike operators they are called with Python's lock held.

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
            native = getattr(library, name)
            native.argtypes, native.restype = arguments, result
            return native

        self.possible = function("dgg_gather_possible", flag)
        self.python = function("dgg_python", None, number, number, ctypes.c_uint64, *[address] * 2)
        array_and_count = address, number
        self.watch_params = function("dgg_watch_params", number, number, *array_and_count * 2)
        self.watch_dicts = function("dgg_watch_dicts", number, number, address, number)
        self.same_dicts = function("dgg_same_dicts", flag, number)
        self.unmoved = function("dgg_unmoved", flag, number)
        self.begin = function("dgg_gather", number, *[address] * 3, flag)
        self.end = function("dgg_gather_end", number, address, flag)


class NativeGradients:
    """The gradients and versions of one list of parameters.

    Args:
        library: The native functions.
        handle: A watch whose first tensors are the parameters; must outlive this.
        addresses: int64 [n], receives the gradients' addresses.
        replay_addresses: int64 [n], receives the replay gradients' addresses.
        distances: float64 [n], receives -1 where the parameter or its anchor was changed.
        usual: For each parameter whether kernels can take a gradient of its dtype and order
            (contiguous, or of the same strides) as it is.
        row_major: The same where elements are counted in row-major order; ``usual`` if None.

    Attributes:
        versions: The parameters' versions; see `begin`.
    """

    def __init__(
        self, library: Library, handle: int, addresses: Tensor, replay_addresses: Tensor,
        distances: Tensor, usual: Sequence[bool], row_major: Sequence[bool] | None = None,
    ) -> None:  # fmt: skip
        count = len(usual)
        self._usual = bytes(usual), bytes(usual if row_major is None else row_major)
        self._odd = array.array("q", bytes(8 * (count + 1)))
        self._memory = addresses, replay_addresses, distances
        self.versions = array.array("q", bytes(8 * count))
        # The struct `Gathered` of csrc/watch.cpp: converting every field at every call would cost
        # more than the call.
        self._fields = array.array("q", (
            handle, count, addresses.data_ptr(), replay_addresses.data_ptr(),
            self.versions.buffer_info()[0], distances.data_ptr(), self._odd.buffer_info()[0],
        ))  # fmt: skip
        self._address = ctypes.c_void_p(self._fields.buffer_info()[0])
        self._library = library

    def begin(
        self, measured: bool, replays: Sequence[Tensor | None] = (), *, row_major: bool = False
    ) -> int:
        """Keeps the gradients in ``.grad``, and reads their addresses and the versions.

        Args:
            measured: The distances were measured at ``versions``. Where the version of a parameter
                or of its anchor has changed since, the distance is dropped.
            replays: Replay gradients, which the caller keeps; empty if there are none at all.
            row_major: Elements are counted in row-major order in this step.

        Returns:
            How many parameters have a gradient or a replay gradient; negative if a watched tensor
            moved.
        """
        usual = self._usual[row_major]
        if not replays:
            return self._library.begin(self._address, usual, None, measured)
        objects = array.array("Q", map(id, replays))
        return self._library.begin(self._address, usual, objects.buffer_info()[0], measured)

    def odd(self) -> Sequence[int]:
        """Returns the parameters whose gradients' addresses the caller has to enter."""
        count = self._odd[0]
        return self._odd[1 : count + 1] if count else ()

    def end(self, *, written: bool) -> None:
        """Releases the gradients.

        Args:
            written: Parameters with a gradient were written: move their version counters, which
                tells autograd, and ``versions``.
        """
        if self._library.end(self._address, written) != 0:
            raise RuntimeError("a parameter's version counter cannot be moved: inference tensor?")


@functools.cache
def load() -> Library | None:
    """Returns the native functions, or None if they cannot be relied on."""
    release = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if release is None or not _READ[0] <= tuple(map(int, release.groups())) <= _READ[1]:
        return None
    # Dicts and gradients are read under Python's lock.
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
    except RuntimeError:  # a mode without real tensors, such as FakeTensorMode
        return None


# Words of a tensor's Python object and of its TensorImpl that are searched; both are longer.
_OBJECT_WORDS, _IMPL_WORDS = 4, 26


def _places() -> tuple[int, int, int] | None:
    """Returns where a tensor's words are that native code reads, or None if they are not found.

    They are the offset in bytes of the pointer to the TensorImpl in a tensor's Python object, the
    offset in a TensorImpl of the word with the bits for lazy negation and conjugation, and these
    two bits.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        tensors = [torch.zeros(2), torch.nn.Parameter(torch.zeros(3)), torch.zeros(4).double()]
        real, imaginary = torch.zeros(5), torch.zeros(5, dtype=torch.complex64)
        pairs = (real, torch._neg_view(real)), (imaginary, imaginary.conj())
    pointers = [
        place
        for place in range(_OBJECT_WORDS)
        if all(_words(id(t), _OBJECT_WORDS)[place] == t._cdata for t in tensors)
    ]
    # Only the word of the dispatch keys differs within both pairs, and by one bit each.
    changed = [
        [x ^ y for x, y in zip(*(_words(t._cdata, _IMPL_WORDS) for t in pair), strict=True)]
        for pair in pairs
    ]
    plain = [_words(t._cdata, _IMPL_WORDS) for t in (*tensors, real)]
    keys = [
        (place, negated | conjugated)
        for place, (negated, conjugated) in enumerate(zip(*changed, strict=True))
        if negated.bit_count() == 1 == conjugated.bit_count()
        and negated != conjugated
        and not any(words[place] & (negated | conjugated) for words in plain)
    ]
    if len(pointers) != 1 or len(keys) != 1:
        return None
    return 8 * pointers[0], 8 * keys[0][0], keys[0][1]


def _words(address: int, count: int) -> list[int]:
    return list((ctypes.c_uint64 * count).from_address(address))


def agrees(library: Library) -> bool:
    """Returns whether the native functions say of some tensors what Python says."""
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        params = [
            torch.zeros(3), torch.zeros(2, 3), torch.zeros(()), torch.zeros(0, 2),
            torch.zeros(4, dtype=torch.float64), torch.zeros(5).requires_grad_(),
            torch.zeros(4, 3).t(),
        ]  # fmt: skip
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
        gradients = NativeGradients(
            library, handle, addresses[0], addresses[1], distances, usual, row_major
        )
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
    """Adds parameters to a watch, which does not keep them alive.

    Args:
        library: The native functions.
        handle: The watch.
        params: The parameters; the watch's owner keeps them.
        anchors: Of the first parameters: the place of each one's anchor among the tensors of the
            watch, or -1.

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
    """Adds dicts to a watch; the watch's owner keeps them, their keys and values."""
    objects = array.array("Q", map(id, dicts))
    library.watch_dicts(handle, objects.buffer_info()[0], len(dicts))


def _says_the_same(
    gradients: NativeGradients, params, addresses: Tensor, distances: Tensor, anchor
) -> bool:
    replays = [None, torch.ones(2, 3), *[None] * (len(params) - 2)]
    if gradients.begin(measured=False, replays=replays) != len(params) or list(gradients.odd()):
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
    if gradients.begin(measured=True) != len(params) or list(gradients.odd()) != [1]:
        return False
    gradients.end(written=False)
    if distances.tolist() != [-1.0, 1.0, 1.0, 1.0, 1.0, -1.0, 1.0]:
        return False
    present = gradients.begin(measured=True, row_major=True)
    if present != len(params) or list(gradients.odd()) != [1, 6]:
        return False
    gradients.end(written=False)
    params[6].grad = torch.ones(3, 4)
    if gradients.begin(measured=True) != len(params) or list(gradients.odd()) != [1, 6]:
        return False
    gradients.end(written=False)
    params[1].grad = torch._neg_view(torch.ones(2, 3))
    return gradients.begin(measured=True) == len(params) and list(gradients.odd()) == [1, 6]


def _sees_dicts(library: Library, handle: int) -> bool:
    entries: list[dict] = [{"a": object(), "b": object()}, collections.defaultdict(dict)]
    watch_dicts(library, handle, entries)
    answers = [library.same_dicts(handle)]
    value = entries[0].pop("a")
    answers.append(library.same_dicts(handle))
    entries[0] |= {"b": entries[0].pop("b"), "a": value}  # in another order
    answers.append(library.same_dicts(handle))
    entries[0] |= {"a": entries[0].pop("a"), "b": entries[0].pop("b")}
    answers.append(library.same_dicts(handle))
    entries[1][0] = value
    answers.append(library.same_dicts(handle))
    return list(map(bool, answers)) == [True, False, False, True, False]


def _sees_what_is_exchanged(
    library: Library, handle: int, gradients: NativeGradients, params
) -> bool:
    params[1].grad = None
    if not library.unmoved(handle) or gradients.begin(measured=True) != len(params) - 1:
        return False
    gradients.end(written=False)
    moved, other = params[0].data, torch.zeros(3)
    params[0].data = moved.clone()
    if library.unmoved(handle) or gradients.begin(measured=True) >= 0:
        return False
    params[0].data = moved
    if not library.unmoved(handle):
        return False
    params[0].grad = None  # swap_tensors() would move it to the other tensor
    torch.utils.swap_tensors(params[0], other)
    return not library.unmoved(handle) and gradients.begin(measured=True) < 0
