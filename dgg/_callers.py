# SPDX-License-Identifier: BSD-3-Clause
"""Who is calling: the one file of the package that looks at frames.

A warning points at the user's line, however many frames of dgg and other libraries lie between.
And some helpers of torch and of other libraries pass no argument that says what they are doing:
they are recognised among the callers.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from types import CodeType, FrameType
from typing import Any

# Packages that call an optimizer for a user: no warning points at a line of one of these.
_BETWEEN = {
    "accelerate", "avalanche", "axolotl", "deepspeed", "dgg", "lightning", "lightning_fabric",
    "llamafactory", "pytorch_lightning", "sentence_transformers", "swift", "torch", "torchtitan",
    "torchtune", "transformers", "trl",
}  # fmt: skip


def stacklevel() -> int:
    """Returns the ``stacklevel`` at which a warning of the caller points at the user's line."""
    level, frame = 1, sys._getframe(1)
    # By the module's name: files of one package may lie in several folders.
    while str(frame.f_globals.get("__name__")).partition(".")[0] in _BETWEEN and frame.f_back:
        level, frame = level + 1, frame.f_back
    return level


def called_by(module: str, *names: str) -> bool:
    """Returns whether a function is among the callers; a method is named by class and name."""
    code = _code(module, *names)
    return any(frame.f_code is code for frame in _outwards(sys._getframe(1)))


def called_by_name(*names: str) -> bool:
    """Returns whether a function of one of these names, of any module, is among the callers."""
    return any(frame.f_code.co_name in names for frame in _outwards(sys._getframe(1)))


def calls_of(*functions: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Yields the calls of some functions among the callers, the innermost first.

    Args:
        functions: Module and name of each; of a method module, class and name. A module that is
            not imported and a name that does not exist have no calls.

    Yields:
        The function, as in ``functions``, and its local variables.
    """
    by_code = {id(_code(*function)): function for function in functions}
    for frame in _outwards(sys._getframe(1)):
        if (function := by_code.get(id(frame.f_code))) is not None:
            yield function, frame.f_locals


def methods(name: str | None = None) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    """Yields ``self`` and local variables of the methods (of a name) that call, innermost first."""
    for frame in _outwards(sys._getframe(1)):
        if name in (None, frame.f_code.co_name) and "self" in (local := frame.f_locals):
            yield local["self"], local


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        # Read before the frame is yielded: the frame of a suspended generator has no f_back.
        outer = frame.f_back
        yield frame
        frame = outer


def _code(module: str, *names: str) -> CodeType | None:
    function: Any = sys.modules.get(module)
    for name in names:
        function = getattr(function, name, None)
    return getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
