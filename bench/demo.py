# SPDX-License-Identifier: BSD-3-Clause
"""A small LLaVA learns six tasks, one after another, and is tested for what it has forgotten.

    python bench/demo.py --out build/demo                   # three seeds, about 4 minutes
    python bench/demo.py --out build/demo --seeds 0 1 2 3 4
    python bench/demo.py --out build/demo --arms replay guard50

Compared are replay alone, DGG, the guard (`alpha="auto"` with importance) and EWC, each with what
the study of docs/forgetting.md has tuned, between two bounds. Interrupt it whenever you like: the
same command goes on. Writes runs/, demo.json, report.md and pictures to the folder.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

# One thread adds up in one order only, and two processes of one beat one of two at this size. The
# variables must be set before torch is loaded, in the workers too.
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_variable] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
INTERRUPTED = 130
SEEDS = (0, 1, 2)

BANNER = """\
A LLaVA of 0.9 million parameters learns six kinds of questions about small pictures, one after
another, each seen by another camera, with one LoRA adapter. After each of them it is tested on all
it has learnt. Nothing is downloaded. The memory keeps {remembered} examples of every former task.

Compared: {labels}
Seeds: {seeds}. {runs} runs of {steps} steps, {processes} at a time{left}.
Results go to {out}. Ctrl-C stops; the same command goes on from there.
"""
LEGEND = """\
FAA: final average accuracy over all six tasks, in %. AIA: the mean of that average after every
task. Forgetting: points lost since a task was known best. Learning: accuracy on a task right after
it was trained. One seed of one arm moves by some four points from one processor to another, since
sums are rounded differently; three seeds prove nothing. The study has twenty: docs/forgetting.md.
"""


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run; returns the exit code."""
    options = _parser().parse_args(argv)
    from study import protocol, workers

    arms = {arm.name: arm for arm in protocol.DEMO_ARMS}
    unknown = [name for name in options.arms or () if name not in arms]
    if unknown:
        raise SystemExit(f"there is no arm {unknown[0]}; there are {', '.join(arms)}")
    chosen = [arms[name] for name in options.arms or arms]
    try:
        return _run(chosen, options)
    except (KeyboardInterrupt, workers.Stopped):
        print(f"\nStopped. What is finished is in {options.out}; the same command goes on.")
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="the folder")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), metavar="S")
    parser.add_argument("--arms", nargs="+", metavar="A", help="only these (default: all)")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--smoke", action="store_true", help="tiny sizes that say nothing")
    return parser


def _run(arms: list[Any], options: argparse.Namespace) -> int:
    """Train what is missing and report."""
    import provenance
    from study import costs, jobs, workers
    from study.arms import LABELS

    plan = jobs.SMOKE if options.smoke else jobs.FULL
    sizes, results = plan.sizes["in-domain"], jobs.Results(options.out)
    wanted = [
        jobs.llava_job("demo", arm.name, "in-domain", arm, sizes, seed)
        for seed in options.seeds
        for arm in arms
    ]
    todo = [job for job in wanted if results.of(job) is None]
    steps = sum(job.steps for job in todo)
    a_step = costs.llava_step("in-domain", sizes) if todo else 0.0
    left = f", about {workers.duration(steps * a_step / options.workers)}" if todo else ""
    banner = BANNER.format(
        remembered=sizes.remembered, labels=", ".join(LABELS[arm.name] for arm in arms),
        seeds=", ".join(map(str, options.seeds)), runs=len(wanted), steps=6 * sizes.steps,
        processes=options.workers, left=left, out=options.out,
    )  # fmt: skip
    print(banner, flush=True)
    if len(todo) < len(wanted):
        commits = ", ".join(sorted({str(x["commit"]) for x in results.origins()}))
        print(f"{len(wanted) - len(todo)} runs are finished already (commit {commits})\n")
    if todo:
        clock = workers.Clock(steps, len(todo), a_step)
        origin = provenance.origin()
        if not workers.run(todo, options.out, options.workers, origin, clock):
            return 1
    _report(results, wanted, options.out)
    return 0


def _report(results: Any, wanted: list[Any], out: Path) -> None:
    import report
    from study import pictures, summary

    runs: dict[str, dict[str, Any]] = {}
    for job in wanted:
        runs.setdefault(job.spec["arm"]["name"], {})[str(job.spec["seed"])] = results.of(job)
    found = {"in-domain": runs, "shifted": {}, "digits": {}, "tuning": {}}
    text = f"{summary.marginals(runs)}\n\n{LEGEND}"
    rows = [
        summary.row(summary.pair(first, "replay"), got)
        for first in ("dgg", "guard50", "ewc")
        if (got := summary.comparison(found, "in-domain", first, "replay")) and got.n > 1
    ]
    if rows:
        text += f"\nDifference of the FAA, seed by seed:\n\n{summary.table(summary.HEAD, rows)}\n"
    report.replace(out / "report.md", text)
    stored = {"origins": results.origins(), "runs": runs}
    report.replace(out / "demo.json", json.dumps(stored) + "\n")
    made = pictures.of_bed("in-domain", runs, out)
    files = ", ".join(str(path) for path in (out / "report.md", out / "demo.json", *made))
    print(f"\n{text}\n{files}")


if __name__ == "__main__":
    sys.exit(main())
