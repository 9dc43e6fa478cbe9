# SPDX-License-Identifier: BSD-3-Clause
"""Task boundaries: whether an anchor may be set now, of which parameters, from which tensors."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dgg import _arguments, anchor, sharding
from dgg.anchor import importance
from dgg.sharding import fsdp1


def is_due(
    groups: Sequence[Mapping[str, Any]], tensors: Any, task: int | None, resumed: int | None
) -> bool:
    """Returns whether ``set_anchor(tensors, task=task)`` sets the anchor; False keeps it.

    Args:
        groups: Parameter groups with ``task_index``, ``draw_index`` and ``anchored``.
        tensors: The source of the anchor; None for the present weights.
        task: Number of the task that is trained now, or None.
        resumed: Steps of the checkpoint that a new optimizer has loaded, or None.

    Raises:
        RuntimeError: The anchor of a task in progress is gone, or was just resumed.
        TypeError: ``task`` is no int.
        ValueError: ``task`` is over already, or not the next one.
    """
    draws = int(groups[0]["draw_index"])
    if task is not None:
        return begins_task(task, groups, draws, has_source=tensors is not None)
    if tensors is None:
        refuse_resumed(groups, draws, resumed)
    return True


def model_of_tensors(tensors: Any, model: Any, importance: Any) -> Any:
    """Returns the model whose names ``set_anchor(tensors, ...)`` looks for in ``tensors``.

    With the present weights as the anchor it may belong to the importance alone.
    """
    if model is not None and not isinstance(model, torch.nn.Module):
        raise TypeError(f"model= must be a torch.nn.Module, not {type(model).__name__}")
    return model if importance is None or tensors is not None else None


# For each parameter (or partition): itself, the source of its anchor, and the anchor's memory. The
# source is None if the memory has the values already, or a function that writes them.
Plan = list[tuple[Tensor, "Tensor | Callable[[Tensor], None] | None", Tensor]]


def place(
    opt, groups: Sequence[dict[str, Any]], marks: Sequence[dict[str, Any]],
    plan_all: Callable[[], Plan], task: int | None,
    plan_importance: Callable[[list[Tensor]], list[importance.Entry]],
) -> None:  # fmt: skip
    """Sets the anchors of a plan, and the importance that goes with them, on all ranks or on none.

    Args:
        opt: The optimizer.
        groups: Groups that hold the parameters.
        marks: For each group the dict that has its ``anchored`` and ``task_index``.
        plan_all: Returns the plan; it raises before anything is changed.
        task: Number of the task that begins; None counts one up.
        plan_importance: Returns the plan of the importance of these parameters; called if the
            optimizer weighs its pull.
    """
    members = opt._ownership.tensors(groups)
    peers = opt._ownership.peers([p for params in members for p in params])
    weighted, mean = bool(marks[0]["importance"]), 0.0
    entries: list[importance.Entry] = []
    with sharding.on_all_or_none(peers, _arguments.settings_of(marks)):
        plan = plan_all()
        if weighted:
            entries = plan_importance([p for p, _, _ in plan])
    if weighted:
        mean = importance.mean_of(opt, entries, peers)
    group_of = {p: group for group, params in zip(groups, members, strict=True) for p in params}
    moved = any([target is not opt.state.get(p, {}).get("anchor") for p, _, target in plan])
    moved |= any([x.target is not opt.state.get(x.param, {}).get("importance") for x in entries])
    importance.write(opt, entries, mean)
    for p, source, target in plan:
        source(target) if callable(source) else anchor.write(target, source)
        # Together with the moments: Adam would take a state with an anchor alone for initialised,
        # and checkpoints made before the first step would lack the moments.
        opt._rule.init_state(opt, p, group_of[p], first=False)
        opt.state[p]["anchor"] = target
        if not weighted and opt.state[p].pop("importance", None) is not None:
            moved = True
    for mark, params in zip(marks, members, strict=True):
        mark["anchored"] = sum("anchor" in opt.state.get(p, ()) for p in params)
        mark["task_index"] = mark["task_index"] + 1 if task is None else task
        mark["importance_mean"] = mean
        mark["importance_draw"] = int(mark["draw_index"]) if weighted else None
    opt._ownership.note_anchors(marks, anchored=True)
    opt._awaits_load = False
    opt._journal.begin_task()
    if moved:  # otherwise the anchors' versions tell the next step to measure anew
        opt._reset_caches()


def clear(opt, groups: Sequence[dict[str, Any]], marks: Sequence[dict[str, Any]]) -> None:
    """Drops all anchors; the arguments are those of `place`."""
    for mark, params in zip(marks, opt._ownership.tensors(groups), strict=True):
        for p in params:
            if p in opt.state:
                opt.state[p].pop("anchor", None)
                opt.state[p].pop("importance", None)
        mark.update(anchored=0, importance_mean=0.0, importance_draw=None)
    opt._ownership.note_anchors(marks, anchored=False)
    opt._awaits_load = False
    opt._journal.begin_task()
    opt._reset_caches()


def anchors_in(state: Mapping[Tensor, Any]) -> dict[Tensor, Tensor | None]:
    """Returns the anchor, or None, of every parameter that has state."""
    return {
        p: entry.get("anchor") for p, entry in state.items() if isinstance(entry, dict) and entry
    }


def refuse_optimizer_state(tensors: Any) -> None:
    """Raises a KeyError if the source of an anchor is an optimizer's state dict."""
    if isinstance(tensors, Mapping) and tensors.keys() >= {"state", "param_groups"}:
        raise KeyError(
            "set_anchor() was given an optimizer's state dict: its anchors come along with "
            "load_state_dict(); to guide towards a model's weights pass model.state_dict()"
        )


