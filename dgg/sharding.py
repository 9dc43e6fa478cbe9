# SPDX-License-Identifier: BSD-3-Clause
"""Sharded parameters: the one place that knows DTensor.

A step works on local shards, plain tensors, and no DTensor operation takes part in it. What a
shard has to tell is where its elements lie in the whole parameter (for draws per element) and over
which ranks the squares of its norm are to be summed: over those of the mesh dimensions that shard
it, not over those that replicate it, so that nothing is counted twice.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dgg import _fsdp1, _ranges


class Place(NamedTuple):
    """Where a shard's elements lie in the whole parameter.

    Local element l is element base + (l // block) · stride + l % block, both row-major.
    """

    base: int
    block: int
    stride: int


def is_dtensor(x: object) -> bool:
    """Returns whether ``x`` is a DTensor."""
    return hasattr(x, "device_mesh") and hasattr(x, "placements")


def local(x: Tensor | None) -> Tensor | None:
    """Returns the local shard of a DTensor, any other tensor as it is."""
    # Not to_local(), which makes a new tensor and a node of the graph.
    return x._local_tensor if is_dtensor(x) else x


def keeps_values_elsewhere(x: Tensor) -> bool:
    """Returns whether ``x`` (of a DTensor the shard) has no memory of its own.

    So it is with what dispatches to Python: fake tensors, float8 and quantised weights.
    """
    return torch._C._dispatch_keys(local(x)).has(torch._C.DispatchKey.Python)


def like(shard: Tensor, param: Tensor) -> Tensor:
    """Returns a local tensor as a DTensor placed as ``param`` is; as it is for a plain one."""
    if not is_dtensor(param):
        return shard
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        shard,
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )


def check(param: Tensor, label: str, *, elements: bool) -> None:
    """Checks that a DTensor parameter can be stepped shard by shard.

    Args:
        param: The parameter.
        label: How errors call it.
        elements: Draws are made per element.

    Raises:
        ValueError: It has partial sums, lies on other ranks, or per-element draws have no place in
            its sharding.
    """
    if param.device_mesh.get_coordinate() is None:
        raise ValueError(
            f"{label} lies on {param.device_mesh}, of which this rank is no part, so that norms "
            "over it cannot be had here; give every rank's optimizer the parameters of its own "
            "meshes"
        )
    if any(placement.is_partial() for placement in param.placements):
        raise ValueError(
            f"{label} is placed as {param.placements}: partial sums are no values to step; "
            "redistribute it to Shard or Replicate first"
        )
    if elements and place_of(param) is None:
        raise ValueError(
            f"{label} is placed as {param.placements}, sharded along several inner dimensions or "
            "interleaved, where granularity='element' cannot number its elements; use 'step' or "
            "'tensor'"
        )


def place_of(param: Tensor) -> Place | None:
    """Returns where a parameter's local elements lie in the whole one.

    None if they are no equal runs at equal distances: sharded along two dimensions that are not
    the first, or interleaved.
    """
    if not is_dtensor(param):
        return Place(0, max(param.numel(), 1), max(param.numel(), 1))
    if _interleaved(param):
        return None
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offsets = compute_local_shape_and_global_offset(
        param.shape, param.device_mesh, param.placements
    )
    sharded = [d for d, size in enumerate(shape) if size != param.shape[d]]
    inner = [d for d in sharded if d > 0]
    if len(inner) > 1:
        return None
    strides = [1] * len(shape)
    for d in range(len(shape) - 2, -1, -1):
        strides[d] = strides[d + 1] * param.shape[d + 1]
    base = sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))
    if not inner:
        count = max(local(param).numel(), 1)
        return Place(base, count, count)
    (d,) = inner
    return Place(base, max(shape[d] * strides[d], 1), param.shape[d] * strides[d])


def _interleaved(param: Tensor) -> bool:
    """Returns whether a shard is several separate pieces of a dimension; the same on all ranks.

    FSDP2 over tensor parallelism shards what is sharded already and calls that strided: the later
    mesh dimensions pick one of the pieces again, if they are as many.
    """
    for d, placement in enumerate(param.placements):
        pieces = getattr(placement, "split_factor", 1)
        if pieces > 1:
            later = range(d + 1, len(param.placements))
            same = [i for i in later if getattr(param.placements[i], "dim", None) == placement.dim]
            if math.prod(param.device_mesh.size(i) for i in same) != pieces:
                return True
    return False


def box_of(param: Tensor) -> tuple[slice, ...]:
    """Returns where this rank's shard lies in the whole parameter: a slice of every dimension.

    Raises:
        ValueError: It lies in several pieces.
    """
    if not is_dtensor(param):
        return tuple(slice(0, size) for size in param.shape)
    if _interleaved(param):
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} placed as {param.placements} has shards of "
            "several separate pieces; give a DTensor, or redistribute it to Shard or Replicate"
        )
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offsets = compute_local_shape_and_global_offset(
        param.shape, param.device_mesh, param.placements
    )
    # The offset of a shard without elements lies behind the end.
    starts = [offset if size else 0 for size, offset in zip(shape, offsets, strict=True)]
    return tuple(slice(a, a + size) for a, size in zip(starts, shape, strict=True))


def shard_of(whole: Tensor, param: Tensor) -> Tensor:
    """Returns the part of a whole tensor that belongs to this rank's shard of ``param``."""
    if not is_dtensor(param) or is_dtensor(whole):
        return whole
    return whole[box_of(param)]


class Shards:
    """The shards of a list of parameters of which some are DTensors, and of their gradients.

    What a step asks of every DTensor is asked here with one attribute each: a look at what a
    tensor is costs as much as the update of a small one.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._all = all(map(is_dtensor, params))
        self._params = list(params)
        self._locals = [local(p) for p in params]
        self._known: list[object] = []

    def of_grads(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Returns the local shards of gradients, a row each, checking how they are placed.

        Raises:
            RuntimeError: A gradient is not placed as its parameter is.
        """
        try:
            specs, shards = [g._spec for g in grads], [g._local_tensor for g in grads]
        except AttributeError:  # some are absent, or plain
            specs, shards = [getattr(g, "_spec", None) for g in grads], [local(g) for g in grads]
        # Engines give every gradient the spec of the step before, or one that is equal.
        if len(specs) != len(self._known) or not all(map(operator.is_, specs, self._known)):
            known = self._known or [None] * len(specs)
            for param, grad, spec, seen in zip(self._params, grads, specs, known, strict=True):
                if grad is None or (seen is not None and _same_placing(spec, seen)):
                    continue
                if not all_equal_dtensors(grad, param):
                    raise RuntimeError("a gradient is not sharded as its parameter is")
            self._known = specs
        return shards

    def versions(self) -> list[int]:
        """Returns for every parameter what changes with each write that autograd knows of."""
        if self._all:
            both = zip(self._params, self._locals, strict=True)
            return [param._version + shard._version for param, shard in both]
        return [version_of(p) for p in self._params]


class _Part(NamedTuple):
    """What is summed together: rows, over which groups one after the other, counted how often.

    ``rows`` are None if they are all there are.
    """

    rows: Tensor | None
    groups: list
    weights: Tensor | None


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
        runs: Mapping[int, _fsdp1.Run] | None = None,
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

        for number, (rows, groups, weights) in enumerate(self._parts):
            if squares.device.type != "cpu":
                # Copied there once: the numbers of a step stay on its device.
                rows, weights = (x if x is None else x.to(squares.device) for x in (rows, weights))
                self._parts[number] = _Part(rows, groups, weights)
            vector = squares if rows is None else squares.index_select(1, rows)
            if weights is not None:
                vector = vector * weights
            if not per_tensor:
                vector = vector.sum(dim=1)
            with _ranges.record("dgg.allreduce"):
                for group in groups:
                    dist.all_reduce(vector, group=group)
            if per_tensor and rows is not None:
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
    runs = _fsdp1.runs(params).values()
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


def _same_placing(spec, other) -> bool:
    return spec is other or (
        spec is not None and spec.mesh is other.mesh and spec.placements == other.placements
    )


def all_equal_dtensors(grad: Tensor, param: Tensor) -> bool:
    """Returns whether a gradient is sharded exactly as its parameter is."""
    if is_dtensor(grad) != is_dtensor(param):
        return False
    return not is_dtensor(param) or (
        grad.device_mesh == param.device_mesh and tuple(grad.placements) == tuple(param.placements)
    )


def settled(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
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


def version_of(param: Tensor) -> int:
    """Returns a number that changes with every write that autograd knows of."""
    shard = local(param)
    return param._version if shard is param else param._version + shard._version
