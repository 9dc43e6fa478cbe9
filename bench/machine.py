# SPDX-License-Identifier: BSD-3-Clause
"""The device under test: clocks, cache eviction, bandwidth, provenance; imported by step.py.

`Cpu` and `Gpu` have the same methods; nothing else in the benchmark asks where it runs.

A step has up to four times, each measured in a way of its own and never mixed:

- ``seconds``: wall time of a call that begins on an idle device and ends when it is idle again;
- ``host_seconds``: of the same call, until it returned to Python;
- ``device_seconds``: what the device needs for all that the call launches, by two events on the
  stream. The device is kept busy until everything stands in its queue, so no time of the host is
  in it;
- ``kernel_seconds``: sum over the kernels as torch.profiler (CUPTI) saw them, without the gaps.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, NoReturn

import torch

from gpu.witness import LOST, lost_device

_FALLBACK_CACHE = 32 * 2**20
# Kept between what is profiled and what is not: far more than the clocks of host and device
# disagree by.
_GUARD_SECONDS = 3e-4


class DeviceLost(RuntimeError):
    """A kernel took the process's access to the device with it; nothing can be run any more.

    ``name`` and ``setting`` say what ran it, ``reason`` what CUDA says.
    """

    def __init__(self, name: str, setting: str, reason: str) -> None:
        super().__init__(f"{name} ({setting}): {reason}")
        self.name, self.setting, self.reason = name, setting, reason


def give_up(reason: object) -> NoReturn:
    """Ends the process with the exit code LOST.

    Nothing can be tidied up on a device that is lost, and trying may hang.
    """
    print(f"error: THE DEVICE WAS LOST: {reason}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(LOST)


class Kernels(NamedTuple):
    """What one call ran on the device."""

    seconds: float  # sum of the kernels' durations
    launches: int
    copies: int  # and fills
    names: dict[str, tuple[int, float]]  # kernel → (times, seconds)


class Cpu:
    """The CPU: work is done when the call returns, and the host is the device."""

    name = "cpu"
    # A line that is written without having been read is read first.
    write_allocate = 1.0
    # Kinds of steps come as the draws have them.
    stratified = False

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.cache_bytes = _last_level_cache()
        self._sweep = torch.zeros(2 * self.cache_bytes // 4)

    def synchronize(self) -> None:
        """Waits for the device."""

    def evict(self) -> None:
        """Replaces the cache's contents by clean lines of other memory.

        Reading leaves nothing to be written back at the timed step's expense, as writing would.
        """
        self._sweep.sum()

    def wall(self, function: Callable[[], object]) -> dict[str, float]:
        """Returns the times of one call that begins and ends on an idle device."""
        begin = time.perf_counter_ns()
        function()
        return {"seconds": (time.perf_counter_ns() - begin) * 1e-9}

    def time(self, function: Callable[[], object]) -> float:
        """Returns the seconds a large call takes on the device, for bandwidth."""
        return self.wall(function)["seconds"]

    @property
    def probes(self) -> Sequence[Callable[[Callable[[], object]], dict[str, float]]]:
        """Ways to measure a call, each of which takes one call."""
        return (self.wall,)

    def profile(
        self, calls: Sequence[tuple[Callable[[], object], Callable[[], object]]]
    ) -> list[Kernels] | str:
        """Returns what each call ran on the device, or why that is not known.

        Before each comes another that is not looked at.
        """
        return "the host is the device"

    def waits(self, function: Callable[[], object]) -> str | None:
        """Returns where a call makes the host wait for the device, or None."""
        return None

    def temporary_bytes(self, function: Callable[[], object]) -> int | None:
        """Returns what one call allocates on the device at its peak; None: not known."""
        return None

    def release(self) -> None:
        """Gives unused memory back, so that the next case finds it."""

    def lost(self) -> str | None:
        """Returns why nothing can be run on the device any more, or None."""
        return None

    def free_bytes(self) -> int:
        """Returns the memory that can be taken without swapping."""
        meminfo = pathlib.Path("/proc/meminfo")
        text = meminfo.read_text() if meminfo.exists() else ""
        if found := re.search(r"MemAvailable:\s+(\d+) kB", text):
            return int(found[1]) * 1024
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


class Gpu(Cpu):
    """A CUDA device: calls return before their work is done."""

    name = "cuda"
    write_allocate = 0.0
    stratified = True

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(self.device)
        self.cache_bytes = properties.L2_cache_size or _FALLBACK_CACHE
        self._sweep = torch.zeros(max(4 * self.cache_bytes, 2**27) // 4, device=self.device)
        self._host_seconds = 1e-4
        self._cycles = self._calibrate()

    # What speaks to CUDA itself; the tests put a clock of their own in its place.

    def _calibrate(self) -> float:
        """Returns the cycles of `torch.cuda._sleep` per second."""
        cycles = 20_000_000
        torch.cuda._sleep(cycles)
        return cycles / self._between(lambda: torch.cuda._sleep(cycles))[0]

    def _spin(self, seconds: float) -> None:
        torch.cuda._sleep(int(seconds * self._cycles))

    def _between(self, function: Callable[[], object]) -> tuple[float, bool]:
        """Returns the device's seconds for a call, and whether it began before all was queued."""
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        function()
        began = first.query()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) * 1e-3, began

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def free_bytes(self) -> int:
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + cached

    def release(self) -> None:
        torch.cuda.empty_cache()

    def lost(self) -> str | None:
        return lost_device()

    def temporary_bytes(self, function: Callable[[], object]) -> int | None:
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        function()
        return torch.cuda.max_memory_allocated(self.device) - before

    def waits(self, function: Callable[[], object]) -> str | None:
        """By torch's synchronisation check."""
        self.synchronize()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            function()
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            return str(error).splitlines()[0]
        finally:
            torch.cuda.set_sync_debug_mode(before)
        return None

    def _profiler(self):
        kinds = torch.profiler.ProfilerActivity
        return torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA])

    # The rest is arithmetic.

    def wall(self, function: Callable[[], object]) -> dict[str, float]:
        """Returns wall and host time of one call that begins and ends on an idle device."""
        self.synchronize()
        begin = time.perf_counter_ns()
        function()
        returned = time.perf_counter_ns()
        self.synchronize()
        end = time.perf_counter_ns()
        self._host_seconds = (returned - begin) * 1e-9
        return {"seconds": (end - begin) * 1e-9, "host_seconds": self._host_seconds}

    def queued(self, function: Callable[[], object]) -> dict[str, float]:
        """Returns the device time of one call, launched while the device is busy.

        ``late`` is 1 if the host did not keep ahead (a call that waits, or that launches more than
        the queue holds): then the time has the host's share in it.
        """
        self.synchronize()
        self._spin(min(5e-2, 2e-4 + 3 * self._host_seconds))
        seconds, late = self._between(function)
        return {"device_seconds": seconds, "late": float(late)}

    def time(self, function: Callable[[], object]) -> float:
        self._host_seconds = 1e-4
        return self.queued(function)["device_seconds"]

    @property
    def probes(self):
        return self.wall, self.queued

    def profile(self, calls) -> list[Kernels] | str:
        try:
            with self._profiler() as profiler:
                for number, (prepare, function) in enumerate(calls):
                    prepare()
                    self.synchronize()
                    time.sleep(_GUARD_SECONDS)
                    with torch.profiler.record_function(f"{_MEASURED}{number}"):
                        function()
                        self.synchronize()
                    time.sleep(_GUARD_SECONDS)
            found = kernels_of(profiler.events(), len(calls))
        except RuntimeError as error:
            return f"torch.profiler: {str(error).splitlines()[0]}"
        if any(call.launches for call in found):
            return found
        return "torch.profiler saw no kernels here (CUPTI is missing or refused)"


