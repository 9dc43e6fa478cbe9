# SPDX-License-Identifier: BSD-3-Clause
"""Anchors of DeepSpeed's partitions: from their float32 weights, or cut out of whole tensors."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from dgg import anchor
from dgg._literals import TensorsOrPath
from dgg.anchor.boundary import Plan, refuse_optimizer_state
from dgg.deepspeed.partitions import Member, Partition, cut


def plan_anchors(
    opt, partitions: Sequence[Partition], tensors: TensorsOrPath | None,
    model: torch.nn.Module | None,
) -> Plan:  # fmt: skip
    """Returns the anchors' sources and memory for every partition.

    Args:
        opt: The dgg optimizer.
        partitions: This rank's.
        tensors: Whole tensors by name, the path of some, or None for the present weights.
        model: Maps names to parameters; None takes DeepSpeed's names.

    Raises:
        FileNotFoundError: There is nothing at the path.
        KeyError: A parameter has no tensor.
        TypeError: A wrong type.
        ValueError: A shape or a value does not fit.
    """
    refuse_optimizer_state(tensors)
    if tensors is None and model is not None:
        raise ValueError("model= maps the names of tensors to parameters; give both or neither")
    if isinstance(tensors, (str, os.PathLike)):
        tensors = anchor.open_path(tensors)
    elif tensors is not None and not isinstance(tensors, Mapping):
        raise TypeError(
            "set_anchor() takes a mapping from names to tensors or the path of a file or "
            f"directory of them, not {type(tensors).__name__}"
        )
    names = anchor.names_of_parameters(model)
    plan: Plan = []
    for number, partition in enumerate(partitions):
        label = f"partition {number}"
        wanted = anchor.storage_dtype(partition.tensor, opt._settings.anchor_dtype, label)
        if tensors is None:
            sources = [cut(partition.tensor, f) for f in partition.fragments]
            for f, source in zip(partition.fragments, sources, strict=True):
                name = partition.members[f.member].name or f"a parameter of {label}"
                anchor.check_source(source, source, name, wanted)
        else:
            sources = list(_named_sources(partition, tensors, names, model, wanted))
        old = opt.state.get(partition.tensor, {}).get("anchor")
        device = opt._settings.anchor_device
        (target,) = anchor.memory_for([partition.tensor], [wanted], device, [old])
        write = functools.partial(_write_fragments, partition, sources)
        plan.append((partition.tensor, write, target))
    return plan


def named_sums(
    partitions: Sequence[Partition], tensors: TensorsOrPath,
    model: torch.nn.Module | None, dtypes: Sequence[torch.dtype],
) -> list[Tensor]:  # fmt: skip
    """Returns the sums of v̂ of every partition, each in its dtype, cut out of whole tensors.

    Partitions, tensors and model are those of `plan_anchors`.
    """
    if not isinstance(tensors, Mapping):
        tensors = anchor.open_path(tensors, "importance")
    names = anchor.names_of_parameters(model)
    sums = []
    for partition, dtype in zip(partitions, dtypes, strict=True):
        sources = list(_named_sources(partition, tensors, names, model, dtype, "importance"))
        sums.append(torch.zeros_like(partition.tensor, dtype=dtype))
        _write_fragments(partition, sources, sums[-1])
    return sums


def whole_sums(
    partitions: Sequence[Partition], sums: Sequence[Callable[[], Tensor]],
    model: torch.nn.Module | None, total: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:  # fmt: skip
    """Returns the sums of v̂ by name, on the CPU: put together from the partitions of all ranks.

    Args:
        partitions: This rank's.
        sums: Return the sum of each partition.
        model: Maps parameters to names; None takes DeepSpeed's names.
        total: Sums a tensor over the ranks.

    Raises:
        ValueError: A parameter has no name.
    """
    names_of = anchor.names_of_parameters(model)

    def name_of(member: Member) -> str | None:
        return names_of.get(member.param, [member.name])[0]

    unnamed = sum(name_of(member) is None for p in partitions for member in p.members)
    if unnamed:
        raise ValueError(
            f"importance_dict() knows no name of {unnamed} parameters: pass model=engine.module"
        )
    result: dict[str, Tensor] = {}
    for partition, read in zip(partitions, sums, strict=True):
        part = read()
        fragments = {f.member: f for f in partition.fragments}
        for number, member in enumerate(partition.members):
            # One parameter at a time: a whole group would be as large as the model.
            whole = part.new_zeros(member.shape.numel())
            if f := fragments.get(number):
                whole[f.base : f.base + f.count] = cut(part, f)
            result[str(name_of(member))] = total(whole).to("cpu").view(member.shape)
    return result


def _write_fragments(partition: Partition, sources: Sequence[Tensor], target: Tensor) -> None:
    # The padding, which ZeRO-3 leaves uninitialised, must be finite in a checkpoint.
    target.zero_()
    for f, source in zip(partition.fragments, sources, strict=True):
        cut(target, f).copy_(source)


def _named_sources(
    partition: Partition, tensors: Mapping[str, Tensor], names: Mapping[Tensor, list[str]],
    model: torch.nn.Module | None, dtype: torch.dtype, what: str = "anchor",
) -> Iterator[Tensor]:  # fmt: skip
    """Yields the source of every fragment, cut out of the named whole tensors."""
    members = partition.members
    labels = [f"parameter {m.name!r}" for m in members]
    candidates = [names.get(m.param) or anchor.variants(m.name or "") for m in members]
    in_source = anchor.find_names(tensors, candidates, labels, model)
    fragments = {f.member: f for f in partition.fragments}
    for number, (member, name, label) in enumerate(zip(members, in_source, labels, strict=True)):
        # All members are checked, also those of other ranks: all ranks raise or none.
        source = tensors[name]
        whole = torch.empty(member.shape, dtype=partition.tensor.dtype, device="meta")
        anchor.check_source(source, whole, label, dtype, what)
        if f := fragments.get(number):
            yield source.detach().reshape(-1)[f.base : f.base + f.count]
