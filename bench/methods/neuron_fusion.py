# SPDX-License-Identifier: BSD-3-Clause
"""Neuron-Fusion: neurons that moved far keep their change, the others go back.

    Δ = θ − θ*;  rows of W with the largest ‖Δ‖ keep s Δ, all others get Δ = 0

per matrix, a share of the rows, at each boundary. Yu, Ananiadou: "Locate-then-merge: neuron-level
parameter fusion for mitigating catastrophic forgetting in multimodal LLMs", Findings of EMNLP
2025, arXiv 2505.16703. Against the paper: θ* is the end of the last task in place of the base
model, and the first task is not merged; a neuron is a row of any matrix, with its element of the
bias, where the paper takes rows and columns of feed-forward layers and value and output vectors of
attention, so for LoRA it is a row of a factor and not of B A. The formula that restores the kept
neurons' effect and the paper's share could not be read: s = 1 and half of the rows are taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from methods.base import Anchored


class NeuronFusion(Anchored):
    """Keeps the changes of the rows that changed most.

    Args:
        *loop: See `Method`; of `named` matrices, and biases beside them, are merged.
        keep: Share of the rows of a matrix.
        scale: s.
    """

    knobs: ClassVar[dict[str, tuple[Any, ...]]] = {"keep": (0.25, 0.5, 0.75, 0.9)}

    def __init__(self, *loop: Any, keep: float = 0.5, scale: float = 1.0) -> None:
        super().__init__(*loop)
        self.keep = self.require("keep", keep, "[0, 1]")
        self.scale = self.require("scale", scale, "[0, inf)")

    def end_task(self, task: int, batches: Sequence[Any]) -> None:
        """Merges, and moves the anchor here."""
        if self.anchor:
            self._merge(dict(zip(self.named, self.anchor, strict=True)))
        super().end_task(task, batches)

    @torch.no_grad()
    def _merge(self, anchor: dict[str, Tensor]) -> None:
        for name, p in self.named.items():
            if p.dim() < 2:
                continue
            moved = (p - anchor[name]).flatten(1).norm(dim=1)
            rows = torch.zeros(len(p), dtype=torch.bool, device=p.device)
            rows[moved.topk(round(self.keep * len(p))).indices] = True
            bias = name.removesuffix("weight") + "bias"
            for part in {name, bias} & self.named.keys():
                value, old = self.named[part], anchor[part]
                chosen = rows.view(-1, *[1] * (value.dim() - 1))
                if self.scale == 1:  # bit for bit what training left there
                    kept = value
                else:
                    kept = old + self.scale * (value - old)
                value.copy_(torch.where(chosen, kept, old))
