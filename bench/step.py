# SPDX-License-Identifier: BSD-3-Clause
"""How long an optimizer step takes: dgg's backends against eager, compiled and plain PyTorch.

    python bench/step.py                                   # quick: a minute
    python bench/step.py --preset targets --out runs/step  # the project's targets, 5 minutes
    python bench/step.py --preset full --out runs/step     # every size and list, 20 minutes
    python bench/step.py --preset host --out runs/step     # what many tensors cost, 2 minutes
    python bench/step.py --preset guidance                 # alpha="auto" and importance, 2 minutes
    python bench/step.py --memory                          # peak memory over ten tasks
    python bench/step.py --device cuda --out runs/step     # on a GPU: preset gpu, 4 minutes;
                                                           # gpu-short: its three most telling cases

Every variant is compared with the float64 reference before it is timed (the run ends if it
differs), then all variants of a case take turns in one process. results/README.md says what the
figures are. Workload, cache policy and byte accounting are described in workload.py, timing.py and
variant.py; what wall, host, device and kernel time are, in machine.py. Machines that are not quiet
give numbers that are not worth much: the load average stands in the results. With ``--deadline`` no
case is begun that late; cases of a preset come in the order of their importance, and the results
are written after each.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import pathlib
import sys
import time

import torch

import cpu_targets
import parameter_lists
import report
from gpu.targets import backend_table, gpu_targets
from machine import Cpu, DeviceLost, Streams, device_of, give_up
from peak_memory import CASES as MEMORY_CASES
from peak_memory import measure as measure_memory
from provenance import provenance
from report import Printer
from timing import Case, run_case
from workload import AUTO, AUTO_WEIGHTED, SETTINGS, WEIGHTED, Setting, VerificationError, sampled

SCHEMA = 2
PLAIN, CLIPPED, GUIDED, REPLAY, REPLAY_CLIPPED, REPLAY_GUIDED = SETTINGS
ALPHA = sampled(0.2)
MI, BF16 = 2**20, torch.bfloat16
# The size the targets are stated for; 32 Mi = 33,554,432 elements, 128 MiB an array in float32.
FLAGSHIP = 32 * MI
# The same on a GPU: 1 GiB an array in float32.
GPU_FLAGSHIP = 256 * MI

TOO_LARGE = (MemoryError, torch.OutOfMemoryError)
Run = tuple[str, Setting]

OURS: list[Run] = [("dgg cpp", s) for s in (PLAIN, CLIPPED, GUIDED, ALPHA)]
FUSED: list[Run] = [("torch fused", PLAIN), ("torch fused", CLIPPED)]
FOREACH_CLIP: list[Run] = [("torch fused, foreach clip", CLIPPED)]
FOREACH: list[Run] = [(name, GUIDED) for name in cpu_targets.FOREACH]
SAMPLED: list[Run] = [("foreach + fused", ALPHA)]
LOOP: list[Run] = [("for-loop", GUIDED)]
EAGER = OURS + FUSED + FOREACH + LOOP
COMPILED: list[Run] = [("torch.compile", GUIDED)]
DEEPSPEED: list[Run] = [("DeepSpeedCPUAdam", PLAIN)]
REFERENCE: list[Run] = [("dgg reference", GUIDED)]

# Replay gradients: a slot of their own, or added to the others by hand.
REPLAYED: list[Run] = [("dgg cpp", s) for s in (REPLAY, REPLAY_CLIPPED, REPLAY_GUIDED)]
ADDED: list[Run] = [
    ("add + torch fused", REPLAY),
    ("add + torch fused", REPLAY_CLIPPED),
    ("add + torch fused, foreach clip", REPLAY_CLIPPED),
    ("foreach + fused", REPLAY_GUIDED),
]
BLOCK: list[Run] = [("dgg cpp, replay() timed", s) for s in (REPLAY, REPLAY_CLIPPED)]
OVER_FUSED: list[Run] = [("dgg Guidance + torch fused", s) for s in (CLIPPED, GUIDED)]
LAUNCHED: list[Run] = [("dgg triton, nothing started", s) for s in SETTINGS]

GPU_BACKENDS = ("dgg cpp", "dgg triton")
GPU_OURS: list[Run] = [(b, s) for b in GPU_BACKENDS for s in (PLAIN, CLIPPED, GUIDED, ALPHA)]
GPU_ALPHAS: list[Run] = [(b, sampled(a)) for b in GPU_BACKENDS for a in (0.0, 0.05)]
GPU_FOREACH: list[Run] = [FOREACH[0], FOREACH[2]]
GPU_FOREIGN: list[Run] = [
    (name, PLAIN)
    for name in ("apex FusedAdam", "DeepSpeed FusedAdam", "bitsandbytes AdamW32bit",
                 "optimi AdamW")
]  # fmt: skip


def _single(elements: int, runs: list[Run], **more) -> Case:
    kind, dtype = more.get("optimizer", "adamw"), more.get("dtype", torch.float32)
    size = f"1e{len(str(elements)) - 1}" if elements % MI else f"{elements // MI}Mi"
    name = f"{kind}-{str(dtype).removeprefix('torch.')}-{size}"
    return Case(name, parameter_lists.one_tensor(elements), runs, **more)


def _guidance(elements: int, dtype: torch.dtype, **more) -> Case:
    ours: list[Run] = [("dgg cpp", s) for s in (GUIDED, WEIGHTED, AUTO, AUTO_WEIGHTED)]
    peers: list[Run] = [("foreach guard + fused", AUTO), *FOREACH[:1]]
    runs = ours + ADDED[1:3] + peers + FUSED[1:]
    case = _single(elements, runs, dtype=dtype, conflict=True, **more)
    return dataclasses.replace(case, name=f"{case.name}-guidance")


def _lora(rank: int, runs: list[Run], suffix: str = "", **more) -> Case:
    return Case(f"llava7b-lora{rank}{suffix}", parameter_lists.llava_7b_lora(rank), runs, **more)


def _tiny(runs: list[Run], *, cold: bool, **more) -> Case:
    name = "tiny448-cold" if cold else "tiny448-warm"
    return Case(name, parameter_lists.many_tiny(), runs, cold=cold, **more)


def host_cases() -> list[Case]:
    """Returns lists of so many tensors that what the host does for each of them counts."""
    ours = OURS[:3] + REPLAYED
    # The time of a LoRA's steps is the memory's: one peer of each kind is enough there.
    few = ours + FUSED + FOREACH[:1] + ADDED[1:2] + ADDED[3:] + OVER_FUSED[1:]
    every = ours + BLOCK + OVER_FUSED + FUSED + FOREACH_CLIP + FOREACH[:1] + ADDED
    apart = OURS[:3] + OVER_FUSED[1:] + FUSED + FOREACH[:1]
    cases = []
    for case in (
        _tiny(every, cold=False, rounds=60, seconds=10.0),
        _lora(16, few, rounds=7, seconds=15.0),
    ):
        last = parameter_lists.of_four_dimensions(case.shapes)
        more = {"shapes": last, "runs": apart, "channels_last": True}
        # Nothing is computed in the last, so there is nothing to be cold.
        launched = {"runs": LAUNCHED, "cold": False, "rounds": 60}
        cases += [
            case,
            dataclasses.replace(case, name=f"{case.name}-channels-last", **more),
            dataclasses.replace(case, name=f"{case.name}-launched", **launched),
        ]
    return cases


# The optimizers and dtypes that get the flagship's table beside AdamW in float32.
OTHERS = [
    {"optimizer": optimizer, "dtype": dtype}
    for optimizer, dtype in (
        ("adamw", BF16), ("sgd", torch.float32), ("momentum", torch.float32), ("sgd", BF16),
        ("momentum", BF16), ("adamw", torch.float16),
    )
]  # fmt: skip


def gpu_cases() -> list[Case]:
    """Returns the cases for a GPU, the most important first."""
    peers = FUSED + GPU_FOREACH
    lora = GPU_OURS + GPU_ALPHAS + peers + LOOP + GPU_FOREIGN
    large = lora + COMPILED
    cases = [
        _single(GPU_FLAGSHIP, large, rounds=24, seconds=15),
        _lora(16, lora, rounds=30, seconds=20),
        _single(GPU_FLAGSHIP, large, dtype=BF16, rounds=24, seconds=15),
        _lora(16, GPU_OURS + peers, "-bfloat16", dtype=BF16, rounds=24, seconds=10),
    ]
    small = GPU_OURS + FUSED + GPU_FOREACH[:1]
    for exponent in (4, 6, 9, 5, 7, 8):
        runs = small + (LOOP + REFERENCE if exponent <= 6 else [])
        for dtype in (torch.float32, BF16):
            cases.append(_single(10**exponent, runs, dtype=dtype, rounds=16, seconds=6))
    full = [(b, s) for b in GPU_BACKENDS for s in (PLAIN, GUIDED, ALPHA)] + peers
    limits = {"rounds": 8, "seconds": 15, "spare": True}
    shapes = parameter_lists.llava_7b_full()
    cases += [
        Case("llava7b-full-bfloat16", shapes, full, dtype=BF16, **limits),
        _lora(64, small, rounds=12, seconds=6),
        _lora(128, small, rounds=12, seconds=6),
        _tiny(small + LOOP, cold=False, rounds=30, seconds=8),
    ]
    for optimizer in ("momentum", "sgd"):
        for dtype in (torch.float32, BF16):
            more = {"optimizer": optimizer, "dtype": dtype, "rounds": 12, "seconds": 5}
            cases.append(_single(GPU_FLAGSHIP, small, **more))
    return cases


def short_gpu_cases() -> list[Case]:
    """Returns the three cases to know first: one large tensor, a LoRA, many tiny tensors."""
    settings = (PLAIN, CLIPPED, GUIDED, REPLAY, REPLAY_GUIDED)
    runs = [(backend, setting) for backend in GPU_BACKENDS for setting in settings]
    runs += FUSED + GPU_FOREACH + ADDED[:2] + OVER_FUSED[1:]
    return [
        _single(GPU_FLAGSHIP, runs, rounds=16, seconds=12),
        _lora(16, runs, rounds=24, seconds=15),
        _tiny(runs, cold=False, rounds=30, seconds=10),
    ]


def remaining_gpu_cases() -> list[Case]:
    """Returns `gpu_cases` less what `short_gpu_cases` has, but for what is divided by."""
    done = {(case.name, *run) for case in short_gpu_cases() for run in case.runs}
    found = []
    for case in gpu_cases():
        left = [run for run in case.runs if (case.name, *run) not in done or run in FUSED]
        found.append(dataclasses.replace(case, runs=left))
    return found


def smoke_cases() -> list[Case]:
    """Returns a case of every kind, small."""
    runs = OURS + REFERENCE + FUSED + FOREACH_CLIP + FOREACH + SAMPLED + LOOP + DEEPSPEED
    cases = [_single(n, runs, rounds=8) for n in (1000, 10000)]
    cases.append(Case("tiny", parameter_lists.many_tiny(5), runs, rounds=8, cold=False))
    cases.append(_guidance(1000, torch.float32, rounds=8))
    return cases + [_single(1000, EAGER, rounds=8, **other) for other in OTHERS]


def quick_cases() -> list[Case]:
    """Returns what a minute is enough for."""
    small, few = EAGER + REFERENCE + DEEPSPEED, OURS + FUSED + FOREACH[:1]
    return [
        _single(10**4, small, rounds=30, seconds=5),
        _single(10**6, small, rounds=30, seconds=5),
        _single(10**7, few, rounds=20, seconds=10),
        _tiny(EAGER + FOREACH_CLIP, cold=True, rounds=30),
        _lora(16, few, rounds=10, seconds=15),
    ]


def target_cases() -> list[Case]:
    """Returns what the project has targets for."""
    tiny = OURS + FUSED + FOREACH_CLIP + FOREACH + REPLAYED + ADDED + OVER_FUSED
    cases = [_single(FLAGSHIP, OURS + FUSED + FOREACH, seconds=100)]
    cases += [_tiny(tiny, cold=cold, rounds=100) for cold in (True, False)]
    runs = OURS + FUSED + FOREACH[:1]
    others = (*OTHERS[:3], OTHERS[-1])
    return cases + [_single(FLAGSHIP, runs, rounds=25, seconds=25, **other) for other in others]


def guidance_cases() -> list[Case]:
    """Returns alpha="auto" and importance against what one would write instead."""
    return [_guidance(FLAGSHIP, dtype, rounds=25, seconds=60) for dtype in (torch.float32, BF16)]


def full_cases() -> list[Case]:
    """Returns every size and list."""
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
    for other in OTHERS:
        cases += [_single(n, EAGER + FOREACH_CLIP, **other) for n in (10**4, 10**6)]
        runs = EAGER + (COMPILED if other is OTHERS[0] else [])
        cases.append(_single(FLAGSHIP, runs, seconds=40, **other))
    return cases


GPU_PRESETS = {"gpu": gpu_cases, "gpu-short": short_gpu_cases, "gpu-rest": remaining_gpu_cases}
PRESETS = {
    "smoke": smoke_cases, "quick": quick_cases, "targets": target_cases, "host": host_cases,
    "guidance": guidance_cases, "full": full_cases, **GPU_PRESETS,
}  # fmt: skip


def run(
    cases: list[Case], device: Cpu, *, stream_elements: int, say, deadline=math.inf, keep=None,
    before: dict[str, object] | None = None, host: bool = False,
) -> dict[str, object]:  # fmt: skip
    """Runs cases, in their order, and returns the results without targets.

    Args:
        cases: The cases.
        device: Where they run.
        stream_elements: Elements of an array that the bandwidth is measured with.
        say: A `report.Printer`.
        deadline: `time.perf_counter` after which no case is begun.
        keep: Called with the results after every case.
        before: Results of a run that lost the device: its cases are not run again, and what lost it
            runs in none.
        host: Show the tables of the preset ``host``.

    Raises:
        DeviceLost: A variant made the device unusable; ``keep`` was given what there is.
    """
    before = before or {}
    lost, skipped = [*before.get("lost", [])], []
    results: dict[str, object] = {
        "schema": SCHEMA, "provenance": provenance(device), "cases": [*before.get("cases", [])],
        "skipped": skipped, "lost": lost,
    }  # fmt: skip
    keep_results = keep or (lambda results: None)
    done = {case["case"] for case in results["cases"]}
    culprits = {entry["name"] for entry in lost}
    cases = [
        dataclasses.replace(case, runs=[run for run in case.runs if run[0] not in culprits])
        for case in cases
        if case.name not in done
    ]

    def skip(reason: str, words: str = "skipped", **more: bool) -> None:
        skipped.append({"case": case.name, "reason": reason, **more})
        say(f"{case.name} {words}: {reason}\n")

    say.begin(results["provenance"])
    streams = Streams(device, stream_elements)
    for _ in range(5):
        streams.run()
    overall = streams.bandwidth()
    del streams
    for case in cases:
        begin = time.perf_counter()
        if begin > deadline:
            skip("no time was left for it")
            continue
        # Neighbours take bandwidth as they please: large cases measure it between their own steps.
        large = parameter_lists.count(case.shapes) * case.dtype.itemsize >= device.cache_bytes
        own = Streams(device, stream_elements) if large and not case.spare else None
        try:
            entry = run_case(case, device, own, log=say, forgiving=keep is not None)
        except TOO_LARGE as error:
            skip(report.first_line(error, *TOO_LARGE))
            continue
        except DeviceLost as error:
            found = {"name": error.name, "setting": error.setting}
            lost.append({**found, "case": case.name, "reason": error.reason})
            say(f"{case.name}: THE DEVICE WAS LOST by {error}\n")
            keep_results(results)
            raise
        except Exception as error:
            if keep is None:
                raise
            # One case of many: time on a GPU is rare.
            skip(report.first_line(error), "FAILED", wrong=True)
            keep_results(results)
            continue
        entry["memory_bandwidth"] = own.bandwidth() if own else overall
        entry["wall_seconds"] = time.perf_counter() - begin
        # The ceiling is a copy; on a CPU triad often gives more.
        ceilings = ("copy", "triad") if device.name == "cpu" else ("copy",)
        best = max(entry["memory_bandwidth"][name] for name in ceilings)
        for variant in entry["variants"]:
            # Of warm caches memory says nothing: what moves does not come from there.
            if case.cold and variant["bandwidth"] is not None:
                variant["share_of_bandwidth"] = variant["bandwidth"] / best
        results["cases"].append(entry)
        say((report.host_table if host else report.case_table)(entry, markdown=say.markdown))
        # Of what the host does for every tensor memory says nothing.
        memory = "" if host else report.bandwidth_line(entry["memory_bandwidth"]) + "; "
        say(f"{memory}{entry['wall_seconds']:.0f} s\n")
        keep_results(results)
    results["provenance"]["load_average_after"] = os.getloadavg()
    return results


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns 1 if a variant failed its verification."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="threads of torch and dgg; default: all cores")
    parser.add_argument("--out", type=pathlib.Path, help="folder for JSON and tables")
    parser.add_argument("--markdown", action="store_true", help="print tables as markdown")
    parser.add_argument("--memory", action="store_true", help="peak memory only")
    parser.add_argument("--only", default="", help="run only cases whose name contains this")
    parser.add_argument(
        "--deadline", type=float, default=math.inf, help="begin no case after so many seconds"
    )
    parser.add_argument(
        "--resume", type=pathlib.Path,
        help="results of a run that lost the device: go on without what lost it",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    began = time.perf_counter()
    preset = options.preset or ("quick" if options.device == "cpu" else "gpu")
    on_gpu = preset in GPU_PRESETS
    if on_gpu and options.device == "cpu":
        parser.error(f"--preset {preset}: its sizes are a GPU's; add --device cuda")
    if options.memory and options.device != "cpu":
        parser.error("--memory measures the process; on a GPU the tables have temporary_bytes")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    cases = [case for case in PRESETS[preset]() if options.only in case.name]
    if not cases:
        names = ", ".join(case.name for case in PRESETS[preset]())
        parser.error(f"--only {options.only}: no such case; there are {names}")
    device = device_of(parser, options.device)
    before = options.resume and json.loads(options.resume.read_text(encoding="utf-8"))
    kind = "memory" if options.memory else "step"
    say = Printer(options.markdown, options.out, f"{kind}-{options.device}")
    settings = {"preset": preset, "threads": torch.get_num_threads(),
                "flagship": GPU_FLAGSHIP if on_gpu else FLAGSHIP}  # fmt: skip

    def judged(results: dict[str, object], memory: list[dict], complete: bool) -> dict[str, object]:
        """Returns the results with the targets that they can speak to."""
        cases = results["cases"]
        found = gpu_targets(cases) if on_gpu else cpu_targets.targets(cases, memory)
        more = {"settings": settings, "complete": complete, "memory": memory, "targets": found}
        return {**results, **more}

    results = {"schema": SCHEMA, "provenance": provenance(device), "cases": [], "skipped": []}
    if not options.memory:
        elements = 2**25 if options.device == "cpu" else 2**28
        elements = {"smoke": 2**16, "host": 2**22}.get(preset, elements)
        # What takes long is kept after every case.
        long = on_gpu or preset == "full"
        try:
            results = run(
                cases, device, stream_elements=elements, say=say,
                deadline=began + options.deadline, before=before, host=preset == "host",
                keep=(lambda found: say.write(judged(found, [], False))) if long else None,
            )  # fmt: skip
        except DeviceLost as error:
            give_up(error)
        except VerificationError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    memory = []
    if options.memory or preset in ("targets", "full"):
        size = 2**20 if preset == "smoke" else 2**24
        memory = [measure_memory(case, size) for case in MEMORY_CASES]
    results = judged(results, memory, True)
    if on_gpu:
        say(backend_table(results["cases"], markdown=options.markdown))
    if results["targets"]:
        say(report.targets_table(results["targets"], markdown=options.markdown))
    for path in say.write(results):
        print(f"wrote {path}")
    wrong = [missing["wrong"] for case in results["cases"] for missing in case["not_run"]]
    wrong += [skipped.get("wrong", False) for skipped in results["skipped"]]
    return int(any(wrong))


if __name__ == "__main__":
    sys.exit(main())
