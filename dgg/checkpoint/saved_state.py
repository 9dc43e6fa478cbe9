# SPDX-License-Identifier: BSD-3-Clause
"""Checks of an optimizer's state dict, before anything is changed.

torch.optim loads any state dict and fails at the next step, or trains on with moments of zero. Here
an error says which key is missing or of the wrong type.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dgg import _arguments, anchor, sharding

# Options of groups that torch.optim fills in if an older release has not saved them.
_FILLED_IN = {
    "amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused",
    "decoupled_weight_decay", "nesterov",
}  # fmt: skip
# The oldest of these: a group that has one of the others has these, too, unless its optimizer has
# no such option (NAdam, RAdam, Adamax).
_OLDEST = {"amsgrad", "nesterov"}
_FLAGS = ("amsgrad", "maximize", "decoupled_weight_decay", "nesterov")
_NOT_NEGATIVE = ("lr", "eps", "weight_decay", "momentum")
_MOST_STEPS = 2.0**53  # beyond it float64 does not count by ones

_CONVERT = (
    "dgg loads what torch.optim.AdamW, Adam, SGD and its own classes save. States of bitsandbytes, "
    "torchao, apex and DeepSpeed's FusedAdam can be converted first: "
    "dgg.convert_state_dict(state_dict, optimizer)"
)


def check_form(
    state_dict: Any, groups: Sequence[Mapping[str, Any]], *, taken_by: str = "load_state_dict()"
) -> None:
    """Checks that this is an optimizer's state dict, of as many parameters in as many groups.

    Raises:
        KeyError: It is no optimizer's state dict.
        TypeError: It, or a part of it, is of the wrong type.
        ValueError: The groups have other sizes, or a parameter stands in them twice.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"{taken_by} takes what an optimizer's state_dict() returned, not "
            f"{type(state_dict).__name__}; torch.load the file first"
        )
    if not state_dict.keys() >= {"state", "param_groups"}:
        tensors = state_dict and all(isinstance(x, Tensor) for x in state_dict.values())
        weights = "; a model's weights go to model.load_state_dict(), or to set_anchor()"
        raise KeyError(
            f"no optimizer's state dict: it has {list(map(str, state_dict))[:5]}, not state "
            "and param_groups; pass what optimizer.state_dict() returned (of a whole "
            "checkpoint the optimizer's entry; of DeepSpeed's ZeRO, whose partitions no other "
            f"optimizer can load, the weights alone){weights if tensors else ''}"
        )
    if not isinstance(state_dict["state"], Mapping):
        raise TypeError(
            f"the state dict's state is a {type(state_dict['state']).__name__}, not a dict of "
            "parameters; pass what optimizer.state_dict() returned"
        )
    saved = state_dict["param_groups"]
    if not isinstance(saved, Sequence) or isinstance(saved, str):
        raise TypeError(
            f"the state dict's param_groups is a {type(saved).__name__}, not a list of groups; "
            "pass what optimizer.state_dict() returned"
        )
    for number, group in enumerate(saved):
        members = group.get("params") if isinstance(group, Mapping) else None
        if not isinstance(members, Sequence) or isinstance(members, str):
            raise TypeError(
                f"group {number} of the state dict is no dict with a list of params; pass what "
                "optimizer.state_dict() returned"
            )
    saved_sizes, sizes = ([len(group["params"]) for group in x] for x in (saved, groups))
    if saved_sizes != sizes:
        raise ValueError(
            f"the checkpoint's groups hold {saved_sizes} parameters, this optimizer's {sizes}; "
            "build the optimizer over the same groups first (add_param_group() and freezing "
            "included)"
        )
    for number, group in enumerate(saved):
        names = names_in(group)
        if names is not None and not (
            isinstance(names, (list, tuple))
            and len(names) == len(group["params"])
            and all(isinstance(name, str) for name in names)
        ):
            raise ValueError(
                f"param_names of group {number} of the state dict are not a name for each of its "
                f"{len(group['params'])} parameters; pass what optimizer.state_dict() returned"
            )
    try:
        keys = [key for group in saved for key in group["params"]]
        twice = len(set(keys)) < len(keys)
    except TypeError:
        raise TypeError(
            "the params in the state dict's groups are no numbers or names; pass what "
            "optimizer.state_dict() returned"
        ) from None
    if twice:
        raise ValueError("the state dict's groups name a parameter twice; it was not saved so")
    entries = state_dict["state"].items()
    unnamed = [k for k, entry in entries if k not in keys and isinstance(entry, Mapping) and entry]
    if unnamed:
        raise ValueError(
            f"the state dict has state of {unnamed[0]!r} and {len(unnamed) - 1} more, which its "
            "groups do not name: it would be lost. Pass what optimizer.state_dict() returned (JSON "
            "turns the numbers of parameters into text)"
        )


