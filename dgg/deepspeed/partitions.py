# SPDX-License-Identifier: BSD-3-Clause
"""DeepSpeed's objects: every attribute of them that dgg relies on is named in this file.

DeepSpeed is never imported. An optimizer whose parameters were replaced looks for the DeepSpeed
object that has it as its ``optimizer``.
"""

from __future__ import annotations

import functools
import gc
import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dgg import _arguments, _callers


class Member(NamedTuple):
    """A parameter of which a partition may have a fragment."""

    # Number in the unsharded optimizer, over all groups. No tuple.index(), which nobody calls.
    index: int  # type: ignore[assignment]
    name: str | None  # in the model
    param: Tensor  # the model's
    shape: torch.Size  # unsharded


class Fragment(NamedTuple):
    """Where a run of a parameter's elements lies in this rank's partition."""

    member: int  # number of the parameter among the partition's members
    start: int  # first element in the partition
    count: int  # type: ignore[assignment]  # not 0; no tuple.count(), which nobody calls
    base: int  # first element in the parameter, row-major


class Partition(NamedTuple):
    """This rank's part of a group or sub-group of parameters."""

    tensor: Tensor  # flat; what the optimizer steps
    group: int  # number of the parameter group
    members: list[Member]  # the parameters of the group or sub-group, the same on every rank
    fragments: list[Fragment]  # what this rank has of them


# Parameter, its unsharded shape, first element in the partition and in the parameter, count.
Piece = tuple[Tensor, torch.Size, int, int, int]
# A tensor, or what may be None.
_Part = TypeVar("_Part", Tensor, Tensor | None)


def cut(x: _Part, fragment: Fragment) -> _Part:
    """Returns a fragment's part of a partition, or None of None."""
    # From .data, so that the fragments count their versions apart from each other.
    return x if x is None else x.data.narrow(0, fragment.start, fragment.count)


def partitions_of(opt, zero_optimizer) -> list[Partition]:
    """Returns this rank's partitions, cut into the fragments of parameters that they consist of.

    Raises:
        RuntimeError: The engine trains parameters that the optimizer was not built with.
    """
    layout = _LAYOUTS[type(zero_optimizer).__name__]
    numbers = {identity: j for j, identity in enumerate(opt._original_ids)}
    tensors = tensors_of(zero_optimizer)
    pieces = [list(layout.pieces(zero_optimizer, number)) for number in range(len(tensors))]
    unknown = sum(id(param) not in numbers for of_one in pieces for param, *_ in of_one)
    if unknown:
        raise RuntimeError(
            f"DeepSpeed's engine trains {unknown} parameters that this optimizer was not built "
            "with, so their draws are not known: the parameters in its groups were exchanged "
            "before deepspeed.initialize, or it has been in another engine. Build a new "
            "optimizer over model.parameters() for every engine"
        )
    names = getattr(zero_optimizer, "param_names", None) or {}
    partitions = []
    for number, (tensor, of_one) in enumerate(zip(tensors, pieces, strict=True)):
        members: list[Member] = []
        fragments: list[Fragment] = []
        for param, shape, start, base, count in of_one:
            if count > 0:
                fragments.append(Fragment(len(members), start, count, base))
            members.append(Member(numbers[id(param)], names.get(param), param, shape))
        group = zero_optimizer.sub_group_to_group_id[number] if layout is _Stage3 else number
        partitions.append(Partition(tensor, group, members, fragments))
    return partitions


def tensors_of(zero_optimizer) -> Sequence[Tensor]:
    """Returns the flat tensors of this rank's partitions."""
    return getattr(zero_optimizer, _LAYOUTS[type(zero_optimizer).__name__].attribute)


def grad_norm(zero_optimizer) -> Tensor:
    """Returns the norm of the gradient that DeepSpeed hands over, clipped if it clips."""
    norm = zero_optimizer._global_grad_norm
    if norm is None:
        raise RuntimeError(
            "zero_optimization.compute_grad_norm=false leaves out the gradient norm that a "
            "guided or clipped step needs; set it to true"
        )
    if getattr(zero_optimizer, "dynamic_loss_scale", False):
        # Stages 1 and 2 unscale the norm by the loss scale after its update, which may be larger.
        norm = _local_of_step(zero_optimizer, "scaled_global_grad_norm") / zero_optimizer.loss_scale
    norm = torch.as_tensor(norm).double()
    # Older releases return -1 where gradients are inf or NaN; its square would look like a norm.
    norm = torch.where(norm < 0, torch.nan, norm)
    if zero_optimizer.clip_grad > 0.0:
        norm = norm / torch.clamp((norm + 1e-6) / zero_optimizer.clip_grad, min=1.0)
    return norm


