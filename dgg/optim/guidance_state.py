# SPDX-License-Identifier: BSD-3-Clause
"""The checks of a state dict of `dgg.Guidance`, before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dgg import _arguments, anchor
from dgg.anchor import boundary
from dgg.anchor import importance as importances
from dgg.checkpoint import saved_state


def check_saved(opt: Any, state_dict: Any) -> None:
    """Raises the errors of `Guidance.load_state_dict`."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"load_state_dict() takes what state_dict() returned, not "
            f"{type(state_dict).__name__}; torch.load the file first"
        )
    if not state_dict.keys() >= {"param_groups", "anchors", "params"}:
        raise KeyError(
            f"no state dict of a guidance: it has {sorted(map(str, state_dict))}, not anchors, "
            "param_groups and params; pass what guidance.state_dict() returned"
        )
    groups, anchors = state_dict["param_groups"], state_dict["anchors"]
    params = [p for group in opt.optimizer.param_groups for p in group["params"]]
    if len(groups) != len(opt.param_groups) or state_dict["params"] != len(params):
        raise ValueError(
            f"the state dict is of {state_dict['params']} parameters in {len(groups)} groups, "
            f"the optimizer has {len(params)} in {len(opt.param_groups)}; load it beside the "
            "optimizer it was saved with"
        )
    named = {"params": range(len(params)), "param_names": state_dict.get("param_names")}
    saved_state.check_order([named], opt.optimizer.param_groups)
    for number, group in enumerate(groups):
        needed = set(_arguments.GUIDANCE_OPTIONS) - _arguments.NEW_OPTIONS.keys()
        absent = sorted(name for name in needed if name not in group)
        if absent:
            raise KeyError(
                f"group {number} of the state dict lacks {absent}; pass what "
                "guidance.state_dict() returned"
            )
        completed = [{**_arguments.NEW_OPTIONS, **each} for each in (group, groups[0])]
        _arguments.check_agreement(number, *completed)
        _arguments.check_options(group)
    ascends = [group.get("maximize") for group in opt.optimizer.param_groups]
    _arguments.guard_of(groups, ascends)
    if opt.param_groups[0]["draw_index"] == 0:
        boundary.refuse_earlier(opt._named, groups)
    weights = state_dict.get("importances", {})
    for name, values in (("anchors", anchors), ("importances", weights)):
        if not isinstance(values, Mapping):
            raise TypeError(
                f"the state dict's {name} are a {type(values).__name__}, not a dict by parameter "
                "number; pass what guidance.state_dict() returned"
            )
    labels = _arguments.group_labels(opt.optimizer.param_groups)
    for i, value in anchors.items():
        if type(i) is not int or i not in range(len(params)):
            raise KeyError(
                f"the state dict has an anchor of parameter {i!r} of {len(params)}; pass what "
                "guidance.state_dict() returned"
            )
        anchor.check_source(value, params[i], labels[i])
    for i in {*anchors, *weights}:
        if groups[0].get("importance") and i not in weights or i not in anchors:
            raise KeyError(
                f"the state dict weighs its pull, but has no anchor and importance of parameter "
                f"{i!r}; pass what guidance.state_dict() returned"
            )
        if i in weights:
            importances.check_saved(weights[i], params[i], labels[i])
