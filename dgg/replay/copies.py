# SPDX-License-Identifier: BSD-3-Clause
"""Copies of nested examples: containers, tensors, arrays and objects; see `ReplayBuffer`."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections import UserDict, UserList, deque
from collections.abc import Mapping, Set
from typing import Any

import torch

# Values of these types stay as they are: nobody can change them in place.
_ATOMIC = frozenset(
    {type(None), bool, int, float, complex, str, bytes, range, type, torch.dtype, torch.device}
)


def is_array(value: Any) -> bool:
    """Whether this is an array of numpy, which is not imported: whoever has an array has it."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def copied(example: Any, leaves: bool = True) -> Any:
    """A copy as `ReplayBuffer` describes it; without `leaves` only the containers are new."""
    try:
        return _walked(example, leaves)
    except RecursionError:
        # An example may contain itself (a node that knows its parent). deepcopy is slower, but
        # can copy that.
        return copy.deepcopy(example)


def _walked(example: Any, leaves: bool) -> Any:
    kind = type(example)
    if kind in _ATOMIC:
        return example
    if isinstance(example, torch.Tensor):
        # A clone does not keep the whole batch alive, of which the example may be a view.
        return example.detach().clone() if leaves else example
    if kind is dict:
        return {key: _walked(value, leaves) for key, value in example.items()}
    if kind in (list, tuple, set, frozenset):
        if _ATOMIC.issuperset(map(type, example)):  # as token ids are: seven times as fast
            return kind(example)
        return kind([_walked(value, leaves) for value in example])
    if isinstance(example, tuple):
        return _walked_tuple(example, leaves)
    if isinstance(example, (dict, UserDict)):
        return _refilled(example, list(example.items()), kind.__setitem__, leaves)
    if isinstance(example, (list, UserList, deque)):
        return _refilled(example, list(enumerate(example)), kind.__setitem__, leaves)
    if isinstance(example, Set):
        return _tried(copy.copy, example)
    if dataclasses.is_dataclass(example):
        names = [field.name for field in dataclasses.fields(example)]
        parts = [(name, getattr(example, name)) for name in names if hasattr(example, name)]
        return _refilled(example, parts, object.__setattr__, leaves)  # frozen ones, too
    if not leaves:
        return example
    if isinstance(example, Mapping) or (is_array(example) and example.dtype.hasobject):
        return _tried(copy.deepcopy, example)  # a shallow copy may share what is inside
    return _tried(copy.copy, example)


def _walked_tuple(example: tuple[Any, ...], leaves: bool) -> tuple[Any, ...]:
    """A copy of a named tuple or of another subclass of tuple."""
    values = [_walked(value, leaves) for value in example]
    if all(new is old for new, old in zip(values, example, strict=True)):
        return example
    try:
        # Not through the class's own __new__, whose arguments may be others.
        result = tuple.__new__(type(example), values)
    except TypeError:
        return type(example)(values)  # what torch.max returns, for one
    if hasattr(example, "__dict__"):
        result.__dict__.update(example.__dict__)
    return result


def _refilled(example: Any, parts: list[tuple[Any, Any]], put: Any, leaves: bool) -> Any:
    """A shallow copy, in which copies of the parts take their places."""
    copies = [(key, value, _walked(value, leaves)) for key, value in parts]

    def refill(example: Any) -> Any:
        result = copy.copy(example)
        for key, value, new in copies:
            if new is not value:
                put(result, key, new)
        return result

    return _tried(refill, example)


def _tried(way: Any, example: Any) -> Any:
    """A copy, or the object itself where there is none or where a copy would do harm."""
    if hasattr(type(example), "__del__"):
        return example  # the end of the copy would close what both have
    try:
        return way(example)
    except (MemoryError, RecursionError):
        raise
    except Exception:
        return example  # files, locks, generators, ...
