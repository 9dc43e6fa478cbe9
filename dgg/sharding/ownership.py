# SPDX-License-Identifier: BSD-3-Clause
"""Who holds which part of the parameters: one interface for every engine.

Four answers: `Sharded` (whole parameters, DTensors, FSDP1's runs, flat partitions over a process
group), `RankShare` (ZeroRedundancyOptimizer deals whole parameters out to the ranks), DeepSpeed's
``Partitions`` (`dgg.deepspeed`), and `Lost` (a copy that no longer knows the other ranks).
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from dgg.sharding import fsdp1
from dgg.sharding.dtensor import Place, is_dtensor, local, place_of
from dgg.sharding.reduction import Reduction


class Sharded:
    """Every rank steps its part of every parameter.

    Args:
        process_group: Over whose ranks plain parameters are flat partitions; None if every rank
            has all of them.

    Attributes:
        has_all: Whether this rank has at least a part of every parameter.
    """

    has_all = True

    def __init__(self, process_group: Any = None) -> None:
        self.process_group = process_group

    def check(self) -> None:
        """Raises a RuntimeError if the ranks with the other parts are not known."""

    def tensors(self, groups: Sequence[Mapping[str, Any]]) -> list[list[Tensor]]:
        """Returns what this rank steps, by group."""
        return [group["params"] for group in groups]

    def recorded(self, groups: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        """Returns the parameters whose replay gradients are recorded."""
        return [p for group in groups for p in group["params"]]

    def indices(self, params: Sequence[Tensor]) -> Sequence[int]:
        """Returns the tensor index j of every parameter, the same on every rank."""
        return range(len(params))

    def everywhere(self) -> tuple[list[int], list[int]] | None:
        """Returns group and tensor index of all ranks' rows; None where each knows all draws."""
        return None

    def parts(self, params: Sequence[Tensor]) -> tuple[list[Place | None], Reduction | None]:
        """Returns where this rank's part of each parameter lies in the whole, and the sums.

        Of parameters of one device. There are no places if all are whole; the sums are over the
        ranks that hold the other parts, None without such ranks.
        """
        runs = fsdp1.runs(params)
        places: list[Place | None] = []
        if runs or any(map(is_dtensor, params)):
            places = [place_of(p) for p in params]
        for row, run in runs.items():
            places[row] = Place(run.start, *[max(params[row].numel(), 1)] * 2)
        return places, Reduction(params, self.process_group, runs) or None

    def peers(self, params: Sequence[Tensor]) -> list:
        """Returns the groups whose ranks have parts or copies of these, in the same order on all.

        Raises:
            RuntimeError: Parameters were taken by FSDP1, whose modules are gone.
        """
        flat = dict.fromkeys(run.group for run in fsdp1.runs(params).values())
        meshes = dict.fromkeys(p.device_mesh for p in params if is_dtensor(p))
        groups = [mesh.get_group(d) for mesh in meshes for d in range(mesh.ndim)]
        return [group for group in (self.process_group, *flat, *groups) if group is not None]

    def anchored_elsewhere(self, number: int, group: Mapping[str, Any]) -> int:
        """Returns how many parameters of this group are anchored on other ranks alone."""
        return 0

    def note_anchors(self, groups: Sequence[dict[str, Any]], *, anchored: bool) -> None:
        """Notes that anchors were set, or cleared, on all ranks."""

    def join_norms(self, sums: int = 3) -> None:
        """Adds zeros to the sums that the other ranks form, if they wait for this rank."""

    def share_weights(self) -> None:
        """Gives the other ranks the weights that this rank alone has written, outside of a step."""

    @property
    def has_names(self) -> bool:
        """Whether the parameters here are those that the model's names belong to."""
        return self.has_all and self.process_group is None

    def elements(self, param: Tensor) -> int:
        """Returns how many elements of what `tensors` returned are weights, real numbers each."""
        return local(param).numel() * (2 if param.is_complex() else 1)

    def total(self, params: Sequence[Tensor], sums: Sequence[Tensor], count: int) -> Tensor:
        """Returns sums over all parts of all ranks, float64 [count] on the CPU; all ranks call it.

        ``params`` is what this rank steps, and ``sums`` has float64 [count] of each.
        """
        whole = torch.zeros(count, dtype=torch.float64, device="cpu")
        for device in dict.fromkeys(p.device for p in params):
            here = [i for i, p in enumerate(params) if p.device == device]
            _, reduction = self.parts([params[i] for i in here])
            part = torch.stack([sums[i].to(device) for i in here], dim=1)
            if reduction is not None:
                reduction.sum_(part, per_tensor=False)
            whole += part.sum(dim=1).to("cpu")
        return whole

    def copied(self) -> Sharded | Lost:
        """Returns the ownership of a copy or of an unpickled optimizer."""
        return self if self.process_group is None else Lost("group")


