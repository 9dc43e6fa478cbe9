# SPDX-License-Identifier: BSD-3-Clause
"""Bernoulli draws: which rows inject the guidance at draw k. The same on every rank and backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dgg import _arguments, _philox, backends, reference
from dgg.step import checks
from dgg.step.options import Options
from dgg.step.rule import CERTAIN, threshold


class Decision:
    """The decisions of one step.

    Attributes:
        options: Options of the whole optimizer.
        groups: Every parameter group.
        hyper: Hyper-parameters of every group under the kernels' names.
        index: Draw index k; 0 in a captured step, which reads it on the device.
        replays: Replay gradient of every parameter or None; empty if there are none at all.
        scaling: Scale and verdict of a GradScaler.
        skipped: The step is skipped since gradients are inf or NaN.
        flags: uint8 flags of every device's rows, or None where none of them injects.
        injecting: Any row of any rank may inject.
        draw: The draw as the backends take it.
        strength: Of the first group, for the statistics.
        guarded: alpha="auto": the replay gradients decide how strong the pull is.
        ascends: The guided groups maximize.
        alignment_and_pull: float64 [2] of a guarded step that injects, for the statistics.
        applies: The step changes anything.
        looks_ahead: The update measures the distances that the next step needs.
    """

    replays: Sequence[Tensor | None] = ()
    scaling = backends.Scaling()
    skipped = injecting = guarded = ascends = False
    applies = True
    flags: Sequence[Tensor | None] = ()
    draw: backends.Draw | None = None
    alignment_and_pull: Tensor | None = None

    def __init__(
        self, options: Mapping[str, Any], groups: Sequence[dict], hyper: list[dict], index: int
    ) -> None:
        self.options, self.groups, self.hyper, self.index = options, groups, hyper, index
        self.looks_ahead = options["scaling"]
        self.strength = hyper[0]["strength"] if hyper else 0.0


class Draws:
    """The draws of one optimizer. Seed and draw index are in its groups, for checkpoints."""

    def __init__(self) -> None:
        self.options = Options()
        self._word: tuple[int, int, int] | None = None

    def guard(self, decision: Decision, guided: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Notes in the decision whether alpha is "auto", and whether the guided groups maximize.

        The groups of the options say the latter, unless there are others, ``guided``.
        """
        # The groups of an optimizer under `dgg.Guidance` are not among the watched options.
        ascends = None if guided is None else [group.get("maximize") for group in guided]
        known = self.options.derived.get("guard")
        if known is None or known[0] != ascends:
            groups = decision.groups
            maximize = ascends or [group.get("maximize") for group in groups]
            known = self.options.derived["guard"] = ascends, _arguments.guard_of(groups, maximize)
        maximizes = known[1]
        if maximizes is not None:
            decision.guarded, decision.ascends = True, maximizes
            decision.looks_ahead = False  # the products read all that a distance would save

    def limits(self, groups: Sequence[Mapping[str, Any]]) -> list:
        """Returns the threshold of every group's draws, 0 where nothing can be injected."""
        derived = self.options.derived
        if "limits" not in derived:
            derived["limits"] = [
                threshold(g["alpha"]) if float(g["strength"]) > 0 else 0 for g in groups
            ]
        return derived["limits"]

    def drawn(
        self, decision: Decision, groups: Sequence[int], indices: Sequence[int], index: int
    ) -> int | list[int]:
        """Returns the flags of rows at draw ``index``: one number if all have the same.

        The rows are given by their groups' numbers and their tensor indices j.
        """
        limits = self.limits(decision.groups)
        if not any(limits):
            return 0
        granularity, seed = decision.options["granularity"], decision.options["seed"]
        if granularity == "tensor":
            words = _philox.tensor_words(seed, index, torch.tensor(indices, device="cpu"))
            limit = torch.tensor([limits[group] for group in groups], device="cpu")
            hits = words < limit
            return hits.tolist() if bool(hits.any()) else 0
        if granularity == "step":
            # At α = 1 the step is known without its word.
            sure = all([limit in (0, CERTAIN) for limit in limits])
            word = 0 if sure else self._step_word(seed, index)
            by_group = [reference.INJECT if word < limit else 0 for limit in limits]
        else:
            # Above or below all words the elements' draws are known without drawing.
            by_group = [
                reference.INJECT if limit == CERTAIN else reference.INJECT_ELEMENTS if limit else 0
                for limit in limits
            ]
        if len(set(by_group)) == 1:
            return by_group[0]
        return [by_group[group] for group in groups]

    def flags(self, decision: Decision, rows: backends.Rows, index: int) -> Tensor | None:
        """Returns the uint8 flags of rows at draw ``index``; None if none injects."""
        if not rows.anchored:
            return None
        flags = self.drawn(decision, rows.groups, rows.indices, index)
        if isinstance(flags, int):
            return rows.constant_flags(flags) if flags else None
        # Two places: the flags of the next step are made before those of this step are read.
        return rows.flags(flags, f"flags {index % 2}")

    def _step_word(self, seed: int, index: int) -> int:
        # The look-ahead of step k needs the word of k + 1, and so does the next step.
        if self._word is None or self._word[:2] != (seed, index):
            self._word = (seed, index, _philox.step_word(seed, index))
        return self._word[2]


