# SPDX-License-Identifier: BSD-3-Clause
"""dgg._numbers: a number of any library becomes one of Python, and nothing else does."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from dgg._numbers import as_float, as_int, shown


@pytest.mark.parametrize(
    "value",
    [5, np.int64(5), np.uint8(5), np.array(5), np.array([[5]]), torch.tensor(5), torch.tensor([5])],
)
def test_integers(value):
    for function, kind in ((as_int, int), (as_float, float)):
        number = function("steps", value)
        assert number == 5
        assert type(number) is kind


@pytest.mark.parametrize(
    "value",
    [0.25, np.float64(0.25), np.float32(0.25), np.array([0.25]), torch.tensor(0.25)]
    + [torch.tensor(0.25, dtype=torch.bfloat16), Fraction(1, 4), Decimal("0.25")],
)
def test_floats(value):
    number = as_float("ratio", value)
    assert number == 0.25
    assert type(number) is float
    with pytest.raises(TypeError, match="^ratio must be an int, got "):
        as_int("ratio", value)


@pytest.mark.parametrize(
    "value",
    [True, np.bool_(True), np.array([True]), torch.tensor(True), "5", np.str_("5"), b"5", None]
    + [[5], 5j, {}, np.arange(2), torch.arange(2), np.array([]), torch.empty(1, device="meta")],
)
def test_what_is_no_number_is_refused_by_name(value):
    for function in (as_int, as_float):
        with pytest.raises(TypeError, match="^lr must be "):
            function("lr", value)


def test_what_cannot_be_written():
    with pytest.raises(ValueError, match="lr is too large, got an object of type int"):
        as_float("lr", 10**5000)
    assert shown("x" * 1000) == "'" + "x" * 96 + "..."
