# SPDX-License-Identifier: BSD-3-Clause
"""Extrapolation (Extrap-SGD): the gradient is taken at a point a little way off.

    θ' = θ − γ̂ ζ,  θ ← step from θ with the gradient at θ'

Lin, Kong, Stich, Jaggi: "Extrapolation for large-batch training in deep learning", ICML 2020,
arXiv 2006.05720. ζ is the gradient of the last mini-batch, as the optimizer got it, or noise of
N(0, 1); or, which is not in the paper, θ − θ*, the way from the end of the last task, so that γ̂ >
0 looks back to it and γ̂ < 0 ahead. The paper's γ̂ is a fraction of the learning rate; here it is
a number of its own, because Adam's learning rate is not in units of the gradient. Against the
paper: one worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from methods.base import Drawing


class Extrapolation(Drawing):
    """Moves the parameters for the time of the forward and backward pass.

    Args:
        length: γ̂.
        direction: ζ: "gradient", "noise" or "displacement".
        seed: Of the noise.
    """

    knobs: ClassVar[dict[str, tuple[Any, ...]]] = {"length": (0.01, 0.03, 0.1, 0.3)}
    kept: ClassVar[tuple[str, ...]] = ("anchor", "last")

    def __init__(
        self, *loop: Any, length: float = 0.01, direction: str = "gradient", seed: int = 0
    ) -> None:
        super().__init__(*loop, seed=seed)
        self.length = self.require("length", length, "(-inf, inf)")
        choices = ("gradient", "noise", "displacement")
        self.direction = self.require_choice("direction", direction, choices)
        self.anchor: list[Tensor] = []
        self.last: list[Tensor] = []  # the gradients of the last step
        self._before: list[Tensor] = []

    @torch.no_grad()
    def before_forward(self) -> None:
        """Goes to θ − γ̂ ζ, if there is a ζ yet."""
        if self.direction == "gradient":
            zeta = self.last
        elif self.direction == "noise":
            draws = [torch.empty_like(p) for p in self.parameters]
            zeta = [draw.normal_(generator=self.generator) for draw in draws]
        else:
            zeta = torch._foreach_sub(self.parameters, self.anchor) if self.anchor else []
        if zeta:
            self._before = self.snapshot()
            torch._foreach_add_(self.parameters, zeta, alpha=-self.length)

    def after_forward(self) -> None:
        """Goes back to θ."""
        if self._before:
            self.put_back(self._before)
            self._before = []

    def edit_gradients(self, replay: Sequence[Tensor | None] | None) -> None:
        """Remembers the gradients, which stay as they are."""
        if self.direction == "gradient":
            self.last = [
                torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
                for p in self.parameters
            ]

    def end_task(self, task: int, batches: Sequence[Any]) -> None:
        """Moves the anchor here."""
        if self.direction == "displacement":
            self.anchor = self.snapshot()
