# SPDX-License-Identifier: BSD-3-Clause
"""Room in a new optimizer's state for the state in a distributed checkpoint.

torch.distributed.checkpoint fills a template, which a helper makes by a step with zero gradients.
`prepare` adds room for anchors, and so does `make_template` if it recognises the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from dgg import anchor, sharding
from dgg.checkpoint.source import Source, dtypes_in, entries_in, find, of_template
from dgg.step import checks, state

# First word of a message between ranks.
_ROOM = "dgg: room for a state dict"


def prepare(opt, checkpoint: Any, model: torch.nn.Module | None) -> None:
    """Makes room for a distributed checkpoint; see `AdamW.prepare_for_load`."""
    if opt._deepspeed_driver() is not None or not opt._ownership.has_all:
        raise RuntimeError(
            "prepare_for_load() is for torch.distributed.checkpoint over FSDP2 and other "
            "DTensors; DeepSpeed and ZeroRedundancyOptimizer load their own checkpoints"
        )
    if checkpoint is not None:
        make_room(opt, _entries_in_checkpoint(opt, checkpoint, model))
        return
    entries = []
    for group in opt.param_groups:
        names = [*opt._rule.needed(group), "anchor", *opt._rule.columns.keys() & {"step"}]
        if group["importance"]:
            names.append("importance")
        for p in group["params"]:
            master = ["master"] if opt._settings.has_master(p) else []
            kept = p.requires_grad or p in opt.state
            entries.append(dict.fromkeys([*names, *master]) if kept else {})
    make_room(opt, entries)


def make_room(opt, entries: Sequence[Mapping[str, torch.dtype | None]]) -> None:
    """Makes the state of every parameter; anchors are filled with NaN.

    Of each parameter the entries have state key → dtype, or None for the usual one.
    """
    params = [p for group in opt.param_groups for p in group["params"]]
    for number, (p, dtypes) in enumerate(zip(params, entries, strict=True)):
        if "master" in dtypes and not opt._settings.has_master(p):
            raise ValueError(
                f"the checkpoint has a master weight of parameter {number}, which this "
                "optimizer would not keep; build it with master_weights=True over 16-bit "
                "parameters"
            )
    for p, dtypes in zip(params, entries, strict=True):
        if not dtypes:
            opt.state.pop(p, None)
            continue
        entry = opt.state[p]
        for name in entry.keys() - dtypes:
            del entry[name]
        if "step" in dtypes:
            entry["step"] = state.step_scalar(opt, p, entry.get("step", 0.0))
        state.make(opt, p, [name for name in dtypes if name not in ("anchor", "importance")])
        settings = opt._settings
        for name, theta, wanted in (
            ("anchor", state.stepped_weight(opt, p), settings.anchor_dtype),
            ("importance", p, settings.importance_dtype),
        ):
            if name in dtypes:
                dtype = dtypes[name] or anchor.storage_dtype(theta, wanted, "a parameter")
                entry[name] = anchor.allocate(p, dtype, settings.anchor_device)
                # NaN shows later which of them were not overwritten.
                sharding.local(entry[name]).fill_(float("nan"))
    for group in opt.param_groups:
        group["anchored"] = sum("anchor" in opt.state.get(p, ()) for p in group["params"])
    opt._awaits_load = True
    opt._reset_caches()


def _entries_in_checkpoint(opt, source: Any, model) -> list[dict[str, torch.dtype | None]]:
    return find(dtypes_in(source, {*opt._rule.columns, "master"}), _names(opt, model))


def _names(opt, model) -> list[list[str]]:
    """Returns the names that every parameter may have in a checkpoint."""
    names_in_model = anchor.names_of_parameters(model)
    names: list[list[str]] = []
    for group in opt.param_groups:
        in_group = group.get("param_names", [None] * len(group["params"]))
        for p, name in zip(group["params"], in_group, strict=True):
            variants = [] if name is None else anchor.variants(name)
            names.append([*names_in_model.get(p, []), *variants])
    return names


def make_template(opt) -> None:
    """Makes state for torch's checkpoint helper, which calls a step with zero gradients.

    It counts no step, consumes no draw and begins no momentum. If it recognises the checkpoint and
    that has anchors, it makes room for exactly the checkpoint's state.
    """
    if opt._awaits_load:
        return  # prepare_for_load() has made room for a checkpoint without state
    origin = of_template() if opt._ownership.has_all else None
    if origin is not None and origin.broadcast:
        anchored = _make_room_together(opt, origin)
    else:
        _check_template(opt)
        anchored = origin is not None and make_room_for(opt, origin)
    opt._template = True
    if anchored and origin is not None and origin.checkpoint is None:
        return  # no state of parameters that the state dict does not hold
    for group in opt.param_groups:
        for p in group["params"]:
            if p.grad is not None and not opt.state.get(p):
                opt._rule.init_state(opt, p, group, first=True)


def _check_template(opt) -> None:
    params = [p for group in opt.param_groups for p in group["params"]]
    checks.check_step(opt, params, [p.grad for p in params], [])


def make_room_for(opt, origin: Source) -> bool:
    """Makes room for the source of a template if it has anchors, and returns whether it has."""
    if origin.checkpoint is None:
        entries = _entries_in_state_dict(opt, origin)
    else:
        try:
            entries = _entries_in_checkpoint(opt, origin.checkpoint, origin.model)
        except Exception:
            # torch reads the checkpoint next, and raises on all ranks.
            return False
    anchored = any("anchor" in entry for entry in entries)
    if anchored:
        make_room(opt, entries)
    return anchored


def _entries_in_state_dict(opt, origin: Source) -> list[dict[str, torch.dtype | None]]:
    """Returns state key → dtype of every parameter in a source's state dict, after checks."""
    entries = entries_in(origin.state_dict or {}, {*opt._rule.columns, "master"})
    names = _names(opt, origin.model)
    try:
        entry_of = find({name: entry for name, entry in entries.items() if entry}, names)
    except KeyError:
        entry_of = [{} for _ in names]
    params = [p for group in opt.param_groups for p in group["params"]]
    by_name = not all(name.isdigit() for name in entries)
    for number, (p, entry, candidates) in enumerate(zip(params, entry_of, names, strict=True)):
        label = f"parameter {number} ({candidates[0]})" if candidates else f"parameter {number}"
        if origin.strict and by_name and p.requires_grad and not {*candidates} & entries.keys():
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
    return [{key: getattr(x, "dtype", None) for key, x in entry.items()} for entry in entry_of]