_MEASURED = "measured call "
_COPIES = ("Memcpy", "Memset")


def kernels_of(events: Iterable, calls: int) -> list[Kernels]:
    """Sorts a profile's kernels by the call that ran them: ranges ``measured call <number>``."""
    on_host = torch.autograd.DeviceType.CPU
    device = []
    spans = {}
    for event in events:
        if event.device_type == on_host:
            spans[event.name] = event.time_range
        else:
            device.append(event)
    slack = _GUARD_SECONDS / 2 * 1e6
    windows = [spans[f"{_MEASURED}{number}"] for number in range(calls)]
    begins = [window.start - slack for window in windows]
    copies = [0] * calls
    names: list[dict[str, tuple[int, float]]] = [{} for _ in range(calls)]
    for event in device:
        span, number = event.time_range, bisect_right(begins, event.time_range.start) - 1
        # A range of the host has a shadow of its name on the device.
        if event.name in spans or number < 0 or span.start > windows[number].end + slack:
            continue
        if event.name.startswith(_COPIES):
            copies[number] += 1
        else:
            times, seconds = names[number].get(event.name, (0, 0.0))
            names[number][event.name] = times + 1, seconds + (span.end - span.start) * 1e-6
    return [
        Kernels(sum(s for _, s in ran.values()), sum(n for n, _ in ran.values()), copied, ran)
        for ran, copied in zip(names, copies, strict=True)
    ]


