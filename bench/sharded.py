# SPDX-License-Identifier: BSD-3-Clause
"""How long an optimizer step over sharded parameters takes, and what it sends.

    python bench/sharded.py --out runs/sharded            # 1, 2 and 4 gloo ranks: 15 minutes
    python bench/sharded.py --quick                       # 2 ranks, tiny lists: half a minute
    python bench/sharded.py --ranks 2 --only small120     # what the target is stated for

The parameters are DTensors, sharded along their first dimension, as FSDP2 makes them; every rank is
a process with one torch thread. Every variant is compared with the unsharded float64 reference
before it is timed. Then the variants take turns (timing.py), in an order that is the same on all
ranks and another in each round. Before each timed step the gradients are new DTensors, as a
backward pass leaves them, and all ranks meet at a barrier. Caches are warm: nothing is evicted
between the steps.

results/README.md says what the figures are. With more ranks than cores the ranks wait for each
other's time slices: the times of those runs say how a crowded machine behaves, not what so many
machines would do.

Collectives are counted apart from the timing, three times: by a dispatch mode that also adds up
their bytes, by torch's CommDebugMode, and by the sequence number of the process group, which no
collective gets past. Where they disagree the run ends.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

import report
import sharded_peers as peers
from collectives import count_collectives
from machine import Cpu
from provenance import provenance
from report import Printer, find, target
from sharded_peers import EAGER, FOREACH_CLIP, FUSED
from timing import MIN_SAMPLES, Timed, rounds_of
from variant import Unavailable

SCHEMA = 1
# A variant that would use this share of a case's time takes part in fewer rounds.
SLOW = 0.15
TIMEOUT = datetime.timedelta(seconds=120)

# What DTensor parameters look like: a small network's weights, biases and projections; the A and B
# of LoRA adapters; a few large matrices. The tiny ones have uneven shards and empty ones.
LISTS: dict[str, list[tuple[int, ...]]] = {
    "small120": [(64, 64), (64,), (64, 16)] * 40,
    "lora448": [(8, 256), (256, 8)] * 224,
    "large16Mi": [(2048, 1024)] * 8,
    "tiny6": [(8, 6), (5,), (1, 7)] * 2,
    "tiny12": [(8, 6), (5,), (1, 7)] * 4,
}
FULL, QUICK = ("small120", "lora448", "large16Mi"), ("tiny6", "tiny12")
FIGURES = ("seconds", "cpu_seconds", "process_seconds")


class Rank(Cpu):
    """A rank's CPU: a step begins when all ranks are there."""

    stratified = True

    def wall(self, function: Callable[[], object]) -> dict[str, float]:
        """Returns the times of one call: of the clock, of this thread, of all threads."""
        dist.barrier()
        process, thread, begin = time.process_time(), time.thread_time(), time.perf_counter()
        function()
        end = time.perf_counter()
        taken = (end - begin, time.thread_time() - thread, time.process_time() - process)
        return dict(zip(FIGURES, taken, strict=True))


def run_case(name: str, mesh, rounds: int, seconds: float, log) -> dict[str, object]:
    """Verifies, counts and times all variants on a list; every rank calls it.

    Returns:
        The case's entry in the results, the same on all ranks.
    """
    begin = time.perf_counter()
    work = peers.Sharded(LISTS[name], mesh)
    oracle = peers.Oracle(work)
    timed, counted, absent = [], [], []
    for implementation, setting in peers.RUNS:
        try:
            variant = peers.IMPLEMENTATIONS[implementation](work, setting)
        except Unavailable as reason:
            absent.append({"name": implementation, "setting": setting.name, "reason": str(reason)})
            continue
        timed.append(Timed(variant, peers.verify(variant, oracle)))
        counted.append(count_collectives(variant, mesh.get_group()))
    del oracle
    log(f"  {name}: verified and counted, {time.perf_counter() - begin:.0f} s")
    rounds = _measure(timed, rounds, seconds)
    entries = [_entry(*pair) for pair in zip(timed, counted, strict=True)]
    for entry in timed:
        if not all(torch.isfinite(x).all() for x in entry.variant.locals):
            raise FloatingPointError(f"{name}: {entry.variant.name} left parameters not finite")
    return {
        "case": f"{name}-{dist.get_world_size()}",
        "list": name,
        "ranks": dist.get_world_size(),
        "optimizer": "adamw",
        "dtype": "float32",
        "placements": "Shard(0)",
        "elements": work.elements,
        "tensors": len(work.shapes),
        "shapes": sorted(set(work.shapes)),
        "cache": "warm",
        "rounds": rounds,
        "wall_seconds": time.perf_counter() - begin,
        "variants": entries,
        "not_run": absent,
    }


