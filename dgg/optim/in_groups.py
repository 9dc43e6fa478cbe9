# SPDX-License-Identifier: BSD-3-Clause
"""Options that are no attributes of the optimizer: entries of its groups, the constructor's own."""

from __future__ import annotations

from typing import Any

from dgg import _arguments
from dgg.step.settings import CONSTRUCTED

# A subclass may have attributes of its own with these names.
_USUAL = ("seed", "backend")


class InGroups:
    """Refuses ``opt.alpha = 0.1``, which would set an attribute that no step reads.

    It is a descriptor and no ``__setattr__``, which every attribute that a step sets would pay for.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._read = f"read opt.param_groups[0][{name!r}]"
        self._set = f"set it in the groups, for group in opt.param_groups: group[{name!r}] ="
        if name in CONSTRUCTED:
            self._read, self._set = "the constructor takes it", f"construct it with {name} ="
        self.__doc__ = f"An attribute {name} is refused: {self._set} ..."

    def __get__(self, opt: Any, owner: Any = None) -> Any:
        """Raises an AttributeError, as if there were nothing of this name."""
        if opt is None:
            return self
        if self._name in vars(opt):  # a subclass' own
            return vars(opt)[self._name]
        kind = type(opt).__name__
        raise AttributeError(f"{kind} has no attribute {self._name!r}; {self._read}")

    def __set__(self, opt: Any, value: Any) -> None:
        """Raises an AttributeError that says where to set it."""
        if self._name in _USUAL and not type(opt).__module__.startswith("dgg."):
            vars(opt)[self._name] = value
            return
        raise AttributeError(
            f"an attribute {self._name!r} of {type(opt).__name__} would change no step: "
            f"{self._set} {value!r}"
        )


def refuse_attributes(cls: type) -> None:
    """Makes setting an option on an optimizer of this class, instead of in its groups, an error."""
    no_arguments = ("draw_index", "task_index", "importance_mean", "importance_draw")
    for name in (*_arguments.GUIDANCE_OPTIONS, *CONSTRUCTED):
        if name not in no_arguments:
            # Not in the class, so that type checkers see no such attribute either.
            setattr(cls, name, InGroups(name))