def plan_anchors(
    groups: Sequence[Mapping[str, Any]], anchors: Mapping[Tensor, Tensor | None],
    tensors: Mapping[str, Tensor] | str | os.PathLike | None, model: torch.nn.Module | None,
    dtype: torch.dtype | None, device: torch.device | None,
    weights: Callable[[Tensor], Tensor] = Tensor.detach, *, none: bool = False,
) -> Plan:  # fmt: skip
    """Decides which parameters get an anchor, from which source and into which memory.

    Existing tensors are not written. A tensor in a file is read into the memory of its new anchor;
    if it will overwrite an anchor, it is read once to be checked and once to be copied.

    Args:
        groups: Groups that hold the parameters.
        anchors: From `anchors_in`.
        tensors: Named sources, the path of some, or None for the present weights.
        model: Maps names to parameters, or None if the groups have the names.
        dtype: Storage dtype or None for the parameter's.
        device: Storage device or None for the parameter's.
        weights: Parameter → the tensor that the optimizer steps for it: itself or its master.
        none: This rank may have no parameter, because other ranks have them.

    Returns:
        The plan; a present anchor that fits is its target again.
    """
    refuse_optimizer_state(tensors)
    if tensors is None and model is not None:
        raise ValueError("model= maps the names of tensors to parameters; give both or neither")
    if tensors is not None and not isinstance(tensors, (Mapping, str, os.PathLike)):
        raise TypeError(
            "set_anchor() takes a mapping from names to tensors or the path of a file or "
            f"directory of them, not {type(tensors).__name__}; pass a state_dict, or the path that "
            "save_pretrained() wrote to"
        )
    label_of = _labels(groups)
    params = [p for p in label_of if p.requires_grad or p in anchors]
    labels = [label_of[p] for p in params]
    if not params and none:
        return []
    if not params:
        raise ValueError(
            "set_anchor() found no trainable parameter in this optimizer; unfreeze "
            "(requires_grad_(True)) what the next task trains first"
        )
    for p, label in zip(params, labels, strict=True):
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
    dtypes = [anchor.storage_dtype(x, dtype, y) for x, y in zip(stepped, labels, strict=True)]
    sources: Sequence[Tensor | anchor.Part]
    if tensors is None:
        sources = stepped
        for p, theta, label, wanted in zip(params, stepped, labels, dtypes, strict=True):
            anchor.check_source(theta, p, label, wanted)
    else:
        sources = _named_sources(tensors, groups, model, params, labels, "anchor", dtypes)
    former = [anchors.get(p) for p in params]
    for place, (old, p, theta) in enumerate(zip(former, params, stepped, strict=True)):
        # Somebody may have put the weights themselves there.
        if old is not None and (anchor.is_alias(old, p) or anchor.is_alias(old, theta)):
            former[place] = None
    targets = anchor.memory_for(params, dtypes, device, former)
    plan: Plan = []
    for p, source, target, label in zip(params, sources, targets, labels, strict=True):
        values: Any = source  # or None: they are in the target already
        if isinstance(source, anchor.Part):
            read = source.read()
            anchor.check_values(read, label, target.dtype)
            if target is not anchors.get(p):
                sharding.local(target).copy_(read)
                values = None
        plan.append((p, values, target))
    return plan