def _measure(timed: list[Timed], rounds: int, seconds: float) -> int:
    device, costs = Rank(), []
    for entry in timed:
        turns = []
        for _ in range(3):
            begin = time.perf_counter()
            entry.take_turn(device)
            turns.append(time.perf_counter() - begin)
        costs.append(min(turns))
        entry.samples.clear()
    # The first rank plans for all: ranks with plans of their own would wait for each other.
    dist.broadcast_object_list(costs, src=0)
    for entry, cost in zip(timed, costs, strict=True):
        entry.be_slow(rounds, SLOW * seconds / cost)
    whole = sum(cost / entry.stride for entry, cost in zip(timed, costs, strict=True))
    least = MIN_SAMPLES * max(entry.stride for entry in timed)
    rounds = max(least, min(rounds, int(seconds / whole)))
    for turn in rounds_of(timed, rounds):
        for entry in turn:
            entry.take_turn(device)
    return rounds


def _entry(entry: Timed, collectives: list[dict[str, object]]) -> dict[str, object]:
    """Returns a variant's entry, from the figures of all ranks."""
    own = {(name, q): entry.quantile(q, name) for name in FIGURES for q in (0.0, 0.2, 0.5, 0.8)}
    ranks: list[dict] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(ranks, own)
    slowest = max(ranks, key=lambda found: found["seconds", 0.5])
    variant = entry.variant
    return {
        "name": variant.name,
        "setting": variant.setting.name,
        "seconds": slowest["seconds", 0.5],
        "low": slowest["seconds", 0.2],
        "high": slowest["seconds", 0.8],
        "fastest": slowest["seconds", 0.0],
        "seconds_by_rank": [found["seconds", 0.5] for found in ranks],
        "cpu_seconds": max(found["cpu_seconds", 0.5] for found in ranks),
        "process_seconds": max(found["process_seconds", 0.5] for found in ranks),
        "samples": entry.count(),
        "collectives": collectives,
        "collectives_per_step": sum(c["share"] * c["count"] for c in collectives),
        "bytes_per_step": sum(c["share"] * c["bytes"] for c in collectives),
        "seed": variant.seed,
        "injected_fraction": sum(c["share"] for c in collectives if c["injects"]),
        "error_in_tolerances": entry.error,
    }


def work(rank: int, world: int, folder: str, names: Sequence[str], rounds: int, seconds: float):
    """What every rank runs; the first one leaves the cases in ``folder``."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (world,))
    log = Printer(markdown=False) if rank == 0 else lambda line: None
    cases = [run_case(name, mesh, rounds, seconds, log) for name in names]
    if rank == 0:
        pathlib.Path(folder, "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def run(ranks: int, names: Sequence[str], rounds: int, seconds: float) -> list[dict]:
    """Starts the ranks and returns their cases."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (ranks, folder, names, rounds, seconds), nprocs=ranks)
        return json.loads(pathlib.Path(folder, "cases.json").read_text(encoding="utf-8"))


HEADER = (
    "variant", "setting", "ms", "/ fused", "/ clip+fused", "/ foreach guidance", "20 %", "80 %",
    "CPU ms", "n", "collectives", "bytes",
)  # fmt: skip
OPPONENTS = ((FUSED, "plain"), (FUSED, "clipped"), (EAGER, "guided"))


