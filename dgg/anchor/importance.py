# SPDX-License-Identifier: BSD-3-Clause
"""Importance F: how much each weight mattered to the former tasks, from Adam's second moments.

At every task boundary v̂ = exp_avg_sq / (1 - β₂^step) is added to the sum over the boundaries
before, and F is that sum divided by its mean over all anchored parameters of the optimizer. The
state holds F. The groups hold the mean, ``importance_mean``: F · mean is the sum again. They also
hold the draw index of that boundary, ``importance_draw``: v̂ counts once, however often a boundary
is set, or the sums are asked for, before the next step. v̂ estimates E[G²] over the last
1 / (1 - β₂) steps of the task, a diagonal Fisher matrix that costs nothing (Li et al., "Fishers for
Free?", arXiv 2507.18807). It is in the units of the clipped gradient; a clipping factor that is the
same for all steps leaves F as it is.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgg import anchor, sharding
from dgg.backends.views import real_view
from dgg.sharding import fsdp1


class Entry(NamedTuple):
    """The importance of one parameter (or partition) that a boundary sets.

    Attributes:
        param: The parameter.
        label: Its name in errors.
        sum: Returns the sum of v̂ over all boundaries, float32 or float64, of this rank's part.
        target: The memory of its F.
        known: There is a second moment, a former sum, or a given one.
    """

    param: Tensor
    label: str
    sum: Callable[[], Tensor]
    target: Tensor
    known: bool


def check_form(importance: Any) -> None:
    """Raises a TypeError unless the argument ``importance`` names sums of v̂, or is None."""
    if importance is not None and not isinstance(importance, (Mapping, str, os.PathLike)):
        raise TypeError(
            "importance= must be what importance_dict() returned, a mapping from names to tensors, "
            f"or its path, not {type(importance).__name__}"
        )


def check_wanted(importance: Any, weight: float) -> None:
    """Raises unless ``set_anchor(importance=...)`` has a form that is used."""
    check_form(importance)
    if importance is not None and not weight:
        raise ValueError(
            "set_anchor(importance=...) would be ignored, since the optimizer's importance is 0; "
            "build it with importance=0.5 or 1, or leave the argument out"
        )


def plan(
    opt, groups: Sequence[Mapping[str, Any]], params: Sequence[Tensor], labels: Sequence[str],
    match: Callable[[Sequence[torch.dtype]], Sequence[Any]] | None,
) -> list[Entry]:  # fmt: skip
    """Decides where the importance of every anchored parameter comes from, and into which memory.

    Args:
        opt: The optimizer.
        groups: Groups that hold the parameters.
        params: Those that get an anchor; parameters, or partitions.
        labels: Their names in errors.
        match: Dtype of every parameter's sum → their sources, sums of v̂; it raises if one has
            none. None adds v̂ to the present sums.
    """
    dtypes = [
        anchor.storage_dtype(p, opt._settings.importance_dtype, label)
        for p, label in zip(params, labels, strict=True)
    ]
    if match is None:
        sums, known = running_sums(opt, groups, params)
    else:
        sums, known = [], [True] * len(params)
        exact = [exact_dtype(p) for p in params]
        for p, label, given in zip(params, labels, match(exact), strict=True):
            if isinstance(given, anchor.Part):
                values = sharding.like(given.read(), p)  # this rank's part is all that was read
            else:
                values = given.detach()
            check_sum(values, label)
            sums.append(functools.partial(_exact, values, p))
    former = [opt.state.get(p, {}).get("importance") for p in params]
    targets = anchor.memory_for(params, dtypes, opt._settings.anchor_device, former)
    return [Entry(*entry) for entry in zip(params, labels, sums, targets, known, strict=True)]


def exact_dtype(param: Tensor) -> torch.dtype:
    """Returns the dtype that the numbers of ``param`` are computed in."""
    dtype = torch.float64 if param.dtype.to_real() == torch.float64 else torch.float32
    return dtype.to_complex() if param.is_complex() else dtype


def check_saved(value: Any, param: Tensor, label: str) -> None:
    """Checks a saved F before anything is changed."""
    kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
    suitable = isinstance(value, Tensor) and value.dtype.to_real() in anchor.FLOAT_DTYPES
    if not suitable or value.is_complex() != param.is_complex() or value.layout != torch.strided:
        raise TypeError(
            f"the importance saved for {label} is {kind}, not a dense tensor of floating numbers; "
            "pass what optimizer.state_dict() returned"
        )
    if value.shape != param.shape:
        raise ValueError(
            f"the importance saved for {label} has shape {tuple(value.shape)}, the parameter has "
            f"{tuple(param.shape)}; load it into the same architecture"
        )
    if value.device.type == "meta":
        raise ValueError(
            f"the importance saved for {label} is on the meta device, which holds no values; load "
            "the checkpoint to a device first"
        )
    check_sum(value, label)


def check_sum(values: Tensor, label: str) -> None:
    """Raises a ValueError unless F, or a sum of v̂, is finite and not negative."""
    values = real_view(anchor.resolved(sharding.local(values.detach())))
    if not anchor.finite(values) or bool((values < 0).any()):
        raise ValueError(
            f"the importance given for {label} has values that are negative, inf or NaN; it is "
            "made of squares: pass what importance_dict() or state_dict() returned"
        )


def _exact(values: Tensor, param: Tensor) -> Tensor:
    """Returns this rank's part of a given sum, in the dtype that is computed in."""
    part = anchor.allocate(param, exact_dtype(param), None)
    anchor.write(part, values)
    return real_view(sharding.local(part))


