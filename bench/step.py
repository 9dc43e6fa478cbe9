# SPDX-License-Identifier: BSD-3-Clause
"""How long an optimizer step takes: dgg's backends against eager, compiled and plain PyTorch.

    python bench/step.py                                   # quick: a minute
    python bench/step.py --preset targets --out runs/step  # the project's targets, 5 minutes
    python bench/step.py --preset full --out runs/step     # every size and list, 20 minutes
    python bench/step.py --memory                          # peak memory over ten tasks

Every variant is compared with the float64 reference before it is timed (the run ends if it
differs), then all variants of a case take turns in one process. Times are medians with the 20th
and 80th percentile. A setting that injects at a share of the steps is averaged over a window of
50 real draws, by the median of each kind of step. Workload, cache policy and byte accounting are
described in workload.py, round_robin.py and peers.py. Machines that are not quiet give numbers
that are not worth much: the load average stands in the results.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import time

import torch

from machine import Cpu, Streams, open_device, provenance
from parameter_lists import count, llava_7b_lora, many_tiny, one_tensor
from peak_memory import CASES as MEMORY_CASES
from peak_memory import measure as measure_memory
from round_robin import Case, run_case
from step_report import (
    bandwidth_line,
    case_table,
    fill_shares,
    provenance_lines,
    targets,
    targets_table,
    write,
)
from workload import CLIPPED, GUIDED, PLAIN, Setting, VerificationError, sampled

SCHEMA = 1
ALPHA = sampled(0.2)
MI = 2**20
# The size the targets are stated for; 32 Mi = 33,554,432 elements, 128 MiB an array in float32.
FLAGSHIP = 32 * MI

Run = tuple[str, Setting]

OURS: list[Run] = [("dgg cpp", s) for s in (PLAIN, CLIPPED, GUIDED, ALPHA)]
FUSED: list[Run] = [("torch fused", PLAIN), ("torch fused", CLIPPED)]
FOREACH_CLIP: list[Run] = [("torch fused, foreach clip", CLIPPED)]
FOREACH: list[Run] = [
    ("foreach + fused", GUIDED),
    ("foreach + fused, d kept", GUIDED),
    ("foreach + clip_grad_norm_ + fused", GUIDED),
]
SAMPLED: list[Run] = [("foreach + fused", ALPHA)]
LOOP: list[Run] = [("for-loop", GUIDED)]
COMPILED: list[Run] = [("torch.compile", GUIDED)]
DEEPSPEED: list[Run] = [("DeepSpeedCPUAdam", PLAIN)]
REFERENCE: list[Run] = [("dgg reference", GUIDED)]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _size_name(elements: int) -> str:
    if elements % MI == 0:
        return f"{elements // MI}Mi"
    digits = len(str(elements)) - 1
    return f"1e{digits}" if elements == 10**digits else str(elements)


def _single(elements: int, runs: list[Run], *, optimizer="adamw", dtype=torch.float32, **limits):
    name = f"{optimizer}-{_dtype_name(dtype)}-{_size_name(elements)}"
    return Case(name, one_tensor(elements), dtype, optimizer, runs, **limits)


def _lora(rank: int, runs: list[Run], **limits) -> Case:
    name = f"llava7b-lora{rank}"
    return Case(name, llava_7b_lora(rank), torch.float32, "adamw", runs, **limits)


def _tiny(runs: list[Run], *, cold: bool, rounds: int) -> Case:
    name = "tiny448-cold" if cold else "tiny448-warm"
    return Case(name, many_tiny(), torch.float32, "adamw", runs, rounds=rounds, cold=cold)


# The optimizers and dtypes that get the flagship's table beside AdamW in float32.
OTHERS = (
    ("adamw", torch.bfloat16),
    ("sgd", torch.float32),
    ("momentum", torch.float32),
    ("sgd", torch.bfloat16),
    ("momentum", torch.bfloat16),
)


def cases_of(preset: str) -> list[Case]:
    """Returns the cases of a preset."""
    eager = OURS + FUSED + FOREACH + LOOP
    if preset == "smoke":
        runs = OURS + REFERENCE + FUSED + FOREACH_CLIP + FOREACH + SAMPLED + LOOP + DEEPSPEED
        cases = [_single(n, runs, rounds=8) for n in (1000, 10000)]
        cases.append(Case("tiny", many_tiny(5), torch.float32, "adamw", runs, rounds=8, cold=False))
        for optimizer, dtype in OTHERS:
            cases.append(_single(1000, eager, optimizer=optimizer, dtype=dtype, rounds=8))
        return cases
    if preset == "quick":
        small = eager + REFERENCE + DEEPSPEED
        return [
            _single(10**4, small, rounds=30, seconds=5),
            _single(10**6, small, rounds=30, seconds=5),
            _single(10**7, OURS + FUSED + FOREACH[:1], rounds=20, seconds=10),
            _tiny(eager + FOREACH_CLIP, cold=True, rounds=30),
            _lora(16, OURS + FUSED + FOREACH[:1], rounds=10, seconds=15),
        ]
    if preset == "targets":
        tiny = OURS + FUSED + FOREACH_CLIP + FOREACH
        cases = [_single(FLAGSHIP, OURS + FUSED + FOREACH, seconds=100)]
        cases += [_tiny(tiny, cold=cold, rounds=100) for cold in (True, False)]
        for optimizer, dtype in OTHERS[:3]:
            runs = OURS + FUSED + FOREACH[:1]
            cases.append(
                _single(FLAGSHIP, runs, optimizer=optimizer, dtype=dtype, rounds=25, seconds=25)
            )
        return cases
    if preset != "full":
        raise ValueError(f"no preset {preset!r}")
    every = OURS + FUSED + FOREACH_CLIP + FOREACH + SAMPLED + LOOP + COMPILED + DEEPSPEED
    cases = [
        _single(n, every + (REFERENCE if n <= 10**6 else []), seconds=30)
        for n in (10**4, 10**5, 10**6, 10**7)
    ]
    cases.append(_single(FLAGSHIP, every, seconds=120))
    cases.append(_single(10**8, OURS + FUSED + FOREACH, rounds=21, seconds=60))
    cases += [_tiny(every, cold=cold, rounds=100) for cold in (True, False)]
    cases.append(_lora(16, OURS + FUSED + FOREACH_CLIP + FOREACH + LOOP, rounds=50, seconds=60))
    cases.append(_lora(64, OURS + FUSED + FOREACH, rounds=14, seconds=60))
    cases.append(_lora(128, OURS + FUSED + FOREACH[:1], rounds=7, seconds=60))
    for optimizer, dtype in OTHERS:
        for n in (10**4, 10**6):
            cases.append(_single(n, eager + FOREACH_CLIP, optimizer=optimizer, dtype=dtype))
        runs = eager + (COMPILED if (optimizer, dtype) == OTHERS[0] else [])
        cases.append(_single(FLAGSHIP, runs, optimizer=optimizer, dtype=dtype, seconds=40))
    return cases


def run(cases: list[Case], device: Cpu, *, stream_elements: int, say) -> dict[str, object]:
    """Runs cases and returns the results without targets."""
    results: dict[str, object] = {
        "schema": SCHEMA, "provenance": provenance(device), "cases": [], "skipped": [],
    }  # fmt: skip
    say(provenance_lines(results["provenance"]) + "\n")
    if results["provenance"]["load_average"][0] > 0.5:
        say("This machine is not quiet: take the times as provisional.\n")
    streams = Streams(device, stream_elements)
    for _ in range(5):
        streams.run(device)
    overall = streams.bandwidth()
    for case in cases:
        begin = time.perf_counter()
        # Neighbours take bandwidth as they please: large cases measure it between their own steps.
        large = count(case.shapes) * case.dtype.itemsize >= device.cache_bytes
        own = Streams(device, stream_elements) if large else None
        try:
            entry = run_case(case, device, own, log=say)
        except MemoryError as error:
            results["skipped"].append({"case": case.name, "reason": str(error)})
            say(f"{case.name} skipped: {error}\n")
            continue
        entry["memory_bandwidth"] = own.bandwidth() if own else overall
        entry["wall_seconds"] = time.perf_counter() - begin
        fill_shares(entry, max(entry["memory_bandwidth"][name] for name in ("copy", "triad")))
        results["cases"].append(entry)
        say(case_table(entry, markdown=say.markdown))
        say(f"{bandwidth_line(entry['memory_bandwidth'])}; {entry['wall_seconds']:.0f} s\n")
    results["provenance"]["load_average_after"] = os.getloadavg()
    return results


class Printer:
    """Prints lines and keeps them for the page written beside the JSON."""

    def __init__(self, markdown: bool) -> None:
        self.markdown, self.lines = markdown, []

    def __call__(self, line: str) -> None:
        """Prints one line or paragraph."""
        self.lines.append(line)
        print(line, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns 1 if a variant failed its verification."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=("smoke", "quick", "targets", "full"), default="quick")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="threads of torch and dgg; default: all cores")
    parser.add_argument("--out", type=pathlib.Path, help="folder for JSON, table and plots")
    parser.add_argument("--markdown", action="store_true", help="print tables as markdown")
    parser.add_argument("--memory", action="store_true", help="peak memory only")
    parser.add_argument("--only", default="", help="run only cases whose name contains this")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    say = Printer(options.markdown)
    device = open_device(options.device)
    smoke = options.preset == "smoke"
    if options.memory:
        results = {"schema": SCHEMA, "provenance": provenance(device), "cases": [], "skipped": []}
    else:
        cases = [case for case in cases_of(options.preset) if options.only in case.name]
        if not cases:
            names = ", ".join(case.name for case in cases_of(options.preset))
            parser.error(f"--only {options.only}: no such case; there are {names}")
        try:
            results = run(cases, device, stream_elements=2**16 if smoke else 2**25, say=say)
        except VerificationError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    results["settings"] = {
        "preset": options.preset, "threads": torch.get_num_threads(), "flagship": FLAGSHIP,
    }  # fmt: skip
    results["memory"] = []
    if options.memory or options.preset in ("targets", "full"):
        size = 2**20 if smoke else 2**24
        results["memory"] = [measure_memory(case, size) for case in MEMORY_CASES]
    results["targets"] = targets(results["cases"], results["memory"])
    if results["targets"]:
        say(targets_table(results["targets"], markdown=options.markdown))
    if options.out is not None:
        date = results["provenance"]["date"][:10]
        stem = f"{'memory' if options.memory else 'step'}-{options.device}-{date}"
        for path in write(options.out, results, "\n".join(say.lines) + "\n", stem):
            print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