def names_in(saved: Mapping[str, Any]) -> Any:
    """Returns the names of a saved group's parameters, if it has any.

    Where names stand in place of numbers, torch's helpers have chosen them for the optimizer that
    loads, and its list of names is still the checkpoint's, of perhaps another group.
    """
    by_name = all(isinstance(key, str) for key in saved["params"])
    return saved["params"] if by_name else saved.get("param_names")


def check_order(saved: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]) -> None:
    """Raises a ValueError if the parameters of both have the same names, but in another order.

    torch.optim gives state to parameters by their place, so it would land on others. Other names
    (a wrapper's prefix) say nothing about the places.
    """
    ours = [(n, name) for n, group in enumerate(groups) for name in group.get("param_names") or ()]
    theirs: list[str] = []
    for group in saved:
        theirs += names_in(group) or ()
    if sorted(name for _, name in ours) != sorted(theirs):
        return
    for place, ((number, name), other) in enumerate(zip(ours, theirs, strict=True)):
        if name != other:
            place -= sum(len(group["params"]) for group in groups[:number])
            raise ValueError(
                f"parameter {place} of group {number} is {other!r} in the state dict and {name!r} "
                "in the optimizer; build it from the parameters in the same order"
            )


def check_group(
    number: int, saved: Mapping[str, Any], defaults: Mapping[str, Any], ours: Mapping[str, Any]
) -> None:
    """Checks the options of a group: those of torch.optim, and all of ours or none.

    Args:
        number: Of the group.
        saved: The group in the state dict.
        defaults: The options that a group of this optimizer has.
        ours: Those among them that torch.optim does not know.
    """
    filled_in = _FILLED_IN - (_OLDEST if saved.keys() & (_FILLED_IN - _OLDEST) else set())
    needed = defaults.keys() - ours.keys() - filled_in
    missing = sorted(needed - saved.keys())
    # alpha alone does not make it dgg's: somebody may set it in a state dict of torch.optim.
    if saved.keys() & ours.keys() - set(_arguments.GROUP_OPTIONS):
        missing += sorted(ours.keys() - saved.keys() - _arguments.NEW_OPTIONS.keys())
    if missing:
        raise ValueError(
            f"group {number} of the state dict has no {', '.join(missing)}: it is another "
            f"optimizer's, or a part of it is lost (it has {sorted(map(str, saved))}). {_CONVERT}"
        )
    for name in needed & {*_NOT_NEGATIVE, "dampening"}:
        value = _number(saved[name])
        if value is None or math.isnan(value):
            raise TypeError(
                f"{name}={_shown(saved[name])} of group {number} of the state dict is no number; "
                "pass what optimizer.state_dict() returned"
            )
        if value < 0 and name in _NOT_NEGATIVE:
            raise ValueError(f"{name}={value} of group {number} of the state dict is negative")
    if "betas" in needed:
        betas = saved["betas"]
        pair = isinstance(betas, Sequence) and not isinstance(betas, str) and len(betas) == 2
        values = [_number(beta) for beta in betas] if pair else []
        if not pair or not all(beta is not None and 0 <= beta < 1 for beta in values):
            raise ValueError(
                f"betas={_shown(betas)} of group {number} of the state dict are no two numbers in "
                "[0, 1)"
            )
    for name in saved.keys() & defaults.keys() & set(_FLAGS):
        if not isinstance(saved[name], (bool, int)):
            raise TypeError(
                f"{name}={_shown(saved[name])} of group {number} of the state dict is neither True "
                "nor False"
            )
    anchored = saved.get("anchored", 0)
    if isinstance(anchored, bool) or not isinstance(anchored, int) or anchored < 0:
        raise TypeError(
            f"anchored={_shown(anchored)} of group {number} of the state dict is no number of "
            "parameters"
        )


