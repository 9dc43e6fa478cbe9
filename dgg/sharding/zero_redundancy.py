# SPDX-License-Identifier: BSD-3-Clause
"""ZeroRedundancyOptimizer: an optimizer built by it holds only this rank's share of the parameters.

They are whole tensors, but norms run over all ranks' shares, draws count all parameters, and ranks
whose share is small or empty take part in every sum. Nothing of this reaches the local optimizer
as an argument, and forgetting it would change the training without a word; so it recognises its
builder.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dgg import _callers, _ranges

_MODULE = "torch.distributed.optim.zero_redundancy_optimizer"


class Share:
    """The share of a ZeroRedundancyOptimizer's parameters that one local optimizer steps.

    Args:
        whole: The ZeroRedundancyOptimizer; it holds the local optimizer, so it is not held here.
    """

    def __init__(self, whole: torch.optim.Optimizer) -> None:
        self._whole = weakref.ref(whole)
        self._anchored_elsewhere: list[int] = []

    def _optimizer(self) -> torch.optim.Optimizer:
        whole = self._whole()
        if whole is None:
            raise RuntimeError(
                "the ZeroRedundancyOptimizer that built this optimizer is gone, and this rank's "
                "share alone is no training: keep it, and step it instead of its `optim`"
            )
        return whole

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self._optimizer().param_groups

    def params(self) -> list[Tensor]:
        """Returns the parameters of all ranks."""
        return [p for group in self._groups for p in group["params"]]

    def numbers(self, params: Sequence[Tensor]) -> list[int]:
        """Returns the tensor index j of each parameter, counted over those of all ranks."""
        number = {p: j for j, p in enumerate(self.params())}
        return [number[p] for p in params]

    def others(self, number: int, group: Mapping[str, Any]) -> int:
        """Returns how many parameters of group ``number`` are anchored on other ranks, if any."""
        if self._anchored_elsewhere:
            return self._anchored_elsewhere[number]
        mine = set(group["params"])
        return sum(p.requires_grad and p not in mine for p in self._groups[number]["params"])

    def note_anchors(self, groups: Sequence[dict[str, Any]], *, anchored: bool) -> None:
        """Notes in every group how many parameters of all ranks are anchored, and publishes it.

        The ZeroRedundancyOptimizer hands its own groups down before every step.
        """
        self._anchored_elsewhere = []
        self._anchored_elsewhere = [self.others(n, group) for n, group in enumerate(groups)]
        for mine, whole in zip(groups, self._groups, strict=True):
            mine["anchored"] = sum(p.requires_grad for p in whole["params"]) if anchored else 0
            whole.update({name: mine[name] for name in ("anchored", "task_index")})

    def every_row(self) -> EveryRow:
        """Returns a stand-in for the rows of all ranks."""
        return EveryRow(self._groups)

    @property
    def reduction(self) -> Reduction:
        """Sums squares over the shares."""
        return Reduction(self._optimizer().process_group)

    def peers(self) -> list:
        """Returns the groups whose ranks have the other shares."""
        return [self._optimizer().process_group]

    def join(self) -> None:
        """Takes part in the other ranks' sum with nothing of its own."""
        device = self.params()[0].device
        self.reduction.sum_(torch.zeros(3, 1, dtype=torch.float64, device=device), per_tensor=False)


class EveryRow:
    """The rows of all ranks, as far as the flags of a step ask for them."""

    def __init__(self, groups: Sequence[Mapping[str, Any]]) -> None:
        self.anchored = any(group["anchored"] for group in groups)
        self.groups = [number for number, group in enumerate(groups) for _ in group["params"]]
        self.indices = list(range(len(self.groups)))

    def constant_flags(self, value: int) -> int:
        """Returns what is the same for all rows."""
        return value

    def flags(self, values: list[int], _name: str) -> list[int]:
        """Returns what is each row's own."""
        return values


class Reduction:
    """Sums the squares of whole tensors that are dealt out to the ranks of a group."""

    def __init__(self, group) -> None:
        self._group = group

    def sum_(self, squares: Tensor, *, per_tensor: bool) -> Tensor:
        """Sums over the ranks; every rank calls it.

        Args:
            squares: float64 [3, n] of this rank: of h, g and d. Modified in place.
            per_tensor: Norms of guidance are every row's own, which this rank has already; only
                that of clipping runs over the ranks.

        Returns:
            ``squares``; what is summed over the ranks stands in the first row, the others are 0.
        """
        import torch.distributed as dist

        sums = squares.sum(dim=1)
        with _ranges.record("dgg.allreduce"):
            dist.all_reduce(sums, group=self._group)
        summed = 1 if per_tensor else 3
        squares[:summed] = 0.0
        squares[:summed, 0] = sums[:summed]
        return squares


def builder() -> Share | None:
    """Returns the share, if the caller is being built by a ZeroRedundancyOptimizer.

    Raises:
        ValueError: Its parameters are on several devices.
    """
    module = sys.modules.get(_MODULE)
    for whole, _ in _callers.methods() if module is not None else ():
        if isinstance(whole, module.ZeroRedundancyOptimizer):
            share = Share(whole)
            # Of all ranks' parameters, so that every rank raises and none waits for the others.
            devices = sorted({str(p.device) for p in share.params()})
            if len(devices) > 1:
                raise ValueError(
                    f"ZeroRedundancyOptimizer over parameters on several devices ({devices}) is "
                    "not supported; build one per device"
                )
            return share
    return None
