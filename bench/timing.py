# SPDX-License-Identifier: BSD-3-Clause
"""Verification and interleaved timing: of a case of step.py in whole, of sharded.py its turns.

Cache policy: before every timed step the gradients are written anew (as a backward pass would,
and because some variants edit them), and replay gradients put where a step finds them. A cold case
then reads twice the last-level cache's size (on a GPU four times) of other memory, so that no
variant finds data that the one before it left; a warm case does not. Reading leaves clean lines:
dirty ones would be written back at the timed step's expense.

Where host and device are two, every turn of a variant is a step for the wall and host time and a
step for the device time (machine.py); kinds of steps are then taken equally often instead of as
the draws have them, each behind the step that really precedes it, and weighed by their share.
After the rounds a few steps run under the profiler, for kernel times and launches.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence

import torch

from machine import Cpu, DeviceLost, Kernels, Streams
from parameter_lists import count
from peers import IMPLEMENTATIONS
from report import first_line
from variant import Unavailable, Variant
from workload import Setting, VerificationError, Workload, check

MIN_SAMPLES = 7
# A variant that would use this share of a case's time takes part in fewer rounds.
SLOW = 0.1
# Steps of each kind that are profiled; none of a loop over so many tensors, whose thousands of
# events take longer to sort than all the rest.
PROFILED, MANY_TENSORS = 3, 64
# Errors whose text says why a variant is left out.
LEFT_OUT = (Unavailable, VerificationError, torch.OutOfMemoryError)


class NotVerified(RuntimeError):
    """A variant was to be timed that nobody has compared with the reference."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One workload, see `Workload`, and the (implementation, setting) pairs that are run on it.

    Attributes:
        rounds: How often the fast variants are timed.
        cold: Cache policy, see above.
        seconds: Time the case should take; after twice that no further round is begun.
    """

    name: str
    shapes: list[tuple[int, ...]]
    runs: list[tuple[str, Setting]]
    dtype: torch.dtype = torch.float32
    optimizer: str = "adamw"
    rounds: int = 50
    cold: bool = True
    seconds: float = 120.0
    spare: bool = False
    channels_last: bool = False
    conflict: bool = False

    @property
    def replay(self) -> bool:
        """Whether any run takes replay gradients."""
        return any(setting.replay for _, setting in self.runs)

    def bytes_needed(self) -> int:
        """Returns the memory of the workload, with one array for the temporaries of the peers."""
        arrays = {"adamw": 6, "momentum": 5, "sgd": 4}[self.optimizer]
        arrays += (not self.spare) + self.replay
        return arrays * count(self.shapes) * self.dtype.itemsize


def verify(variant: Variant) -> float:
    """Runs a variant's first steps against the reference; only then it may be timed.

    Two steps in a row, because what dgg measures ahead in the first is used in the second; for a
    setting that injects at a share of the steps, one that does and one that does not.

    Returns:
        The largest error in units of the variant's tolerance.

    Raises:
        VerificationError: The variant computes something else.
        Unavailable: The variant cannot run here.
    """
    if (error := variant.verified_elsewhere()) is not None:
        variant.verified = True
        return error
    worst, draws = 0.0, range(2)
    if variant.setting.alpha not in (None, 0.0, 1.0):
        draws = (variant.pattern.index(True), variant.pattern.index(False))
    for draw in draws:
        variant.seek(draw)
        off = check(variant, variant.workload, injects=variant.pattern[draw])
        worst = max(worst, off)
    variant.seek(0)
    variant.verified = True
    return worst


class Timed:
    """A variant, the error of its verification in tolerances, and what was measured of it."""

    def __init__(self, variant: Variant, error: float) -> None:
        self.variant, self.error, self.stride = variant, error, 1
        self.kinds = sorted(variant.shares())
        # Figure ("seconds", "host_seconds", ...) → kind of step → samples.
        self.samples: dict[str, dict[tuple[bool, bool], list[float]]] = {}
        self.kernels: dict[tuple[bool, bool], list[Kernels]] = {}
        self.waits: str | None = None
        self.temporary_bytes: int | None = None
        self.turn = 0

    def prepare(self, device: Cpu, kind: tuple[bool, bool] | None, *, cold: bool) -> None:
        """Leaves everything as the next step wants it, which is of this kind (None: any)."""
        if kind is not None and len(self.kinds) > 1:
            self.variant.approach(kind)
        self.variant.ready()
        if cold:
            device.evict()

    def take_turn(self, device: Cpu, *, cold: bool = False) -> None:
        """Takes a step for each of the device's probes and keeps the times."""
        kind = self.kinds[self.turn % len(self.kinds)] if device.stratified else None
        for probe in device.probes:
            self.prepare(device, kind, cold=cold)
            self.run(probe)
        self.turn += 1

    def be_slow(self, rounds: int, affordable: float) -> None:
        """Takes part in so many rounds that no more steps are taken than are affordable."""
        self.stride = max(1, int(rounds / max(MIN_SAMPLES, affordable)))

    def run(self, probe) -> None:
        """Measures the next step."""
        if not self.variant.verified:
            raise NotVerified(f"{self.variant.name} ({self.variant.setting.name}) was not verified")
        kind = self.variant.kind()
        for name, value in probe(self.variant).items():
            self.samples.setdefault(name, {}).setdefault(kind, []).append(value)

    def count(self) -> int:
        """Returns how many steps were timed."""
        return sum(map(len, self.samples.get("seconds", {}).values()))

    def quantile(self, q: float, figure: str = "seconds") -> float | None:
        """Quantile of a step's time, averaged over the kinds of steps by their share."""
        return weighed(self.samples.get(figure, {}), self.variant.shares(), q)

    def mean(self, figure: str) -> float:
        """Returns the mean over all that was measured."""
        return statistics.fmean(t for times in self.samples[figure].values() for t in times)


