# SPDX-License-Identifier: BSD-3-Clause
"""The exact diagonal Fisher matrix: an expectation over the model's own labels.

    F = E_x Σ_y p(y|x) (∂ log p(y|x) / ∂θ)²

The empirical one, which takes the label of the data in place of the expectation, vanishes with the
training loss; one gradient of a batch mean, squared, is neither. arXiv 2502.11756 compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Gradients (item, label) that are worked out in one call.
CHUNK = 64


def exact_fisher(
    logits_of: Callable[[Any], Tensor],
    batches: Sequence[Any],
    parameters: Sequence[Tensor],
    *,
    samples: int | None = None,
    coverage: float = 1.0,
) -> list[Tensor]:
    """Returns the mean diagonal Fisher matrix of the items of these batches.

    Args:
        logits_of: Returns the logits (items, classes) of a batch, with their graph.
        batches: The data. Batches of one item are the fastest: each gradient goes through a batch.
        parameters: With respect to which.
        samples: So many items, the first ones; None: all.
        coverage: 1: every label of every item, which is exact. Less: of a batch's pairs of item and
            label those that matter most, as many as hold this share of the trace of the Fisher
            matrix of the logits, Σ p(y) ‖e_y − p‖². It saves the items that the model is sure of.
            (Likely labels alone would not do: of a sure model the others hold nearly all of it.)
    """
    total = [torch.zeros_like(p) for p in parameters]
    items = 0
    for batch in batches:
        with torch.enable_grad():
            log_p = logits_of(batch).log_softmax(-1)
        count = len(log_p) if samples is None else min(len(log_p), samples - items)
        p = log_p.detach()[:count].exp()
        taken = torch.ones_like(p, dtype=torch.bool)
        if coverage < 1:
            # ‖e_y − p‖² = 1 − 2 p_y + ‖p‖²; a pair is needed while those before it do not suffice.
            parts = (p * (1 - 2 * p + p.square().sum(1, keepdim=True))).flatten()
            ordered, order = parts.sort(descending=True)
            needed = ordered.cumsum(0) - ordered < coverage * parts.sum()
            taken.view(-1)[order] = needed
        rows, labels = taken.nonzero(as_tuple=True)
        for row, label in zip(rows.split(CHUNK), labels.split(CHUNK), strict=True):
            seeds = log_p.new_zeros(len(row), *log_p.shape)
            # The root of the probability, so that the squares have it as their factor.
            seeds[torch.arange(len(row)), row, label] = p[row, label].sqrt()
            gradients = torch.autograd.grad(
                log_p, parameters, seeds, retain_graph=True, is_grads_batched=True,
                allow_unused=True,
            )  # fmt: skip
            for sum_, g in zip(total, gradients, strict=True):
                if g is not None:
                    sum_ += g.square().sum(0)
        items += count
        if samples is not None and items >= samples:
            break
    if not items:
        raise ValueError("no batches: the Fisher matrix needs data of the task")
    return [sum_.div_(items) for sum_ in total]
