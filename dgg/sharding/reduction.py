# SPDX-License-Identifier: BSD-3-Clause
"""Sums and agreements over the ranks that hold the other shards of the parameters."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dgg import _ranges
from dgg.sharding import fsdp1
from dgg.sharding.dtensor import is_dtensor, like, local


class _Part(NamedTuple):
    """Rows that are summed together."""

    rows: Tensor | None  # their numbers; None for all rows
    groups: list  # the process groups over which to sum, one after the other
    weights: Tensor | None  # float64, of each row; None for 1
    shares: bool = False  # the rows are whole tensors, and the other ranks have other tensors


class Reduction:
    """Sums squares over the ranks that hold the other shards, one collective per mesh.

    Where a mesh dimension shards some parameters and replicates others, the squares of the others
    are divided by the number of replicas.

    Args:
        params: Parameters of the rows, DTensors or plain ones.
        process_group: Over whose ranks plain parameters are partitioned, or None if every rank
            has all of them.
        runs: The runs of FSDP1's parameters, by row.
    """

    def __init__(
        self, params: Sequence[Tensor], process_group: Any, runs: Mapping[int, fsdp1.Run]
    ) -> None:
        sharding: dict[Any, dict[int, set[int]]] = {}  # by mesh
        flat: dict[Any, list[int]] = {}  # by process group
        if runs and process_group is not None:
            raise ValueError(
                "process_group= does not go with parameters of FSDP1, whose own process group is "
                "used; leave it None"
            )
        for row, param in enumerate(params):
            if row in runs or not is_dtensor(param):
                group = runs[row].group if row in runs else process_group
                flat.setdefault(group, []).append(row)
                continue
            mesh = param.device_mesh
            split = {d for d, p in enumerate(param.placements) if not p.is_replicate()}
            sharding.setdefault(mesh, {})[row] = {d for d in split if mesh.size(d) > 1}
        self._parts: list[_Part] = []
        for group, rows in flat.items():
            if group is not None:
                self._add(rows, len(params), [group], [1.0] * len(rows))
        for mesh, dims_of in sharding.items():
            dims = sorted(set().union(*dims_of.values()))
            if dims:
                weights = [
                    1.0 / math.prod(mesh.size(d) for d in dims if d not in sharding_dims)
                    for sharding_dims in dims_of.values()
                ]
                self._add(list(dims_of), len(params), _groups_of(mesh, dims), weights)

    @classmethod
    def of_shares(cls, process_group) -> Reduction:
        """Returns the sums over whole tensors, each of which is on one rank of a group.

        With norms per tensor only the norm for clipping is summed over the ranks.
        """
        reduction = cls((), None, {})
        reduction._parts.append(_Part(None, [process_group], None, shares=True))
        return reduction

    def _add(self, rows: list[int], count: int, groups: list, weights: list[float]) -> None:
        some = None if len(rows) == count else torch.tensor(rows, device="cpu")
        even = all(weight == 1.0 for weight in weights)
        vector = None if even else torch.tensor(weights, dtype=torch.float64, device="cpu")
        self._parts.append(_Part(some, groups, vector))

    def __bool__(self) -> bool:
        return bool(self._parts)

    def sum_(self, squares: Tensor, *, per_tensor: bool) -> Tensor:
        """Sums over the ranks; every rank calls it, whether it has gradients or not.

        Args:
            squares: float64 [k, n] of this rank. Modified in place.
            per_tensor: Return the sum of every row, not only that over all rows.

        Returns:
            ``squares``; unless ``per_tensor`` the first row of each mesh has the sum over the
            mesh's rows, and the others are 0.
        """
        for number, (rows, groups, weights, shares) in enumerate(self._parts):
            if squares.device.type != "cpu":
                # Copied to the device once.
                rows, weights = (x if x is None else x.to(squares.device) for x in (rows, weights))
                self._parts[number] = _Part(rows, groups, weights, shares)
            vector = squares if rows is None else squares.index_select(1, rows)
            if weights is not None:
                vector = vector * weights
            if shares or not per_tensor:
                vector = vector.sum(dim=1)
            with _ranges.record("dgg.allreduce"):
                for group in groups:
                    dist.all_reduce(vector, group=group)
            if shares:
                summed = 1 if per_tensor else len(squares)
                squares[:summed] = 0.0
                squares[:summed, 0] = vector[:summed]
            elif rows is None and per_tensor:
                squares.copy_(vector)
            elif rows is None:
                squares.zero_()
                squares[:, 0] = vector
            elif per_tensor:
                squares.index_copy_(1, rows, vector)
            else:
                squares.index_fill_(1, rows, 0.0)
                squares.index_copy_(1, rows[:1], vector.unsqueeze(1))
        return squares


def _groups_of(mesh, dims: Sequence[int]) -> list:
    """Returns the groups over which to sum one after the other, a single one if possible.

    All ranks of the world have to take part when a group is made. On a mesh over a part of the
    world the others would not, so there no new group is made.
    """
    world = dist.get_world_size()
    if len(dims) > 1 and mesh.size() == world:
        if mesh.mesh_dim_names:
            part = mesh[tuple(mesh.mesh_dim_names[d] for d in dims)]
            return [part._flatten().get_group()]
        if math.prod(mesh.size(d) for d in dims) == world:
            return [dist.group.WORLD]
    return [mesh.get_group(d) for d in dims]


@contextlib.contextmanager
def on_all_or_none(groups: Sequence, settings: Mapping[str, object]) -> Iterator[None]:
    """Raises on every rank if the block fails on one of them, or if their settings differ.

    Otherwise ranks would go on with different states, and wait for each other at the next step.

    Args:
        groups: Process groups, one after the other; all ranks call this.
        settings: Options that have to be the same on all ranks.

    Raises:
        RuntimeError: Another rank failed; the message says why. A rank that failed itself raises
            its own error.
        ValueError: A setting differs.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    message = None
    for group in groups:
        if message is None and failure is not None:
            message = f"rank {dist.get_rank()}: {failure}"
        reports: list = [None] * dist.get_world_size(group)
        dist.all_gather_object(reports, (message, settings), group=group)
        message = next((text for text, _ in reports if text is not None), None)
        if message is None:
            failure = _difference([settings_there for _, settings_there in reports])
    if failure is not None:
        raise failure
    if message is not None:
        raise RuntimeError(f"another rank failed, so no rank has changed anything: {message}")


