# SPDX-License-Identifier: BSD-3-Clause
"""Who holds which part of the parameters: one interface for every engine.

Four answers: `Sharded` (whole parameters, DTensors, FSDP1's runs, flat partitions over a process
group), `RankShare` (ZeroRedundancyOptimizer deals whole parameters out to the ranks), DeepSpeed's
``Partitions`` (`dgg.deepspeed`), and `Lost` (a copy that has to be told again).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dgg.sharding import fsdp1, zero_redundancy
from dgg.sharding.dtensor import Place, is_dtensor, place_of
from dgg.sharding.reduction import Reduction
from dgg.sharding.reduction import peers as peers_of


class Sharded:
    """Every rank steps its part of every parameter.

    Args:
        process_group: Over whose ranks plain parameters are flat partitions; None if every rank
            has all of them.
    """

    def __init__(self, process_group: Any = None) -> None:
        self.process_group = process_group

    def check(self) -> None:
        """Raises a RuntimeError if a step could not know who has the rest."""

    def tensors(self, groups: Sequence[Mapping[str, Any]]) -> list[list[Tensor]]:
        """Returns what this rank steps, by group."""
        return [group["params"] for group in groups]

    def recorded(self, groups: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        """Returns the parameters whose replay gradients are kept."""
        return [p for group in groups for p in group["params"]]

    def indices(self, params: Sequence[Tensor]) -> Sequence[int]:
        """Returns the tensor index j of every parameter, the same on every rank."""
        return range(len(params))

    def everywhere(self) -> tuple[list[int], list[int]] | None:
        """Returns group and tensor index of the rows of all ranks.

        None where every rank has a part of each, and knows what all draw.
        """
        return None

    def parts(self, params: Sequence[Tensor]) -> tuple[list[Place | None], Reduction | None]:
        """Returns where this rank's part of each parameter lies in the whole, and what sums.

        Args:
            params: Parameters of one device.

        Returns:
            Their places, empty if all are whole; and the sums over the ranks that hold the other
            parts, None if there are none.
        """
        runs = fsdp1.runs(params)
        sharded = any(map(is_dtensor, params))
        if not (sharded or runs or self.process_group is not None):
            return [], None
        places: list[Place | None] = []
        if sharded or runs:
            places = [place_of(p) for p in params]
        for row, run in runs.items():
            places[row] = Place(run.start, *[max(params[row].numel(), 1)] * 2)
        return places, Reduction(params, self.process_group, runs) or None

    def peers(self, params: Sequence[Tensor]) -> list:
        """Returns the groups whose ranks have the other parts."""
        return peers_of(params, self.process_group)

    def anchored_elsewhere(self, number: int, group: Mapping[str, Any]) -> int:
        """Returns how many parameters of a group are anchored on other ranks alone.

        Args:
            number: Of the group.
            group: The group here.
        """
        return 0

    def note_anchors(self, groups: Sequence[dict[str, Any]], *, anchored: bool) -> None:
        """Notes that anchors were set, or cleared, on all ranks."""

    def join_norms(self) -> None:
        """Takes part in the other ranks' sum with nothing of its own."""

    @property
    def has_all(self) -> bool:
        """Whether this rank has at least a part of every parameter."""
        return True

    def copied(self) -> Sharded | Lost:
        """Returns who holds what of a copy or of an unpickled optimizer."""
        return self if self.process_group is None else Lost("group")


class RankShare(Sharded):
    """This rank steps its share of a ZeroRedundancyOptimizer's parameters, whole tensors each.

    Args:
        share: The ZeroRedundancyOptimizer, as this rank's local optimizer sees it.
    """

    def __init__(self, share: zero_redundancy.Share) -> None:
        super().__init__()
        self._share = share

    def recorded(self, groups: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        """Returns the parameters of all ranks: their gradients are summed everywhere."""
        return self._share.params()

    def indices(self, params: Sequence[Tensor]) -> Sequence[int]:
        """Returns the tensor index j of every parameter, counted over those of all ranks."""
        return self._share.numbers(params)

    def everywhere(self) -> tuple[list[int], list[int]]:
        """Returns group and tensor index of the parameters of all ranks."""
        return self._share.rows()

    def parts(self, params: Sequence[Tensor]) -> tuple[list[Place | None], Reduction | None]:
        """Returns that the tensors are whole, and what sums over the shares."""
        return [], Reduction.of_shares(self._share.process_group)

    def peers(self, params: Sequence[Tensor]) -> list:
        """Returns the group whose ranks have the other shares."""
        return [self._share.process_group]

    def anchored_elsewhere(self, number: int, group: Mapping[str, Any]) -> int:
        """Returns how many parameters of a group are anchored on other ranks."""
        return self._share.anchored_elsewhere(number, group)

    def note_anchors(self, groups: Sequence[dict[str, Any]], *, anchored: bool) -> None:
        """Notes the anchors of all ranks in the groups here and in the whole optimizer's."""
        self._share.note_anchors(groups, anchored=anchored)

    def join_norms(self) -> None:
        """Takes part in the other ranks' sum with nothing of its own."""
        zero = self._share.params()[0].new_zeros(3, 1, dtype=torch.float64)
        Reduction.of_shares(self._share.process_group).sum_(zero, per_tensor=False)

    @property
    def has_all(self) -> bool:
        """Whether this rank has at least a part of every parameter: no, whole ones are dealt."""
        return False

    def copied(self) -> Lost:
        """Returns that a copy has one rank's share and no ZeroRedundancyOptimizer."""
        return Lost("share")


class Lost(Sharded):
    """A copy that does not know who has the rest: its first step raises.

    Args:
        what: ``"group"`` or ``"share"``.
    """

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def check(self) -> None:
        """Raises a RuntimeError that says what the copy has to be told."""
        if self.what == "share":
            raise RuntimeError(
                "this optimizer was copied out of a ZeroRedundancyOptimizer and has only one "
                "rank's share of the parameters: build a new ZeroRedundancyOptimizer"
            )
        raise RuntimeError(
            "this optimizer was copied or unpickled, and its process group could not come "
            "along: set optimizer.process_group before the step, or its norms would be those "
            "of this rank alone"
        )

    def copied(self) -> Lost:
        """Returns that a copy of the copy has lost it, too."""
        return self


class ProcessGroup:
    """The attribute ``process_group`` of an optimizer, by which a copy is told again who it is."""

    def __get__(self, opt, owner=None) -> Any:
        """Returns the group over whose ranks plain parameters are flat partitions, or None."""
        return self if opt is None else opt._ownership.process_group

    def __set__(self, opt, value: Any) -> None:
        """Takes another group; the next step makes its rows, and their sums, anew."""
        opt._ownership = Sharded(value)
        opt._cache = None
