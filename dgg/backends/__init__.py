# SPDX-License-Identifier: BSD-3-Clause
"""Who computes: the rows of parameters that a backend steps, and which backends can run here."""

from dgg._device import capturing, without_waiting
from dgg._dispatch import (
    ADAM,
    BACKENDS,
    SGD,
    Draw,
    MemoryWatch,
    Rows,
    Rule,
    Scaling,
    choose,
    choose_for,
    is_dense,
    launches,
    make_rows,
    real_view,
    same_order,
    show_config,
    unavailable,
)

__all__ = [
    "ADAM",
    "BACKENDS",
    "SGD",
    "Draw",
    "MemoryWatch",
    "Rows",
    "Rule",
    "Scaling",
    "capturing",
    "choose",
    "choose_for",
    "is_dense",
    "launches",
    "make_rows",
    "real_view",
    "same_order",
    "show_config",
    "unavailable",
    "without_waiting",
]
