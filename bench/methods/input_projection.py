# SPDX-License-Identifier: BSD-3-Clause
"""What SGP and PEGP share: weights move only where old inputs of their layer do not reach.

With P = M diag(λ) Mᵀ, M an orthonormal basis of a layer's old inputs, a change of its weight W
becomes ΔW (1 − P). Where λ = 1 the layer answers old inputs as before. Under Adam a projected
gradient does not give a projected step, so by default the step itself is projected and the moments
see the raw gradient, as the authors of SGP do with Adam.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from methods.base import Method
from methods.layers import trained_linears


class InputProjection(Method):
    """Projects gradients or steps; a subclass says in `end_task` on what.

    Args:
        *loop: See `Method`; the weights of linear layers in `named` are projected, and `logits_of`
            must call these layers.
        threshold: Share of the energy of the inputs that a basis has to hold.
        samples: Items of a task whose inputs are looked at; None: all given.
        where: "step" or "gradient", what is projected.
        freeze_rest: True: from the second task on biases, norms and all else stand still.
    """

    reads_modules: ClassVar[str] = "boundary"
    kept: ClassVar[tuple[str, ...]] = ("bases", "importance")

    def __init__(
        self, *loop: Any, threshold: float, samples: int | None = 125, where: str = "step",
        freeze_rest: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(*loop)
        self.threshold = self.require("threshold", threshold, "(0, 1]")
        self.samples = self.require("samples", samples, "[1, inf)", whole=True, optional=True)
        self.where = self.require_choice("where", where, ("step", "gradient"))
        self.freeze_rest = freeze_rest
        self.layers = trained_linears(self.model, self.named)
        if not self.layers:
            raise ValueError(f"{type(self).__name__}: no linear layer has its weight in named")
        self.bases: dict[str, Tensor] = {}  # layer → M (in × k)
        self.importance: dict[str, Tensor] = {}  # layer → λ (k)
        self._before: list[Tensor] = []

    def project(self, layer: str, change: Tensor) -> Tensor:
        """Returns ΔW (1 − P) for a gradient or step of this layer's weight."""
        basis = self.bases[layer].to(change)
        return change - ((change @ basis) * self.importance[layer].to(change)) @ basis.T

    @torch.no_grad()
    def edit_gradients(self, replay: Sequence[Tensor | None] | None) -> None:
        """Projects the gradients, or remembers where the step starts."""
        if not self.bases:
            return
        self._before = self.snapshot()
        if self.where == "gradient":
            for name in self.bases:
                weight = self.named[self.layers[name].weight]
                if weight.grad is not None:
                    weight.grad.copy_(self.project(name, weight.grad))

    @torch.no_grad()
    def after_step(self) -> None:
        """Projects the step, and puts back what is frozen."""
        if not self.bases:
            return
        layer_of = {self.layers[name].weight: name for name in self.bases}
        weights = {layer.weight for layer in self.layers.values()}
        for (name, p), before in zip(self.named.items(), self._before, strict=True):
            if name in layer_of and self.where == "step":
                p.copy_(before + self.project(layer_of[name], p - before))
            elif name not in weights and self.freeze_rest:
                p.copy_(before)
