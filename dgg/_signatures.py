# SPDX-License-Identifier: BSD-3-Clause
"""Signatures as help() is to print them."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any, TypeVar

_Listed = TypeVar("_Listed", bound=Callable[..., Any])
# Characters of a signature that is printed in one line.
_WIDTH = 72


class _Written(str):
    """A type as it is written in the source; other texts would be printed in quotes."""

    __repr__ = str.__str__


class Listed(inspect.Signature):
    """A signature that prints types as they are written, and long lists an argument per line."""

    def __str__(self) -> str:
        """Returns what help() prints behind the name."""
        pieces: list[str] = []
        for parameter in self.parameters.values():
            if parameter.kind is parameter.KEYWORD_ONLY and "*" not in "".join(pieces):
                pieces.append("*")
            pieces.append(str(parameter))
        result = self.return_annotation
        end = ")" if result is self.empty else f") -> {inspect.formatannotation(result)}"
        line = f"({', '.join(pieces)}{end}"
        if len(line) <= _WIDTH:
            return line
        return "\n".join(["(", *(f"    {piece}," for piece in pieces), end])

    def format(self, **options: Any) -> str:
        """Returns the same, for the help() of Python 3.13 and later."""
        return str(self)


def listed(target: _Listed) -> _Listed:
    """Gives a function, or those of a class, signatures that help() prints well, in place."""
    is_function = isinstance(target, types.FunctionType)
    functions: dict[str, Any] = {"": target} if is_function else dict(vars(target))
    for name, function in functions.items():
        if isinstance(function, types.FunctionType) and (name == "__init__" or name[:1] != "_"):
            now = inspect.signature(function)
            parameters = [
                parameter.replace(annotation=_written(parameter.annotation))
                for parameter in now.parameters.values()
            ]
            result = _written(now.return_annotation)
            vars(function)["__signature__"] = Listed(parameters, return_annotation=result)
    return target


def _written(annotation: Any) -> Any:
    return _Written(annotation) if isinstance(annotation, str) else annotation
