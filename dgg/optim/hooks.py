# SPDX-License-Identifier: BSD-3-Clause
"""How `dgg.Guidance` gets into the calls of the optimizer that it guides, beside torch's hooks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from dgg.step.gradients import ReplaySlot


def guided_closure(guidance: Any, closure: Callable[[], Any]) -> Callable[[], Any]:
    """Returns a closure after which the gradients are guided, at every look of one step.

    The gradients exist only after the closure. However often the optimizer looks, it makes one
    step: all looks have its draw and its replay gradients, though a look uses these up.
    """
    slot, journal = guidance._replay, guidance._journal
    draw, replays, evaluated = guidance.param_groups[0]["draw_index"], slot.kept(), False

    def guided() -> Any:
        nonlocal evaluated
        if evaluated:
            slot.restore(replays)
        slot.looking = True
        try:
            loss = closure()
            for group in guidance.param_groups:
                group["draw_index"] = draw
            journal.paused = evaluated  # the first look is the one that is counted
            guidance._edit()
        except BaseException:
            if evaluated:
                slot.clear()  # not once more in the next step
            raise
        finally:
            slot.looking = journal.paused = False
        evaluated = True
        return loss

    return guided


def watch_zero_grad(optimizer: torch.optim.Optimizer, slot: ReplaySlot) -> Callable[[], None]:
    """Tells the slot of every `zero_grad`, for which torch has no hook; returns what ends it.

    The attribute is the instance's: torch leaves it out of copies and pickles.
    """
    attributes, zero_grad = vars(optimizer), optimizer.zero_grad
    former = attributes.get("zero_grad")

    @functools.wraps(zero_grad)
    def watched(*args, **kwargs) -> None:
        zero_grad(*args, **kwargs)
        slot.zero_grad()

    def unwatch() -> None:
        if attributes.get("zero_grad") is watched:  # nobody has put in another one since
            del attributes["zero_grad"]
            if former is not None:
                attributes["zero_grad"] = former

    attributes["zero_grad"] = watched
    return unwatch
