# SPDX-License-Identifier: BSD-3-Clause
"""Where `ReplayBuffer.batches()` is in a data set."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from dgg.replay.drawing import Draws


@dataclasses.dataclass
class _Pass:
    """How far `batches()` is: after so many batches, in so many passes over a data set."""

    __module__ = "dgg.replay"  # as pickled buffers name it

    length: int  # of the data set
    steps: int | None  # batches in all, or None for a single pass
    made: int = 0  # batches
    passes: int = 0  # begun
    order: list[int] = dataclasses.field(default_factory=list)
    left: int = 0  # the first so many of `order` are still to come, the last of them next
    loaded: bool = False  # from a state, and not continued yet

    def over(self) -> bool:
        """Whether there is no further batch."""
        if self.steps is None:
            return self.passes > 0 and not self.left
        return self.made >= self.steps

    def check_continued(self, length: int, steps: int | None) -> None:
        """Raises a ValueError if a call with these arguments does not continue this pass."""
        for name, value, then in (
            ("len(dataset)", length, self.length),
            ("steps", steps, self.steps),
        ):
            if value != then:
                raise ValueError(
                    f"the state loaded is of a pass with {name} = {then}, after {self.made} "
                    f"batches, and this call has {value}: continue with the same (steps counts "
                    "all batches, those made before included), or begin anew with resume=False"
                )

    def deal(self, count: int, dataset: Sequence[Any], draws: Draws) -> tuple[list[int], _Pass]:
        """Deals `count` indices of the data set, fewer at the end of a single pass.

        Returns:
            The indices, and where the pass is after their batch. This one does not change, so that
            it stays true if the batch fails.
        """
        order, left, passes = self.order, self.left, self.passes
        indices: list[int] = []
        while len(indices) < count:
            if not left:
                if self.steps is None and passes:
                    break
                if not len(dataset):
                    raise ValueError("the data set has become empty")
                order = list(range(len(dataset)))
                draws.rng.shuffle(order)
                left, passes = len(order), passes + 1
            taken = min(left, count - len(indices))
            indices += reversed(order[left - taken : left])
            left -= taken
        after = _Pass(self.length, self.steps, self.made + 1, passes, order, left)
        return indices, after

    def state(self) -> dict[str, Any]:
        """Returns what a state dict says of the pass."""
        return {
            "length": self.length,
            "steps": self.steps,
            "made": self.made,
            "passes": self.passes,
            "order": self.order[: self.left],
        }
