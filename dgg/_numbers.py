# SPDX-License-Identifier: BSD-3-Clause
"""Numbers of Python, of numpy, or in arrays and tensors of one element, turned into Python's.

State dicts hold Python's numbers alone, since `torch.load(weights_only=True)` and `json` refuse
numpy's. numpy is not imported: any object with a method `item()` counts as one of its scalars.
"""

from __future__ import annotations

import operator
from typing import Any

__all__ = ["as_float", "as_int", "plain", "shown"]


def plain(name: str, value: Any) -> Any:
    """The element of a scalar, or of an array or tensor of one element; all else as it is.

    Raises:
        TypeError: if there are several elements, or none.
    """
    item = getattr(value, "item", None)
    if not callable(item):
        return value
    try:
        return item()
    except (TypeError, ValueError, RuntimeError) as error:
        # numpy and torch say it with different types; none of them names the parameter.
        raise TypeError(f"{name} must be one number, got {shown(value)}: {error}") from None


def as_int(name: str, value: Any) -> int:
    """An int of Python from an integer of any library; floats and bools are refused.

    Raises:
        TypeError: if it is no integer.
    """
    number = plain(name, value)
    if not isinstance(number, bool):
        try:
            return operator.index(number)
        except TypeError:
            pass
    raise TypeError(f"{name} must be an int, got {shown(value)}")


def as_float(name: str, value: Any) -> float:
    """A float of Python from a real number of any library; bools and strings are refused.

    Raises:
        TypeError: if it is no real number.
        ValueError: if it is finite and too large for a float.
    """
    number = plain(name, value)
    if isinstance(number, bool) or not (
        hasattr(type(number), "__float__") or hasattr(type(number), "__index__")
    ):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    try:
        return float(number)
    except OverflowError:
        raise ValueError(f"{name} is too large, got {shown(value)}") from None


def shown(value: Any) -> str:
    """A short `repr` for an error message, whatever the value is."""
    try:
        text = repr(value)
    except Exception:  # an int of too many digits, or a __repr__ that is broken
        text = f"an object of type {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:97]}..."
