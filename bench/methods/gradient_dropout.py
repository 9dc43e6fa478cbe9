# SPDX-License-Identifier: BSD-3-Clause
"""Gradient dropout (DropGrad): noise of mean 1 on every element of the gradient.

    g ← g ∘ n,  n ~ Bernoulli(1 − p) / (1 − p)  or  n ~ N(1, p / (1 − p)),  fresh at each step

Tseng et al.: "Regularizing meta-learning via gradient dropout", ACCV 2020, arXiv 2004.05859, p =
0.1. Against the paper: made for the inner loop of MAML, here on an ordinary step; p stays
constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from methods.base import Drawing


class GradientDropout(Drawing):
    """Multiplies the gradients by noise of mean 1.

    Args:
        rate: p.
        noise: "bernoulli" or "gaussian".
        seed: Of the noise.
    """

    knobs: ClassVar[dict[str, tuple[Any, ...]]] = {"rate": (0.1, 0.3, 0.5, 0.7)}

    def __init__(
        self, *loop: Any, rate: float = 0.1, noise: str = "bernoulli", seed: int = 0
    ) -> None:
        super().__init__(*loop, seed=seed)
        self.rate = self.require("rate", rate, "[0, 1)")
        self.noise = self.require_choice("noise", noise, ("bernoulli", "gaussian"))

    @torch.no_grad()
    def edit_gradients(self, replay: Sequence[Tensor | None] | None) -> None:
        """Draws and multiplies."""
        for p in self.parameters:
            if p.grad is None:
                continue
            noise = torch.empty_like(p.grad)
            if self.noise == "bernoulli":
                noise.bernoulli_(1 - self.rate, generator=self.generator).div_(1 - self.rate)
            else:
                deviation = (self.rate / (1 - self.rate)) ** 0.5
                noise.normal_(1, deviation, generator=self.generator)
            p.grad.mul_(noise)
