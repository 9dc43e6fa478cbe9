# SPDX-License-Identifier: BSD-3-Clause
"""Who computes: the rows of parameters that a backend steps, and which backends can run here."""

from dgg.backends.choice import (
    BACKENDS,
    choose,
    choose_for,
    launches,
    make_rows,
    show_config,
    unavailable,
    unexpected_reference,
)
from dgg.backends.prefetch import side_by_side
from dgg.backends.rows import ADAM, SGD, Draw, Rows, Rule, Scaling
from dgg.backends.uploads import capturing, without_waiting
from dgg.backends.views import is_dense
from dgg.backends.watch import MemoryWatch

__all__ = [
    "ADAM", "BACKENDS", "SGD", "Draw", "MemoryWatch", "Rows", "Rule", "Scaling", "capturing",
    "choose", "choose_for", "is_dense", "launches", "make_rows", "show_config", "side_by_side",
    "unavailable", "unexpected_reference", "without_waiting",
]  # fmt: skip
