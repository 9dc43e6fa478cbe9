# SPDX-License-Identifier: BSD-3-Clause
"""RecAdam: Adam annealed from recalling to learning, with the pull outside the preconditioner.

    θ ← θ − lr λ(t) m̂/(√v̂ + ε) − lr (1 − λ(t)) γ (θ − θ*),  λ(t) = 1 / (1 + exp(−k (t − t₀)))

Chen et al.: "Recall and learn: fine-tuning deep pretrained language models with less forgetting",
EMNLP 2020, arXiv 2004.12651. Defaults are the authors': γ = 5000, k = 0.5, t₀ = 250, at their lr =
2e-5; lr γ (0.1 there) is what counts, and from 2 on the pull throws parameters past the anchor
ever farther, which is refused. t counts the steps of a task. Against the paper: θ* is the end of
the last task in place of the pre-trained model, and the first task, which has none, is not
annealed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from methods.base import Anchored


class RecAdam(Anchored):
    """Scales Adam's step by λ(t) and pulls by lr (1 − λ(t)) γ (θ − θ*).

    Args:
        *loop: See `Method`; the decoupled weight decay of `optimizer` stays as it is.
        strength: γ.
        rate: k, how fast the schedule turns from recalling to learning.
        middle: t₀, the step of a task at which λ is ½.
    """

    # Of a learning rate of some 1e-3: lr γ from 0.001 to 0.03, and t₀ in the first part of a task.
    knobs: ClassVar[dict[str, tuple[Any, ...]]] = {"strength": (1.0, 3.0, 10.0, 30.0)}

    def __init__(
        self, *loop: Any, strength: float = 5000.0, rate: float = 0.5, middle: float = 250.0
    ) -> None:
        super().__init__(*loop)
        self.strength = self.require("strength", strength, "[0, inf)")
        self.rate = self.require("rate", rate, "(0, inf)")
        self.middle = self.require("middle", middle, "[0, inf)")
        self._steps = 0
        self._before: list[Tensor] = []

    def weight(self, step: int) -> float:
        """Returns λ, the share of the new task, at the step-th step of a task (from 1)."""
        x = self.rate * (step - self.middle)
        return 1 / (1 + math.exp(-x)) if x > -700 else 0.0

    def begin_task(self, task: int) -> None:
        """Starts the schedule."""
        self._steps = 0

    def edit_gradients(self, replay: Sequence[Tensor | None] | None) -> None:
        """Remembers where the step starts; the gradient stays as it is."""
        self._steps += 1
        if self.anchor:
            for group in self.groups():
                if float(group["lr"]) * self.strength >= 2:
                    raise ValueError(
                        f"RecAdam: strength={self.strength:g} times lr={float(group['lr']):g} must "
                        "be below 2: the pull would throw parameters beyond the anchor"
                    )
            self._before = self.snapshot()

    @torch.no_grad()
    def after_step(self) -> None:
        """Weighs the step that Adam made, and pulls."""
        if not self.anchor:
            return
        learn = self.weight(self._steps)
        for p, old, anchor, group in zip(
            self.parameters, self._before, self.anchor, self.groups(), strict=True
        ):
            lr = float(group["lr"])
            decayed = old * (1 - lr * group["weight_decay"])
            pulled = decayed - lr * (1 - learn) * self.strength * (old - anchor)
            p.copy_(pulled + learn * (p - decayed))