def second_moments(
    opt, groups: Sequence[Mapping[str, Any]], params: Sequence[Tensor]
) -> list[tuple[Tensor, float] | None]:
    """Returns (exp_avg_sq, 1 - β₂^step) of every parameter, or None where there is none.

    Right after a boundary, which has added them to the sums, there are none.
    """
    options = opt.param_groups[0]
    if options["importance_draw"] == int(options["draw_index"]):
        return [None] * len(params)
    members = opt._ownership.tensors(groups)
    group_of = {p: group for group, ps in zip(groups, members, strict=True) for p in ps}
    return [opt._rule.second_moment(opt, p, group_of[p]) for p in params]


def running_sums(
    opt, groups, params: Sequence[Tensor]
) -> tuple[list[Callable[[], Tensor]], list[bool]]:
    """Returns functions that return the present sum of every parameter with its v̂ added.

    And whether there is a second moment or a sum of each parameter. A rank may have none at all,
    where its part is empty or had no gradient.
    """
    mean = float(opt.param_groups[0]["importance_mean"])
    moments = second_moments(opt, groups, params)
    present = [opt.state.get(p, {}).get("importance") for p in params]
    triples = list(zip(params, moments, present, strict=True))
    known = [moment is not None or before is not None for _, moment, before in triples]
    return [functools.partial(_running_sum, *triple, mean) for triple in triples], known


def _running_sum(param: Tensor, moment, before: Tensor | None, mean: float) -> Tensor:
    shard = real_view(sharding.local(param.detach()))
    total = torch.zeros_like(shard, dtype=exact_dtype(shard))
    if moment is not None:
        value, correction = moment
        total += real_view(sharding.local(value)).to(total.device, total.dtype) / correction
    if before is not None:
        total += real_view(sharding.local(before)).to(total.device, total.dtype) * mean
    return total


def refuse_unknown(opt, known: bool) -> None:
    """Raises a RuntimeError unless there is a second moment, or a sum."""
    if not known:
        raise RuntimeError(
            f"importance={opt.param_groups[0]['importance']} needs the second moments of the task "
            f"that has ended, and {opt._rule.no_moment}: pass "
            "set_anchor(importance=former.importance_dict()), of the optimizer that trained it "
            "(saved and loaded between processes), or use importance=0"
        )


def mean_of(opt, entries: Sequence[Entry], peers: Sequence) -> float:
    """Returns the mean of all sums over all elements of all ranks; every rank calls it.

    Raises:
        RuntimeError: No rank has a second moment, all sums are 0, or another rank failed.
        ValueError: The mean is not finite, or F overflows its dtype.
    """
    params = [entry.param for entry in entries]
    sums, largest = [], []
    for entry in entries:
        total = entry.sum()
        numbers = [opt._ownership.elements(entry.param), entry.known]
        counts = torch.tensor(numbers, dtype=torch.float64, device="cpu").to(total.device)
        sums.append(torch.cat([total.double().sum().view(1), counts]))
        largest.append(float(total.max()) if total.numel() else 0.0)
    whole = opt._ownership.total(params, sums, 3)
    mean = float(whole[0] / whole[1].clamp(min=1))
    with sharding.on_all_or_none(peers, {}):
        refuse_unknown(opt, whole[2] > 0)
        if mean == 0.0:
            raise RuntimeError(
                "the second moments of all anchored parameters are 0, so no weight is more "
                "important than another; call set_anchor() after the steps of a task"
            )
        if not 0.0 < mean < float("inf"):
            raise ValueError(
                f"the mean of the second moments is {mean}; the training has diverged, and no "
                "importance can be made of it"
            )
        for entry, value in zip(entries, largest, strict=True):
            dtype = entry.target.dtype.to_real()
            if value / mean > torch.finfo(dtype).max:
                raise ValueError(
                    f"the importance of {entry.label} is {value / mean:g} times the mean and "
                    f"overflows {dtype}; pass importance_dtype=torch.bfloat16 or torch.float32"
                )
    return mean


def write(opt, entries: Sequence[Entry], mean: float) -> None:
    """Writes F, the sums divided by their mean, and enters it in the state."""
    for entry in entries:
        target = real_view(sharding.local(entry.target))
        target.copy_(entry.sum().div_(mean))
        opt.state[entry.param]["importance"] = entry.target


def as_dict(opt, groups: Sequence[Mapping[str, Any]], model: torch.nn.Module | None):
    """Returns the sums of all parameters by name; see `dgg.AdamW.importance_dict`."""
    params = [p for group in groups for p in group["params"]]
    if not opt._ownership.has_names or any(map(fsdp1.is_one, params)):
        raise RuntimeError(
            "importance_dict() needs whole tensors with names, and this engine has put flat "
            "runs or shares in their place: keep the optimizer between tasks, or resume its "
            "checkpoint, which has the importance"
        )
    chosen = [p for p in params if p.requires_grad or "importance" in opt.state.get(p, ())]
    if model is not None:
        names_of = anchor.names_of_parameters(model)
        names = {p: names_of[p][0] for p in chosen if names_of.get(p)}
    else:
        names = {
            p: name
            for group in groups
            for p, name in zip(group["params"], group.get("param_names", ()), strict=False)
        }
    unnamed = [p for p in chosen if p not in names]
    if unnamed:
        raise ValueError(
            f"importance_dict() knows no name of {len(unnamed)} parameters: pass model=, or build "
            "the optimizer from model.named_parameters()"
        )
    result: dict[str, Tensor] = {}
    sums, known = running_sums(opt, groups, chosen)
    refuse_unknown(opt, any(known) or not chosen)
    for p, read in zip(chosen, sums, strict=True):
        total = read()
        if p.is_complex():
            total = torch.view_as_complex(total)
        result[names[p]] = sharding.like(total, p)
    return result
