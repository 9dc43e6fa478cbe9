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

from dgg import _callers

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

    def anchored_elsewhere(self, number: int, group: Mapping[str, Any]) -> int:
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
        self._anchored_elsewhere = [
            self.anchored_elsewhere(n, group) for n, group in enumerate(groups)
        ]
        for mine, whole in zip(groups, self._groups, strict=True):
            mine["anchored"] = sum(p.requires_grad for p in whole["params"]) if anchored else 0
            whole.update({name: mine[name] for name in ("anchored", "task_index")})

    def rows(self) -> tuple[list[int], list[int]]:
        """Returns group and tensor index j of the parameters of all ranks."""
        numbers = [number for number, group in enumerate(self._groups) for _ in group["params"]]
        return numbers, list(range(len(numbers)))

    @property
    def process_group(self) -> Any:
        """The group whose ranks have the shares."""
        return self._optimizer().process_group


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
