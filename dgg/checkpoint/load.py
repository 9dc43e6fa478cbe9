# SPDX-License-Identifier: BSD-3-Clause
"""Loading the state of the guided optimizers: nothing lost, nothing cast, or an error.

torch.optim would cast anchors to the parameters' dtype, and torch.distributed.checkpoint leaves out
what the template it fills has no room for (see `room`).
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from dgg import _arguments, anchor, backends, sharding
from dgg.anchor import boundary, importance
from dgg.checkpoint import regrouped, room, saved_state
from dgg.checkpoint.source import of_template
from dgg.sharding import fsdp1
from dgg.step import state

_STEP_FLAGS = ("foreach", "fused", "capturable", "differentiable")
_BEFORE, _AFTER = ("_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks")


def make_whole(opt) -> None:
    """Completes an optimizer's state before `state_dict` returns it; see `Guided.state_dict`."""
    if opt._template and opt._cache is None and not opt._awaits_load:
        origin = of_template()
        if origin is not None and not origin.broadcast:
            room.make_room_for(opt, origin)
    for group in opt.param_groups:
        _arguments.make_plain(group)
        if "step" not in opt._rule.columns:  # the first step of SGD makes its buffer
            continue
        for p in group["params"]:
            # amsgrad may have been switched on since the last step: do what the next step would.
            if isinstance(entry := opt.state.get(p), dict) and "exp_avg" in entry:
                state.make(opt, p, opt._rule.needed(group))


def load(opt, state_dict: Any, torch_load: Callable[[Any], None]) -> None:
    """Loads a state dict, with torch.optim's own method; after an error all is as it was."""
    # Loading makes new objects in place of these, which stay as they are.
    attributes = dict(opt.__dict__)
    try:
        _load_between_hooks(opt, state_dict, torch_load)
    except BaseException:
        opt.__dict__.clear()
        opt.__dict__.update(attributes)
        raise
    opt._journal.begin_task()


def _load_between_hooks(opt, state_dict: Any, torch_load: Callable[[Any], None]) -> None:
    # Hooks may repair the state dict and look at the result, so they run before and after all of
    # the loading, not only around torch's part of it.
    hooks = {name: getattr(opt, name) for name in (_BEFORE, _AFTER)}
    if isinstance(state_dict, Mapping):
        state_dict = dict(state_dict)
        for hook in hooks[_BEFORE].values():
            changed = hook(opt, state_dict)
            state_dict = state_dict if changed is None else changed
    for name in hooks:
        setattr(opt, name, OrderedDict())
    _load_checked(opt, state_dict, torch_load)
    for name, registered in hooks.items():
        setattr(opt, name, registered)
    for hook in hooks[_AFTER].values():
        hook(opt)