def open_device(name: str) -> Cpu:
    """Returns the device called ``name``: ``cpu`` or ``cuda``.

    Raises:
        ValueError: There is none here.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no GPU here that torch can use")
    return Gpu() if name == "cuda" else Cpu()


def device_of(parser: argparse.ArgumentParser, name: str) -> Cpu:
    """Returns the device called ``name``; ends the script with its usage if there is none."""
    try:
        return open_device(name)
    except ValueError as error:
        parser.error(str(error))


class Streams:
    """Copy and triad, the measure of what the memory can do; timed between the steps.

    The destination of either is not read before it is written, so a CPU loads its lines first
    (write-allocate): there copy moves 3 and triad 4 elements per element, on a GPU 2 and 3. In
    place (a += s b), as an optimizer works, nothing is loaded for writing alone and a CPU's memory
    gives more: shown beside them, since a share above 100 % of copy and triad would else look like
    a mistake. Reading alone (on a CPU) says how fast a step could be whose writes cost nothing.
    """

    def __init__(self, device: Cpu, elements: int) -> None:
        self._device, loaded = device, device.write_allocate
        a, b, c = (torch.ones(elements, device=device.device) for _ in range(3))
        # Name → bytes, and what moves them.
        self._calls: dict[str, tuple[float, Callable[[], object]]] = {
            "copy": ((2 + loaded) * a.nbytes, lambda: a.copy_(b)),
            "triad": ((3 + loaded) * a.nbytes, lambda: torch.add(b, c, alpha=0.5, out=a)),
            "in place": (3 * a.nbytes, lambda: c.add_(b, alpha=1e-3)),
        }
        self._readers = _readers(b, c) if device.name == "cpu" else {}
        self._calls |= self._readers
        self._seconds: dict[str, list[float]] = {name: [] for name in self._calls}

    def run(self) -> None:
        """Times each once."""
        for name, (_, call) in self._calls.items():
            if name in self._readers:
                self._device.evict()  # what was just read may still be in a large cache
            self._seconds[name].append(self._device.time(call))

    def bandwidth(self) -> dict[str, float]:
        """Returns bytes per second of each, from the medians."""
        return {
            name: self._calls[name][0] / sorted(times)[len(times) // 2]
            for name, times in self._seconds.items()
            if times
        }


def _readers(first: torch.Tensor, second: torch.Tensor) -> dict[str, tuple[int, Callable]]:
    """Returns the fastest ways known to read memory, by name: bytes, and what reads them."""
    import dgg  # noqa: F401, loads the operators

    found = {"read (torch.dot)": (2 * first.nbytes, lambda: torch.dot(first, second))}
    if hasattr(torch.ops.dgg, "norms"):
        distances = torch.full((1,), -1.0, dtype=torch.float64)
        one = [first], [first], [], []
        settings = {"replay_weight": 1.0, "grad_scale": 1.0, "which": 1}
        found["read (dgg norm)"] = (
            first.nbytes, lambda: torch.ops.dgg.norms(*one, distances, **settings)
        )  # fmt: skip
    return found


def _last_level_cache() -> int:
    sizes = []
    for index in pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        text = (index / "size").read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]])
    return max(sizes, default=_FALLBACK_CACHE)