def weighed(
    times: Mapping[object, Sequence[float]], shares: Mapping[object, float], q: float = 0.5
) -> float | None:
    """Averages a quantile of each kind by the shares of the kinds that have times; None: none has.

    The quantile lies between two values in proportion.
    """
    total = found = 0.0
    for kind, values in times.items():
        share = float(shares[kind])
        total += share
        found += share * torch.quantile(torch.tensor(values, dtype=torch.float64), q).item()
    return found / total if total else None


def run_case(
    case: Case, device: Cpu, streams: Streams | None = None, *, log=lambda line: None,
    forgiving: bool = False,
) -> dict[str, object]:  # fmt: skip
    """Verifies and times all variants of a case.

    Args:
        case: The case.
        device: Where it runs.
        streams: Timed once a round beside the steps.
        log: Called with progress lines.
        forgiving: A variant of ours that is wrong, or that fails, is left out and noted as
            ``wrong`` instead of ending the run: hours on a GPU are rare.

    Returns:
        The case's entry in the results; bench/results/README.md says what is in it.

    Raises:
        VerificationError: A variant computes something else than the reference.
        MemoryError: The case does not fit.
        DeviceLost: A variant made the device unusable.
    """
    needed = case.bytes_needed()
    device.release()
    if needed > (0.95 if case.spare else 0.8) * device.free_bytes():
        raise MemoryError(
            f"{needed / 2**30:.1f} GiB needed, {device.free_bytes() / 2**30:.1f} GiB free"
        )
    work = Workload(
        case.shapes, case.dtype, case.optimizer, device.device, spare=case.spare,
        replay=case.replay, channels_last=case.channels_last, conflict=case.conflict,
    )  # fmt: skip
    timed: list[Timed] = []
    absent: list[dict[str, object]] = []
    differing: set[str | None] = set()
    for name, setting in case.runs:
        # One that was left out lets go of its memory before the next one takes its own.
        variant = work.latest = None
        try:
            variant = IMPLEMENTATIONS[name](work, setting)
            off = verify(variant)
        except Exception as error:
            wrong = not isinstance(error, LEFT_OUT)  # a kernel that does not compile, say
            lost = device.lost() if wrong and forgiving else None
            if isinstance(error, VerificationError):
                wrong = not variant.foreign and variant.built_on not in differing
                differing.add(name)
            if wrong and not forgiving:
                raise
            if lost is not None:
                raise DeviceLost(name, setting.name, lost) from error
            reason = first_line(error, *LEFT_OUT)
            log(f"  {name} ({setting.name}) {'WRONG' if wrong else 'not run'}: {reason}")
            absent.append({"name": name, "setting": setting.name, "reason": reason, "wrong": wrong})
            continue
        timed.append(Timed(variant, off))
    try:
        rounds = _measure(case, timed, device, streams)
        profiled = _profile(case, timed, device)
    except Exception as error:
        if work.latest is None or (lost := device.lost()) is None:
            raise
        raise DeviceLost(work.latest.name, work.latest.setting.name, lost) from error
    if not work.finite():
        raise FloatingPointError(f"{case.name}: parameters or moments are not finite after the run")
    return {
        "case": case.name,
        "optimizer": case.optimizer,
        "dtype": str(case.dtype).removeprefix("torch."),
        "elements": work.elements,
        "tensors": len(case.shapes),
        "cache": "cold" if case.cold else "warm",
        "channels_last": case.channels_last,
        "rounds": rounds,
        "device": device.name,
        "profiler": profiled,
        "variants": [_entry(entry, work.elements) for entry in timed],
        "not_run": absent,
    }


