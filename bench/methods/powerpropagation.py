# SPDX-License-Identifier: BSD-3-Clause
"""Powerpropagation: large weights learn faster than small ones, which stay near 0.

    θ = φ |φ|^(a−1), φ is trained:  ∂L/∂φ = a |φ|^(a−1) ∂L/∂θ;  at first φ = sign(θ) |θ|^(1/a)

Schwarz et al.: "Powerpropagation: a sparsity inducing weight reparameterisation", NeurIPS 2021,
arXiv 2110.00296; a = 1 is plain training. At each boundary a share of all weights, the largest of
those still free, is frozen, as EfficientPackNet does. Against the paper: that share is given in
place of being the smallest one that keeps a validation score; the other weights are neither pruned
nor masked when an old task is evaluated, because the loop tells nobody which task an item is of;
biases stay plain. A tensor of zeros stays plain too: its φ would have no gradient, ever (LoRA's
B).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from methods.base import Method


class Powerpropagation(Method):
    """Lets the optimizer step φ in place of θ.

    Args:
        *loop: See `Method`; of `named` matrices and larger tensors are reparametrised.
        power: a.
        keep: Share of all reparametrised weights that each task's end freezes.
    """

    knobs: ClassVar[dict[str, tuple[Any, ...]]] = {"power": (1.25, 1.5, 2.0, 3.0)}
    kept: ClassVar[tuple[str, ...]] = ("roots", "frozen")

    def __init__(self, *loop: Any, power: float = 2.0, keep: float = 0.1) -> None:
        super().__init__(*loop)
        self.power = self.require("power", power, "[1, inf)")
        self.keep = self.require("keep", keep, "[0, 1]")
        self.roots: dict[str, Tensor] = {}  # φ
        self.frozen: dict[str, Tensor] = {}
        for name, p in self.named.items():
            if p.dim() > 1 and bool(p.detach().any()):
                self.roots[name] = p.detach().sign() * p.detach().abs() ** (1 / self.power)
                self.frozen[name] = torch.zeros_like(p, dtype=torch.bool)

    @torch.no_grad()
    def edit_gradients(self, replay: Sequence[Tensor | None] | None) -> None:
        """Hands φ and its gradient to the optimizer."""
        for name, root in self.roots.items():
            p = self.named[name]
            p.copy_(root)
            if p.grad is not None:
                p.grad.mul_(self.power * root.abs() ** (self.power - 1))
                p.grad.masked_fill_(self.frozen[name], 0)

    @torch.no_grad()
    def after_step(self) -> None:
        """Takes φ back and sets θ."""
        for name, root in self.roots.items():
            p = self.named[name]
            root.copy_(torch.where(self.frozen[name], root, p))  # momentum or decay moved others
            p.copy_(root * root.abs() ** (self.power - 1))

    @torch.no_grad()
    def end_task(self, task: int, batches: Sequence[Any]) -> None:
        """Freezes the largest of the free weights."""
        free = [root.abs().masked_fill(self.frozen[name], -1) for name, root in self.roots.items()]
        if not free:
            return
        flat = torch.cat([part.flatten() for part in free])
        count = min(int(self.keep * len(flat)), int((flat >= 0).sum()))
        chosen = torch.zeros_like(flat, dtype=torch.bool)
        chosen[flat.topk(count).indices] = True
        parts = chosen.split([part.numel() for part in free])
        for name, part in zip(self.roots, parts, strict=True):
            self.frozen[name] |= part.view_as(self.frozen[name])