def _difference(settings: Sequence[Mapping[str, object]]) -> ValueError | None:
    for name in settings[0]:
        values = list(dict.fromkeys(of_rank[name] for of_rank in settings))[:4]
        if len(values) > 1:
            return ValueError(
                f"{name} is {values} on these ranks; give all ranks the same, or each would make "
                "other draws and steps than the others"
            )
    return None


def sum_partial_gradients(
    params: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Returns the gradients, those that are partial sums summed over the parameter's mesh.

    Under sequence parallelism the gradients of layer norms are sums over each rank's part of the
    sequence. All ranks of a mesh must have partial gradients of the same parameters: there is one
    collective per mesh and dtype. A parameter may occur twice; no gradient is modified.
    """
    grads = list(grads)
    if not (dist.is_available() and dist.is_initialized()):
        return grads
    partial: dict[tuple, list[int]] = {}
    for place, (param, grad) in enumerate(zip(params, grads, strict=True)):
        if grad is None or not (is_dtensor(grad) and is_dtensor(param)):
            continue
        dims = tuple(d for d, p in enumerate(grad.placements) if p.is_partial("sum"))
        if (
            dims
            and grad.device_mesh == param.device_mesh
            and all(
                placement.is_replicate() if d in dims else placement == grad.placements[d]
                for d, placement in enumerate(param.placements)
            )
        ):
            key = (param.device_mesh, dims, grad.dtype, grad.device)
            partial.setdefault(key, []).append(place)
    for (mesh, dims, *_), places in partial.items():
        whole = [grads[i] for i in places]
        shards = [local(grad).detach() for grad in whole if grad is not None]
        vector = torch.cat([shard.reshape(-1) for shard in shards])
        with _ranges.record("dgg.allreduce"):
            for group in _groups_of(mesh, dims):
                dist.all_reduce(vector, group=group)
        sums = vector.split([shard.numel() for shard in shards])
        for i, shard, total in zip(places, shards, sums, strict=True):
            grads[i] = like(total.view(shard.shape), params[i])
    return grads
