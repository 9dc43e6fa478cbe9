# SPDX-License-Identifier: BSD-3-Clause
"""CoSO's projection: a weight leaves alone the directions in which old tasks' gradients moved it.

    G ← G − M (Mᵀ G),  M (out × k) orthonormal

Every `gap` steps the leading left singular vectors of the projected gradient, times their singular
values, enter a sketch S by Frequent Directions: S ← U diag(√max(σ² − σ²_{r+1}, 0)) of [S | U_g
Σ_g]. At the boundary the left vectors that hold a share of the sketch's energy are appended to M.

Cheng et al.: "Continuous subspace optimization for continual learning", NeurIPS 2025, arXiv
2505.11816. Against the paper: the projection alone. There Adam runs in a subspace of r₁
dimensions, on Qᵀ G, which makes its step orthogonal to M too; here Adam sees the whole projected
gradient and its step is projected as well. A matrix with no more rows than a sketch has (LoRA's A)
is projected on the side of its columns, vectors are not projected, the sketch does not decay.
Ranks, gap and share of the paper could not be read from the sources at hand: 8, 16, 1 and 0.98 are
taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from methods.base import Method
from methods.layers import count_for


def shrink(sketch: Tensor, rank: int) -> Tensor:
    """Returns Frequent Directions' sketch of `rank` columns of a matrix of more."""
    u, sigma, _ = torch.linalg.svd(sketch, full_matrices=False)
    if len(sigma) <= rank:
        return u * sigma
    squares = (sigma[:rank].square() - sigma[rank].square()).clamp(min=0)
    return u[:, :rank] * squares.sqrt()


class CoSO(Method):
    """Projects gradients and steps off the directions of old tasks' gradients.

    Args:
        *loop: See `Method`; of `named` matrices are projected.
        threshold: Share of a sketch's energy that M takes over.
        rank: Leading directions of a gradient that enter the sketch.
        sketch_rank: Columns of a sketch.
        gap: Steps between two gradients that enter.
    """

    knobs: ClassVar[dict[str, tuple[Any, ...]]] = {"threshold": (0.5, 0.8, 0.9, 0.98)}
    kept: ClassVar[tuple[str, ...]] = ("bases",)

    def __init__(
        self, *loop: Any,
        threshold: float = 0.98, rank: int = 8, sketch_rank: int = 16, gap: int = 1,
    ) -> None:  # fmt: skip
        super().__init__(*loop)
        self.threshold = self.require("threshold", threshold, "(0, 1]")
        self.rank = self.require("rank", rank, "[1, inf)", whole=True)
        self.sketch_rank = self.require("sketch_rank", sketch_rank, "[1, inf)", whole=True)
        self.gap = self.require("gap", gap, "[1, inf)", whole=True)
        # Name → whether M meets the columns.
        self.sides = {
            name: p.shape[0] <= sketch_rank and p.shape[1] > p.shape[0]
            for name, p in self.named.items()
            if p.dim() == 2
        }
        self.bases: dict[str, Tensor] = {}
        self._sketches: dict[str, Tensor] = {}
        self._steps = 0
        self._before: list[Tensor] = []

    def begin_task(self, task: int) -> None:
        """Starts new sketches."""
        self._sketches, self._steps = {}, 0

    def project(self, name: str, change: Tensor) -> Tensor:
        """Returns the change without what lies along M."""
        if name not in self.bases:
            return change
        basis = self.bases[name].to(change)
        if self.sides[name]:
            return change - (change @ basis) @ basis.T
        return change - basis @ (basis.T @ change)

    @torch.no_grad()
    def edit_gradients(self, replay: Sequence[Tensor | None] | None) -> None:
        """Projects the gradients and takes them into the sketches."""
        if self.bases:
            self._before = self.snapshot()
        for name, turned in self.sides.items():
            g = self.named[name].grad
            if g is None:
                continue
            g.copy_(self.project(name, g))
            if self._steps % self.gap == 0:
                matrix = (g.T if turned else g).double()
                u, sigma, _ = torch.linalg.svd(matrix, full_matrices=False)
                new = u[:, : self.rank] * sigma[: self.rank]
                old = self._sketches.get(name, new[:, :0])
                self._sketches[name] = shrink(torch.cat([old, new], 1), self.sketch_rank)
        self._steps += 1

    @torch.no_grad()
    def after_step(self) -> None:
        """Projects the step."""
        if self.bases:
            for (name, p), before in zip(self.named.items(), self._before, strict=True):
                if name in self.bases:
                    p.copy_(before + self.project(name, p - before))

    @torch.no_grad()
    def end_task(self, task: int, batches: Sequence[Any]) -> None:
        """Appends the leading directions of the sketches to M."""
        for name, sketch in self._sketches.items():
            u, sigma, _ = torch.linalg.svd(sketch, full_matrices=False)
            old = self.bases.get(name, u[:, :0])
            squares = sigma.square()
            count = count_for(squares, self.threshold, float(squares.sum()))
            new = u[:, : min(count, len(u) - old.shape[1])]
            new = new - old @ (old.T @ new)
            if new.shape[1]:
                new = torch.linalg.qr(new).Q
            self.bases[name] = torch.cat([old, new], 1)
        self._sketches = {}
