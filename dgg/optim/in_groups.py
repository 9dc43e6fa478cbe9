# SPDX-License-Identifier: BSD-3-Clause
"""Options that are entries of the parameter groups, and no attributes of the optimizer."""

from __future__ import annotations

from typing import Any

from dgg import _arguments


class InGroups:
    """Refuses ``opt.alpha = 0.1``, which would set an attribute that no step reads.

    It is a descriptor and no ``__setattr__``, which every attribute that a step sets would pay for.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self.__doc__ = f'Set ``group["{name}"]`` in ``param_groups``; an attribute is refused.'

    def __get__(self, opt: Any, owner: Any = None) -> Any:
        """Raises an AttributeError, as if there were nothing of this name."""
        if opt is None:
            return self
        raise AttributeError(
            f"{type(opt).__name__} has no attribute {self._name!r}; "
            f"read opt.param_groups[0][{self._name!r}]"
        )

    def __set__(self, opt: Any, value: Any) -> None:
        """Raises an AttributeError that says where to set it."""
        raise AttributeError(
            f"an attribute {self._name!r} of {type(opt).__name__} would change no step: set it in "
            f"the groups, for group in opt.param_groups: group[{self._name!r}] = {value!r}"
        )


def refuse_attributes(cls: type) -> None:
    """Makes setting an option on an optimizer of this class, instead of in its groups, an error."""
    # A subclass may have a seed of its own; the others are no arguments.
    own = ("seed", "draw_index", "task_index", "importance_mean", "importance_draw")
    for name in _arguments.GUIDANCE_OPTIONS:
        if name not in own:
            # Not in the class, so that type checkers see no such attribute either.
            setattr(cls, name, InGroups(name))
