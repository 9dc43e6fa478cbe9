# SPDX-License-Identifier: BSD-3-Clause
"""Perturb-and-Merge: train at points ahead and behind, then go only a part of the way.

    boundary:  θ̂_t = θ̂_{t−1} + α Δ,  Δ = θ_t* − θ̂_{t−1},  α the minimum over [0, 1] of
               Σ_{i≤t} ½ (θ̂_t − θ_i*)ᵀ F_i (θ̂_t − θ_i*), which is
               −Σ_i Δᵀ F_i (θ̂_{t−1} − θ_i*) / Σ_i Δᵀ F_i Δ
    step:      gradient at θ + c (θ − θ̂_{t−1}), c drawn from {−ε, 0, ε}

Qiu, Zhang, Qiao, Nie: "Train with perturbation, infer after merging", NeurIPS 2025, arXiv
2505.22389; the closed form was derived again. Training of the next task goes on from the merged
model. ε and the three probabilities could not be read from the sources at hand: ½ and ⅓ each are
taken. Against the paper: F_i is the exact diagonal Fisher matrix at θ_i*, there the empirical one;
the first task, whose α is 1, is not perturbed; that the perturbation depends on θ is not derived
through (a factor 1 + c); any parameters are merged, not LoRA's product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from methods.base import Drawing, dot
from methods.fisher import exact_fisher


def merge_coefficient(
    start: Sequence[Tensor],
    end: Sequence[Tensor],
    precision: Sequence[Tensor],
    target: Sequence[Tensor],
) -> float:
    """Returns the α in [0, 1] at which the sum of the tasks' quadratics is least.

    Args:
        start: θ̂_{t−1}.
        end: θ_t*.
        precision: Σ_i F_i, task t included.
        target: Σ_i F_i ∘ θ_i*.
    """
    delta = [b.double() - a.double() for a, b in zip(start, end, strict=True)]
    slope = [
        f * a.double() - g for f, a, g in zip(precision, start, target, strict=True)
    ]  # Σ F_i (θ̂ − θ_i*)
    curvature = float(dot(delta, [f * d for f, d in zip(precision, delta, strict=True)]))
    if curvature <= 0:  # nothing moved, or nothing of it matters to any task
        return 1.0
    return min(1.0, max(0.0, -float(dot(delta, slope)) / curvature))


class PerturbAndMerge(Drawing):
    """Perturbs along the way from the merged model, and merges at boundaries.

    Args:
        epsilon: ε; 0: no perturbation.
        share: Probability of a perturbation, half of it for each sign.
        fisher: "exact", or "equal": all elements of all tasks count alike, α = 1/t.
        samples: Items of a task that its Fisher matrix is worked out from; None: all given.
        coverage: See `exact_fisher`.
        seed: Of the draws of c.
    """

    knobs: ClassVar[dict[str, tuple[Any, ...]]] = {"epsilon": (0.0, 0.1, 0.3, 1.0)}
    kept: ClassVar[tuple[str, ...]] = ("merged", "precision", "target", "alphas")

    def __init__(
        self, *loop: Any, epsilon: float = 0.5, share: float = 2 / 3, fisher: str = "exact",
        samples: int | None = None, coverage: float = 1.0, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(*loop, seed=seed)
        self.epsilon = self.require("epsilon", epsilon, "[0, inf)")
        self.share = self.require("share", share, "[0, 1]")
        self.fisher = self.require_choice("fisher", fisher, ("exact", "equal"))
        self.samples = self.require("samples", samples, "[1, inf)", whole=True, optional=True)
        self.coverage = self.require("coverage", coverage, "(0, 1]")
        self.merged: list[Tensor] = []  # θ̂_{t−1}
        self.precision: list[Tensor] = []  # Σ F_i, float64
        self.target: list[Tensor] = []  # Σ F_i ∘ θ_i*, float64
        self.alphas: list[float] = []  # of the boundaries so far, to be looked at
        self._before: list[Tensor] = []

    @torch.no_grad()
    def before_forward(self) -> None:
        """Draws c and goes to θ + c (θ − θ̂)."""
        if not self.merged or not self.epsilon:
            return
        u = float(torch.rand((), generator=self.generator, dtype=torch.float64))
        if u < self.share:
            c = self.epsilon if u < self.share / 2 else -self.epsilon
            self._before = self.snapshot()
            way = torch._foreach_sub(self.parameters, self.merged)
            torch._foreach_add_(self.parameters, way, alpha=c)

    def after_forward(self) -> None:
        """Goes back to θ."""
        if self._before:
            self.put_back(self._before)
            self._before = []

    def end_task(self, task: int, batches: Sequence[Any]) -> None:
        """Merges: the parameters become θ̂_t."""
        ends = self.snapshot()
        if self.fisher == "equal":
            found = [torch.ones_like(p) for p in ends]
        else:
            found = exact_fisher(
                self.logits_of, batches, self.parameters,
                samples=self.samples, coverage=self.coverage,
            )  # fmt: skip
        found = [f.double() for f in found]
        target = [f * p.double() for f, p in zip(found, ends, strict=True)]
        if self.merged:
            self.precision = torch._foreach_add(self.precision, found)
            self.target = torch._foreach_add(self.target, target)
            alpha = merge_coefficient(self.merged, ends, self.precision, self.target)
            pairs = zip(self.merged, ends, strict=True)
            self.put_back([start + alpha * (end - start) for start, end in pairs])
        else:  # one quadratic has its minimum at its own end
            self.precision, self.target, alpha = found, target, 1.0
        self.alphas.append(alpha)
        self.merged = self.snapshot()
