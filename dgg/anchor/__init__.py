# SPDX-License-Identifier: BSD-3-Clause
"""Anchors θ*: their memory, and where they come from. `boundary` decides when they may be set."""

from dgg.anchor.memory import (
    Part,
    allocate,
    allocate_all,
    check_source,
    check_values,
    finite,
    is_alias,
    memory_for,
    resolved,
    storage_dtype,
    write,
)
from dgg.anchor.names import names_of_parameters, variants
from dgg.anchor.readings import find_names
from dgg.anchor.sources import Stored, open_path
from dgg.reference import FLOAT_DTYPES

__all__ = [
    "FLOAT_DTYPES", "Part", "Stored", "allocate", "allocate_all", "check_source", "check_values",
    "find_names", "finite", "is_alias", "memory_for", "names_of_parameters", "open_path",
    "resolved", "storage_dtype", "variants", "write",
]  # fmt: skip
