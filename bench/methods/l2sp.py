# SPDX-License-Identifier: BSD-3-Clause
"""L2-SP: a quadratic penalty on the distance from where the last task ended.

    L + λ/2 ‖θ − θ*‖²,  that is  g ← g + λ (θ − θ*)

Li, Grandvalet, Davoine: "Explicit inductive bias for transfer learning with convolutional
networks", ICML 2018, arXiv 1802.01483, whose λ (there α) is 0.1. Against the paper: θ* is not the
pre-trained model but the end of the last task, new at each boundary, so that the first task is
trained freely; there is no second penalty on a new head; and the penalty is added behind the
clipping.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from methods.base import Anchored


class L2SP(Anchored):
    """Adds λ (θ − θ*) to the gradients.

    Args:
        strength: λ.
    """

    knobs: ClassVar[dict[str, tuple[Any, ...]]] = {"strength": (0.01, 0.03, 0.1, 0.3)}

    def __init__(self, *loop: Any, strength: float = 0.1) -> None:
        super().__init__(*loop)
        self.strength = self.require("strength", strength, "[0, inf)")

    @torch.no_grad()
    def edit_gradients(self, replay: Sequence[Tensor | None] | None) -> None:
        """Adds the gradient of the penalty."""
        if self.anchor:
            self.add_to_gradients(torch._foreach_sub(self.parameters, self.anchor), self.strength)
