# SPDX-License-Identifier: BSD-3-Clause
"""Rows that the reference steps: torch's own operations, which run anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dgg import reference
from dgg.backends.rows import Rows
from dgg.backends.views import give_back, resolved
from dgg.kernels.layout import ANCHOR, COPY, GUIDE_HYPER, IMPORTANCE, PARAM


class ReferenceRows(Rows):
    """Rows whose steps are the functions of `dgg.reference`."""

    _finds_written_copies = False

    def take_gradients(self, grads, replays, *, elementwise: bool) -> None:
        """Keeps the gradients as the reference takes them: real, without lazy negation."""
        grads, replays = self._shards_of(grads, replays)
        self.grads, self.replays = resolved(grads), resolved(replays)
        self._grad_copies = [
            (grad.detach(), copy)
            for grad, copy in zip(grads, self.grads, strict=True)
            if grad is not None and copy is not None and grad.layout == torch.strided
            if grad.is_neg() or grad.is_conj()
        ]
        pairs = zip(grads, replays or [None] * len(grads), strict=True)
        self._present = [g is not None or r is not None for g, r in pairs]
        self.present = sum(self._present)
        self.adopt_changes()

    def _had_gradients(self) -> Tensor:
        return torch.tensor(self._present, device="cpu")

    def norms(self, *, replay_weight, scaling, which, gate=None) -> Tensor:
        """Calls `reference.norms`."""
        return reference.norms(
            self.tensors(PARAM), self.grads, self.replays, self.tensors(ANCHOR), self.distances,
            replay_weight=replay_weight, grad_scale=scaling.divisor, which=which,
            **self._importance(),
        )  # fmt: skip

    def products(self, flags: Tensor, *, replay_weight, scaling) -> Tensor:
        """Calls `reference.products`."""
        return reference.products(
            self.tensors(PARAM), self.grads, self.replays, self.tensors(ANCHOR), flags,
            replay_weight=replay_weight, grad_scale=scaling.divisor, **self._importance(),
        )  # fmt: skip

    def _importance(self) -> dict[str, Any]:
        """Returns the arguments of the reference's functions that weigh the pull."""
        if not self.importance:
            return {}
        return {"importances": self.tensors(IMPORTANCE), "importance": self.importance}

    def update_(
        self, rule, coefficients, flags, groups, draw, scaling, *, look_ahead, replay_weight
    ) -> None:
        """Calls the rule's function in `reference` for each group."""
        for number, group in enumerate(groups):
            getattr(reference, rule.name)(
                self.tensors(PARAM), *self._of_group(number),
                *(self.tensors(column) for column in rule.state), self.distances, coefficients,
                flags, self.indices, **{key: group[key] for key in rule.hyper},
                look_ahead=look_ahead, places=self._all_places(),
                copies=self.tensors(COPY) if self._has_masters else (), stochastic=self.stochastic,
                replay_weight=replay_weight, grad_scale=scaling.divisor, seed=draw.seed,
                draw=draw.index, route=self.route, **self._importance(),
            )  # fmt: skip
        self._after_update(look_ahead)

    def guide_(self, coefficients, flags, groups, draw, scaling, *, replay_weight) -> None:
        """Calls `reference.guide_` for each group."""
        for number, group in enumerate(groups):
            grads, replays = self._of_group(number)
            reference.guide_(
                self.tensors(PARAM), grads, replays, self.tensors(ANCHOR), coefficients,
                flags, self.indices, **{key: group[key] for key in GUIDE_HYPER},
                replay_weight=replay_weight, grad_scale=scaling.divisor, seed=draw.seed,
                draw=draw.index, places=self._all_places(), **self._importance(),
            )  # fmt: skip
        give_back(self._grad_copies)
        self.release()

    def _all_places(self) -> Sequence[tuple[int, int, int]]:
        return [self._place(row) for row in range(len(self.params))] if self.places else ()

    def _of_group(self, number: int) -> tuple[list, list]:
        # The reference leaves rows without gradient alone: here the rows of other groups have none.
        grads, replays = (
            [x if g == number else None for g, x in zip(self.groups, tensors, strict=bool(tensors))]
            for tensors in (self.grads, self.replays)
        )
        return grads, replays
