# SPDX-License-Identifier: BSD-3-Clause
"""How a guided optimizer is built, copied, unpickled and given another group."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from dgg import _arguments, _callers, sharding
from dgg._arguments import GROUP_OPTIONS, OPTIMIZER_OPTIONS
from dgg.sharding import zero_redundancy
from dgg.step.checks import Warned
from dgg.step.draws import Draws
from dgg.step.gradients import ReplaySlot
from dgg.step.journal import Journal
from dgg.step.settings import CONSTRUCTED, FORMER_NAMES, check_kernels, settings_in, take_settings


def build(
    opt, torch_init: Callable[..., None], numbers: Sequence[str], arguments: Mapping[str, Any]
) -> None:
    """Checks the guidance arguments, then lets torch.optim check and take the others.

    The optimizer has no attribute yet. ``numbers`` are the arguments that both constructors take
    and numpy's numbers may be given for; ``arguments`` are all, ``self`` included.
    """
    options = {name: value for name, value in arguments.items() if name not in ("self", "params")}
    params = _as_params(arguments["params"])
    _check_numbers({name: options[name] for name in numbers})
    for_torch = {name: _arguments.plain(name, options.pop(name)) for name in numbers}
    for_torch |= {name: options[name] for name in ("foreach", "fused")}
    if "decoupled_weight_decay" in options:
        for_torch["decoupled_weight_decay"] = options.pop("decoupled_weight_decay")
    name = type(opt).__name__
    if options.pop("differentiable"):
        raise ValueError(
            f"dgg.{name} does not support differentiable=True: the fused step writes in place "
            f"and records no graph; use torch.optim.{name} to differentiate through a step"
        )
    process_group = _arguments.check_process_group(options.pop("process_group"), options)
    opt._ownership = sharding.Sharded(process_group)
    zero_optimizer = zero_redundancy.builder()
    if zero_optimizer is not None:
        if process_group is not None or options["capturable"]:
            raise ValueError(
                "process_group= and capturable=True do not go with ZeroRedundancyOptimizer, "
                "whose own process group is used and whose ranks synchronise in every step; "
                "leave both"
            )
        opt._ownership = sharding.RankShare(zero_optimizer)
    opt._settings = take_settings(options)
    start_without_caches(opt)
    opt._guidance = {**_arguments.NEW_OPTIONS, **options, "draw_index": 0, "task_index": 0}
    _arguments.check_options(opt._guidance)
    opt._rule.check_route(options["route"])
    _arguments.guard_of([opt._guidance], [False])
    _arguments.make_plain(opt._guidance)
    # Identities of parameters, not references: torch swaps no parameter (as to_empty() of FSDP2's
    # modules does) that has a weak reference, and a strong one would keep alive the parameters that
    # an engine has replaced.
    opt._original_ids, opt._driver, opt._first_id = [], None, None
    torch_init(opt, params, **for_torch)
    opt._all_groups, opt._first_id = opt.param_groups, first_id(opt.param_groups)
    settings = opt._settings
    _arguments.check_backend(settings.backend, opt.param_groups)
    params_of_all_ranks = opt._ownership.recorded(opt.param_groups)
    _arguments.check_precision(
        settings.stochastic_rounding, settings.master_weights, [{"params": params_of_all_ranks}]
    )
    check_kernels(settings, [p for group in opt.param_groups for p in group["params"]])
    opt.defaults.update(opt._guidance)
    _arguments.make_plain(opt.defaults)


def _as_params(params: Any) -> Any:
    """Returns what torch.optim is to take as parameters; what an iterator has left as a list."""
    if isinstance(params, Mapping):
        remedy = (
            "pass a list of groups, [{'params': ..., 'lr': ...}]"
            if "params" in params
            else "pass model.parameters(), or the items() of a dict of named parameters (a state "
            "dict holds copies, which no model trains)"
        )
        raise TypeError(f"params is a dict with the keys {list(params)[:4]}: {remedy}")
    if isinstance(params, Iterator):
        params = list(params)
    models = [params] if isinstance(params, torch.nn.Module) else params
    if isinstance(models, (list, tuple)):
        # A ParameterList may be given: it has parameters, and is a module all the same.
        others = [x for x in models if isinstance(x, torch.nn.Module)]
        if others and not isinstance(params, torch.nn.ParameterList):
            raise TypeError(
                f"params has a model ({type(others[0]).__name__}) where parameters belong: pass "
                "model.parameters(), or model.named_parameters(), whose names then stand in errors"
            )
    if isinstance(params, (list, tuple)) and not params:
        raise ValueError(
            "params is an empty parameter list. A generator such as model.parameters() can be "
            "used once: call it again for every optimizer. Or does the model train nothing "
            "(requires_grad_(False)), and a filter has left nothing over?"
        )
    return params


def _check_numbers(numbers: Mapping[str, Any]) -> None:
    """Checks the types of the numbers whose values torch.optim checks; warns of swapped betas."""
    betas: Any = numbers.get("betas", (0.0, 0.0))
    try:
        is_pair = len(betas) == 2 and not isinstance(betas, str)
    except TypeError:
        is_pair = False
    if not is_pair:
        raise TypeError(
            f"betas={betas!r} must be a pair, (0.9, 0.999): the decay rates of both moments"
        )
    singles = {name: value for name, value in numbers.items() if name != "betas"}
    for name, value in {**singles, "betas[0]": betas[0], "betas[1]": betas[1]}.items():
        if value is None or isinstance(value, (str, bytes, list, tuple, dict)):
            hint = "; pass float(...) of it: YAML reads 1e-3 as text, 1.0e-3 as a number"
            raise TypeError(
                f"{name}={value!r} must be a number, not {type(value).__name__}"
                f"{hint if isinstance(value, str) else ''}"
            )
    floats = isinstance(betas[0], float) and isinstance(betas[1], float)
    if floats and 1 > betas[0] ** 2 > betas[1] >= 0:
        warnings.warn(
            f"betas={tuple(betas)}: the first one, squared, is above the second one, where Adam "
            f"may diverge. If they are swapped: betas={tuple(betas)[::-1]}",
            stacklevel=_callers.stacklevel(),
        )


def start_without_caches(opt) -> None:
    """Sets the attributes that no checkpoint, copy or pickle carries along."""
    opt._rule, opt._draws, opt._replay = opt._new_rule(), Draws(), ReplaySlot()
    opt._cache = opt._last = opt._resumed = opt._named = None
    opt._partial = opt._skipped = False
    # The tensors that captured steps read and write, for the optimizer's life: a graph has their
    # addresses alone. Each entry begins with its cache of rows.
    opt.__dict__.setdefault("_captured", [])
    opt.__dict__.setdefault("_warned", Warned())
    opt.__dict__.setdefault("_journal", Journal())


def take_state(opt, state: dict[str, Any], torch_set: Callable[[dict[str, Any]], None]) -> None:
    """Takes over a copied, pickled or loaded state and starts without caches.

    The state is what ``__getstate__`` returned, of this release or a former one, or torch.optim's.
    """
    state = dict(state)
    if "_settings" not in opt.__dict__:  # a copy; load_state_dict() keeps the present settings
        state["_settings"] = settings_in(state)
        state.setdefault("_ownership", _ownership_in(state))
    for former in _FORMER_ENTRIES & state.keys():
        del state[former]
    start_without_caches(opt)
    torch_set(state)
    # For the step of one group DeepSpeed replaces `param_groups` by a shorter list.
    opt._all_groups = opt.param_groups
    if "_original_ids" not in opt.__dict__:
        opt._original_ids = [id(p) for group in opt.param_groups for p in group["params"]]
        opt._driver, opt._first_id = None, first_id(opt.param_groups)
    opt._guidance = {**_arguments.NEW_OPTIONS, **opt._guidance}
    for group in opt.param_groups:
        for name, value in opt._guidance.items():
            group.setdefault(name, value)
        group.setdefault("anchored", 0)


def add_group(
    opt, param_group: dict[str, Any], torch_add: Callable[[dict[str, Any]], None]
) -> None:
    """Checks the options of a group and adds it; after an error the groups are as before."""
    options, given = opt.param_groups[0] if opt.param_groups else opt._guidance, param_group
    if isinstance(param_group, dict):
        if "anchored" in param_group:
            # A group of another optimizer, since torch.optim keeps the dict it is given. The
            # options of that optimizer as a whole stay there and do not come along.
            param_group = {k: v for k, v in param_group.items() if k not in OPTIMIZER_OPTIONS}
        present = {**vars(opt._settings), "process_group": opt.process_group, **options}
        for name in (*OPTIMIZER_OPTIONS, *CONSTRUCTED, "process_group"):
            if name in param_group and param_group[name] != present[name]:
                raise ValueError(
                    f"{name} is one setting for the whole optimizer ({present[name]!r}), given to "
                    f"the constructor; a group cannot have its own ({param_group[name]!r}). Per "
                    "group: alpha, strength"
                )
        _arguments.check_options({n: param_group[n] for n in GROUP_OPTIONS if n in param_group})
    number = len(opt.param_groups)
    torch_add(param_group)
    group = opt.param_groups[-1]
    try:
        _arguments.make_plain(group)
        checked: set[int] = set()
        for place, param in enumerate(group["params"]):
            names = group.get("param_names")
            label = f"parameter {names[place]!r}" if names else f"parameter {place}"
            _arguments.check_param(param, f"{label} of group {number}")
            if id(param) in checked:
                raise ValueError(
                    f"{label} of group {number} is in the group twice and would be updated by "
                    "two threads at once; pass every parameter once"
                )
            checked.add(id(param))
    except (TypeError, ValueError):
        del opt.param_groups[number:]
        raise
    if number == 0 and any(opt.state.get(p) for p in group["params"]):
        options = {**options, **given}  # its only group, taken out and put back: draws, task
    for name in OPTIMIZER_OPTIONS:
        group[name] = options[name]
    for name in GROUP_OPTIONS:
        group.setdefault(name, opt._guidance[name])
    group["anchored"] = sum("anchor" in opt.state.get(p, ()) for p in group["params"])
    opt._original_ids += map(id, group["params"])
    opt._reset_caches()


def first_id(groups: list[dict[str, Any]]) -> int | None:
    """Returns the identity of the first parameter, by which exchanged ones are noticed."""
    params = groups[0]["params"] if groups else []
    return id(params[0]) if params else None


# Entries of former pickles that `Settings` and the ownership have replaced.
_FORMER_ENTRIES = {*FORMER_NAMES, "_lost_group", "_lost_share"}


def _ownership_in(state: Mapping[str, Any]) -> sharding.Sharded:
    """Returns who holds what of an optimizer that a former release pickled."""
    if state.get("_lost_share"):
        return sharding.Lost("share")
    return sharding.Lost("group") if state.get("_lost_group") else sharding.Sharded()
