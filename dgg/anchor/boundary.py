# SPDX-License-Identifier: BSD-3-Clause
"""Task boundaries: whether an anchor may be set now, of which parameters, from what; setting it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dgg import _arguments, anchor, sharding
from dgg.sharding import fsdp1


def is_due(
    groups: Sequence[Mapping[str, Any]], tensors: Any, task: int | None, resumed: int | None
) -> bool:
    """Returns whether ``set_anchor(tensors, task=task)`` is to set the anchor, not to keep it.

    Args:
        groups: Parameter groups with ``task_index``, ``draw_index`` and ``anchored``.
        tensors: What the anchor is taken from; None for the present weights.
        task: Number of the task that is trained now, or None.
        resumed: Steps that a fresh optimizer was resumed after, or None if it was not.

    Raises:
        RuntimeError: The anchor of a task in progress is gone, or was just resumed.
        TypeError: ``task`` is no int.
        ValueError: ``task`` is over already, or not the next one.
    """
    draws = int(groups[0]["draw_index"])
    if task is not None:
        return begins_task(task, groups, draws, given=tensors is not None)
    if tensors is None:
        refuse_resumed(groups, draws, resumed)
    return True


# A parameter (or partition), what its anchor is taken from, and the memory for it. The source is
# None where the memory has the values already, or a function that writes them.
Plan = list[tuple[Tensor, "Tensor | Callable[[Tensor], None] | None", Tensor]]


def place(
    opt,
    groups: Sequence[dict[str, Any]],
    marks: Sequence[dict[str, Any]],
    plan_all: Callable[[], Plan],
    task: int | None,
) -> None:
    """Sets the anchors of a plan, on all ranks or on none.

    Args:
        opt: The optimizer.
        groups: Groups that hold the parameters.
        marks: For each group the dict that ``anchored`` and ``task_index`` are noted in.
        plan_all: Returns the plan; it raises before anything is changed.
        task: Number of the task that begins; None counts one up.
    """
    members = opt._ownership.tensors(groups)
    peers = opt._ownership.peers([p for params in members for p in params])
    with sharding.on_all_or_none(peers, _arguments.settings_of(marks)):
        plan = plan_all()
    group_of = {p: group for group, params in zip(groups, members, strict=True) for p in params}
    moved = any([target is not opt.state.get(p, {}).get("anchor") for p, _, target in plan])
    for p, source, target in plan:
        source(target) if callable(source) else anchor.write(target, source)
        # Together with the moments: Adam would take a state that holds an anchor alone for
        # initialised, and checkpoints made before the first step would miss the moments.
        opt._rule.init_state(opt, p, group_of[p], first=False)
        opt.state[p]["anchor"] = target
    for mark, params in zip(marks, members, strict=True):
        mark["anchored"] = sum("anchor" in opt.state.get(p, ()) for p in params)
        mark["task_index"] = mark["task_index"] + 1 if task is None else task
    opt._ownership.note_anchors(marks, anchored=True)
    opt._awaits_load = False
    if moved:  # else the next step finds that its distances are those of another anchor
        opt._reset_caches()


def clear(opt, groups: Sequence[dict[str, Any]], marks: Sequence[dict[str, Any]]) -> None:
    """Drops all anchors.

    Args:
        opt: The optimizer.
        groups: Groups that hold the parameters.
        marks: As in `place`.
    """
    for mark, params in zip(marks, opt._ownership.tensors(groups), strict=True):
        for p in params:
            if p in opt.state:
                opt.state[p].pop("anchor", None)
        mark["anchored"] = 0
    opt._ownership.note_anchors(marks, anchored=False)
    opt._awaits_load = False
    opt._reset_caches()


def known_anchors(state: Mapping[Tensor, Any]) -> dict[Tensor, Tensor | None]:
    """Returns the anchor, or None, of every parameter that has state."""
    return {
        p: entry.get("anchor") for p, entry in state.items() if isinstance(entry, dict) and entry
    }


def plan_anchors(
    groups: Sequence[Mapping[str, Any]],
    known: Mapping[Tensor, Tensor | None],
    tensors: Mapping[str, Tensor] | str | os.PathLike | None,
    model: torch.nn.Module | None,
    dtype: torch.dtype | None,
    device: torch.device | None,
    weights: Callable[[Tensor], Tensor] = Tensor.detach,
    *,
    none: bool = False,
) -> Plan:
    """Decides which parameters get an anchor, from what and into which memory.

    Nothing that exists is written: of a file each tensor is read into the memory of its new
    anchor; where there is an anchor to be overwritten it is read twice, to be looked at first.

    Args:
        groups: Groups that hold the parameters.
        known: From `known_anchors`.
        tensors: Named sources, the path of some, or None for the present weights.
        model: Maps names to parameters, or None if the groups know the names.
        dtype: Storage dtype or None for the parameter's.
        device: Storage device or None for the parameter's.
        weights: What the optimizer steps for a parameter: itself, or its master weight.
        none: Whether there may be nothing to anchor: other ranks have the parameters.

    Returns:
        The plan; a present anchor that fits is its target again.

    Raises:
        FileNotFoundError: There is nothing at the path.
        KeyError: A trainable parameter has no tensor.
        TypeError: A wrong type.
        ValueError: A shape, value or name does not fit.
    """
    if tensors is None and model is not None:
        raise ValueError("model= maps the names of tensors to parameters; give both or neither")
    if tensors is not None and not isinstance(tensors, (Mapping, str, os.PathLike)):
        raise TypeError(
            "set_anchor() takes a mapping from names to tensors or the path of a file or "
            f"directory of them, not {type(tensors).__name__}; pass a state_dict, or the path that "
            "save_pretrained() wrote to"
        )
    if model is not None and not isinstance(model, torch.nn.Module):
        raise TypeError(f"model= must be a torch.nn.Module, not {type(model).__name__}")
    every = [p for group in groups for p in group["params"]]
    chosen = [
        (p, label)
        for p, label in zip(every, _arguments.group_labels(groups), strict=True)
        if p.requires_grad or p in known
    ]
    if not chosen and none:
        return []
    if not chosen:
        raise ValueError(
            "set_anchor() found no trainable parameter in this optimizer; unfreeze "
            "(requires_grad_(True)) what the next task trains first"
        )
    params, labels = [p for p, _ in chosen], [label for _, label in chosen]
    for p, label in chosen:
        _arguments.check_param(p, label, stepped=True)
        if tensors is not None and fsdp1.is_one(p):
            raise ValueError(
                f"{label} is FSDP1's, and anchors by name are not cut into its runs: load the "
                "tensors into the model and call set_anchor() before the next task is trained"
            )
        if device is not None and device != p.device and sharding.is_dtensor(p):
            raise ValueError(
                f"anchor_device={str(device)!r} is not supported for DTensors, and {label} is one "
                f"on {str(p.device)!r}; leave it None"
            )
        if device is not None and device.type not in ("cpu", p.device.type):
            raise ValueError(
                f"anchor_device={str(device)!r} does not go with {label} on {str(p.device)!r}; "
                "use 'cpu' or None (the parameter's device)"
            )
    stepped = [weights(p) for p in params]
    dtypes = [
        anchor.storage_dtype(theta, dtype, label)
        for theta, label in zip(stepped, labels, strict=True)
    ]
    if tensors is None:
        sources = stepped
        for p, theta, label, wanted in zip(params, stepped, labels, dtypes, strict=True):
            anchor.check_source(theta, p, label, wanted)
    else:
        names = _names_of(groups, model, params)
        if not isinstance(tensors, Mapping):
            tensors = anchor.open_path(tensors)
        others = () if model is not None else _other_names(groups, params)
        sources = anchor.match_named(tensors, params, names, labels, dtypes, model, others)
    kept = {}
    for p, theta, wanted in zip(params, stepped, dtypes, strict=True):
        old = known.get(p)
        fits = old is not None and old.dtype == wanted and old.shape == p.shape
        # Somebody may have put the weights themselves there.
        if fits and not anchor.is_alias(old, p) and not anchor.is_alias(old, theta):
            kept[p] = old
    wanted_of = dict(zip(params, dtypes, strict=True))
    fresh = [p for p in params if p not in kept]
    made = anchor.allocate_all(fresh, [wanted_of[p] for p in fresh], device)
    targets = kept | dict(zip(fresh, made, strict=True))
    plan = []
    for p, source, label, wanted in zip(params, sources, labels, dtypes, strict=True):
        fits = p in kept
        target = targets[p]
        if isinstance(source, anchor.Part):
            values = source.read()
            anchor.check_values(values, label, wanted)
            if not fits:
                sharding.local(target).copy_(values)
                source = None
        plan.append((p, source, target))
    return plan


def _names_of(groups, model, params) -> list[list[str]]:
    if model is not None:
        known = anchor.names_of_parameters(model)
        return [known.get(p, []) for p in params]
    names: dict[Tensor, str] = {}
    for group in groups:
        if "param_names" not in group:
            raise ValueError(
                "set_anchor(tensors) cannot tell which name belongs to which parameter: pass "
                "model=, or build the optimizer from model.named_parameters()"
            )
        names.update(zip(group["params"], group["param_names"], strict=True))
    return [anchor.variants(names[p]) for p in params]


def _other_names(groups, params) -> list[str]:
    """Returns the names of parameters that get no anchor, which may have tensors all the same."""
    mine = set(params)
    return [
        name
        for group in groups
        for p, name in zip(group["params"], group["param_names"], strict=True)
        if p not in mine
    ]


def begins_task(task: int, groups: Sequence[Mapping[str, Any]], draws: int, *, given: bool) -> bool:
    """Decides what ``set_anchor(task=...)`` does: True sets the anchor, False keeps what is.

    Args:
        task: Number of the task that is to be trained now.
        groups: Parameter groups with ``task_index``.
        draws: Steps made so far.
        given: Whether tensors or a path are given, not the present weights.

    Raises:
        TypeError: ``task`` is no int.
        ValueError: ``task`` is negative, over already, or not the next one.
        RuntimeError: The anchor of a task in progress is gone, and nothing is given for it.
    """
    _arguments.check_options({"task_index": task})
    present = groups[0]["task_index"]
    anchored = any(group["anchored"] for group in groups)
    if present > task:
        raise ValueError(
            f"set_anchor(task={task}): this optimizer is in task {present}, beyond it. Resume from "
            f"a checkpoint of task {task}, or of the end of task {task - 1}"
            if task
            else f"set_anchor(task=0): this optimizer is in task {present}, beyond it. Start with "
            "a new optimizer, or resume from a checkpoint of task 0"
        )
    if present == task:
        if anchored or (task == 0 and not given):
            return False
        if task and not given:
            raise RuntimeError(
                f"set_anchor(task={task}): this optimizer is in task {task} already and has no "
                "anchor, and the weights of now need not be those the task began with. Name them: "
                f"set_anchor(path_or_tensors_of_the_end_of_task_{task - 1}, model=model, "
                f"task={task})"
            )
        return True
    if present < task - 1 and (draws or anchored):
        raise ValueError(
            f"set_anchor(task={task}): this optimizer is in task {present}, so task {present + 1} "
            f"would be left out. Load the state of the end of task {task - 1}, or start task "
            f"{task} with a new optimizer"
        )
    return True


def refuse_resumed(groups: Sequence[Mapping[str, Any]], draws: int, resumed: int | None) -> None:
    """Raises where ``set_anchor()`` could replace a resumed anchor by the weights of mid-task.

    Args:
        groups: Parameter groups with ``task_index`` and ``anchored``.
        draws: Steps made so far.
        resumed: Steps that a fresh optimizer was resumed after, or None if it was not.

    Raises:
        RuntimeError: The optimizer has an anchor from a checkpoint and made no step since.
    """
    task = groups[0]["task_index"]
    if resumed and draws == resumed and any(group["anchored"] for group in groups):
        raise RuntimeError(
            f"this optimizer was just resumed in task {task}, after {draws} steps and with that "
            "task's anchor: set_anchor() would replace it by the weights of now, which in the "
            "middle of a task are not those it began with. Say which task is trained now: "
            f"set_anchor(task={task}) goes on with the resumed anchor, set_anchor(task={task + 1}) "
            "begins the next task; or clear_anchor() first"
        )


def refuse_earlier(named: int | None, saved: Sequence[Mapping[str, Any]]) -> None:
    """Raises where a state of an earlier task would take the place of an anchor just set.

    Args:
        named: The task that a new optimizer's anchor was set for by number, or None.
        saved: Groups of the state that is about to be loaded.

    Raises:
        ValueError: The state is of an earlier task.
    """
    task = saved[0].get("task_index", 0) if saved else 0
    if named is not None and task < named:
        raise ValueError(
            f"set_anchor(task={named}) was called before a state of task {task} is loaded, whose "
            f"anchor would take its place: load first, then call set_anchor(task={named})"
        )
