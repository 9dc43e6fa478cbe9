# SPDX-License-Identifier: BSD-3-Clause
"""EWC: a quadratic penalty for every old task, weighted by its exact diagonal Fisher matrix.

    L + λ/2 Σ_i (θ − θ_i*)ᵀ F_i (θ − θ_i*),  that is  g ← g + λ Σ_i F_i ∘ (θ − θ_i*)

Kirkpatrick et al.: "Overcoming catastrophic forgetting in neural networks", PNAS 2017, arXiv
1612.00796. F_i is the mean over items of the exact Fisher matrix (see fisher.py), so that λ = 1 is
what Laplace's approximation gives for tasks of one size; it is the default, because the paper's λ
(400 for Atari) belongs to its own losses. Σ F_i and Σ F_i θ_i* are all that the sum over tasks
needs, whatever their number. Against the paper: nothing but Adam in place of SGD or RMSProp.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from methods.base import Method
from methods.fisher import exact_fisher


class EWC(Method):
    """Adds λ Σ_i F_i ∘ (θ − θ_i*) to the gradients.

    Args:
        strength: λ.
        samples: Items of a task that its Fisher matrix is worked out from; None: all given.
        coverage: Share of the Fisher matrix that is worked out; 1 is exact (see `exact_fisher`).
    """

    knobs: ClassVar[dict[str, tuple[Any, ...]]] = {"strength": (0.3, 1.0, 10.0, 100.0)}
    kept: ClassVar[tuple[str, ...]] = ("precision", "target")

    def __init__(
        self, *loop: Any, strength: float = 1.0, samples: int | None = None, coverage: float = 1.0
    ) -> None:
        super().__init__(*loop)
        self.strength = self.require("strength", strength, "[0, inf)")
        self.samples = self.require("samples", samples, "[1, inf)", whole=True, optional=True)
        self.coverage = self.require("coverage", coverage, "(0, 1]")
        self.precision: list[Tensor] = []  # Σ F_i
        self.target: list[Tensor] = []  # Σ F_i ∘ θ_i*

    @torch.no_grad()
    def edit_gradients(self, replay: Sequence[Tensor | None] | None) -> None:
        """Adds the gradient of the penalty."""
        if self.precision:
            pull = torch._foreach_mul(self.precision, self.parameters)
            torch._foreach_sub_(pull, self.target)
            self.add_to_gradients(pull, self.strength)

    def fisher(self, batches: Sequence[Any]) -> list[Tensor]:
        """Returns the exact diagonal Fisher matrix of the task at the parameters as they are."""
        return exact_fisher(
            self.logits_of, batches, self.parameters, samples=self.samples, coverage=self.coverage
        )

    def end_task(self, task: int, batches: Sequence[Any]) -> None:
        """Adds the task's Fisher matrix, and where it holds."""
        fisher = self.fisher(batches)
        target = [f * p.detach() for f, p in zip(fisher, self.parameters, strict=True)]
        if self.precision:
            torch._foreach_add_(self.precision, fisher)
            torch._foreach_add_(self.target, target)
        else:
            self.precision, self.target = fisher, target
