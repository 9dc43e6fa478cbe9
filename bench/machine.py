# SPDX-License-Identifier: BSD-3-Clause
"""The device under test: clock, cache eviction, bandwidth, provenance; imported by step.py.

A GPU harness adds a class with the methods of `Cpu`; nothing else in the benchmark asks where it
runs.
"""

from __future__ import annotations

import datetime
import os
import pathlib
import platform
import re
import subprocess
import time
from collections.abc import Callable

import torch

_FALLBACK_CACHE = 32 * 2**20


class Cpu:
    """The CPU: work is done when the call returns, and the host is the device."""

    name = "cpu"

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.cache_bytes = _last_level_cache()
        self._sweep = torch.zeros(2 * self.cache_bytes // 4)

    def synchronize(self) -> None:
        """Waits for the device; nothing to wait for here."""

    def evict(self) -> None:
        """Replaces the cache's contents by clean lines of other memory.

        Reading leaves nothing to be written back at the timed step's expense, as writing would.
        """
        self._sweep.sum()

    def time(self, function: Callable[[], object]) -> float:
        """Returns the wall time of one call in seconds."""
        self.synchronize()
        begin = time.perf_counter_ns()
        function()
        self.synchronize()
        return (time.perf_counter_ns() - begin) * 1e-9

    def kernel_time(self, function: Callable[[], object]) -> float | None:
        """Returns the device time of one call apart from the host's; None: there is no such."""
        return None

    def free_bytes(self) -> int:
        """Returns the memory that can be taken without swapping."""
        meminfo = pathlib.Path("/proc/meminfo")
        if meminfo.exists():
            found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
            if found:
                return int(found[1]) * 1024
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def open_device(name: str) -> Cpu:
    """Returns the device called ``name``.

    Raises:
        ValueError: The benchmark does not know it.
    """
    if name == "cpu":
        return Cpu()
    raise ValueError(f"--device {name}: only cpu is measured by this version")


class Streams:
    """Copy and triad, the measure of what the memory can do; timed between the steps.

    The destination of either is not read before it is written, so the processor loads its lines
    first (write-allocate): copy moves 3 and triad 4 elements per element. In place (a += s b), as
    an optimizer works, nothing is loaded for writing alone and memory gives more: shown beside
    them, since a share above 100 % of copy and triad would else look like a mistake.
    """

    def __init__(self, device: Cpu, elements: int) -> None:
        self._a, self._b, self._c = (torch.ones(elements, device=device.device) for _ in range(3))
        self.bytes = {
            "copy": 3 * 4 * elements, "triad": 4 * 4 * elements, "in place": 3 * 4 * elements
        }  # fmt: skip
        self.seconds: dict[str, list[float]] = {name: [] for name in self.bytes}

    def run(self, device: Cpu) -> None:
        """Times each once."""
        self.seconds["copy"].append(device.time(lambda: self._a.copy_(self._b)))
        self.seconds["triad"].append(
            device.time(lambda: torch.add(self._b, self._c, alpha=0.5, out=self._a))
        )
        self.seconds["in place"].append(device.time(lambda: self._c.add_(self._b, alpha=1e-3)))

    def bandwidth(self) -> dict[str, float]:
        """Returns bytes per second of each, from the medians."""
        return {
            name: self.bytes[name] / sorted(times)[len(times) // 2]
            for name, times in self.seconds.items()
            if times
        }


def _last_level_cache() -> int:
    sizes = []
    for index in pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        text = (index / "size").read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]])
    return max(sizes, default=_FALLBACK_CACHE)


def provenance(device: Cpu) -> dict[str, object]:
    """Returns what a reader needs to judge or repeat the numbers."""
    import dgg

    folder = pathlib.Path(__file__).parent
    huge = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
    active = re.search(r"\[(\w+)\]", huge.read_text()) if huge.exists() else None
    configuration = dgg.show_config().splitlines()
    changed = _output(["git", "-C", str(folder), "status", "--porcelain", "-uno"])
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device.name,
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "last_level_cache": device.cache_bytes,
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "huge_pages": active[1] if active else None,
        "load_average": os.getloadavg(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dgg": dgg.__version__,
        "backends": [line.strip() for line in configuration[1:]],
        "compiler": (_output(["g++", "--version"]) or "none").splitlines()[0],
        "commit": _output(["git", "-C", str(folder), "rev-parse", "HEAD"]),
        "uncommitted_changes": None if changed is None else bool(changed),
    }


def _cpu_model() -> str:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
