# SPDX-License-Identifier: BSD-3-Clause
"""What is compared on the two LLaVA beds, and the optimizer that each arm trains with.

Everything that needs the newer options of `dgg.AdamW` (`alpha="auto"`, `importance=`, `route=`) and
the measurements of `guidance_stats()` is in this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import dgg


@dataclass(frozen=True)
class Arm:
    """One way to train, with all its hyper-parameters."""

    name: str  # as it stands in file names
    kind: str = "plain"  # or `dgg`, `guard`, or a name in `methods.METHODS`
    lr: float = 3e-3  # learning rate at the end of the warm-up of every sub-task
    # Of `dgg` and `guard` options of `dgg.AdamW`, of a comparison method its keywords.
    options: dict[str, Any] = field(default_factory=dict)
    replay: bool = True  # whether batches have examples of former sub-tasks
    joint: bool = False  # all sub-tasks at once, the upper bound

    @property
    def is_method(self) -> bool:
        """Whether a comparison method takes part."""
        return self.kind not in ("plain", "dgg", "guard")


LABELS = {
    "joint": "joint training (upper bound)",
    "sequential": "sequential (lower bound)",
    "replay": "replay only",
    "replay_other_lr": "replay, at DGG's rate",
    "dgg": "DGG, searched α",
    "guard0": "guard, w = 0",
    "guard50": "guard, w = ½",
    "guard100": "guard, w = 1",
    "l2sp": "L2-SP",
    "ewc": "EWC",
    "other": "strongest other method",
    "guidance": "ĝ only, no replay",
    "replay_own_rate": "replay only, own learning rate",
    "guard50_own_rate": "guard, w = ½, own learning rate",
    # Rules of the digits beds.
    **{f"alpha{a:g}": f"DGG, α = {a:g}" for a in (0.02, 0.05, 0.1, 0.2, 0.4)},
    "dgg_w50": "DGG, α = 0.1, w = ½",
    "dgg_w100": "DGG, α = 0.1, w = 1",
    "dgg_first_moment": "DGG, α = 0.1, first_moment",
    "dgg_decoupled": "DGG, α = 0.1, decoupled",
    "guard50_first_moment": "guard, w = ½, first_moment",
    "guard50_decoupled": "guard, w = ½, decoupled",
    "no_scaling": "DGG, α = 0.1, no scaling",
    "no_draw": "DGG, α = 1",
    "no_draw_tenth": "DGG, α = 1, strength 0.1",
    "laplace": "λ B Σv̂ ∘ d, λ = 1",
    "agem": "A-GEM, as a rule",
}


def optimizer(
    arm: Arm, parameters: Sequence[torch.nn.Parameter], seed: int, max_grad_norm: float
) -> dgg.AdamW:
    """The optimizer of an arm.

    A comparison method edits gradients after the clipping, so the loop clips for it.
    """
    options: dict[str, Any] = {"alpha": 0.0}
    if arm.kind == "dgg":
        options = dict(arm.options)
    elif arm.kind == "guard":
        options = {"alpha": "auto", **arm.options}
    return dgg.AdamW(
        parameters, lr=arm.lr, weight_decay=0.0, seed=seed,
        max_grad_norm=None if arm.is_method else max_grad_norm, **options,
    )  # fmt: skip


def missing(arm: Arm) -> str | None:
    """Why this arm cannot run with the installed dgg; None if it can."""
    try:
        optimizer(arm, [torch.nn.Parameter(torch.ones(1))], 0, 1.0)
    except (TypeError, ValueError) as reason:
        return str(reason)
    return None


def forget_moments(opt: torch.optim.Optimizer) -> None:
    """Every sub-task starts as with a fresh optimizer; anchor, importance and draws go on."""
    for state in opt.state.values():
        for name in ("step", "exp_avg", "exp_avg_sq"):
            state[name].zero_()


def measured(arm: Arm, opt: dgg.AdamW) -> dict[str, float]:
    """What the guidance did at the last step; nothing where it was not drawn, or none is.

    Returns:
        `pull` = ‖pull‖ / ‖gradient‖, `distance` = ‖u‖ and, of the guard, `alignment` = cos(h, r).
    """
    if arm.kind not in ("dgg", "guard"):
        return {}
    stats = opt.guidance_stats()
    if arm.kind == "guard":
        names = ("pull", "alignment", "distance")
        return {name: float(stats[name]) for name in names if stats[name] is not None}
    if not stats["injected"]:
        return {"pull": 0.0}
    scale, norm, distance = (float(stats[k]) for k in ("scale", "grad_norm", "distance"))
    return {"pull": scale * distance / norm if norm else 0.0, "distance": distance}
