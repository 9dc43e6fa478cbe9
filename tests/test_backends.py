# SPDX-License-Identifier: BSD-3-Clause
"""The rows themselves, without an optimizer: who computes, by how many calls, and what is known."""

from __future__ import annotations

import ast
import pathlib
import sys

import pytest
import torch

import dgg
from cases import cpp_missing
from dgg import backends, sharding
from dgg.backends import table
from dgg.backends.distances import Distances

CPU = torch.device("cpu")
NO_CPP = pytest.mark.skipif(
    cpp_missing() is not None, reason=f"the C++ library is missing: {cpp_missing()}"
)
SOURCES = sorted((pathlib.Path(dgg.__file__).parent / "backends").glob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_files_and_classes_stay_small(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 500
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef):
            assert node.end_lineno - node.lineno < 350, node.name


@NO_CPP
@pytest.mark.parametrize("rule", ["adam_", "sgd_"])
def test_update_calls_the_operator_itself(rule, monkeypatch):
    callers = []

    def noted(*args, **kwargs):
        callers.append(sys._getframe(1).f_code)
        return operator(*args, **kwargs)

    operator = table.OPERATORS[rule]
    monkeypatch.setitem(table.OPERATORS, rule, noted)
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    {"adam_": dgg.AdamW, "sgd_": dgg.SGD}[rule]([param], lr=0.1, backend="cpp").step()
    assert callers == [table.TableRows.update_.__code__]


@pytest.mark.parametrize(
    "backend", ["reference", pytest.param("cpp", marks=NO_CPP)]
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_elements_of_a_guided_shard_draw_as_those_of_the_whole(backend, dtype):
    """Kernels see a complex number as a pair of reals, and every real draws by its own place."""
    generator = torch.Generator().manual_seed(3)
    param, grad, anchor = (torch.randn(24, generator=generator, dtype=dtype) for _ in range(3))
    place = sharding.Place(3, 2, 7)  # elements 3, 4, 10, 11, 17, 18
    elements = [place.base + l // 2 * place.stride + l % 2 for l in range(6)]  # noqa: E741

    def guided(chosen, places):
        rows = backends.make_rows(
            backend, [param[chosen]], [0], [5], anchors=[anchor[chosen]], places=places
        )
        edited = grad[chosen].clone()
        rows.take_gradients([edited], [], elementwise=True)
        rows.guide_(
            rows.constant_coefficients(),
            rows.constant_flags(2),
            [{"maximize": False, "strength": 1.0, "threshold": 2.0**31}],
            backends.Draw(7, 0, injecting=True, elements=True),
            backends.Scaling(),
            replay_weight=1.0,
        )
        return edited

    whole = guided(list(range(24)), [])
    changed = whole != grad
    assert 0 < changed.sum() < 24
    assert torch.equal(guided(elements, [place]), whole[elements])


def test_distances_hold_until_a_parameter_is_written():
    known = Distances(3, CPU)
    assert known.squares.tolist() == [-1.0] * 3 and known.versions is None
    known.measured([4, 5, 6])
    assert known.written([4, 5, 6]) == []
    assert known.written([4, 9, 6]) == [1]
    assert known.written([4, 9, 6]) == [], "the look of before counts"


def test_a_row_that_was_not_updated_keeps_the_version_of_its_distance():
    known = Distances(3, CPU)
    known.measured([4, 5, 6], skipped=[2])
    assert list(known.versions) == [4, 5, 6], "nothing was known of it"
    known.measured([5, 6, 8], skipped=[2])
    assert known.written([5, 6, 8]) == [2], "somebody wrote it, and it was not measured since"
