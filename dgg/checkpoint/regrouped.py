# SPDX-License-Identifier: BSD-3-Clause
"""Groups of a state dict that torch's helpers have dealt out by name to an optimizer with others.

They give the options of each group of the checkpoint to the last group here that has one of its
parameters, one over the other. Groups that get none keep the options of this optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dgg import _arguments


def put_right(
    opt, state_dict: Mapping[str, Any], unfilled: Callable[..., bool]
) -> list[dict[str, Any]]:
    """Returns the groups with the checkpoint's options of the whole optimizer, and anchors counted.

    Args:
        opt: The optimizer that loads.
        state_dict: Its groups and entries have passed their checks.
        unfilled: Returns whether an anchor of a group is room into which nothing was loaded.
    """
    groups = [dict(group) for group in state_dict["param_groups"]]
    if not all(isinstance(key, str) for group in groups for key in group["params"]):
        return groups
    names = (*_arguments.OPTIMIZER_OPTIONS, "anchored")
    came = [
        saved
        for saved, own in zip(groups, opt.param_groups, strict=True)
        if any(
            name in saved and _arguments.comparable(saved[name]) != _arguments.comparable(own[name])
            for name in names
        )
    ]
    for saved in groups:
        if came and all(saved is not other for other in came):
            saved.update({name: came[0][name] for name in names[:-1] if name in came[0]})
    counted, present = sum(group.get("anchored", 0) for group in came), []
    if not counted:
        return groups
    for group in groups:
        found = [state_dict["state"].get(key, {}).get("anchor") for key in group["params"]]
        present.append(sum(x is not None and not unfilled(x, group) for x in found))
    # With an anchor of every parameter none was lost; and none may be this optimizer's own.
    whole = sum(present) == sum(len(group["params"]) for group in groups)
    entries = [entry for entry in opt.state.values() if isinstance(entry, dict)]
    has_own = not opt._awaits_load and any("anchor" in entry for entry in entries)
    if whole and not (has_own and counted < sum(present)):
        for saved, count in zip(groups, present, strict=True):
            saved["anchored"] = count
    return groups