def _measure(case: Case, timed: list[Timed], device: Cpu, streams: Streams | None) -> int:
    for entry in timed:
        times = []
        for _ in range(3):
            entry.variant.ready()
            times.append(device.wall(entry.variant)["seconds"])
        entry.variant.seek(0)
        entry.be_slow(case.rounds, SLOW * case.seconds / (min(times) * len(device.probes)))
    begin, done = time.perf_counter(), 0
    for turn in rounds_of(timed, case.rounds):
        late = time.perf_counter() - begin > 2 * case.seconds
        if late and min(entry.count() for entry in timed) >= MIN_SAMPLES:
            break
        for entry in turn:
            entry.take_turn(device, cold=case.cold)
        if streams is not None:
            device.evict()
            streams.run()
        done += 1
    return done


def rounds_of(timed: Sequence[Timed], rounds: int) -> Iterator[list[Timed]]:
    """Yields who takes part in each round, in which order; no garbage is collected meanwhile."""
    order = random.Random(0)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            # Another order every round: no variant is always behind the same other one.
            turn = [entry for entry in timed if number % entry.stride == 0]
            order.shuffle(turn)
            yield turn
    finally:
        if collecting:
            gc.enable()


def _profile(case: Case, timed: list[Timed], device: Cpu) -> str | None:
    """Profiles some steps of every variant; returns why there is no profile, or None."""
    for entry in timed:
        entry.variant.ready()
        entry.waits = device.waits(entry.variant)
        entry.variant.ready()
        entry.temporary_bytes = device.temporary_bytes(entry.variant)
        entry.variant.seek(0)
    calls, owners = [], []
    for entry in timed:
        looping = entry.variant.name in ("for-loop", "dgg reference")
        if looping and len(case.shapes) > MANY_TENSORS:
            continue
        for kind in entry.kinds * PROFILED:
            prepare = functools.partial(entry.prepare, device, kind, cold=case.cold)
            calls.append((prepare, entry.variant))
            owners.append((entry, kind))
    found = device.profile(calls) if calls else "nothing was timed"
    if isinstance(found, str):
        return found
    for (entry, kind), kernels in zip(owners, found, strict=True):
        entry.kernels.setdefault(kind, []).append(kernels)
    return None


def _kernel_figures(entry: Timed) -> dict[str, object]:
    if not entry.kernels:
        return {"kernel_seconds": None, "launches": None, "copies": None, "kernels": {}}
    seconds = {kind: [call.seconds for call in calls] for kind, calls in entry.kernels.items()}
    calls = [call for some in entry.kernels.values() for call in some]
    # Of the busiest step: what a launch-bound user waits for.
    busiest = max(calls, key=lambda call: call.launches)
    longest = sorted(busiest.names.items(), key=lambda item: -item[1][1])[:8]
    return {
        "kernel_seconds": weighed(seconds, entry.variant.shares()),
        "launches": busiest.launches,
        "copies": max(call.copies for call in calls),
        "kernels": {name: {"times": times, "seconds": spent} for name, (times, spent) in longest},
    }


def _entry(entry: Timed, elements: int) -> dict[str, object]:
    variant = entry.variant
    seconds, moved = entry.quantile(0.5), variant.bytes_moved()
    on_device = entry.quantile(0.5, "device_seconds")
    # Bandwidth is a claim about kernels: without the host's share where that is known.
    busy = seconds if on_device is None else on_device
    late = entry.samples.get("late")
    return {
        "name": variant.name,
        "setting": variant.setting.name,
        "seconds": seconds,
        "low": entry.quantile(0.2),
        "high": entry.quantile(0.8),
        "mean": entry.mean("seconds"),
        "fastest": entry.quantile(0.0),
        "samples": entry.count(),
        "host_seconds": entry.quantile(0.5, "host_seconds"),
        "device_seconds": on_device,
        "device_low": entry.quantile(0.2, "device_seconds"),
        "device_high": entry.quantile(0.8, "device_seconds"),
        "device_late": None if late is None else entry.mean("late"),
        **_kernel_figures(entry),
        "waits_for_device": entry.waits,
        "temporary_bytes": entry.temporary_bytes,
        "ns_per_element": busy / elements * 1e9,
        "bytes": moved,
        "bytes_per_element": None if moved is None else moved / elements,
        "bandwidth": None if moved is None else moved / busy,
        "share_of_bandwidth": None,
        "seed": variant.seed,
        "injected_fraction": variant.share_injected(),
        "error_in_tolerances": entry.error,
    }
