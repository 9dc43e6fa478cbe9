# SPDX-License-Identifier: BSD-3-Clause
"""All that a step relies on, looked at before anything is changed; and what it warns of."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from dgg import _arguments, _callers, anchor, backends, sharding

# Steps after which an optimizer without an anchor, or without any gradient, is told of.
LONG, _IDLE = 199, 100


class Warned:
    """What an optimizer has warned of, and what its next warnings depend on.

    Attributes:
        narrow: 16-bit weights are stepped without compensation.
        unguided: There is no anchor for a long time.
        idle: There is no gradient for a long time.
        idle_steps: Steps in a row without any gradient.
        boundary_known: A task boundary was named, or a callback sees to it.
    """

    narrow = unguided = idle = boundary_known = False
    idle_steps = 0


def check_step(opt, params: Sequence[Tensor], grads, replays) -> None:
    """Checks everything a step relies on, before anything is changed.

    Args:
        opt: The optimizer.
        params: All parameters.
        grads: Gradient of each or None.
        replays: Replay gradient of each or None; empty if there are none at all.

    Raises:
        RuntimeError: Room was made for a checkpoint that was not loaded, or anchors are missing.
        TypeError: A parameter, a gradient or state is of the wrong kind.
        ValueError: A shape differs, or an anchor is the parameter's own memory.
    """
    labels = None
    groups = opt.param_groups
    group_of = [group for group in groups for _ in group["params"]]
    for place, (param, grad) in enumerate(zip(params, grads, strict=True)):
        replay = replays[place] if replays else None
        if grad is None and replay is None:
            continue
        labels = labels or _arguments.group_labels(groups)
        label = labels[place]
        elementwise = groups[0]["granularity"] == "element"
        _arguments.check_param(param, label, stepped=True, elements=elementwise)
        backends.choose_for(opt._settings.backend, param)
        for given, kind in ((grad, "gradient"), (replay, "replay gradient")):
            if given is not None:
                _arguments.check_gradient(given, param, label, kind)
        entry = opt.state.get(param, {})
        if not isinstance(entry, dict):
            raise TypeError(
                f"the state of {label} is a {type(entry).__name__}, not a dict; drop it (del "
                "optimizer.state[p])"
            )
        for name in (*opt._rule.needed(group_of[place]), "anchor", "master"):
            if entry.get(name) is not None:
                _arguments.check_state(name, entry[name], param, label)
        value = entry.get("anchor")
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


def _check_anchored(opt, params: Sequence[Tensor]) -> None:
    """Raises if anchors that the groups promise are not there."""
    groups = opt.param_groups
    elsewhere = [opt._ownership.anchored_elsewhere(n, group) for n, group in enumerate(groups)]
    present = [sum("anchor" in opt.state.get(p, ()) for p in g["params"]) for g in groups]
    promised = [group["anchored"] - n for group, n in zip(groups, elsewhere, strict=True)]
    missing = [here < there for here, there in zip(present, promised, strict=True)]
    if not any(missing):
        return
    # Somebody has taken parameters out of a group, or into another: none goes unguided.
    cache = opt._cache
    if cache is not None and sum(promised) - sum(present) == cache.anchored_and_removed(params):
        for group, here, there in zip(groups, present, elsewhere, strict=True):
            group["anchored"] = here + there
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
    """Raises if a graph is being captured that would replay the wrong thing.

    Args:
        opt: The optimizer.
        device: The device of its parameters.
        valid: The rows of the step before can be used again.

    Raises:
        RuntimeError: The step decides on the host, or it would make state.
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


def warn_if_narrow(opt, params: Sequence[Tensor], grads, replays) -> None:
    """Warns once if 16-bit weights are stepped and nothing keeps what their rounding loses."""
    if opt._warned.narrow:
        return
    settings = opt._settings
    narrow = [
        place
        for place, p in enumerate(params)
        if p.dtype in _arguments.NARROW
        and (grads[place] is not None or (replays and replays[place] is not None))
        and not settings.has_master(p)
        and not (settings.stochastic_rounding and p.dtype == torch.bfloat16)
    ]
    if not narrow:
        return
    label = _arguments.group_labels(opt.param_groups)[narrow[0]]
    more = f" and {len(narrow) - 1} more are" if len(narrow) > 1 else " is"
    dtype = params[narrow[0]].dtype
    rounding = " or stochastic_rounding=True (no memory)" if dtype == torch.bfloat16 else ""
    _arguments.warn_narrow(
        f"{label}{more}",
        dtype,
        f"pass master_weights=True (a float32 copy){rounding}, or keep the weights in float32 "
        "and compute in 16 bits under autocast",
    )
    opt._warned.narrow = True


def warn_if_slow(opt, params: Sequence[Tensor], grads, replays) -> None:
    """Warns, once in a process, of steps on the reference that nobody asked for."""
    if opt._settings.backend is not None:
        return
    for place, p in enumerate(params):
        if grads[place] is None and not (replays and replays[place] is not None):
            continue
        reason = backends.unexpected_reference(p.device)
        if reason is not None:
            warnings.warn(
                f"steps on {p.device.type!r} take the slow reference: {reason}. "
                "backend='reference' asks for it without this warning",
                stacklevel=_callers.stacklevel(),
            )


def warn_if_idle(opt, params: Sequence[Tensor], grads, replays) -> None:
    """Warns at a first step without any gradient: the model trains other parameters."""
    if opt._cache is not None or any(opt.state.values()):
        return
    waiting = [
        p for p in params if p.requires_grad and not is_lazy(p) and sharding.local(p).numel()
    ]
    if waiting and all(g is None for g in (*grads, *replays)):
        warnings.warn(
            f"the first step found no gradient in any of {len(waiting)} parameters and changed "
            "nothing. If the model was sharded or wrapped (fully_shard, an adapter) after the "
            "optimizer was made, it trains other parameters: make the optimizer afterwards",
            stacklevel=_callers.stacklevel(),
        )


def warn_if_nothing_happens(opt, index: int, all_rows: Sequence[backends.Rows]) -> None:
    """Warns once if no gradient, or no anchor, has been there for a long time."""
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
