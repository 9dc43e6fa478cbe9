# SPDX-License-Identifier: BSD-3-Clause
"""Peak memory of a guided run over several tasks, in a process of its own; for step.py.

Everything a run of dgg.AdamW needs is θ, g, m, v and one θ*. The process allocates these, goes
through ten task boundaries with guided and clipped steps between them, and compares the highest
resident size the kernel ever saw (VmHWM) with what it had before: a full-size temporary anywhere,
or a second anchor, would be one array more.
"""

from __future__ import annotations

import multiprocessing
import pathlib
import re
import warnings
from concurrent.futures import ProcessPoolExecutor

CASES = ("step", "element", "named", "clear", "bfloat16", "momentum")
TASKS = 10
STEPS = 3
# Small allocations, the allocator's own and pages of code first used in the run: a share of an
# array, and bytes. A temporary of full size would be a whole array.
SLACK, SLACK_BYTES = 0.05, 2**21


def measure(case: str, elements: int) -> dict[str, object]:
    """Returns what a fresh process finds.

    Raises:
        RuntimeError: The process failed.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_run, case, elements).result()
        except Exception as error:
            raise RuntimeError(f"peak memory of {case!r} was not measured: {error}") from error


def _status(field: str) -> int:
    # Not ru_maxrss, which a child inherits from its parent on Linux.
    text = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", text)[1]) * 1024


def _run(case: str, elements: int) -> dict[str, object]:
    import torch

    import dgg

    dtype = torch.bfloat16 if case == "bfloat16" else torch.float32
    warnings.filterwarnings("ignore", "16-bit weights")  # meant to be so

    def build(count: int):
        param = torch.nn.Parameter(torch.empty(count, dtype=dtype).normal_())
        param.grad = torch.empty(count, dtype=dtype).normal_()
        options = {"lr": 1e-3, "alpha": 0.5, "max_grad_norm": 1.0,
                   "granularity": "element" if case == "element" else "step"}  # fmt: skip
        named = [("weight", param)]
        if case == "momentum":
            return param, dgg.SGD(named, momentum=0.9, **options)
        return param, dgg.AdamW(named, **options)

    def tasks(param, optimizer) -> None:
        for _ in range(TASKS):
            if case == "clear":
                optimizer.clear_anchor()
            if case == "named":
                optimizer.set_anchor({"weight": param.detach()})
            else:
                optimizer.set_anchor()
            for _ in range(STEPS):
                optimizer.step()

    # Everything that is loaded or allocated once for all is there after a small run.
    tasks(*build(100_000))
    base = _status("VmRSS")
    param, optimizer = build(elements)
    for _ in range(STEPS):
        optimizer.step()
    tasks(param, optimizer)
    array = elements * dtype.itemsize
    arrays = (_status("VmHWM") - base) / array
    extra = arrays - (3 if case == "momentum" else 4)
    slack = SLACK + SLACK_BYTES / array
    return {
        "case": case, "elements": elements, "tasks": TASKS, "arrays": arrays,
        "extra_arrays": extra, "met": abs(extra - 1) <= slack,
    }  # fmt: skip
