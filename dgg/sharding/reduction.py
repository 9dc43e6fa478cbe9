# SPDX-License-Identifier: BSD-3-Clause
"""Sums and agreements over the ranks that hold the other shards of the parameters."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dgg import _ranges
from dgg.sharding import fsdp1
from dgg.sharding.dtensor import is_dtensor, like, local


class _Part(NamedTuple):
    """What is summed together: rows, over which groups one after the other, counted how often.

    ``rows`` are None if they are all there are. ``shares``: they are whole tensors, of which the
    other ranks have others.
    """

    rows: Tensor | None
    groups: list
    weights: Tensor | None
    shares: bool = False


class Reduction:
    """Sums squares over the ranks that hold the other shards, one collective per mesh.

    Where a mesh dimension shards some parameters and replicates others, those are counted by the
    share that makes their replicas one.

    Args:
        params: Parameters of the rows, DTensors or plain ones.
        process_group: Over whose ranks plain parameters are partitioned, or None if every rank
            has all of them.
        runs: What FSDP1's parameters are runs of, by row.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        process_group=None,
        runs: Mapping[int, fsdp1.Run] | None = None,
    ) -> None:
        sharding: dict[object, dict[int, set[int]]] = {}
        plain = []
        flat: dict[object, list[int]] = {}
        if runs and process_group is not None:
            raise ValueError(
                "process_group= does not go with parameters of FSDP1, whose own process group is "
                "used; leave it None"
            )
        for row, param in enumerate(params):
            if runs and row in runs:
                flat.setdefault(runs[row].group, []).append(row)
                continue
            if not is_dtensor(param):
                plain.append(row)
                continue
            mesh = param.device_mesh
            dims = {d for d, p in enumerate(param.placements) if not p.is_replicate()}
            sharding.setdefault(mesh, {})[row] = {d for d in dims if mesh.size(d) > 1}
        self._parts = []
        if process_group is not None and plain:
            self._add(plain, len(params), [process_group], [1.0] * len(plain))
        for group, rows in flat.items():
            if group is not None:
                self._add(rows, len(params), [group], [1.0] * len(rows))
        for mesh, rows in sharding.items():
            dims = sorted(set().union(*rows.values()))
            if dims:
                weights = [
                    1.0 / math.prod(mesh.size(d) for d in dims if d not in own)
                    for own in rows.values()
                ]
                self._add(list(rows), len(params), _groups_of(mesh, dims), weights)

    @classmethod
    def of_shares(cls, process_group) -> Reduction:
        """Returns the sums over whole tensors that are dealt out to the ranks of a group.

        Of norms per tensor only that of clipping runs over the ranks: this rank has the others.
        """
        made = cls(())
        made._parts.append(_Part(None, [process_group], None, shares=True))
        return made

    def _add(self, rows: list[int], count: int, groups: list, weights: list[float]) -> None:
        even = all(weight == 1.0 for weight in weights)
        self._parts.append(
            _Part(
                None if len(rows) == count else torch.tensor(rows, device="cpu"),
                groups,
                None if even else torch.tensor(weights, dtype=torch.float64, device="cpu"),
            )
        )

    def __bool__(self) -> bool:
        return bool(self._parts)

    def sum_(self, squares: Tensor, *, per_tensor: bool) -> Tensor:
        """Sums over the ranks; every rank calls it, whether it has gradients or not.

        Args:
            squares: float64 [3, n] of this rank. Modified in place.
            per_tensor: Every row's own sum is wanted, not only that over all rows.

        Returns:
            ``squares``; unless ``per_tensor`` the sums over the rows of a mesh stand in the first
            of them, the others are 0.
        """
        import torch.distributed as dist

        for number, (rows, groups, weights, shares) in enumerate(self._parts):
            if squares.device.type != "cpu":
                # Copied there once: the numbers of a step stay on its device.
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
                summed = 1 if per_tensor else 3
                squares[:summed] = 0.0
                squares[:summed, 0] = vector[:summed]
            elif per_tensor and rows is not None:
                squares.index_copy_(1, rows, vector)
            elif per_tensor:
                squares.copy_(vector)
            else:
                self._only_first(squares, rows, vector)
        return squares

    @staticmethod
    def _only_first(squares: Tensor, rows: Tensor | None, sums: Tensor) -> None:
        if rows is None:
            squares.zero_()
            squares[:, 0] = sums
        else:
            squares.index_fill_(1, rows, 0.0)
            squares.index_copy_(1, rows[:1], sums.unsqueeze(1))


