# SPDX-License-Identifier: BSD-3-Clause
"""The state of `dgg.Guidance`: its checks, and its way in the guided optimizer's state dict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dgg import _arguments, anchor
from dgg.anchor import boundary
from dgg.anchor import importance as importances

# The attribute of an optimizer that has its guidance, and the key of that in its state dict.
GUIDED, CARRIED = "_dgg_guidance", "dgg_guidance"


class Carried:
    """Lets the state dicts of an optimizer carry those of its guidance, where that is wanted.

    Attributes:
        optimizer: The guided one.
        param_groups: The guidance's.
    """

    optimizer: torch.optim.Optimizer
    param_groups: list[dict[str, Any]]
    # Whether they do; a callback says so. And the guidance's part of a state dict that is loading.
    _carried = False
    _arriving: Any = None

    def _ride(self) -> list[torch.utils.hooks.RemovableHandle]:
        """Registers the hooks and returns their handles."""
        return [
            self.optimizer.register_state_dict_post_hook(self._into_state_dict),
            self.optimizer.register_load_state_dict_pre_hook(self._before_load),
            self.optimizer.register_load_state_dict_post_hook(self._after_load),
        ]

    def _into_state_dict(self: Any, optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        return {**state_dict, CARRIED: self.state_dict()} if self._carried else None

    def _before_load(self: Any, optimizer, state_dict: dict[str, Any]) -> None:
        self._arriving = state_dict.get(CARRIED)
        if self._arriving is not None:
            params = [p for group in self.optimizer.param_groups for p in group["params"]]
            self._sync_groups()
            check_saved(self, params, self._arriving)  # before the optimizer has loaded its part

    def _after_load(self: Any, optimizer) -> None:
        arriving, self._arriving = self._arriving, None
        if arriving is not None:
            self.load_state_dict(arriving)


def check_saved(opt: Any, params: Sequence[Tensor], state_dict: Any) -> None:
    """Checks a state dict before anything is changed; see `Guidance.load_state_dict`."""
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
    groups = state_dict["param_groups"]
    if len(groups) != len(opt.param_groups) or state_dict["params"] != len(params):
        raise ValueError(
            f"the state dict is of {state_dict['params']} parameters in {len(groups)} groups, "
            f"the optimizer has {len(params)} in {len(opt.param_groups)}; load it beside the "
            "optimizer it was saved with"
        )
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
    labels = _arguments.group_labels(opt.optimizer.param_groups)
    if not isinstance(state_dict["anchors"], Mapping):
        raise TypeError(
            f"the state dict's anchors are a {type(state_dict['anchors']).__name__}, not a "
            "dict by parameter number; pass what guidance.state_dict() returned"
        )
    for i, value in state_dict["anchors"].items():
        if type(i) is not int or i not in range(len(params)):
            raise KeyError(
                f"the state dict has an anchor of parameter {i!r} of {len(params)}; pass what "
                "guidance.state_dict() returned"
            )
        anchor.check_source(value, params[i], labels[i])
    weights = state_dict.get("importances", {})
    if not isinstance(weights, Mapping):
        raise TypeError(
            f"the state dict's importances are a {type(weights).__name__}, not a dict by parameter "
            "number; pass what guidance.state_dict() returned"
        )
    for i in {*state_dict["anchors"], *weights}:
        if groups[0].get("importance") and i not in weights or i not in state_dict["anchors"]:
            raise KeyError(
                f"the state dict weighs its pull, but has no anchor and importance of parameter "
                f"{i!r}; pass what guidance.state_dict() returned"
            )
        if i in weights:
            importances.check_saved(weights[i], params[i], labels[i])