def _load_checked(opt, state_dict: Mapping[str, Any], torch_load: Callable[[Any], None]) -> None:
    state_dict = _completed(opt, state_dict)
    _check_entries(opt, state_dict)
    groups = regrouped.put_right(opt, state_dict, functools.partial(_unfilled, opt))
    state_dict = {**state_dict, "param_groups": groups}
    anchors, importances = _checked_anchors(opt, state_dict)
    pairs = zip(opt.param_groups, state_dict["param_groups"], strict=True)
    loaded = [{**group, **saved} for group, saved in pairs]
    for number, group in enumerate(loaded):  # where one of them has an option and another not
        _arguments.check_agreement(number, group, loaded[0])
    _arguments.guard_of(loaded, [group.get("maximize") for group in loaded])
    draws, resumed = int(opt.param_groups[0]["draw_index"]), opt._resumed
    slot, cache = opt._replay, opt._cache
    saved_groups, groups_before = state_dict["param_groups"], opt.param_groups
    if draws <= 1:
        boundary.refuse_earlier(opt._named, saved_groups)
    # torch casts all floating state to the parameter's dtype, which would round an anchor, a
    # master weight and moments with a dtype of their own.
    not_for_torch = {"anchor", "importance", "master"}
    if opt._settings.state_dtype is not None:
        not_for_torch |= opt._rule.columns.keys() - {"step"}
    for_torch = {
        key: {k: anchor.resolved(v) for k, v in entry.items() if k not in not_for_torch}
        if isinstance(entry, Mapping)
        else entry
        for key, entry in state_dict["state"].items()
    }
    torch_load({**state_dict, "state": for_torch})
    _load_without_torch(opt, state_dict, not_for_torch - {"anchor", "importance"})
    _give_moments_memory(opt)
    for group, before, saved in zip(opt.param_groups, groups_before, saved_groups, strict=True):
        _arguments.make_plain(group)
        flags = {name: before.get(name) for name in _STEP_FLAGS}
        group.update({k: v for k, v in flags.items() if v is not None or k in group})
        if "param_names" in before:  # by which set_anchor() finds the parameters
            group["param_names"] = before["param_names"]
        group.update({k: before[k] for k in (*opt._guidance, "anchored") if k not in saved})
    for name, values in (("anchor", anchors), ("importance", importances)):
        dtypes = [value.dtype for value in values.values()]
        targets = anchor.allocate_all([*values], dtypes, opt._settings.anchor_device)
        for (param, value), target in zip(values.items(), targets, strict=True):
            # A copy: set_anchor() writes in place, and the checkpoint may be another optimizer's.
            anchor.write(target, value.detach())
            opt.state[param][name] = target
    for group, saved in zip(opt.param_groups, saved_groups, strict=True):
        if saved.get("anchored"):
            _anchor_empty_shards(opt, group)
        present = sum("anchor" in opt.state.get(p, ()) for p in group["params"])
        group["anchored"] = max(present, saved.get("anchored", 0))  # other ranks' included
    _normalise_steps(opt)
    # torch's checkpoint helpers make an empty step before they load into a new optimizer.
    fresh = draws in (0, 1, resumed)
    opt._resumed = int(opt.param_groups[0]["draw_index"]) if fresh else None
    opt._replay = slot
    opt._awaits_load, opt._cache = False, cache
    opt._reset_caches()
    opt._rule.after_load(opt, state_dict)


def _give_moments_memory(opt) -> None:
    """Gives every moment dense memory of its own, and shards those of sharded parameters.

    torch takes the checkpoint's tensors as they are. A step could not write one that is expanded,
    that two parameters share, or that is a parameter's memory. And torch's helpers shard only those
    that had room.
    """
    in_use = {
        (p.device, sharding.local(p).untyped_storage().data_ptr())
        for group in opt.param_groups
        for p in group["params"]
        if not (is_lazy(p) or sharding.keeps_values_elsewhere(p))
    }
    for param, entry in opt.state.items():
        if not isinstance(entry, dict):
            continue
        for name in (*opt._rule.columns, "master"):
            value = entry.get(name)
            if not isinstance(value, Tensor) or sharding.is_dtensor(value):
                continue
            if sharding.is_dtensor(param) and name != "step":
                entry[name] = anchor.allocate(param, value.dtype, None)
                anchor.write(entry[name], value.detach())
                continue
            place = value.device, value.untyped_storage().data_ptr()
            if not backends.is_dense(value):
                entry[name] = value.contiguous()
            elif value.numel() and place in in_use:
                entry[name] = value.clone()
            in_use.add(place)


def _anchor_empty_shards(opt, group: dict[str, Any]) -> None:
    """Anchors the parameters of FSDP1 that are empty on this rank and not in its checkpoints.

    Otherwise a rank with empty parameters alone would not take part in the sums of norms.
    """
    for param in group["params"]:
        empty = fsdp1.is_empty(param) and param.requires_grad
        if empty and "anchor" not in opt.state.get(param, ()):
            opt._rule.init_state(opt, param, group, first=False)
            opt.state[param]["anchor"] = torch.empty_like(param)
            if group["importance"]:
                opt.state[param]["importance"] = torch.empty_like(param)


