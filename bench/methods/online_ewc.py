# SPDX-License-Identifier: BSD-3-Clause
"""Online EWC: one decaying Fisher matrix, around the end of the last task alone.

    F ← γ F + F_t at each boundary,  g ← g + λ F ∘ (θ − θ*)

Schwarz et al.: "Progress & Compress", ICML 2018, arXiv 1805.06370, section 4. γ < 1 forgets old
tasks gracefully; the paper tunes it, 0.95 is taken here. Against the paper: no knowledge base and
active column, only the penalty that protects the knowledge base; Fisher matrices are not
normalised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from methods.ewc import EWC


class OnlineEWC(EWC):
    """Adds λ F ∘ (θ − θ*) to the gradients.

    Args:
        decay: γ.
        **more: As for `EWC`.
    """

    kept: ClassVar[tuple[str, ...]] = ("precision", "anchor")

    def __init__(self, *loop: Any, decay: float = 0.95, **more: Any) -> None:
        super().__init__(*loop, **more)
        self.decay = self.require("decay", decay, "[0, 1]")
        self.anchor: list[Tensor] = []

    @torch.no_grad()
    def edit_gradients(self, replay: Sequence[Tensor | None] | None) -> None:
        """Adds the gradient of the penalty."""
        if self.anchor:
            pull = torch._foreach_sub(self.parameters, self.anchor)
            torch._foreach_mul_(pull, self.precision)
            self.add_to_gradients(pull, self.strength)

    def end_task(self, task: int, batches: Sequence[Any]) -> None:
        """Lets the Fisher matrix decay, adds the task's, and moves the anchor here."""
        fisher = self.fisher(batches)
        if self.precision:
            torch._foreach_add_(fisher, self.precision, alpha=self.decay)
        self.precision, self.anchor = fisher, self.snapshot()