def plan_importance(
    opt, groups: Sequence[Mapping[str, Any]],
    source: Mapping[str, Tensor] | str | os.PathLike | None, model: torch.nn.Module | None,
    params: Sequence[Tensor],
) -> list[importance.Entry]:  # fmt: skip
    """Returns the plan of `importance.plan` for plain parameters, those that get an anchor.

    The source has sums of v̂ by name, or is their path; None takes the present second moments.
    """
    label_of = _labels(groups)
    labels = [label_of[p] for p in params]
    if source is None:
        return importance.plan(opt, groups, params, labels, None)
    for p, label in zip(params, labels, strict=True):
        if fsdp1.is_one(p):
            raise ValueError(
                f"{label} is FSDP1's, and importance by name is not cut into its runs: keep the "
                "optimizer between tasks, or resume its checkpoint, which has the importance"
            )
    match = functools.partial(_named_sources, source, groups, model, params, labels, "importance")
    return importance.plan(opt, groups, params, labels, match)


def _labels(groups: Sequence[Mapping[str, Any]]) -> dict[Tensor, str]:
    """Returns the name of every parameter in errors."""
    params = [p for group in groups for p in group["params"]]
    return dict(zip(params, _arguments.group_labels(groups), strict=True))


def _named_sources(
    tensors: Mapping[str, Tensor] | str | os.PathLike, groups: Sequence[Mapping[str, Any]],
    model: torch.nn.Module | None, params: Sequence[Tensor], labels: Sequence[str], what: str,
    dtypes: Sequence[torch.dtype],
) -> list[Tensor | anchor.Part]:  # fmt: skip
    """Returns the tensor of every parameter among named ones, in memory or in files, checked.

    Values in files are not read yet. Tensors of other parameters (frozen ones, buffers) are left
    alone.
    """
    names, others = _names(groups, model, params)
    if not isinstance(tensors, Mapping):
        tensors = anchor.open_path(tensors, what)
    in_source = anchor.find_names(tensors, names, labels, model, params, others)
    sources: list[Tensor | anchor.Part] = []
    for p, name, label, dtype in zip(params, in_source, labels, dtypes, strict=True):
        if isinstance(tensors, anchor.Stored):
            sources.append(anchor.Part(tensors, name, p, *tensors.kind(name)))
        else:
            sources.append(tensors[name])
        anchor.check_source(sources[-1], p, label, dtype, what)
    return sources


def _names(groups, model, params) -> tuple[list[list[str]], list[str]]:
    """Returns the names of each of these parameters, and those of the others in the groups."""
    if model is not None:
        names_of = anchor.names_of_parameters(model)
        return [names_of.get(p, []) for p in params], []
    names: dict[Tensor, str] = {}
    for group in groups:
        if "param_names" not in group:
            raise ValueError(
                "set_anchor(tensors) cannot tell which name belongs to which parameter: pass "
                "model=, or build the optimizer from model.named_parameters()"
            )
        names.update(zip(group["params"], group["param_names"], strict=True))
    return [anchor.variants(names.pop(p)) for p in params], list(names.values())


def begins_task(
    task: int, groups: Sequence[Mapping[str, Any]], draws: int, *, has_source: bool
) -> bool:
    """Returns whether ``set_anchor(task=...)``, after so many draws, sets the anchor."""
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
        if anchored or (task == 0 and not has_source):
            return False
        if task and not has_source:
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
    """Raises where ``set_anchor()`` could replace a resumed anchor by the weights of mid-task."""
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
    """Raises if the state of an earlier task would replace an anchor that was just set.

    Args:
        named: The task that ``set_anchor(task=...)`` named on a new optimizer, or None.
        saved: Groups of the state that is about to be loaded.
    """
    task = saved[0].get("task_index", 0) if saved else 0
    if named is not None and task < named:
        raise ValueError(
            f"set_anchor(task={named}) was called before a state of task {task} is loaded, whose "
            f"anchor would take its place: load first, then call set_anchor(task={named})"
        )
