# SPDX-License-Identifier: BSD-3-Clause
"""Verification and interleaved timing of one benchmark case; imported by step.py, test_step.py.

Cache policy: before every timed step the gradients are written anew (as a backward pass would,
and because some variants edit them). A cold case then reads twice the last-level cache's size of
other memory, so that no variant finds data that the one before it left; a warm case does not.
"""

from __future__ import annotations

import dataclasses
import gc
import random
import time

import torch

from machine import Cpu, Streams
from peers import IMPLEMENTATIONS, WINDOW, Unavailable, Variant
from workload import Setting, Verifier, Workload

MIN_SAMPLES = 7
# A variant that would use this share of a case's time takes part in fewer rounds.
SLOW = 0.1


class NotVerified(RuntimeError):
    """A variant was to be timed that nobody has compared with the reference."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One workload and what is run on it.

    Attributes:
        name: Key of the case in the results.
        shapes: Shapes of the parameters.
        dtype: Dtype of parameters, gradients, moments and anchor.
        optimizer: One of `workload.OPTIMIZERS`.
        runs: (implementation, setting) pairs.
        rounds: How often the fast variants are timed.
        cold: Cache policy, see above.
        seconds: Time the case should take; after twice that no further round is begun.
    """

    name: str
    shapes: list[tuple[int, ...]]
    dtype: torch.dtype
    optimizer: str
    runs: list[tuple[str, Setting]]
    rounds: int = 50
    cold: bool = True
    seconds: float = 120.0


def verify(variant: Variant, verifier: Verifier) -> float:
    """Runs a variant's first steps against the reference; only then it may be timed.

    Two steps in a row, because what dgg measures ahead in the first is used in the second; for a
    setting that injects at a share of the steps, one that does and one that does not.

    Returns:
        The largest error in units of the variant's tolerance.

    Raises:
        VerificationError: The variant computes something else.
        Unavailable: The variant cannot run here.
    """
    worst = 0.0
    draws = range(2)
    if variant.setting.alpha not in (None, 1.0):
        kinds = [variant.injects()]
        for draw in range(1, WINDOW):
            variant.seek(draw)
            kinds.append(variant.injects())
        draws = (kinds.index(True), kinds.index(False))
    for draw in draws:
        variant.seek(draw)
        worst = max(worst, verifier.check(variant, injects=variant.injects()))
    variant.seek(0)
    variant.verified = True
    return worst


class _Timed:
    def __init__(self, variant: Variant, error: float) -> None:
        self.variant, self.error, self.stride = variant, error, 1
        self.samples: dict[tuple[bool, bool], list[float]] = {}

    def run(self, device: Cpu) -> float:
        if not self.variant.verified:
            raise NotVerified(f"{self.variant.name} ({self.variant.setting.name})")
        kind = self.variant.kind()
        seconds = device.time(self.variant)
        self.samples.setdefault(kind, []).append(seconds)
        return seconds

    def count(self) -> int:
        return sum(map(len, self.samples.values()))

    def quantile(self, q: float) -> float:
        """Quantile of the step's time, averaged over the kinds of steps by their share."""
        shares = {k: s for k, s in self.variant.shares().items() if k in self.samples}
        weighed = sum(float(s) * _quantile(self.samples[k], q) for k, s in shares.items())
        return weighed / float(sum(shares.values()))

    def mean(self) -> float:
        times = [t for kind in self.samples.values() for t in kind]
        return sum(times) / len(times)


def _quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def run_case(
    case: Case, device: Cpu, streams: Streams | None = None, *, log=lambda line: None
) -> dict[str, object]:
    """Verifies and times all variants of a case.

    Args:
        case: The case.
        device: Where it runs.
        streams: Timed once a round beside the steps; None leaves bandwidth out.
        log: Called with progress lines.

    Returns:
        The case's entry in the results; bench/results/README.md says what is in it.

    Raises:
        VerificationError: A variant computes something else than the reference.
        MemoryError: The case does not fit.
    """
    elements = sum(torch.Size(shape).numel() for shape in case.shapes)
    needed = Workload.bytes_needed(elements, case.dtype, case.optimizer)
    if needed > 0.8 * device.free_bytes():
        raise MemoryError(
            f"{needed / 2**30:.1f} GiB needed, {device.free_bytes() / 2**30:.1f} GiB free"
        )
    work = Workload(case.shapes, case.dtype, case.optimizer, device.device)
    verifier = Verifier(work)
    timed: list[_Timed] = []
    absent: list[dict[str, str]] = []
    for name, setting in case.runs:
        try:
            variant = IMPLEMENTATIONS[name](work, setting)
            error = verify(variant, verifier)
        except Unavailable as reason:
            absent.append({"name": name, "setting": setting.name, "reason": str(reason)})
            log(f"  {name} ({setting.name}) not run: {reason}")
            continue
        timed.append(_Timed(variant, error))
    rounds = _measure(case, timed, work, device, streams)
    if not work.finite():
        raise FloatingPointError(f"{case.name}: parameters or moments are not finite after the run")
    return {
        "case": case.name,
        "optimizer": case.optimizer,
        "dtype": str(case.dtype).removeprefix("torch."),
        "elements": elements,
        "tensors": len(case.shapes),
        "cache": "cold" if case.cold else "warm",
        "rounds": rounds,
        "variants": [_entry(entry, elements) for entry in timed],
        "not_run": absent,
    }


def _measure(case, timed: list[_Timed], work, device: Cpu, streams) -> int:
    for entry in timed:
        times = []
        for _ in range(3):
            work.fresh_gradients()
            times.append(device.time(entry.variant))
        entry.variant.seek(0)
        affordable = SLOW * case.seconds / min(times)
        if affordable < case.rounds:
            entry.stride = max(1, case.rounds // max(MIN_SAMPLES, int(affordable)))
    order = random.Random(0)
    begin = time.perf_counter()
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(case.rounds):
            late = time.perf_counter() - begin > 2 * case.seconds
            if late and min(entry.count() for entry in timed) >= MIN_SAMPLES:
                return number
            # Another order every round: no variant is always behind the same other one.
            turn = [e for e in timed if number % e.stride == 0]
            order.shuffle(turn)
            for entry in turn:
                work.fresh_gradients()
                if case.cold:
                    device.evict()
                entry.run(device)
            if streams is not None:
                device.evict()
                streams.run(device)
    finally:
        if collecting:
            gc.enable()
    return case.rounds


def _entry(entry: _Timed, elements: int) -> dict[str, object]:
    variant = entry.variant
    seconds, moved = entry.quantile(0.5), variant.bytes_moved()
    shares = variant.shares()
    return {
        "name": variant.name,
        "setting": variant.setting.name,
        "seconds": seconds,
        "low": entry.quantile(0.2),
        "high": entry.quantile(0.8),
        "mean": entry.mean(),
        "fastest": entry.quantile(0.0),
        "samples": entry.count(),
        "kernel_seconds": None,
        "ns_per_element": seconds / elements * 1e9,
        "bytes": moved,
        "bytes_per_element": None if moved is None else moved / elements,
        "bandwidth": None if moved is None else moved / seconds,
        "share_of_bandwidth": None,
        "seed": variant.seed,
        "injected_fraction": float(sum(s for (now, _), s in shares.items() if now)),
        "error_in_tolerances": entry.error,
    }
