# SPDX-License-Identifier: BSD-3-Clause
"""The interface of an update rule; `dgg.optim` has one for each optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dgg import _arguments, _philox, backends

# The threshold at α = 1, above every word.
CERTAIN = 1 << 32


class Rule:
    """The rule by which one optimizer changes its parameters.

    Attributes:
        kernel: What the backends know of it (`backends.Rule`); None if it changes gradients alone.
        columns: State key → keyword of `backends.make_rows`.
        routes: The places where its pull may enter; the others have no meaning for it.
    """

    kernel: backends.Rule | None = None
    columns: Mapping[str, str] = {"anchor": "anchors", "importance": "importances"}
    routes: tuple[str, ...] = ("gradient",)

    def check_route(self, route: str) -> None:
        """Raises a ValueError if the rule has no such place where the pull could enter."""
        if route not in self.routes:
            raise ValueError(
                f"route={route!r} does not go with this optimizer, which has "
                f"{'no second moment' if 'decoupled' in self.routes else 'the gradients alone'}: "
                f"use {' or '.join(map(repr, self.routes))}, or dgg.AdamW"
            )

    def needed(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """Returns the state keys that a step of the group's parameters reads, ``step`` apart."""
        return ()

    def needed_to_load(self, group: Mapping[str, Any], entry: Any) -> tuple[str, ...]:
        """Returns the state keys that a parameter's saved state, ``entry``, must have."""
        return ()

    def init_state(self, opt, param: Tensor, group: Mapping[str, Any], *, first: bool) -> None:
        """Makes the state of ``param`` that is missing.

        It is made for a step that is about to use it, the ``first`` one, or otherwise for an anchor
        or a checkpoint.
        """

    def hyper(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the hyper-parameters of a group under the kernels' names, checked."""
        return {}

    def final_flags(self, rows: backends.Rows, flags: Tensor | None) -> Tensor:
        """Returns the uint8 flags [n] that the update takes; ``flags`` None means none injects."""
        return rows.constant_flags(0) if flags is None else flags

    def after_update(self, rows: backends.Rows) -> None:
        """Notes that a step wrote these rows."""

    def after_load(self, opt, state_dict: Mapping[str, Any]) -> None:
        """Adapts the rule to a loaded state dict."""

    # Why it has no second moment, in the error of an importance that needs one.
    no_moment = "a new optimizer has none"

    def second_moment(
        self, opt, param: Tensor, group: Mapping[str, Any]
    ) -> tuple[Tensor, float] | None:
        """Returns exp_avg_sq of ``param`` and 1 - β₂^step, its correction; None without steps."""
        return None

    def skip_update(self, opt, param: Tensor) -> None:
        """Ends a step in which every element of ``param`` is padding and none is updated."""

    def waits_for_scaler(self, opt) -> bool:
        """Returns whether the host must know if a GradScaler skips this step."""
        return False


def threshold(alpha: float | str | Tensor) -> int | Tensor:
    """Returns the threshold of the draws for a group's alpha: floor(α · 2**32).

    A tensor on an accelerator stays there.
    """
    if isinstance(alpha, str):  # "auto" draws nothing: every step may inject
        return CERTAIN
    if isinstance(alpha, Tensor) and alpha.device.type != "cpu":
        return (alpha.double() * 4294967296.0).floor()
    return _philox.threshold(float(alpha))


def corrected_moment(
    entry: Mapping[str, Any], group: Mapping[str, Any]
) -> tuple[Tensor, float] | None:
    """Returns exp_avg_sq in a parameter's state, and 1 - β₂^step; None without it or a step."""
    value, step = entry.get("exp_avg_sq"), entry.get("step")
    if not isinstance(value, Tensor) or step is None or float(step) < 1:
        return None
    return value, 1.0 - float(group["betas"][1]) ** float(step)


def number(name: str, value: Any) -> float | Tensor:
    """Returns the value of a group's option as a float; a tensor on an accelerator stays there."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"{name} is a tensor of {value.numel()} elements; pass a number or a tensor of one"
            )
        # A tensor on an accelerator stays there: reading it would synchronise.
        if value.device.type != "cpu":
            return value
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}={value!r} in a parameter group must be a number") from None


def flag(name: str, value: Any) -> bool:
    """Returns the value of a group's option that is True or False."""
    if not isinstance(value, (bool, int)):
        value = _arguments.plain(name, value)
        if not isinstance(value, (bool, int)):
            raise TypeError(f"{name}={value!r} in a parameter group must be True or False")
    return bool(value)
