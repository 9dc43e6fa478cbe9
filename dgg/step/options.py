# SPDX-License-Identifier: BSD-3-Clause
"""The options in force at a step: read from the groups, checked where one changed."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from dgg import _arguments

# The draw index of the last step that a number of 64 bits can count.
_LAST = (1 << 63) - 1
# Entries of a group that are not compared here: others look at them, or they change at every step.
_MOVING = ("params", "param_names", "draw_index")
_COMPARED = [name for name in _arguments.GUIDANCE_OPTIONS if name != "draw_index"]


class Options:
    """The options in force at one step, read from the groups and checked when they change.

    Attributes:
        derived: Values that other modules computed from the options, by name; emptied as soon as
            an option may have changed.
    """

    def __init__(self) -> None:
        self.derived: dict[str, Any] = {}
        self._checked: Any = None
        self._draw: object = object()  # the draw index of captured steps, a tensor
        # The keys of every group, a function that reads its options, and their values; empty if a
        # value could change and stay the same object.
        self._known: list[tuple[list[str], Callable[[Mapping[str, Any]], tuple], tuple]] = []

    def read(self, groups: Sequence[dict[str, Any]]) -> Mapping[str, Any]:
        """Returns the first group as the source of the optimizer-wide options, all checked."""
        first = groups[0]
        # draw_index moves every step. Tensors are compared by value: a schedule may write into one.
        draw = first["draw_index"]
        valid = draw is self._draw or (type(draw) is int and 0 <= draw < _LAST)
        # A loop: comprehensions and generators cost more than the one group of most optimizers.
        for group in groups:
            valid = valid and group["draw_index"] is draw
        if not valid:
            self._read_draws(groups)
        if self._unchanged(groups):
            return first
        self.derived.clear()
        values = [[_arguments.comparable(group[name]) for name in _COMPARED] for group in groups]
        if values != self._checked:
            for number, group in enumerate(groups):
                _arguments.check_agreement(number, group, first)
                _arguments.check_options({n: group[n] for n in _arguments.GUIDANCE_OPTIONS})
            for group in groups:
                _arguments.make_plain(group)
            self._checked = values
        self._keep(groups)
        return first

    def _unchanged(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Returns whether all options, the update rule's too, are the objects kept last."""
        if len(groups) != len(self._known):
            return False
        for number, group in enumerate(groups):
            keys, options_of, values = self._known[number]
            # A key that was removed or added counts as a change.
            if [*group] != keys or not all(map(operator.is_, options_of(group), values)):
                return False
        return True

    def _keep(self, groups: Sequence[Mapping[str, Any]]) -> None:
        self._known = []
        for group in groups:
            options = {name: value for name, value in group.items() if name not in _MOVING}
            read = operator.itemgetter(*options)
            self._known.append((list(group), read, tuple(options.values())))
        if not all(_is_fixed(values) for _, _, values in self._known):
            self._known = []

    def _read_draws(self, groups: Sequence[dict[str, Any]]) -> None:
        for number, group in enumerate(groups):
            _arguments.check_options({"draw_index": group["draw_index"]})
            _arguments.check_agreement(number, {"draw_index": group["draw_index"]}, groups[0])
        draw = groups[0]["draw_index"]
        if isinstance(draw, Tensor):
            self._draw = draw
            return
        for group in groups:
            group["draw_index"] = _arguments.plain("draw_index", draw)


def _is_fixed(value: Any) -> bool:
    """Returns whether ``value`` can only change by becoming another object."""
    if type(value) is tuple:
        return all(map(_is_fixed, value))
    return type(value) in _arguments.PLAIN_TYPES
