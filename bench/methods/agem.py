# SPDX-License-Identifier: BSD-3-Clause
"""A-GEM: a gradient that conflicts with that of the memory loses the part that conflicts.

    if ⟨g, r⟩ < 0:  g ← g − (⟨g, r⟩ / ‖r‖²) r,  over all parameters at once

Chaudhry et al.: "Efficient lifelong learning with A-GEM", ICLR 2019, arXiv 1812.00420. No
hyper-parameter. Against the paper: the step is Adam's, whose preconditioner does not keep
⟨step, r⟩ ≥ 0; and g is whatever the loop trains on, new and replayed rows together in a study with
replay, the new ones alone in the paper. Task descriptors are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from methods.base import Method, dot


class AGEM(Method):
    """Projects g so that ⟨g, r⟩ ≥ 0."""

    needs_replay_gradients: ClassVar[bool] = True

    @torch.no_grad()
    def edit_gradients(self, replay: Sequence[Tensor | None] | None) -> None:
        """Removes what conflicts with the replay gradients, if there are any."""
        if replay is None:
            return
        inner = dot([p.grad for p in self.parameters], replay)
        square = dot(replay, replay)
        if inner < 0 < square:
            ratio = float(inner / square)
            for p, r in zip(self.parameters, replay, strict=True):
                if r is not None and p.grad is None:
                    p.grad = r * -ratio
                elif r is not None:
                    p.grad.sub_(r, alpha=ratio)