def check_entry(
    entry: Any, param: Tensor, label: str, needed: Sequence[str], keys: Sequence[str]
) -> None:
    """Checks the state of a parameter, but not its anchor.

    Args:
        entry: Its state in the state dict.
        param: The parameter.
        label: Its name in errors.
        needed: Keys that must be there.
        keys: Keys whose values are checked.
    """
    if not isinstance(entry, Mapping):
        raise TypeError(
            f"the state of {label} is a {type(entry).__name__}, not a dict; pass what "
            "optimizer.state_dict() returned"
        )
    missing = [name for name in needed if entry.get(name) is None]
    if missing:
        raise ValueError(
            f"the checkpoint carries no {', '.join(missing)} of {label}, but "
            f"{sorted(map(str, entry))}: it is another optimizer's, or a part of it was lost on "
            f"the way. {_CONVERT}"
        )
    for name in keys:
        value = entry.get(name)
        if value is not None and name == "step":
            _check_step(value, label)
        elif value is not None:
            _check_moment(name, value, param, label)


def _check_step(value: Any, label: str) -> None:
    steps = _number(value)
    if steps is None or not 0 <= steps <= _MOST_STEPS or steps != int(steps):
        raise ValueError(
            f"the checkpoint's step of {label} is {_shown(value)}, not a number of steps; pass "
            "what optimizer.state_dict() returned"
        )


def _check_moment(name: str, value: Any, param: Tensor, label: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"the checkpoint's {name} of {label} is a {type(value).__name__}, not a tensor. "
            f"{_CONVERT}"
        )
    if value.shape != param.shape:
        raise ValueError(
            f"the checkpoint's {name} of {label} has shape {tuple(value.shape)}, the parameter has "
            f"{tuple(param.shape)}; load it into the same architecture"
        )
    # The numbers behind float8 and a library's codes are not known here.
    elsewhere = sharding.keeps_values_elsewhere(value) and type(value) is not type(param)
    suitable = value.dtype.to_real() in anchor.FLOAT_DTYPES
    if elsewhere or not suitable or value.is_complex() != param.is_complex():
        raise TypeError(
            f"the checkpoint's {name} of {label} is a {type(value).__name__} of {value.dtype}, not "
            f"a tensor of floating numbers. {_CONVERT}"
        )
    if value.layout != torch.strided or value.device.type == "meta":
        raise ValueError(
            f"the checkpoint's {name} of {label} is {value.layout} on {str(value.device)!r}, where "
            "no values can be read; load the checkpoint to a device first"
        )


def _number(value: Any) -> float | None:
    """Returns a number, or the one element of a tensor or array, as a float; else None."""
    if isinstance(value, Tensor):
        dense = value.layout == torch.strided
        if not dense or value.numel() != 1 or value.dtype == torch.bool or value.is_complex():
            return None
    elif not _arguments.is_number(value):
        return None
    try:
        return float(_arguments.plain("value", value))
    except (OverflowError, TypeError, ValueError, RuntimeError):
        return None


def _shown(value: Any) -> str:
    text = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