def hyper_of(opt, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the hyper-parameters of every group, made anew only where an option changed."""
    derived = opt._draws.options.derived
    if "hyper" not in derived:
        opt._rule.check_route(groups[0]["route"])
        derived["hyper"] = [opt._rule.hyper(group) for group in groups]
    return derived["hyper"]


def decide(opt) -> Decision:
    """Returns a step's decision, with all that the groups determine; nothing is changed."""
    opt._replay.check_closed()
    groups = opt.param_groups
    options = opt._draws.options.read(groups)
    index = 0 if opt._settings.capturable else options["draw_index"]
    decision = Decision(options, groups, hyper_of(opt, groups), index)
    opt._draws.guard(decision)
    return decision


def draw(opt, decision: Decision, all_rows: Sequence[backends.Rows]) -> None:
    """Draws for the rows of every device: fills the decision's flags."""
    draws, rows_of_all_ranks = opt._draws, opt._ownership.everywhere()
    if decision.guarded:
        anchored = any(rows.anchored for rows in all_rows)
        shared = rows_of_all_ranks is not None or any(x.reduction is not None for x in all_rows)
        if not checks.has_replay(opt, anchored, shared):
            decision.flags = [None] * len(all_rows)
            settle(decision, False)
            return
    decision.flags = [draws.flags(decision, rows, decision.index) for rows in all_rows]
    if rows_of_all_ranks is None:
        injecting = any([flags is not None for flags in decision.flags])
        per_tensor = decision.options["granularity"] == "tensor"
        if per_tensor and not injecting and opt.process_group is not None:
            # This rank drew for its own partition alone, and another one may inject.
            anchored = any(rows.anchored for rows in all_rows)
            injecting = anchored and any(draws.limits(decision.groups))
    else:
        # A rank without rows that inject takes part in the norms of the others.
        anchored = any([group["anchored"] for group in decision.groups])
        injecting = anchored and draws.drawn(decision, *rows_of_all_ranks, decision.index) != 0
    settle(decision, injecting)


def settle(decision: Decision, injecting: bool, index_tensor: Tensor | None = None) -> None:
    """Sets the decision's ``injecting`` and ``draw``.

    ``index_tensor``, int64 [], is the draw index that a captured step reads on the device.
    """
    seed, granularity = decision.options["seed"], decision.options["granularity"]
    elements = injecting and granularity == "element"
    decision.injecting = injecting
    decision.draw = backends.Draw(seed, decision.index, injecting, elements, index_tensor)


def index_on(opt, device: torch.device) -> Tensor:
    """Returns the draw index as an int64 tensor on ``device``, the same in all groups."""
    value = opt.param_groups[0]["draw_index"]
    if not (isinstance(value, Tensor) and value.device == device):
        value = torch.full((), int(value), dtype=torch.int64, device=device)
    for group in opt.param_groups:
        group["draw_index"] = value
    return value


def advance(opt, decision: Decision) -> None:
    """Counts the draw of a step."""
    if opt._settings.capturable:
        index_on(opt, opt.param_groups[0]["params"][0].device).add_(1)
        return
    index = decision.index + 1  # one object, by whose identity the next step sees that all agree
    for group in opt.param_groups:
        group["draw_index"] = index
