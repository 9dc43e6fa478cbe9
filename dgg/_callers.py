# SPDX-License-Identifier: BSD-3-Clause
"""Who is calling: the one file of the package that looks at frames.

A warning points at the user's own line, however many frames of ours and of others lie between. And
what torch's and other libraries' helpers tell an optimizer by no argument is told by their being
among the callers.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from types import CodeType, FrameType
from typing import Any

# Packages that call an optimizer on a user's behalf: no warning is about a line of theirs.
_BETWEEN = {
    "accelerate", "deepspeed", "dgg", "lightning", "lightning_fabric", "pytorch_lightning",
    "torch", "transformers", "trl",
}  # fmt: skip


def stacklevel() -> int:
    """Returns the level, for a warning issued by who asks, of the innermost frame of the user's."""
    level, frame = 1, sys._getframe(1)
    while _is_between(frame) and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    return level


def _is_between(frame: FrameType) -> bool:
    # By the module's name: files of one package may lie in several folders.
    return str(frame.f_globals.get("__name__")).partition(".")[0] in _BETWEEN


def called_by(module: str, *names: str) -> bool:
    """Returns whether a function (of a class: ``names`` are both) is being run further out."""
    code = _code(module, *names)
    return any(frame.f_code is code for frame in _outwards(sys._getframe(1)))


def called_by_name(*names: str) -> bool:
    """Returns whether a function of one of these names, of any module, is being run further out."""
    return any(frame.f_code.co_name in names for frame in _outwards(sys._getframe(1)))


def calls_of(*functions: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Yields those of some functions that are being run, and their local variables.

    Args:
        functions: Module and name of each, of a method the class' name between them. Modules that
            are not imported, and names that are not there, are nobody's.

    Yields:
        The function as it was given, and its local variables; the innermost call first.
    """
    known = {id(_code(*function)): function for function in functions}
    for frame in _outwards(sys._getframe(1)):
        if (function := known.get(id(frame.f_code))) is not None:
            yield function, frame.f_locals


def methods(name: str | None = None) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    """Yields ``self`` and the local variables of every method being run, the innermost first.

    Args:
        name: Only of methods called so; None for all.
    """
    for frame in _outwards(sys._getframe(1)):
        if name in (None, frame.f_code.co_name) and "self" in (local := frame.f_locals):
            yield local["self"], local


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        # Asked before the frame is handed out: a generator's that is not running has none.
        outer = frame.f_back
        yield frame
        frame = outer


def _code(module: str, *names: str) -> CodeType | None:
    function: Any = sys.modules.get(module)
    for name in names:
        function = getattr(function, name, None)
    return getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