def _load_without_torch(opt, state_dict: Mapping[str, Any], names: set[str]) -> None:
    for group, saved in zip(opt.param_groups, state_dict["param_groups"], strict=True):
        for param, key in zip(group["params"], saved["params"], strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if name not in names or value is None:
                    continue
                if name != "master":
                    dtype = anchor.storage_dtype(param, opt._settings.state_dtype, "a parameter")
                elif opt._settings.has_master(param):
                    dtype = torch.float32
                else:
                    continue  # the weights are of 32 bits now
                value = anchor.resolved(value.detach())
                opt.state[param][name] = value.to(param.device, dtype, copy=True)


def _completed(opt, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a state dict without the traces of torch's checkpoint helpers.

    In flattened state dicts they put empty dicts where the checkpoint has nothing. And they leave
    out frozen parameters, although the load has filled their prepared room.
    """
    saved_state.check_form(state_dict, opt.param_groups)
    # FSDP1's helper puts numbers for names, in the optimizer's order, and leaves the list of names.
    if not any(fsdp1.is_one(p) for group in opt.param_groups for p in group["params"]):
        saved_state.check_order(state_dict["param_groups"], opt.param_groups)
    groups = [
        {**group, "param_names": list(saved_state.names_in(group))}
        if group.get("param_names")
        else group
        for group in state_dict["param_groups"]
    ]
    state = {
        key: {k: v for k, v in entry.items() if not (isinstance(v, Mapping) and not v)}
        if isinstance(entry, Mapping)
        else entry
        for key, entry in state_dict["state"].items()
    }
    for group, saved in zip(opt.param_groups, state_dict["param_groups"], strict=True):
        for param, key in zip(group["params"], saved["params"], strict=True):
            if state.get(key) is None and opt._awaits_load and not param.requires_grad:
                room = opt.state.get(param, {})
                if "anchor" in room and anchor.finite(room["anchor"]):
                    state[key] = dict(room)
    # None and {} mean that there is no state of a parameter.
    empty = {k for k, x in state.items() if x is None or (isinstance(x, Mapping) and not x)}
    state = {k: x for k, x in state.items() if k not in empty}
    return {**state_dict, "state": state, "param_groups": groups}


def _check_entries(opt, state_dict: Mapping[str, Any]) -> None:
    """Checks groups and states, but not the anchors."""
    ours = {**opt._guidance, "anchored": 0}
    keys = [*opt._rule.columns.keys() - {"anchor", "importance"}, "master"]
    pairs = zip(opt.param_groups, state_dict["param_groups"], strict=True)
    for number, (group, saved) in enumerate(pairs):
        saved_state.check_group(number, saved, opt.defaults, ours)
        options = {**group, **saved, "amsgrad": saved.get("amsgrad") or False}
        for place, (param, key) in enumerate(zip(group["params"], saved["params"], strict=True)):
            if key not in state_dict["state"]:
                continue
            entry = state_dict["state"][key]
            label = f"parameter {place} of group {number}"
            needed = opt._rule.needed_to_load(options, entry)
            saved_state.check_entry(entry, param, label, needed, keys)
            if "master" in entry and not opt._settings.master_weights:
                raise ValueError(
                    f"the checkpoint has a master weight of {label}, which this optimizer "
                    "would not keep; build it with master_weights=True over 16-bit parameters"
                )


def _checked_anchors(
    opt, state_dict: Mapping[str, Any]
) -> tuple[dict[Tensor, Tensor], dict[Tensor, Tensor]]:
    """Returns the anchors in a state dict and the importances, checked, of their parameters."""
    saved_groups = state_dict["param_groups"]
    anchors: dict[Tensor, Tensor] = {}
    importances: dict[Tensor, Tensor] = {}
    for number, (group, saved) in enumerate(zip(opt.param_groups, saved_groups, strict=True)):
        check = {name: saved[name] for name in opt._guidance if name in saved}
        _arguments.check_agreement(number, check, saved_groups[0])
        _arguments.check_options(check)
        present, filled, frozen = 0, 0, 0
        for place, (param, key) in enumerate(zip(group["params"], saved["params"], strict=True)):
            entry = state_dict["state"].get(key, {})
            label = f"parameter {place} of group {number}"
            value, weight = (
                None if _unfilled(opt, x, saved) else x
                for x in (entry.get("anchor"), entry.get("importance"))
            )
            if value is None:
                present += fsdp1.is_empty(param)
                frozen += not param.requires_grad
            else:
                anchor.check_source(value, param, label)
                anchors[param] = value
                present += 1
                filled += value.numel() > 0
            if weight is not None:
                importance.check_saved(weight, param, label)
                importances[param] = weight
            elif value is not None and saved.get("importance"):
                raise RuntimeError(
                    f"the checkpoint weighs its pull (importance={saved['importance']}) but "
                    f"carries no importance of {label}: it was lost on the way. Save and load "
                    "the whole state_dict(); for a distributed checkpoint call "
                    "prepare_for_load(checkpoint) before the template is made"
                )
        missing = (
            saved.get("anchored", 0) - opt._ownership.anchored_elsewhere(number, group) - present
        )
        if missing > 0:
            raise RuntimeError(
                f"the checkpoint's group {number} was anchored ({saved['anchored']} "
                f"parameters) but carries {present} anchors: they were lost on the way. "
                + (
                    "torch's checkpoint helpers leave out the state of frozen parameters: "
                    "requires_grad_(True) while it is loaded, or prepare_for_load() with a "
                    "distributed checkpoint"
                    if missing <= frozen
                    else "A new optimizer has no room for them where a distributed checkpoint "
                    "or torch's set_optimizer_state_dict fills what is there: call "
                    "prepare_for_load(checkpoint) first, before get_optimizer_state_dict. "
                    "Otherwise save and load the whole state_dict(), or call "
                    "set_anchor(tensors) with the previous task's weights after loading one "
                    "without guidance"
                )
            )
        if filled > saved.get("anchored", filled):
            raise ValueError(
                f"the checkpoint's group {number} has {saved['anchored']} anchored parameters, "
                f"but {filled} anchors came with it: they are not the checkpoint's but this "
                "optimizer's, as they stood in the template of a partial load. Call "
                "prepare_for_load(checkpoint) or clear_anchor() before the template is made; if "
                "the checkpoint had other groups, build the optimizer over those"
            )
    anchored = any("anchor" in entry for entry in opt.state.values() if isinstance(entry, dict))
    anchored = anchored and not opt._awaits_load
    if anchored and not anchors and not any(saved.get("anchored") for saved in saved_groups):
        raise ValueError(
            "this optimizer has an anchor and the checkpoint carries none: loading would drop "
            "it silently. Load first and call set_anchor() afterwards, or call clear_anchor() "
            "before loading"
        )
    return anchors, importances


def _unfilled(opt, value: Any, saved: Mapping[str, Any]) -> bool:
    """Returns whether an anchor is prepared room into which nothing was loaded."""
    if not opt._awaits_load or not isinstance(value, Tensor):
        return False
    if sharding.local(value).numel() == 0:  # an empty anchor has no NaN that would show it
        return not saved.get("anchored", 1)
    return not anchor.finite(value)


def _normalise_steps(opt) -> None:
    """Gives ``step`` and the draw index the form that the kernels write."""
    for param, entry in opt.state.items():
        if isinstance(entry, dict) and entry.get("step") is not None:
            # A clone: a count that two parameters share would go up twice in a step.
            entry["step"] = state.step_scalar(opt, param, entry["step"]).clone()
    for group in opt.param_groups:
        if isinstance(group["draw_index"], Tensor) and not opt._settings.capturable:
            group["draw_index"] = int(group["draw_index"])
