# SPDX-License-Identifier: BSD-3-Clause
"""Room in a new optimizer's state for what a distributed checkpoint holds.

torch.distributed.checkpoint loads into what is there: a template, that a helper makes by a step
with zero gradients. Room for anchors is made by `prepare`, or where it is known who is loading.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dgg import anchor, sharding
from dgg.checkpoint.source import Source, entries_in, find, held_by, of_template
from dgg.step import checks, state

# What ranks say to each other begins with it.
_ROOM = "dgg: room for a state dict"


def prepare(opt, checkpoint: Any, model: torch.nn.Module | None) -> None:
    """Makes room for what a distributed checkpoint holds; see `AdamW.prepare_for_load`."""
    if opt._deepspeed_driver() is not None or not opt._ownership.has_all:
        raise RuntimeError(
            "prepare_for_load() is for torch.distributed.checkpoint over FSDP2 and other "
            "DTensors; DeepSpeed and ZeroRedundancyOptimizer load their own checkpoints"
        )
    every = [(p, group) for group in opt.param_groups for p in group["params"]]
    if checkpoint is None:
        held = [
            {name: None for name in (*_kept_by_steps(opt, p, group), "anchor")}
            if p.requires_grad or p in opt.state
            else {}
            for p, group in every
        ]
    else:
        held = _held_by(opt, checkpoint, model)
    make_room(opt, held)


def make_room(opt, held: Sequence[Mapping[str, torch.dtype | None]]) -> None:
    """Makes the state of every parameter that ``held`` says, anchors without any value."""
    params = [p for group in opt.param_groups for p in group["params"]]
    for number, (p, names) in enumerate(zip(params, held, strict=True)):
        if "master" in names and not opt._settings.has_master(p):
            raise ValueError(
                f"the checkpoint has a master weight of parameter {number}, which this "
                "optimizer would not keep; build it with master_weights=True over 16-bit "
                "parameters"
            )
    for p, names in zip(params, held, strict=True):
        if not names:
            opt.state.pop(p, None)
            continue
        entry = opt.state[p]
        for name in entry.keys() - names:
            del entry[name]
        if "step" in names:
            entry["step"] = state.step_scalar(opt, p, entry.get("step", 0.0))
        state.make(opt, p, [name for name in names if name != "anchor"])
        if "anchor" in names:
            dtype = names["anchor"] or anchor.storage_dtype(
                state.stepped_weight(opt, p), opt._settings.anchor_dtype, "a parameter"
            )
            entry["anchor"] = anchor.allocate(p, dtype, opt._settings.anchor_device)
            # No weights are NaN: what is not overwritten will be noticed.
            sharding.local(entry["anchor"]).fill_(float("nan"))
    for group in opt.param_groups:
        group["anchored"] = sum("anchor" in opt.state.get(p, ()) for p in group["params"])
    opt._awaits_load = True
    opt._reset_caches()


def _kept_by_steps(opt, param: Tensor, group: dict[str, Any]) -> tuple[str, ...]:
    """Returns the keys of the state that a step keeps of a parameter, anchors apart."""
    step = ("step",) if "step" in opt._rule.columns else ()
    master = ("master",) if opt._settings.has_master(param) else ()
    return (*step, *opt._rule.needed(group), *master)


def _held_by(opt, source: Any, model) -> list[dict[str, torch.dtype | None]]:
    held = held_by(source, {*opt._rule.columns, "master"})
    return find(held, _names(opt, model))


def _names(opt, model) -> list[list[str]]:
    """Returns the names that every parameter may have in a checkpoint."""
    known = anchor.names_of_parameters(model)
    names: list[list[str]] = []
    for group in opt.param_groups:
        own = group.get("param_names", [None] * len(group["params"]))
        for p, name in zip(group["params"], own, strict=True):
            names.append([*known.get(p, []), *([] if name is None else anchor.variants(name))])
    return names


def make_template(opt) -> None:
    """Makes the state of torch's checkpoint helper, which calls a step with zero gradients.

    Nothing else: no step is counted, no draw consumed, no momentum begun. Where it is known
    what will be loaded and that has anchors, it is room for just that.
    """
    if opt._awaits_load:
        return  # room was made, for a checkpoint that holds no state
    origin = of_template() if opt._ownership.has_all else None
    if origin is not None and origin.broadcast:
        anchored = _make_room_together(opt, origin)
    else:
        _check_template(opt)
        anchored = origin is not None and make_room_for(opt, origin)
    opt._template = True
    if anchored and origin.checkpoint is None:
        return  # of what a state dict does not hold there is to be no state
    for group in opt.param_groups:
        for p in group["params"]:
            if p.grad is not None and not opt.state.get(p):
                opt._rule.init_state(opt, p, group, first=True)


def _check_template(opt) -> None:
    params = [p for group in opt.param_groups for p in group["params"]]
    checks.check_step(opt, params, [p.grad for p in params], [])


def make_room_for(opt, origin: Source) -> bool:
    """Makes room for what will be loaded, if that has anchors, which it returns."""
    if origin.checkpoint is None:
        held = _held_in(opt, origin)
    else:
        try:
            held = _held_by(opt, origin.checkpoint, origin.model)
        except Exception:
            # Torch reads it next, and what is wrong with it is an error on all ranks.
            return False
    anchored = any("anchor" in names for names in held)
    if anchored:
        make_room(opt, held)
    return anchored


def _held_in(opt, origin: Source) -> list[dict[str, torch.dtype | None]]:
    """Returns what the state dict of a source holds of every parameter.

    Raises:
        KeyError: It holds nothing of a parameter that is trained, and that is an error.
        ValueError: A shape is not the parameter's.
    """
    entries = entries_in(origin.given or {}, {*opt._rule.columns, "master"})
    names = _names(opt, origin.model)
    some = {name: entry for name, entry in entries.items() if entry}
    try:
        found = find(some, names)
    except KeyError:
        found = [{} for _ in names]
    params = [p for group in opt.param_groups for p in group["params"]]
    by_name = not all(name.isdigit() for name in entries)
    held = []
    for number, (p, entry, mine) in enumerate(zip(params, found, names, strict=True)):
        label = f"parameter {number} ({mine[0]})" if mine else f"parameter {number}"
        if origin.strict and by_name and p.requires_grad and not {*mine} & entries.keys():
            raise KeyError(
                f"the state dict holds nothing of {label}, which is trained: is it another "
                "model's? StateDictOptions(strict=False) loads the others"
            )
        for key, value in entry.items():
            shape = getattr(value, "shape", p.shape)
            if key != "step" and shape != p.shape:
                raise ValueError(
                    f"the state dict's {key} of {label} has shape {tuple(shape)}, the "
                    f"parameter has {tuple(p.shape)}; load it into the same architecture"
                )
        held.append({key: getattr(value, "dtype", None) for key, value in entry.items()})
    return held


def _make_room_together(opt, origin: Source) -> bool:
    """Makes room on every rank for what rank 0 was given; returns whether it has anchors.

    Raises on all ranks if any of them cannot: none is left waiting for the others.
    """
    # In the group and from the rank that torch takes for the tensors.
    rank, world = dist.get_rank(), dist.get_world_size()
    held: list[dict[str, torch.dtype | None]] = []
    wrong: Exception | None = None
    try:
        _check_template(opt)
        if rank == 0:
            held = _held_in(opt, origin)
    except Exception as error:
        wrong = error
    # No dict, which torch would take for its own message where a rank has state already.
    told: list[Any] = [(_ROOM, held)]
    dist.broadcast_object_list(told, src=0)
    if not (isinstance(told[0], tuple) and len(told[0]) == 2 and told[0][0] == _ROOM):
        raise RuntimeError(
            "the optimizer has state on rank 0 and none here: call prepare_for_load() on all "
            "ranks or on none before a state dict is loaded with broadcast_from_rank0=True"
        )
    held = told[0][1]
    anchored = any("anchor" in names for names in held)
    if anchored and wrong is None:
        try:
            make_room(opt, held)
        except Exception as error:
            wrong = error
    everywhere: list[str | None] = [None] * world
    dist.all_gather_object(everywhere, None if wrong is None else str(wrong))
    if wrong is not None:
        raise wrong
    for other, text in enumerate(everywhere):
        if text is not None:
            raise RuntimeError(f"rank {other} cannot load: {text}")
    return anchored
