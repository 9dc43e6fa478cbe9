# SPDX-License-Identifier: BSD-3-Clause
"""SGP: scaled gradient projection; with `scaled=False` it is GPM.

    ΔW ← ΔW (1 − M diag(λ) Mᵀ),  λ_i = (a + 1) σ_i / (a σ_i + σ_max)

M is an orthonormal basis of old inputs of the layer. After the first task it has the leading left
singular vectors of the inputs R, as many as hold the share ε of ‖R‖². Later the old ones get the
importance that they have for the new inputs on top, σ'_i = ‖m_iᵀ R‖, up to 1, and vectors of
R − M Mᵀ R are appended until both hold the share ε; σ' and the new σ are scaled together.

Saha, Roy: "Continual learning with scaled gradient projection", AAAI 2023, arXiv 2302.01386 (GPM:
arXiv 2103.09762). Defaults are the authors' for CIFAR-100: ε = 0.97, + 0.003 a task, a = 10, 125
items. Against the paper: the last layer is projected like all others, as there is one head for all
tasks; linear layers only; σ come from R Rᵀ in float64, not from R.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from methods.input_projection import InputProjection
from methods.layers import count_for, input_moments, principal


class SGP(InputProjection):
    """Projects by bases of old inputs, weighted by their importance.

    Args:
        threshold: ε of the first task.
        increment: What each further task adds to it.
        scale: a.
        scaled: False: λ = 1 everywhere, which is GPM.
        **more: As for `InputProjection`.
    """

    knobs: ClassVar[dict[str, tuple[Any, ...]]] = {"threshold": (0.8, 0.9, 0.95, 0.97)}

    def __init__(
        self, *loop: Any, threshold: float = 0.97, increment: float = 0.003, scale: float = 10.0,
        scaled: bool = True, **more: Any,
    ) -> None:  # fmt: skip
        super().__init__(*loop, threshold=threshold, **more)
        self.increment = self.require("increment", increment, "[0, inf)")
        self.scale = self.require("scale", scale, "[0, inf)")
        self.scaled = scaled

    def weigh(self, sigma: Tensor) -> Tensor:
        """Returns the importance of directions that have these singular values."""
        if not self.scaled or not len(sigma):
            return torch.ones_like(sigma)
        largest = sigma.max()
        if largest == 0:
            return torch.zeros_like(sigma)
        return (self.scale + 1) * sigma / (self.scale * sigma + largest)

    def end_task(self, task: int, batches: Sequence[Any]) -> None:
        """Weighs the bases anew and appends what they do not hold."""
        energy = min(1.0, self.threshold + self.increment * task)
        moments = input_moments(self.layers, self.logits_of, batches, self.samples)
        for name, moment in moments.items():
            total = float(moment.trace())
            old = self.bases.get(name, moment[:, :0])
            weight = self.importance.get(name, moment.new_zeros(0))
            rest = moment - old @ (old.T @ moment)
            rest = rest - (rest @ old) @ old.T
            squares, vectors = principal((rest + rest.T) / 2)
            room = len(moment) - old.shape[1]
            held = total - float(rest.trace())
            count = min(room, count_for(squares, energy, total, held))
            sigma_old = (old * (moment @ old)).sum(0).clamp(min=0).sqrt()
            found = self.weigh(torch.cat([sigma_old, squares[:count].sqrt()]))
            found[: len(weight)] = (found[: len(weight)] + weight).clamp(max=1)
            # Orthonormal to the last bit of float64, however many tasks append.
            new = vectors[:, :count] - old @ (old.T @ vectors[:, :count])
            if count:
                new = torch.linalg.qr(new).Q
            self.bases[name] = torch.cat([old, new], 1)
            self.importance[name] = found
