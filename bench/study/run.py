# SPDX-License-Identifier: BSD-3-Clause
"""The study of docs/forgetting.md; `make study` runs all of it, about 2½ hours on two idle cores.

    python bench/study/run.py --out runs/study                  # everything that is not there yet
    python bench/study/run.py --out runs/study --part digits    # or tuning, in-domain, shifted
    python bench/study/run.py --out runs/study --report         # only the report, of what is there
    python bench/study/run.py --page docs/forgetting.md --from bench/results/study-DATE.json
    python bench/study/run.py --estimate                         # only how long it would take

Parts: `digits` (where guidance helps and hurts), `tuning` (of both LLaVA beds, on seeds that are
not reported), `in-domain` and `shifted` (the test seeds; they need the tuning). Interrupt it
whenever you like: the same command goes on. Finished runs are never removed, and those of another
experiment are refused. Writes runs/, study.json, report.md, pictures and events to the folder.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

# One thread adds up in one order only, and two processes of one beat one of two at this size. The
# variables must be set before torch is loaded, in the workers too.
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_variable] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).parent]

PARTS = ("digits", "tuning", "in-domain", "shifted")
INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run; returns the exit code."""
    options = _parser().parse_args(argv)
    from study import jobs, summary, workers

    if options.page:
        found = json.loads(options.source.read_text(encoding="utf-8"))
        page = summary.into_page(found, options.page.read_text(encoding="utf-8"))
        options.page.write_text(page, encoding="utf-8")
        return 0
    plan = jobs.SMOKE if options.smoke else jobs.FULL
    if options.arms:
        plan = replace(plan, arms=tuple(options.arms))
    results = jobs.Results(options.out)
    try:
        return _run(plan, results, options)
    except (KeyboardInterrupt, workers.Stopped):
        print(f"\nStopped. All that is finished is in {options.out}; the same command goes on "
              "from there.")  # fmt: skip
        return INTERRUPTED


def _run(plan, results, options) -> int:
    """Run the parts that were asked for, then write the report."""
    from study import summary

    parts = options.part or list(PARTS)
    if not options.report:
        _check(plan, parts, results)
        for part in options.out.glob("checkpoints/*.part"):
            part.unlink()  # half a checkpoint of a killed run
        seconds = _estimate(plan, parts, results, options.workers)
        if options.estimate:
            return 0
        for part in PARTS:
            if part in parts and not _run_part(part, plan, results, options.workers, seconds[part]):
                return 1
    summary.write(plan, results, options.out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="the folder")
    parser.add_argument("--part", nargs="+", choices=PARTS, help="only these (default: all)")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--estimate", action="store_true", help="say how long it takes, and exit")
    parser.add_argument("--report", action="store_true", help="write the report, and exit")
    parser.add_argument("--page", type=Path, help="put the tables into this page, and exit")
    parser.add_argument(
        "--from", dest="source", type=Path, default=Path("runs/study/study.json"), metavar="F",
        help="the results for --page (default: runs/study/study.json)",
    )  # fmt: skip
    parser.add_argument("--arms", nargs="+", metavar="A", help="only these arms of the LLaVA beds")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes that say nothing")
    return parser


def _check(plan, parts: list[str], results) -> None:
    """Refuse before anything is timed: results of another experiment, arms that cannot train.

    Raises:
        SystemExit: with the reason.
    """
    from study import jobs

    for part in parts:
        if part in ("in-domain", "shifted") and "tuning" in parts:
            continue  # what it consists of is known after the tuning
        known = jobs.of_part(plan, results, part)
        refused = jobs.unrunnable(known)
        if refused:
            reasons = "\n".join(f"  {name}: {reason}" for name, reason in refused.items())
            raise SystemExit(f"arms that this dgg cannot train:\n{reasons}")
        for job in known:
            results.of(job)


def _estimate(plan, parts: list[str], results, count: int) -> dict[str, float]:
    """Print how long every part takes; returns seconds a step of one worker."""
    from study import costs, workers

    seconds, total = {}, 0.0
    for part in parts:
        seconds[part] = costs.of_step(plan, part)
        left = costs.steps_left(plan, results, part) * seconds[part] / count
        total += left
        print(f"{part}: about {workers.duration(left)}", flush=True)
    print(f"together about {workers.duration(total)} in {count} processes, if they are alone")
    return seconds


def _run_part(part: str, plan, results, count: int, seconds_a_step: float) -> bool:
    """Run what is missing of a part; tuning in as many rounds as it needs."""
    import provenance
    from study import costs, jobs, workers

    origin, clock = provenance.origin(), None
    while True:
        all_jobs = jobs.of_part(plan, results, part)
        todo = [job for job in all_jobs if results.of(job) is None]
        if clock is None:
            steps = costs.steps_left(plan, results, part)
            expected = jobs.expected_jobs(plan, part, all_jobs) - (len(all_jobs) - len(todo))
            clock = workers.Clock(steps, expected, seconds_a_step)
            print(f"{part}: {len(all_jobs) - len(todo)} runs are finished already")
        if not todo:
            return True
        # A worker keeps the pictures of one seed; drawing them anew takes as long as 300 steps.
        todo.sort(key=lambda job: (job.spec["bed"], job.spec.get("seed", 0)))
        if not workers.run(todo, results.out, count, origin, clock):
            return False


if __name__ == "__main__":
    sys.exit(main())
