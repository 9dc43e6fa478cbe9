# SPDX-License-Identifier: BSD-3-Clause
"""PEGP: gradient projection for parameter-efficient tuning, here LoRA.

    ΔA ← ΔA (1 − U_x U_xᵀ),  ΔB ← ΔB (1 − U_a U_aᵀ)

U_x spans the old inputs x of the adapter and U_a the old A x: both factors are projected on the
side that their input meets, so that B A x stays what it was for old x. At each boundary the
inputs' second moments are added to those of all tasks before, and U gets the leading directions
that hold a share ε of them. Layers without an adapter are treated the same way.

Qiao et al.: "Gradient projection for continual parameter-efficient tuning", arXiv 2405.13383. ε and
the number of items could not be read from the sources at hand: 0.95 and 125 are taken. Against the
paper: second moments are summed, which stands for the inputs of all tasks side by side; prompts,
prefixes and other adapters are left out; the step is projected, not the gradient (`where`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from methods.input_projection import InputProjection
from methods.layers import count_for, input_moments, principal


class PEGP(InputProjection):
    """Projects both factors of adapters by bases of their old inputs.

    Args:
        threshold: ε.
        factors: "both", "A" or "B", the factors of LoRA that are projected.
        **more: As for `InputProjection`.
    """

    knobs: ClassVar[dict[str, tuple[Any, ...]]] = {"threshold": (0.6, 0.8, 0.9, 0.95)}
    kept: ClassVar[tuple[str, ...]] = ("bases", "importance", "moments")

    def __init__(
        self, *loop: Any, threshold: float = 0.95, factors: str = "both", **more: Any
    ) -> None:
        super().__init__(*loop, threshold=threshold, **more)
        self.factors = self.require_choice("factors", factors, ("both", "A", "B"))
        self.moments: dict[str, Tensor] = {}

    def end_task(self, task: int, batches: Sequence[Any]) -> None:
        """Adds the inputs of the task and finds the bases anew."""
        other = {"both": None, "A": "lora_B", "B": "lora_A"}[self.factors]
        moments = input_moments(self.layers, self.logits_of, batches, self.samples)
        for name, moment in moments.items():
            if other is not None and other in name.split("."):
                continue
            self.moments[name] = self.moments.get(name, 0) + moment
            squares, vectors = principal(self.moments[name])
            count = count_for(squares, self.threshold, float(squares.sum()))
            self.bases[name] = vectors[:, :count].clone()
            self.importance[name] = torch.ones(count, dtype=torch.float64)
