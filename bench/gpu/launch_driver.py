# SPDX-License-Identifier: BSD-3-Clause
"""A driver for Triton that starts nothing, and launched steps on it: what the host does for a GPU.

With `Driver` in place Triton binds arguments, looks into its cache and compiles as it does on an
H100, on a machine without a GPU; tests look at what would have been started. With `install` a
whole step of ``backend="triton"`` runs so over tensors of the CPU. All of its host's work is
there but what needs a GPU: the driver's own part of a launch, pinned memory, and what the queue of
copies costs.

Nothing is computed then, so `DggLaunched` is verified in two halves: a process of its own, with
Triton's interpreter as the device, takes the same steps and compares them with the float64
reference (``TRITON_INTERPRET=1 python bench/gpu/launch_driver.py adamw float32``); here every step
has to start each of its kernels once, over all chunks of the list. Imported by dgg_variants.py and
tests.
"""

from __future__ import annotations

import collections
import functools
import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

import torch

# Elements of the tensors that the interpreter takes; the last goes over a chunk's end.
_INTERPRETED = (8, 65, 8200)
_PATIENCE = 120


class Driver:
    """What Triton asks of a driver, without a GPU.

    Args:
        started: Called with every launch that would have been made: the kernel's name, the grid,
            the loaded function and the kernel's arguments. None: launches go nowhere. May be
            exchanged at any time.
        spills: Kernel name → registers spilled by its first, second, ... variant; others by none.
    """

    def __init__(
        self,
        started: Callable[..., object] | None = None,
        spills: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        self.started, self._spills = started, spills or {}
        self._loaded = collections.Counter()
        self.utils = self  # every kernel is taken for loaded

    def load_binary(self, name, kernel, shared, device):
        self._loaded[name] += 1
        spills = self._spills.get(name, [])[self._loaded[name] - 1 : self._loaded[name]]
        return 1, f"{name} {self._loaded[name]}", 32, sum(spills), 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536,
                "warpSize": 32}  # fmt: skip

    def launcher_cls(self, source, metadata):
        def start(x, y, z, stream, function, packed, launch, enter, leave, *arguments):
            if self.started is not None:
                self.started(metadata.name, [x, y, z], function, arguments)

        return start

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@functools.cache
def install() -> Driver:
    """Lets ``backend="triton"`` take CPU tensors for the rest of this process; starts nothing.

    Raises:
        RuntimeError: Launched steps cannot be timed in this process.
    """
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("Triton is not installed")
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        reason = "TRITON_INTERPRET=1: the interpreter's time says nothing about a launch"
        raise RuntimeError(reason)
    if torch.accelerator.is_available():
        raise RuntimeError("there is a GPU here: --device cuda measures the host's time on it")
    import dgg.kernels
    import triton

    driver = Driver()
    triton.runtime.driver.set_active(driver)
    # What it says of the CPU: that Triton runs there in its interpreter only.
    dgg.kernels.unavailable = lambda device: None
    return driver


def started_by(driver: Driver, function: Callable[[], object]) -> list[tuple[str, int]]:
    """Returns the kernels that a call would have started, each with its number of programs."""
    found: list[tuple[str, int]] = []
    driver.started = lambda name, grid, *_: found.append((name, math.prod(grid)))
    try:
        function()
    finally:
        driver.started = None
    return found


@functools.cache
def interpreted(optimizer: str, dtype: str) -> dict[str, float]:
    """Returns, by setting, the error of steps that the interpreter takes, in tolerances.

    One process for all settings, on a few tensors: the list that is timed would take hours.

    Raises:
        RuntimeError: The process that takes them failed; the message is its last line.
    """
    done = subprocess.run(
        [sys.executable, pathlib.Path(__file__).resolve(), optimizer, dtype],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
        timeout=_PATIENCE,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no word"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def main(optimizer: str, dtype: str) -> int:
    """Verifies the Triton kernels in the interpreter; prints the error in tolerances."""
    import dgg_variants
    import timing
    import workload

    found = {}
    for setting in workload.SETTINGS:
        work = workload.Workload(
            [(size,) for size in _INTERPRETED], getattr(torch, dtype), optimizer,
            torch.device("cpu"), replay=setting.replay,
        )  # fmt: skip
        variant = dgg_variants.DggTriton(work, setting)
        found[setting.name] = timing.verify(variant)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    # For bench/, where what is compared is described.
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
    sys.exit(main(*sys.argv[1:]))