def _make_room_together(opt, origin: Source) -> bool:
    """Makes room on every rank for rank 0's state dict; returns whether it has anchors.

    If one rank fails, all raise: none waits for the others.
    """
    # Rank 0 of the whole world, as torch does for the tensors.
    entries: list[dict[str, torch.dtype | None]] = []
    failure: Exception | None = None
    try:
        _check_template(opt)
        if dist.get_rank() == 0:
            entries = _entries_in_state_dict(opt, origin)
    except Exception as error:
        failure = error
    # A tuple: torch takes a dict for a message of its own on ranks that have state already.
    message: list[Any] = [(_ROOM, entries)]
    dist.broadcast_object_list(message, src=0)
    if not (isinstance(message[0], tuple) and len(message[0]) == 2 and message[0][0] == _ROOM):
        raise RuntimeError(
            "the optimizer has state on rank 0 and none here: call prepare_for_load() on all "
            "ranks or on none before a state dict is loaded with broadcast_from_rank0=True"
        )
    entries = message[0][1]
    anchored = any("anchor" in entry for entry in entries)
    if anchored and failure is None:
        try:
            make_room(opt, entries)
        except Exception as error:
            failure = error
    reports: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, None if failure is None else str(failure))
    if failure is not None:
        raise failure
    for rank, text in enumerate(reports):
        if text is not None:
            raise RuntimeError(f"rank {rank} cannot load: {text}")
    return anchored