def case_table(case: dict, cores: int, *, markdown: bool) -> str:
    """Returns title, table and notes of one case."""
    title = (
        f"{case['list']} on {case['ranks']} rank{'s' * (case['ranks'] > 1)}: AdamW, float32, "
        f"{case['elements']:,} elements in {case['tensors']} DTensors, Shard(0)"
    )
    opponents = [find(case, *opponent) for opponent in OPPONENTS]
    rows = [HEADER] + [
        (
            entry["name"],
            entry["setting"],
            f"{entry['seconds'] * 1e3:.3f}",
            *report.ratios(entry, opponents),
            *(f"{entry[key] * 1e3:.3f}" for key in ("low", "high", "cpu_seconds")),
            str(entry["samples"]),
            f"{entry['collectives_per_step']:g}",
            f"{entry['bytes_per_step']:g}",
        )
        for entry in case["variants"]
    ]
    notes, ranks = report.absences(case) + report.losses(case), case["ranks"]
    if ranks > cores:
        notes.append(f"{ranks} ranks share {cores} cores: most of the time is waiting for a core")
    return report.page(title, rows, notes, markdown=markdown)


def targets(cases: Sequence[dict]) -> list[dict]:
    """Compares results with the project's targets: what, target, measured, met."""
    found = []
    for case in cases:
        ours = {setting: find(case, "dgg cpp", setting) for setting in ("plain", "guided")}
        if None in ours.values():
            continue
        stated = case["case"] == "small120-2"
        for other, limit in ((FUSED, 0.35), (FOREACH_CLIP, None)) if stated else ():
            value = report.quotient(case, ("dgg cpp", "guided"), (other, "clipped"))
            if value is not None:
                what = f"{case['case']}: guided, clipped / {other} over DTensor, clipped"
                found.append(target(what, value, most=limit))
        for setting, limit in (("plain", 0), ("guided", 1)):
            what = f"{case['case']}: collectives in a {setting} step"
            value = max(c["count"] for c in ours[setting]["collectives"])
            found.append(target(what, value, "", most=limit, stated=""))
    return found


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns 1 if a rank failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2 ranks, tiny lists, few rounds")
    parser.add_argument("--ranks", type=int, nargs="+", help="default: 1 2 4; with --quick 2")
    parser.add_argument("--only", default="", help="run only lists whose name contains this")
    parser.add_argument("--rounds", type=int, help="turns of a fast variant; default 100, quick 8")
    parser.add_argument("--seconds", type=float, default=30.0, help="of timing a list, about")
    parser.add_argument("--out", type=pathlib.Path, help="folder for JSON and tables")
    parser.add_argument("--markdown", action="store_true", help="print tables as markdown")
    options = parser.parse_args(arguments)
    names = [name for name in (QUICK if options.quick else FULL) if options.only in name]
    if not names:
        parser.error(f"--only {options.only}: no such list; there are {', '.join(FULL)}")
    if not dist.is_available() or not dist.is_gloo_available():
        parser.error("this torch was built without torch.distributed or without gloo")
    torch.set_num_threads(1)
    rounds = options.rounds or (8 if options.quick else 100)
    ranks = options.ranks or ([2] if options.quick else [1, 2, 4])
    say = Printer(options.markdown, options.out, "sharded-cpu")
    results: dict[str, object] = {
        "schema": SCHEMA, "provenance": provenance(Cpu()),
        "settings": {
            "quick": options.quick, "ranks": ranks, "rounds": rounds, "seconds": options.seconds,
            "backend": "gloo", "threads_per_rank": 1, "max_norm": peers.MAX_NORM,
        },
        "cases": [], "complete": False,
    }  # fmt: skip
    say.begin(results["provenance"])
    cores = results["provenance"]["cores"]
    for world in ranks:
        for case in run(world, names, rounds, options.seconds):
            results["cases"].append(case)
            say(case_table(case, cores, markdown=options.markdown))
        # Whatever ends the run, what it has measured stays.
        say.write(results)
    results["provenance"]["load_average_after"] = os.getloadavg()
    results["targets"] = targets(results["cases"])
    if results["targets"]:
        say(report.targets_table(results["targets"], markdown=options.markdown))
    results["complete"] = True
    for path in say.write(results):
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
