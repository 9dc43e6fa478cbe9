# SPDX-License-Identifier: BSD-3-Clause
"""The checks and the warnings of a step; they run before anything is changed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from dgg import _arguments, _callers, anchor, backends, sharding

# Draw index from which a missing anchor is warned of; steps without a gradient until a warning.
LONG, _IDLE = 199, 100
# Anchors in a row, with at most one step in between, until a warning.
_OFTEN = 10


class Warned:
    """Which warnings an optimizer has given, and what the next ones depend on.

    Attributes:
        narrow: Warned that 16-bit weights are stepped without compensation.
        unguided: Warned that there has been no anchor for a long time.
        idle: Warned that there has been no gradient for a long time.
        idle_steps: Steps in a row without any gradient.
        steps_without_replay: Of alpha="auto", while there was an anchor; -1 once there was a
            replay gradient, or a warning.
        boundary_known: A task boundary was named, or a callback sets the anchors.
        anchored_at: Draw index of the last anchor that is the weights; None before the first.
        anchors_in_a_row: How many of them followed each other with at most one step in between.
    """

    narrow = unguided = idle = boundary_known = False
    idle_steps = steps_without_replay = anchors_in_a_row = 0
    anchored_at: int | None = None


def with_gradient(grads, replays) -> list[int]:
    """Returns the places of the parameters that have a gradient or a replay gradient.

    The arguments have that of each parameter or None; ``replays`` may be empty.
    """
    if not replays:
        return [place for place, grad in enumerate(grads) if grad is not None]
    pairs = zip(grads, replays, strict=True)
    return [place for place, (g, r) in enumerate(pairs) if g is not None or r is not None]


def check_step(opt, params: Sequence[Tensor], grads, replays) -> None:
    """Checks parameters, gradients, state and anchors of a step, before anything is changed.

    The lists are parallel, of all parameters; those of gradients as `with_gradient` takes them.

    Raises:
        RuntimeError: Room was made for a checkpoint that was not loaded, or anchors are missing.
        TypeError: A parameter, a gradient or state is of the wrong kind.
        ValueError: A shape differs, or an anchor is the parameter's own memory.
    """
    groups = opt.param_groups
    places = with_gradient(grads, replays)
    labels = _arguments.group_labels(groups) if places else []
    group_of = [group for group in groups for _ in group["params"]]
    elementwise = groups[0]["granularity"] == "element"
    for place in places:
        param, label = params[place], labels[place]
        _arguments.check_param(param, label, stepped=True, elements=elementwise)
        backends.choose_for(opt._settings.backend, param)
        replay = replays[place] if replays else None
        for kind, grad in (("gradient", grads[place]), ("replay gradient", replay)):
            if grad is not None:
                _arguments.check_gradient(grad, param, label, kind)
        entry = opt.state.get(param, {})
        if not isinstance(entry, dict):
            raise TypeError(
                f"the state of {label} is a {type(entry).__name__}, not a dict; drop it (del "
                "optimizer.state[p])"
            )
        for name in (*opt._rule.needed(group_of[place]), "anchor", "importance", "master"):
            if entry.get(name) is not None:
                _arguments.check_state(name, entry[name], param, label)
        value = entry.get("anchor")
        check_weighed(entry, groups[0]["importance"], label)
        if value is not None and any(
            anchor.is_alias(value, theta) for theta in (param, entry.get("master", param))
        ):
            raise ValueError(
                f"the anchor in the state of {label} is the parameter's own memory: it would "
                "move along and guide nothing; call set_anchor(), which copies"
            )
    if opt._awaits_load:
        raise RuntimeError(
            "prepare_for_load(), or a load that failed, has made room in this optimizer for a "
            "checkpoint that was not loaded: load it (set_optimizer_state_dict, "
            "set_state_dict or load_state_dict), or give it up with clear_anchor() or "
            "set_anchor()"
        )
    _check_anchored(opt, params)


def check_weighed(entry: Mapping[str, Any], weight: float, label: str) -> None:
    """Raises a RuntimeError if the pull of a parameter is to be weighed and has no importance.

    ``weight`` is the option of that name, ``entry`` the parameter's state.
    """
    if weight and entry.get("anchor") is not None and entry.get("importance") is None:
        raise RuntimeError(
            f"importance={weight} weighs the pull of {label}, whose state has "
            "no importance: it is made at a task boundary. Set it with set_anchor(), or "
            "set_anchor(importance=...), while the option is on; or set the option to 0"
        )


def _check_anchored(opt, params: Sequence[Tensor]) -> None:
    """Raises if the state lacks anchors that the groups count."""
    groups = opt.param_groups
    elsewhere = [opt._ownership.anchored_elsewhere(n, group) for n, group in enumerate(groups)]
    present = [sum("anchor" in opt.state.get(p, ()) for p in g["params"]) for g in groups]
    counted = [group["anchored"] - n for group, n in zip(groups, elsewhere, strict=True)]
    missing = [count < promised for count, promised in zip(present, counted, strict=True)]
    if not any(missing):
        return
    # Parameters that were removed from a group, or moved to another, explain the difference.
    cache = opt._cache
    if cache is not None and sum(counted) - sum(present) == cache.anchored_and_removed(params):
        for group, count, other_ranks in zip(groups, present, elsewhere, strict=True):
            group["anchored"] = count + other_ranks
        return
    number = missing.index(True)
    raise RuntimeError(
        f"group {number} was anchored ({groups[number]['anchored']} parameters) but only "
        f"{present[number]} anchors are in the state: the resume lost them, or parameters or "
        "state were exchanged. Load a checkpoint that has them, set them again with "
        "set_anchor(tensors) of the previous task's weights (at a task boundary: set_anchor() "
        "after the exchange), or give up guidance with clear_anchor()"
    )


def check_capture(opt, device: torch.device, valid: bool) -> None:
    """Raises a RuntimeError if the step is being captured into a graph and cannot be replayed.

    It cannot if it decides on the host, or would make state: the rows of the step before are not
    ``valid``.
    """
    if not backends.capturing(device):
        return
    if not opt._settings.capturable:
        raise RuntimeError(
            "this step is being captured into a CUDA graph, whose replays would repeat its "
            "draw, learning rate and step count; build the optimizer with capturable=True"
        )
    if not valid:
        raise RuntimeError(
            "the first step cannot be captured, it makes the state; run a warm-up step before "
            "the capture, as torch.cuda.graph() asks for"
        )


def warn_if_narrow(opt, params: Sequence[Tensor], places: Sequence[int]) -> None:
    """Warns once if 16-bit weights are stepped, at these places, and rounding errors are lost."""
    if opt._warned.narrow:
        return
    settings = opt._settings
    narrow = [
        place
        for place in places
        if params[place].dtype in _arguments.NARROW
        and not settings.has_master(params[place])
        and not (settings.stochastic_rounding and params[place].dtype == torch.bfloat16)
    ]
    if not narrow:
        return
    label = _arguments.group_labels(opt.param_groups)[narrow[0]]
    more = f" and {len(narrow) - 1} more are" if len(narrow) > 1 else " is"
    dtype = params[narrow[0]].dtype
    rounding = " or stochastic_rounding=True (no memory)" if dtype == torch.bfloat16 else ""
    remedy = (
        f"pass master_weights=True (a float32 copy){rounding}, or keep the weights in float32 "
        "and compute in 16 bits under autocast"
    )
    _arguments.warn_narrow(f"{label}{more}", dtype, remedy)
    opt._warned.narrow = True


def warn_if_slow(opt, params: Sequence[Tensor], places: Sequence[int]) -> None:
    """Warns, once in a process, of steps on the reference that nobody asked for."""
    if opt._settings.backend is not None:
        return
    for device in dict.fromkeys(params[place].device for place in places):
        reason = backends.unexpected_reference(device)
        if reason is not None:
            warnings.warn(
                f"steps on {device.type!r} take the slow reference: {reason}. "
                "backend='reference' asks for it without this warning",
                stacklevel=_callers.stacklevel(),
            )


def warn_if_idle(opt, params: Sequence[Tensor], places: Sequence[int]) -> None:
    """Warns at a first step without any gradient: the model trains other parameters."""
    if places or opt._cache is not None or any(opt.state.values()):
        return
    waiting = [
        p for p in params if p.requires_grad and not is_lazy(p) and sharding.local(p).numel()
    ]
    if waiting:
        warnings.warn(
            f"the first step found no gradient in any of {len(waiting)} parameters and changed "
            "nothing. If the model was sharded or wrapped (fully_shard, an adapter) after the "
            "optimizer was made, it trains other parameters: make the optimizer afterwards",
            stacklevel=_callers.stacklevel(),
        )


def warn_if_nothing_happens(opt, index: int, all_rows: Sequence[backends.Rows]) -> None:
    """Warns once if there has been no gradient, or no anchor, for a long time."""
    warned = opt._warned
    present = any([rows.present for rows in all_rows])
    warned.idle_steps = 0 if present else warned.idle_steps + 1
    if warned.idle_steps == _IDLE and not warned.idle:
        warned.idle = True
        warnings.warn(
            f"no parameter has had a gradient for {_IDLE} steps, and none has changed. If the "
            "model was sharded, wrapped or exchanged after the optimizer was made, it trains "
            "other parameters: make the optimizer afterwards",
            stacklevel=_callers.stacklevel(),
        )
    groups = opt.param_groups
    if index < LONG or warned.unguided or warned.boundary_known or groups[0]["task_index"]:
        return
    if any(group["anchored"] for group in groups) or not any(opt._draws.limits(groups)):
        return
    warned.unguided = True
    warnings.warn(
        f"{index + 1} steps were made with alpha > 0 and nothing is guided, for there is no "
        "anchor: call set_anchor() at the end of every task. If this is the first one there is "
        "nothing to protect yet: say so with set_anchor(task=0) before it begins",
        stacklevel=_callers.stacklevel(),
    )


def warn_if_anchor_follows(warned: Warned, index: int) -> None:
    """Warns once if the anchor is set so often that it is always the weights themselves.

    It is called where the anchor becomes the weights, at draw ``index``.
    """
    before, warned.anchored_at = warned.anchored_at, index
    follows = before is not None and 0 <= index - before <= 1
    warned.anchors_in_a_row = warned.anchors_in_a_row + 1 if follows else 1
    if warned.anchors_in_a_row == _OFTEN:
        warnings.warn(
            f"set_anchor() was called {_OFTEN} times with at most one step in between: every step "
            "begins at its own anchor, and nothing is pulled. Call it once per task, at its end or "
            "with set_anchor(task=k) before it begins, and not in the loop over the batches",
            stacklevel=_callers.stacklevel(),
        )


def has_replay(opt, anchored: bool, shared: bool) -> bool:
    """Returns whether a step with alpha="auto" has replay gradients; warns once if none ever has.

    Args:
        opt: The optimizer.
        anchored: There is something that they would guide.
        shared: Sums are formed with other ranks. All of them have left a replay() block then, but
            one may have got no gradient there: its parts of the parameters are empty.
    """
    warned = opt._warned
    replays = bool(opt._replay) or (shared and opt._replay.recorded)
    if replays:
        warned.steps_without_replay = -1
    elif warned.steps_without_replay >= 0 and anchored:
        warned.steps_without_replay += 1
    if warned.steps_without_replay == _IDLE:
        warned.steps_without_replay = -1
        warnings.warn(
            f"alpha='auto' takes the strength of the pull from replay gradients, and {_IDLE} "
            "steps had none: nothing is guided. Record them (with opt.replay(): "
            "loss(old).backward()); without a memory use a number for alpha, with "
            "importance=0.5 or 1",
            stacklevel=_callers.stacklevel(),
        )
    return replays