def put_back(opt, zero_optimizer) -> None:
    """Restores the groups to what they are between steps, after an error in a step.

    DeepSpeed would leave them as they were for one of its calls of ``step()``, and a checkpoint
    saved then would hold no more than these.
    """
    opt.param_groups = opt._all_groups
    if _LAYOUTS.get(type(zero_optimizer).__name__) is _Stage3:
        for group in opt.param_groups:
            group["params"] = []


class _Stage1And2:
    """ZeRO-1 and ZeRO-2: a partition per group; each parameter is one run of the flat group."""

    attribute = "single_partition_of_fp32_groups"

    @classmethod
    def pieces(cls, zero_optimizer, number: int) -> Iterator[Piece]:
        """Yields what this rank has of every parameter of a partition."""
        size = getattr(zero_optimizer, cls.attribute)[number].numel()
        first = size * dist.get_rank(zero_optimizer.real_dp_process_group[number])
        for param, offset in cls.offsets(zero_optimizer, number):
            low, high = max(offset, first), min(offset + param.numel(), first + size)
            yield param, param.shape, max(low - first, 0), max(low - offset, 0), high - low

    @staticmethod
    def offsets(zero_optimizer, number: int) -> Iterable[tuple[Tensor, int]]:
        """Returns the parameters of a group and where each begins in the flat group."""
        params = zero_optimizer.round_robin_bit16_groups[number]
        return zip(params, zero_optimizer.round_robin_bit16_offsets[number], strict=True)


class _BF16(_Stage1And2):
    """bfloat16 with float32 gradients (ZeRO-1): the parameters lie in the group's own order."""

    attribute = "fp32_groups_flat_partition"

    @staticmethod
    def offsets(zero_optimizer, number: int) -> Iterable[tuple[Tensor, int]]:
        params = zero_optimizer.bf16_groups[number]
        ends = itertools.accumulate(p.numel() for p in params)
        return [(p, end - p.numel()) for p, end in zip(params, ends, strict=True)]


class _Stage3:
    """ZeRO-3: a partition per sub-group; of each parameter equal runs on all ranks, padded."""

    attribute = "fp32_partitioned_groups_flat"

    @staticmethod
    def pieces(zero_optimizer, number: int) -> Iterator[Piece]:
        rank, start = dist.get_rank(zero_optimizer.dp_process_group), 0
        for param in zero_optimizer.fp16_groups[number]:
            size = param.partition_numel()
            base = min(rank * size, param.ds_numel)
            yield param, param.ds_shape, start, base, min(size, param.ds_numel - base)
            start += size


_LAYOUTS: dict[str, type[_Stage1And2] | type[_Stage3]] = {
    "DeepSpeedZeroOptimizer": _Stage1And2,
    "DeepSpeedZeroOptimizer_Stage3": _Stage3,
    "BF16_Optimizer": _BF16,
}


def find_zero_optimizer(opt) -> Any:
    """Returns the ZeRO optimizer of DeepSpeed that has ``opt`` as its ``optimizer``, or None."""
    if "deepspeed" not in sys.modules:
        return None
    # By what it steps, so that a kind which is not known is refused by name.
    attributes = [layout.attribute for layout in _LAYOUTS.values()]
    wrappers = _wrappers_of(opt)
    return next((x for x in wrappers if any(hasattr(x, name) for name in attributes)), None)


def _wrappers_of(opt) -> Iterator[Any]:
    """Yields the objects of DeepSpeed that have an optimizer as their ``optimizer``."""
    referrers = gc.get_referrers(opt)
    entries = [x for x in referrers if isinstance(x, dict)]
    owners = gc.get_referrers(*entries) if entries else []
    for owner in (*referrers, *owners):
        of_deepspeed = type(owner).__module__.startswith("deepspeed.")
        if of_deepspeed and getattr(owner, "optimizer", None) is opt:
            yield owner


