# SPDX-License-Identifier: BSD-3-Clause
"""SPD (AdamSPD): a tensor that turns back to its anchor may not move away from it.

    θ̃ = the step of Adam;  d = θ − θ*
    if ⟨g, d⟩ > 0:  θ ← θ̃ − λ ρ (θ̃ − θ*),  ρ = clip((‖θ̃ − θ*‖ − ‖d‖) / ‖θ̃ − θ*‖, 0, 1)

per tensor. Tian, Huang, Kira: "Rethinking weight decay for robust fine-tuning of foundation
models", NeurIPS 2024, arXiv 2411.01713. λ = 1 puts the tensor back on the sphere it came from.
Against the paper: θ* is the end of the last task in place of the pre-trained model, for LoRA too
(there 0 in the paper), and the first task is trained freely.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from methods.base import Anchored


class SPD(Anchored):
    """Shrinks tensors back to their old distance from the anchor, where the gradient agrees.

    Args:
        strength: λ.
    """

    knobs: ClassVar[dict[str, tuple[Any, ...]]] = {"strength": (0.3, 0.6, 1.0, 2.0)}

    def __init__(self, *loop: Any, strength: float = 1.0) -> None:
        super().__init__(*loop)
        self.strength = self.require("strength", strength, "[0, inf)")
        self._distance: list[Tensor | None] = []  # ‖d‖ of tensors that turn back, None for others

    @torch.no_grad()
    def edit_gradients(self, replay: Sequence[Tensor | None] | None) -> None:
        """Looks where the gradient points; it stays as it is."""
        self._distance = []
        if not self.anchor:
            return
        for p, anchor in zip(self.parameters, self.anchor, strict=True):
            turns_back = p.grad is not None and bool((p.grad * (p - anchor)).sum() > 0)
            self._distance.append((p - anchor).norm() if turns_back else None)

    @torch.no_grad()
    def after_step(self) -> None:
        """Projects."""
        if not self.anchor:
            return
        for p, anchor, before in zip(self.parameters, self.anchor, self._distance, strict=True):
            if before is None:
                continue
            d = p - anchor
            now = d.norm()
            if now > before:
                p.sub_(d, alpha=float(self.strength * (now - before) / now))