class RankShare(Sharded):
    """This rank steps its share of a ZeroRedundancyOptimizer's parameters, whole tensors each.

    Norms run over all ranks' shares, draws count all parameters, and a rank whose share is small or
    empty takes part in every sum.

    Args:
        zero_optimizer: The ZeroRedundancyOptimizer. It refers to the local optimizer, which
            therefore refers to it weakly.
    """

    has_all = False

    def __init__(self, zero_optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        self._zero_optimizer = weakref.ref(zero_optimizer)
        self._anchored_elsewhere: list[int] = []

    def _optimizer(self) -> Any:
        optimizer = self._zero_optimizer()
        if optimizer is None:
            raise RuntimeError(
                "the ZeroRedundancyOptimizer that built this optimizer is gone, and this rank's "
                "share alone is no training: keep it, and step it instead of its `optim`"
            )
        return optimizer

    def recorded(self, groups: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        """Returns the parameters of all ranks: their gradients are summed everywhere."""
        return [p for group in self._optimizer().param_groups for p in group["params"]]

    def indices(self, params: Sequence[Tensor]) -> Sequence[int]:
        """Returns the tensor index j of every parameter, counted over those of all ranks."""
        index_of = {p: j for j, p in enumerate(self.recorded(()))}
        return [index_of[p] for p in params]

    def everywhere(self) -> tuple[list[int], list[int]]:
        """Returns group and tensor index of the parameters of all ranks."""
        groups = self._optimizer().param_groups
        numbers = [number for number, group in enumerate(groups) for _ in group["params"]]
        return numbers, list(range(len(numbers)))

    def parts(self, params: Sequence[Tensor]) -> tuple[list[Place | None], Reduction | None]:
        """Returns no places, since the tensors are whole, and the sums over the shares."""
        return [], Reduction.of_shares(self._optimizer().process_group)

    def peers(self, params: Sequence[Tensor]) -> list:
        """Returns the group whose ranks have the other shares."""
        return [self._optimizer().process_group]

    def anchored_elsewhere(self, number: int, group: Mapping[str, Any]) -> int:
        """Returns how many parameters of a group are anchored on other ranks."""
        if self._anchored_elsewhere:
            return self._anchored_elsewhere[number]
        share = set(group["params"])
        params = self._optimizer().param_groups[number]["params"]
        return sum(p.requires_grad and p not in share for p in params)

    def note_anchors(self, groups: Sequence[dict[str, Any]], *, anchored: bool) -> None:
        """Notes the anchors of all ranks in the groups here and in the ZeroRedundancyOptimizer's.

        It copies its own groups to the local optimizer before every step.
        """
        self._anchored_elsewhere = []
        self._anchored_elsewhere = [
            self.anchored_elsewhere(n, group) for n, group in enumerate(groups)
        ]
        for group, whole in zip(groups, self._optimizer().param_groups, strict=True):
            group["anchored"] = sum(p.requires_grad for p in whole["params"]) if anchored else 0
            copied = ("anchored", "task_index", "importance_mean", "importance_draw")
            whole.update({name: group[name] for name in copied})

    def join_norms(self, sums: int = 3) -> None:
        """Adds zeros to the other ranks' sum, which waits for this rank."""
        zeros = self.recorded(())[0].new_zeros(sums, 1, dtype=torch.float64)
        Reduction.of_shares(self._optimizer().process_group).sum_(zeros, per_tensor=False)

    def share_weights(self) -> None:
        """Sends this rank's share to the others, as each step of ZeroRedundancyOptimizer does."""
        self._optimizer()._sync_params()

    def total(self, params: Sequence[Tensor], sums: Sequence[Tensor], count: int) -> Tensor:
        """Returns sums over all shares; a rank without parameters takes part."""
        home = self.recorded(())[0]
        part = home.new_zeros(count, 1, dtype=torch.float64)
        for each in sums:
            part[:, 0] += each.to(home.device)
        Reduction.of_shares(self._optimizer().process_group).sum_(part, per_tensor=False)
        return part[:, 0].to("cpu")

    def copied(self) -> Lost:
        """Returns `Lost`: a copy has one rank's share and no ZeroRedundancyOptimizer."""
        return Lost("share")


class Lost(Sharded):
    """A copy that does not know the ranks with the other parts: its first step raises."""

    def __init__(self, what: Literal["group", "share"]) -> None:
        super().__init__()
        self.what = what

    def check(self) -> None:
        """Raises a RuntimeError that says how to repair the copy."""
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
        """Returns the same for a copy of the copy."""
        return self


class ProcessGroup:
    """The attribute ``process_group`` of an optimizer; setting it repairs a copy."""

    def __get__(self, opt, owner=None) -> Any:
        """Returns the group over whose ranks plain parameters are flat partitions, or None."""
        return self if opt is None else opt._ownership.process_group

    def __set__(self, opt, value: Any) -> None:
        """Sets another group; the next step makes its rows, and their sums, anew."""
        opt._ownership = Sharded(value)
        opt._cache = None
