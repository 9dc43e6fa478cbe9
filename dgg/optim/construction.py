# SPDX-License-Identifier: BSD-3-Clause
"""How a guided optimizer is built, copied, unpickled and given another group."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from dgg import _arguments, sharding
from dgg.sharding import zero_redundancy
from dgg.step.cache import RowCache
from dgg.step.checks import Warned
from dgg.step.draws import Draws
from dgg.step.gradients import ReplaySlot
from dgg.step.settings import FORMER_NAMES, check_kernels, settings_in, take_settings


def build(opt, parent: Callable[[], None], options: dict[str, Any]) -> None:
    """Checks the guidance arguments, then lets torch.optim check and take the others.

    Args:
        opt: The optimizer, of which nothing is made yet.
        parent: Calls the constructor of the torch.optim class.
        options: The arguments from ``alpha`` to ``backend``, and how the step is carried out.
    """
    name = type(opt).__name__
    if options.pop("differentiable"):
        raise ValueError(
            f"dgg.{name} does not support differentiable=True: the fused step writes in place "
            f"and records no graph; use torch.optim.{name} to differentiate through a step"
        )
    process_group = _arguments.check_process_group(options.pop("process_group"), options)
    opt._ownership = sharding.Sharded(process_group)
    share = zero_redundancy.builder()
    if share is not None:
        if process_group is not None or options["capturable"]:
            raise ValueError(
                "process_group= and capturable=True do not go with ZeroRedundancyOptimizer, "
                "whose own process group is used and whose ranks synchronise in every step; "
                "leave both"
            )
        opt._ownership = sharding.RankShare(share)
    opt._settings = take_settings(options)
    start_without_caches(opt)
    opt._guidance = {**options, "draw_index": 0, "task_index": 0}
    _arguments.check_options(opt._guidance)
    _arguments.make_plain(opt._guidance)
    # Identities: a weak reference would forbid torch to swap a parameter (to_empty() of
    # FSDP2's modules does), another one would keep what an engine exchanges alive.
    opt._original_ids, opt._driver, opt._first_id = [], None, None
    parent()
    opt._all_groups, opt._first_id = opt.param_groups, first_id(opt.param_groups)
    _arguments.check_backend(opt._settings.backend, opt.param_groups)
    every = opt._ownership.recorded(opt.param_groups)
    rounding, master = opt._settings.stochastic_rounding, opt._settings.master_weights
    _arguments.check_precision(rounding, master, [{"params": every}])
    check_kernels(opt._settings, [p for group in opt.param_groups for p in group["params"]])
    opt.defaults.update(opt._guidance)
    _arguments.make_plain(opt.defaults)


def start_without_caches(opt) -> None:
    """Gives an optimizer all that is never needed by a checkpoint, a copy or a pickle."""
    opt._rule, opt._draws, opt._replay = opt._new_rule(), Draws(), ReplaySlot()
    opt._cache: RowCache | None = None
    # What the last step did, for the statistics; the last gradients were partial sums of the
    # ranks'; the last step was skipped.
    opt._last: dict[str, Any] | None = None
    opt._partial = False
    opt._skipped: Tensor | bool = False
    # Steps that a fresh optimizer was resumed after; the task that was named with the anchor.
    opt._resumed: int | None = None
    opt._named: int | None = None
    # All that captured steps read and write, for the optimizer's life: a graph knows addresses
    # alone. First of each the rows.
    opt.__dict__.setdefault("_captured", [])
    opt.__dict__.setdefault("_warned", Warned())


def take_state(opt, state: dict[str, Any], torch_set: Callable[[dict[str, Any]], None]) -> None:
    """Takes over a copied, pickled or loaded state and starts without caches.

    Args:
        opt: The optimizer.
        state: What ``__getstate__`` returned, of this release or a former one, or torch.optim's.
        torch_set: ``__setstate__`` of the torch.optim class.
    """
    state = dict(state)
    if "_settings" not in opt.__dict__:  # a copy; loading keeps what there is
        state["_settings"] = settings_in(state)
        state.setdefault("_ownership", _ownership_in(state))
    for former in [name for name in state if name in _FORMER_ENTRIES]:
        del state[former]
    start_without_caches(opt)
    torch_set(state)
    # DeepSpeed steps groups one by one in a list of its own.
    opt._all_groups = opt.param_groups
    if "_original_ids" not in opt.__dict__:
        opt._original_ids = [id(p) for group in opt.param_groups for p in group["params"]]
        opt._driver, opt._first_id = None, first_id(opt.param_groups)
    for group in opt.param_groups:
        for name, value in opt._guidance.items():
            group.setdefault(name, value)
        group.setdefault("anchored", 0)


def add_group(
    opt, param_group: dict[str, Any], torch_add: Callable[[dict[str, Any]], None]
) -> None:
    """Adds a group after a look at its options; after an error it is not there.

    Args:
        opt: The optimizer.
        param_group: As in `AdamW.add_param_group`.
        torch_add: ``add_param_group`` of the torch.optim class.
    """
    options = opt.param_groups[0] if opt.param_groups else opt._guidance
    if isinstance(param_group, dict) and "anchored" in param_group:
        # A dict that was a group before, since torch.optim keeps the one it is given. What
        # belonged to that optimizer as a whole does not come along, nor is it changed there.
        param_group = {k: v for k, v in param_group.items() if k not in _arguments.WIDE}
    if isinstance(param_group, dict):
        for name in _arguments.WIDE:
            if name in param_group and param_group[name] != options[name]:
                raise ValueError(
                    f"{name} is one setting for the whole optimizer ({options[name]!r}); a "
                    f"group cannot have its own ({param_group[name]!r}). Per group: alpha, "
                    "strength"
                )
        schedulable = {n: param_group[n] for n in _arguments.PER_GROUP if n in param_group}
        _arguments.check_options(schedulable)
    before = len(opt.param_groups)
    torch_add(param_group)
    group = opt.param_groups[-1]
    try:
        _arguments.make_plain(group)
        seen: set[int] = set()
        for place, param in enumerate(group["params"]):
            names = group.get("param_names")
            label = f"parameter {names[place]!r}" if names else f"parameter {place}"
            _arguments.check_param(param, f"{label} of group {before}")
            if id(param) in seen:
                raise ValueError(
                    f"{label} of group {before} is in the group twice and would be updated by "
                    "two threads at once; pass every parameter once"
                )
            seen.add(id(param))
    except (TypeError, ValueError):
        del opt.param_groups[before:]
        raise
    for name in _arguments.WIDE:
        group[name] = options[name]
    for name in _arguments.PER_GROUP:
        group.setdefault(name, opt._guidance[name])
    group["anchored"] = 0
    opt._original_ids += map(id, group["params"])
    opt._reset_caches()


def first_id(groups: list[dict[str, Any]]) -> int | None:
    """Returns the identity of the first parameter, by which exchanged ones are noticed."""
    params = groups[0]["params"] if groups else []
    return id(params[0]) if params else None


# Entries of former pickles that `Settings` and the ownership took the place of.
_FORMER_ENTRIES = {*FORMER_NAMES, "_lost_group", "_lost_share"}


def _ownership_in(state: Mapping[str, Any]) -> sharding.Sharded:
    """Returns who holds what of an optimizer that a former release pickled."""
    if state.get("_lost_share"):
        return sharding.Lost("share")
    return sharding.Lost("group") if state.get("_lost_group") else sharding.Sharded()