def _groups_of(mesh, dims: Sequence[int]) -> list:
    """Returns the groups over which to sum one after the other: a single one where it can be.

    A new group is made by all ranks of the world, which count the groups they make: on a mesh over
    a part of it, others would not take part, and wait for these ranks in the next group of theirs.
    """
    import torch.distributed as dist

    world = dist.get_world_size()
    if len(dims) > 1 and mesh.size() == world:
        if mesh.mesh_dim_names:
            part = mesh[tuple(mesh.mesh_dim_names[d] for d in dims)]
            return [part._flatten().get_group()]
        if math.prod(mesh.size(d) for d in dims) == world:
            return [dist.group.WORLD]
    return [mesh.get_group(d) for d in dims]


def peers(params: Sequence[Tensor], process_group=None) -> list:
    """Returns the groups over which ranks hold parts or copies of these; the same order on all.

    Args:
        params: Parameters.
        process_group: Over whose ranks plain ones are partitioned, or None.

    Raises:
        RuntimeError: Parameters were taken by FSDP1, whose modules are gone.
    """
    found = [] if process_group is None else [process_group]
    runs = fsdp1.runs(params).values()
    meshes = dict.fromkeys(p.device_mesh for p in params if is_dtensor(p))
    found += [group for group in dict.fromkeys(run.group for run in runs) if group is not None]
    return found + [mesh.get_group(d) for mesh in meshes for d in range(mesh.ndim)]


@contextlib.contextmanager
def on_all_or_none(groups: Sequence, settings: Mapping[str, object]) -> Iterator[None]:
    """Lets no rank go on from a block in which another one failed, or with settings of its own.

    Otherwise ranks would go on with different states, and wait for each other at the next step.

    Args:
        groups: Process groups, one after the other; all ranks come here.
        settings: What has to be the same on all ranks.

    Raises:
        RuntimeError: Another rank failed, and this says why. A rank that failed itself raises what
            it had to.
        ValueError: A setting differs.
    """
    import torch.distributed as dist

    wrong: Exception | None = None
    try:
        yield
    except Exception as error:
        wrong = error
    said = None
    for group in groups:
        if said is None and wrong is not None:
            said = f"rank {dist.get_rank()}: {wrong}"
        everywhere: list = [None] * dist.get_world_size(group)
        dist.all_gather_object(everywhere, (said, settings), group=group)
        said = next((text for text, _ in everywhere if text is not None), None)
        if said is None:
            wrong = _difference([others for _, others in everywhere])
    if wrong is not None:
        raise wrong
    if said is not None:
        raise RuntimeError(f"another rank failed, so no rank has changed anything: {said}")


def _difference(settings: Sequence[Mapping[str, object]]) -> ValueError | None:
    for name in settings[0]:
        values = list(dict.fromkeys(mine[name] for mine in settings))[:4]
        if len(values) > 1:
            return ValueError(
                f"{name} is {values} on these ranks; give all ranks the same, or each would make "
                "other draws and steps than the others"
            )
    return None


def sum_partial_gradients(
    params: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Returns gradients with partial ones of replicated parameters summed over their mesh.

    Under sequence parallelism every rank has the norms' gradients of its part of the sequence. All
    ranks of a mesh must bring the same ones: there is one collective per mesh and dtype for all.

    Args:
        params: Parameters; one may stand there twice.
        grads: Gradient of each, or None. They are left as they are.
    """
    import torch.distributed as dist

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
                mine.is_replicate() if d in dims else mine == its
                for d, (mine, its) in enumerate(zip(param.placements, grad.placements, strict=True))
            )
        ):
            key = (param.device_mesh, dims, grad.dtype, grad.device)
            partial.setdefault(key, []).append(place)
    for (mesh, dims, *_), places in partial.items():
        shards = [local(grads[i]).detach() for i in places]
        vector = torch.cat([shard.reshape(-1) for shard in shards])
        with _ranges.record("dgg.allreduce"):
            for group in _groups_of(mesh, dims):
                dist.all_reduce(vector, group=group)
        sums = vector.split([shard.numel() for shard in shards])
        for i, shard, found in zip(places, shards, sums, strict=True):
            grads[i] = like(found.view(shard.shape), params[i])
    return grads
