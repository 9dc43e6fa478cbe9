# SPDX-License-Identifier: BSD-3-Clause
"""DTensor parameters: their local shards, and where these lie in the whole.

A step works on local shards, which are plain tensors, without any DTensor operation. Draws per
element need the place of a shard's elements in the whole parameter. Norms are summed over the mesh
dimensions that shard the parameter, not over those that replicate it, so that nothing counts twice.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs

# A tensor, or what may be None.
_Part = TypeVar("_Part", Tensor, Tensor | None)


class Place(NamedTuple):
    """Where a shard's elements lie in the whole parameter.

    Local element l is element base + (l // stretch) · stride + l % stretch, both row-major.
    """

    base: int
    stretch: int
    stride: int


def is_dtensor(x: object) -> TypeIs[DTensor]:
    """Returns whether ``x`` is a DTensor."""
    return hasattr(x, "device_mesh") and hasattr(x, "placements")


def local(x: _Part) -> _Part:
    """Returns the local shard of a DTensor, any other tensor as it is."""
    # Not to_local(), which makes a new tensor and a node of the graph.
    return x._local_tensor if is_dtensor(x) else x


def keeps_values_elsewhere(x: Tensor) -> bool:
    """Returns whether ``x`` (of a DTensor the shard) has no memory of its own.

    Such tensors dispatch to Python: fake tensors, float8 and quantised weights.
    """
    return torch._C._dispatch_keys(local(x)).has(torch._C.DispatchKey.Python)


def like(shard: Tensor, param: Tensor) -> Tensor:
    """Returns a local tensor as a DTensor placed as ``param`` is; as it is for a plain one."""
    if not is_dtensor(param):
        return shard
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        shard, param.device_mesh, param.placements, run_check=False, shape=param.shape,
        stride=param.stride(),
    )  # fmt: skip


def check(param: DTensor, label: str, *, elements: bool) -> None:
    """Checks that a parameter can be stepped shard by shard, with draws per element if asked for.

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

    None if they are not equal runs at equal distances: the parameter is sharded along two
    dimensions that are not the first, or interleaved.
    """
    if not is_dtensor(param):
        return Place(0, max(param.numel(), 1), max(param.numel(), 1))
    if _interleaved(param):
        return None
    shape, offsets = _shape_and_offsets(param)
    inner = [d for d, size in enumerate(shape) if d > 0 and size != param.shape[d]]
    if len(inner) > 1:
        return None
    strides = [math.prod(param.shape[d + 1 :]) for d in range(len(shape))]
    base = sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))
    if not inner:
        count = max(local(param).numel(), 1)
        return Place(base, count, count)
    (d,) = inner
    return Place(base, max(shape[d] * strides[d], 1), param.shape[d] * strides[d])


def _shape_and_offsets(param: DTensor) -> tuple[Sequence[int], Sequence[int]]:
    from torch.distributed.tensor import _utils

    return _utils.compute_local_shape_and_global_offset(
        param.shape, param.device_mesh, param.placements
    )


def _interleaved(param: DTensor) -> bool:
    """Returns whether a shard is several separate pieces of a dimension; the same on all ranks.

    FSDP2 over tensor parallelism shards a dimension a second time ("strided"). The later mesh
    dimensions pick one piece again, if they have as many ranks as there are pieces.
    """
    dims = [getattr(placement, "dim", None) for placement in param.placements]
    for d, placement in enumerate(param.placements):
        pieces = getattr(placement, "split_factor", 1)
        later = [i for i in range(d + 1, len(dims)) if dims[i] == dims[d]]
        if pieces > 1 and math.prod(param.device_mesh.size(i) for i in later) != pieces:
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
    shape, offsets = _shape_and_offsets(param)
    # The offset of a shard without elements lies behind the end.
    starts = [offset if size else 0 for size, offset in zip(shape, offsets, strict=True)]
    return tuple(slice(a, a + size) for a, size in zip(starts, shape, strict=True))


def shard_of(whole: Tensor, param: Tensor) -> Tensor:
    """Returns the part of a whole tensor that belongs to this rank's shard of ``param``."""
    return whole[box_of(param)] if is_dtensor(param) and not is_dtensor(whole) else whole


class Shards:
    """The shards of a list of parameters of which some are DTensors, and of their gradients.

    It reads one attribute of every DTensor in a step: checking the kind of a tensor costs as much
    as the update of a small one.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._all = all(map(is_dtensor, params))
        self._params = list(params)
        self._locals = [local(p) for p in params]
        self._checked_specs: list[object] = []

    def of_grads(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Returns the local shards of gradients, a row each, checking how they are placed.

        Raises:
            RuntimeError: A gradient is not placed as its parameter is.
        """
        placed: Sequence[Any] = grads  # or a tensor, or None, without these attributes
        specs: list[Any]
        shards: list[Tensor | None]
        try:
            specs, shards = [g._spec for g in placed], [g._local_tensor for g in placed]
        except AttributeError:  # some are absent, or plain
            specs, shards = [getattr(g, "_spec", None) for g in grads], [local(g) for g in grads]
        # Engines give every gradient the spec of the step before, or one that is equal.
        checked = self._checked_specs
        if len(specs) != len(checked) or not all(map(operator.is_, specs, checked)):
            checked = checked or [None] * len(specs)
            for param, grad, spec, before in zip(self._params, grads, specs, checked, strict=True):
                if grad is None or (before is not None and _same_placing(spec, before)):
                    continue
                if not all_equal_dtensors(grad, param):
                    raise RuntimeError("a gradient is not sharded as its parameter is")
            self._checked_specs = specs
        return shards

    def versions(self) -> list[int]:
        """Returns for every parameter what changes with each write that autograd knows of."""
        pairs = zip(self._params, self._locals, strict=True)
        if self._all:
            return [param._version + shard._version for param, shard in pairs]
        return [p._version if shard is p else p._version + shard._version for p, shard in pairs]


def _same_placing(spec, other) -> bool:
    return spec is other or (
        spec is not None and spec.mesh is other.mesh and spec.placements == other.placements
    )


def all_equal_dtensors(grad: Tensor, param: Tensor) -> bool:
    """Returns whether a gradient is sharded exactly as its parameter is."""
    if not is_dtensor(param):
        return not is_dtensor(grad)
    return (
        is_dtensor(grad)
        and grad.device_mesh == param.device_mesh
        and tuple(grad.placements) == tuple(param.placements)
    )