def refuse_unknown_partitions(opt) -> None:
    """Raises a RuntimeError if an unknown engine put partitions into the groups."""
    if opt.process_group is not None or not (dist.is_available() and dist.is_initialized()):
        return
    known = set(opt._original_ids)
    params = [p for group in opt.param_groups for p in group["params"]]
    unknown = any(type(p) is Tensor and p.dim() == 1 and id(p) not in known for p in params)
    # DeepSpeed without ZeRO keeps whole float32 copies of 16-bit parameters.
    copies = "deepspeed" in sys.modules and any(True for _ in _wrappers_of(opt))
    if unknown and not copies and dist.get_world_size() > 1:
        raise RuntimeError(
            "somebody put a flat tensor in place of the parameters this optimizer was given, and "
            "it is not an engine that dgg knows (DeepSpeed's ZeRO is). If every rank has a "
            "partition of a whole, say over which ranks: process_group=torch.distributed.group."
            "WORLD (or optimizer.process_group = ...); otherwise norms would be those of one rank"
        )


def refuse_guard(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raises a ValueError for alpha="auto", which needs replay gradients of their own."""
    if any(isinstance(group["alpha"], str) for group in groups):
        raise ValueError(
            "alpha='auto' needs replay gradients kept apart, and DeepSpeed's ZeRO reduces all "
            "gradients into partitions of its own: use a number for alpha, with importance=0.5 or "
            "1, and put the replayed examples into the batch (dgg.ReplayBuffer.mix)"
        )


def refuse(opt, zero_optimizer) -> None:
    """Raises if DeepSpeed's or the optimizer's options do not go together."""
    name = type(zero_optimizer).__name__
    if name not in _LAYOUTS:
        raise RuntimeError(
            f"DeepSpeed's {name} is not supported; use ZeRO stage 1, 2 or 3 without zenflow, "
            "super_offload and MiCS"
        )
    has = functools.partial(getattr, zero_optimizer)
    on_nvme = has("swap_optimizer", False) or has("params_in_nvme_and_cpu", False)
    reasons = {
        "expert parameters (MoE) are partitioned over other ranks than the rest: not supported; "
        "guide a model without them, or use FSDP2": has("has_moe_layers", False),
        "model parallel ranks beside ZeRO are not supported; use ZeRO alone, or FSDP2 with tensor "
        "parallelism": _other_ranks(zero_optimizer),
        "NVMe offload keeps partitions where they cannot be measured; use offload device cpu": (
            on_nvme
        ),
        "zenflow steps selected columns with an optimizer of its own; leave it out": (
            has("zenflow", False)
        ),
        "torch_autocast with float16 scales the loss inside every sub-step; use bfloat16, or "
        "DeepSpeed's fp16": has("torch_autocast_gradscaler", None) is not None,
    }
    for reason, applies in reasons.items():
        if applies:
            raise RuntimeError(f"DeepSpeed: {reason}")
    refuse_guard(opt.param_groups)
    settings = opt._settings
    keeps_float32 = weights_dtype(zero_optimizer) not in _arguments.NARROW
    for option, why, chosen in (
        ("capturable=True", "DeepSpeed calls the step piece by piece, no graph captures it",
         settings.capturable),
        ("stochastic_rounding=True", "ZeRO steps float32 weights of its own",
         settings.stochastic_rounding),
        ("process_group=", "its own process group is used", opt.process_group is not None),
        ("master_weights=True", "ZeRO keeps float32 weights itself, unless its configuration has "
         "bf16_master_weights_and_grads or fp16_master_weights_and_grads: drop that",
         settings.master_weights and not keeps_float32),
    ):  # fmt: skip
        if chosen:
            raise ValueError(f"{option} does not go with DeepSpeed ({why}); leave it out")


def weights_dtype(zero_optimizer) -> torch.dtype:
    """Returns the dtype of the weights that ZeRO steps: float32, unless it was told otherwise."""
    return tensors_of(zero_optimizer)[0].dtype


def _other_ranks(zero_optimizer) -> bool:
    group = getattr(zero_optimizer, "model_parallel_group", None)
    if group is not None and dist.get_world_size(group) > 1:
        return True
    mpu = getattr(zero_optimizer, "mpu", None)
    size = getattr(mpu, "get_model_parallel_world_size", None)
    if size is not None and size() > 1:
        return True
    ranks = dist.get_process_group_ranks(zero_optimizer.dp_process_group)
    others = getattr(zero_optimizer, "sub_group_process_groups", ())
    return any(dist.get_process_group_ranks(other) != ranks for other in others)


def _local_of_step(zero_optimizer, name: str) -> Tensor:
    """Returns a local variable of the ``step()`` of DeepSpeed's that is running now."""
    for owner, local in _callers.methods("step"):
        if owner is zero_optimizer and name in local:
            return local[name]
    raise RuntimeError(
        f"{type(zero_optimizer).__name__}.step() has no {name}; this release of DeepSpeed is not "
        "known to dgg: use the one that docs/deepspeed.md names, or a static loss scale"
    )
