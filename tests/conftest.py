# SPDX-License-Identifier: BSD-3-Clause
"""Skips GPU tests where there is no GPU, and says at the end which backends really ran.

A green run with zero kernels must not pass unnoticed. Without a GPU the Triton kernels run in
Triton's interpreter, which has to be chosen before they are imported.
"""

from __future__ import annotations

import collections
import importlib
import os
import pathlib

import pytest
import torch

if not torch.accelerator.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import dgg
from dgg.backends import BACKENDS, libraries

BENCH = pathlib.Path(__file__).parents[1] / "bench"
_ran: collections.Counter[str] = collections.Counter()

# Whole files go to processes side by side. Those that take the longest begin first, so that no
# process ends with one of them alone, and files that start ranks of their own alternate with others
# that keep to one core; the rest follow in their usual order.
LONGEST_FIRST = [
    "test_engines.py", "test_triton.py", "test_checkpoints.py", "test_triton_code.py",
    "test_cuda_host.py", "test_deepspeed.py", "test_sanitized.py", "test_demo.py",
    "test_cuda_code.py", "test_parallel.py", "test_bench.py", "test_bench_sharded.py",
    "test_example_scripts.py", "test_sharding.py", "test_hf.py", "test_launched.py",
    "test_hf_replay.py", "test_anchors.py", "test_guided.py", "test_misuse.py", "test_cpp.py",
    "test_trl.py",
]  # fmt: skip


@pytest.fixture
def one_thread():
    """Where models are so small that threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def bench(monkeypatch):
    """Imports modules of bench/, which is no package, as its scripts themselves do."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


@pytest.fixture
def trainers(monkeypatch):
    """Returns a list that every Trainer joins when it trains; undoes what install() puts in."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.delenv("DGG_TASK", raising=False)
    monkeypatch.setattr(transformers.Trainer, "__init__", transformers.Trainer.__init__)
    found, train = [], transformers.Trainer.train

    def watched(trainer, *args, **kwargs):
        found.append(trainer)
        return train(trainer, *args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, "train", watched)
    return found


@pytest.fixture(scope="session")
def quick_interpreter():
    """Makes Triton's interpreter several times faster.

    It replaces all functions of the language at every call of every device function, although
    they stay replaced until the launch is over.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        yield
        return
    original = interpreter._patch_lang
    replaced = set()  # namespaces of device functions seen in this launch

    class Scope:
        def __init__(self, inner=None):
            self.inner = inner

        def restore(self):
            if self.inner is not None:  # that of the launch itself
                replaced.clear()
                self.inner.restore()

    def patch_lang(function):
        if id(function.__globals__) in replaced:
            return Scope()
        outermost = not replaced
        replaced.add(id(function.__globals__))
        inner = original(function)
        return Scope(inner) if outermost else inner

    interpreter._patch_lang = patch_lang
    yield
    interpreter._patch_lang = original


def pytest_configure(config):
    # Where there is no compiler, whichever test stepped first would hear of it. The summary says
    # it too, and test_callers.py looks at the warning.
    libraries.told |= {"cpu", "cuda"}
    # xdist would begin with the files of the most tests, which are the quick ones.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
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
