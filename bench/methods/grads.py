# SPDX-License-Identifier: BSD-3-Clause
"""GrADS: examples to keep are chosen by the size of their gradient and how common it is.

For every example the norms of its gradient in the first and in the last layer, each divided by its
mean over all examples, are added: s. A kernel estimate (Gaussian, Scott's width) gives the density
of the examples at s. The tail share of the examples that lie where there are the fewest is left
out, and of the others the k with the largest s are kept.

Liu et al.: "Learn more, forget less: a gradient-aware data selection approach for LLM", arXiv
2511.08620. Against the paper: it selects training data after one epoch of warm-up, here the
examples to replay are selected at the task's end; its layers are embedding and head, here the
first and last matrix that train (`layers`); its thresholds set themselves in a way that could not
be read from the sources at hand, so the rule above, with a tail of 10 %, and the given k stand for
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from methods.base import Method


class GrADS(Method):
    """Chooses examples; does nothing while training.

    Args:
        tail: Share of the examples, the rarest, that are not chosen while there are others.
        layers: Names of the two parameters whose gradients are measured; None: the first and the
            last matrix in `named`.
    """

    knobs: ClassVar[dict[str, tuple[Any, ...]]] = {"tail": (0.05, 0.1, 0.3, 0.5)}
    chooses_examples: ClassVar[bool] = True

    def __init__(self, *loop: Any, tail: float = 0.1, layers: Sequence[str] | None = None) -> None:
        super().__init__(*loop)
        self.tail = self.require("tail", tail, "[0, 1)")
        matrices = [name for name, p in self.named.items() if p.dim() > 1] or list(self.named)
        self.layers = [matrices[0], matrices[-1]] if layers is None else list(layers)
        unknown = [name for name in self.layers if name not in self.named]
        if unknown or not self.layers:
            raise ValueError(f"GrADS: layers={layers!r} must be names of trained parameters")

    def scores(self, batches: Sequence[Any]) -> Tensor:
        """Returns s of every example.

        Args:
            batches: Batches of one example each, as the mean loss of more hides their gradients.
        """
        measured = [self.named[name] for name in self.layers]
        norms = []
        for batch in batches:
            with torch.enable_grad():
                found = torch.autograd.grad(self.loss_of(batch), measured)
            norms.append(torch.stack([g.double().norm() for g in found]))
        table = torch.stack(norms)
        return (table / table.mean(0).clamp(min=1e-300)).sum(1)

    def density(self, scores: Tensor) -> Tensor:
        """Returns the kernel estimate of the density of scores, at each of them."""
        count = len(scores)
        if count < 2 or scores.max() == scores.min():  # no width: one is as common as the other
            return torch.ones(count, dtype=torch.float64)
        width = scores.double().std(correction=1) * count**-0.2
        z = (scores[:, None] - scores[None]).double() / width
        return torch.exp(-z.square() / 2).mean(1) / (width * (2 * torch.pi) ** 0.5)

    def choose(self, batches: Sequence[Any], scores: Tensor | None, k: int) -> list[int]:
        """Returns the places of the k examples to keep, in their order.

        Args:
            batches: Batches of one example each.
            scores: What `scores(batches)` returned, or None: it is called.
            k: How many; all, if there are no more.
        """
        self.require("k", k, "[0, inf)", whole=True)
        if scores is None:
            scores = self.scores(batches)
        rarest_first = self.density(scores).argsort(stable=True)
        common = rarest_first[min(int(self.tail * len(scores)), max(len(scores) - k, 0)) :]
        largest = scores[common].argsort(descending=True, stable=True)[:k]
        return sorted(common[largest].tolist())
