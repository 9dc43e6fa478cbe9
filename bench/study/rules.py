# SPDX-License-Identifier: BSD-3-Clause
"""What is done against forgetting on the digits beds, for all seeds in one program.

A network of 2,410 weights takes less time than the calls that train it. So the rules are written
here once more, over vectors [seeds, weights]; tests/test_study.py shows that a single seed goes the
way that `dgg.AdamW` takes, to rounding.

h is the gradient of the mean loss over a batch, r that of its replayed rows alone, d = θ − θ*,
u = ((1 − w) + w F) ∘ d with F = Σ v̂ over the boundaries, divided by its mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dgg import _philox
from study import digits

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
ROUTES = ("gradient", "first_moment", "decoupled")
KINDS = ("replay", "dgg", "guard", "l2sp", "ewc", "laplace", "agem")


@dataclass(frozen=True)
class Rule:
    """One rule with its knobs.

    Kinds: `replay` (nothing more), `dgg` (the paper's, with `alpha` and so on), `guard` (the least
    pull with ⟨h + a u, r⟩ ≥ 0), `l2sp` (h + λ d), `ewc` (h + λ F d, exact Fisher), `laplace`
    (h + λ B Σ v̂ d), `agem` (new rows only, made not to conflict with r).
    """

    kind: str
    knob: float = 0.0  # λ of the penalties
    alpha: float = 0.0  # probability of a pull at a step
    importance: float = 0.0  # w
    strength: float = 1.0  # factor of the pull
    scaling: bool = True  # False: the pull is `strength` times u, however long
    route: str = "gradient"  # where the pull enters, as in `dgg.AdamW`
    rate: float = 1.0  # factor of the bed's learning rate

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.route not in ROUTES:
            raise ValueError(f"no such rule: {self}")


@dataclass
class Memory:
    """What a rule keeps of former tasks; all [seeds, weights]."""

    anchor: Tensor
    raw: Tensor  # Σ v̂ over the boundaries
    fisher: Tensor  # Σ of exact Fishers


def train(rule: Rule, stream: digits.Stream) -> dict[str, Any]:
    """Train all seeds over the five tasks.

    Returns:
        `matrices` (a seed: R[i][j] = accuracy on task j after task i, None where j > i), `pull`
        (mean of ‖pull‖ / ‖h‖ over the steps after the first task) and `weights`, the last ones.
    """
    flat = stream.weights.clone()
    seeds, steps = len(stream.seeds), stream.setting.steps
    memory: Memory | None = None
    raw, fisher = torch.zeros_like(flat), torch.zeros_like(flat)
    rows: list[Tensor] = []
    pulled, count = torch.zeros(seeds, dtype=flat.dtype), 0
    for task, batches in enumerate(stream.tasks):
        first, second = torch.zeros_like(flat), torch.zeros_like(flat)
        for step in range(steps):
            at = digits.Pass(flat, batches.images[:, step], batches.labels[:, step])
            new = digits.BATCH - batches.replayed
            everything, old = at.gradient(0, digits.BATCH), None
            if batches.replayed and rule.kind in ("guard", "agem"):
                old = at.gradient(new, digits.BATCH)
            pull = None
            if rule.kind == "agem" and old is not None:
                everything = _not_against(at.gradient(0, new), old)
            elif memory is not None:
                pull = _pull(rule, everything, old, flat, memory, stream.seeds, task * steps + step)
                if pull is not None:
                    pulled += _norm(pull)[:, 0] / _norm(everything)[:, 0].clamp_min(1e-30)
            count += task > 0
            rate = min(1, (step + 1) / digits.WARMUP) * (1 - step / steps)
            rate *= rule.rate * stream.lr
            flat = _adam(rule.route, flat, everything, pull, first, second, rate, step + 1)
        rows.append(digits.accuracies(flat, stream))
        raw += second / (1 - BETA2**steps)
        if rule.kind == "ewc":
            fisher += digits.exact_fisher(flat, stream.fisher_images[task])
        memory = Memory(flat, raw, fisher)
    table = torch.stack(rows)  # [after, task, seed]
    matrices = [
        [[table[i, j, k].item() if j <= i else None for j in range(digits.TASKS)]
         for i in range(digits.TASKS)]
        for k in range(seeds)
    ]  # fmt: skip
    return {"matrices": matrices, "pull": (pulled / max(count, 1)).tolist(), "weights": flat}


def _norm(x: Tensor) -> Tensor:
    return x.norm(dim=1, keepdim=True)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(1, keepdim=True)


def _not_against(new: Tensor, old: Tensor) -> Tensor:
    """A-GEM: what of the new gradient would raise the old loss is taken out."""
    product, square = _dot(new, old), _dot(old, old)
    share = torch.where((product < 0) & (square > 0), product / square.clamp_min(1e-30), 0)
    return new - share * old


def _pull(
    rule: Rule, h: Tensor, r: Tensor | None, flat: Tensor, memory: Memory, seeds, index: int
) -> Tensor | None:
    """What a rule adds to h; None if it never adds anything."""
    d = flat - memory.anchor
    if rule.kind == "l2sp":
        return rule.knob * d
    if rule.kind == "ewc":
        return rule.knob * memory.fisher * d
    if rule.kind == "laplace":
        return rule.knob * digits.BATCH * memory.raw * d
    u = d
    if rule.importance:
        share = memory.raw / memory.raw.mean(1, keepdim=True)
        u = ((1 - rule.importance) + rule.importance * share) * d
    limit = _norm(h) / _norm(u).clamp_min(1e-30)
    if rule.kind == "guard" and r is not None:
        x, y = _dot(h, r), _dot(u, r)
        against = (x < 0) & (y > 0)
        least = -x / torch.where(against, y, torch.ones_like(y))
        return torch.where(against, rule.strength * torch.minimum(least, limit), 0) * u
    if rule.kind == "dgg":
        # As an optimizer with this seed draws at its step `index`.
        threshold = _philox.threshold(rule.alpha)
        drawn = [[_philox.step_word(seed, index) < threshold] for seed in seeds]
        scale = limit.clamp_max(1) if rule.scaling else torch.ones_like(limit)
        return torch.where(torch.tensor(drawn), rule.strength * scale, 0) * u
    return None


def _adam(
    route: str, flat: Tensor, h: Tensor, pull: Tensor | None, first: Tensor, second: Tensor,
    rate: float, step: int,
) -> Tensor:  # fmt: skip
    """One Adam step; the moments are changed in place."""
    in_first = in_second = h
    if pull is not None and route != "decoupled":
        in_first = h + pull
        in_second = in_first if route == "gradient" else h
    first.lerp_(in_first, 1 - BETA1)
    second.mul_(BETA2).addcmul_(in_second, in_second, value=1 - BETA2)
    denominator = (second / (1 - BETA2**step)).sqrt_().add_(EPSILON)
    flat = flat - (rate / (1 - BETA1**step)) * first / denominator
    if pull is not None and route == "decoupled":
        flat = flat - rate * pull
    return flat
