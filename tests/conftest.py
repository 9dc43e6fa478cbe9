# SPDX-License-Identifier: BSD-3-Clause
"""Skips GPU tests where there is no GPU, and says at the end which backends really ran.

A green run with zero kernels must not pass unnoticed.
"""

from __future__ import annotations

import collections

import pytest
import torch

import dgg
from dgg._dispatch import BACKENDS

_ran: collections.Counter[str] = collections.Counter()


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU, torch.cuda.is_available() is False here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_runtest_logreport(report):
    if report.when == "call" and report.passed:
        for backend in BACKENDS:
            if backend in report.nodeid.partition("[")[2].rstrip("]").split("-"):
                _ran[backend] += 1


def pytest_terminal_summary(terminalreporter):
    counts = ", ".join(f"{backend}: {_ran[backend]} passed" for backend in BACKENDS)
    terminalreporter.section("backends")
    terminalreporter.write_line(f"tests parametrised by backend: {counts}")
    terminalreporter.write_line(dgg.show_config())
