# SPDX-License-Identifier: BSD-3-Clause
"""Everything that needs a GPU, in one command: build, checks, benchmarks, tests, report.

    python3 bench/gpu/run.py                      # what `make gpu` runs; 14 minutes at the most
    python3 bench/gpu/run.py --stage 1            # one of its stages; a build lasts for later calls
    python3 bench/gpu/run.py --parts build,step   # single parts
    python3 bench/gpu/run.py --parts profile      # what a LoRA step runs; in none of the stages
    python3 bench/gpu/run.py --parts build,step --limit 480 --budget 560    # all cases, ten minutes
    python3 bench/gpu/run.py --out results        # results there too (default: $OUT if set)

1. At most 4 minutes. Does it work: the build, `dgg.show_config()`, the checks of checks.py (the
   reference, the same bits again, both backends alike, no wait, launches, graphs), and
   compute-sanitizer's memcheck and racecheck on a small step, where there is one.
2. At most 6 minutes. What it costs: 256 Mi in one tensor, a LoRA and 448 tiny tensors, each plain,
   clipped, guided and with replay gradients, on both backends.
3. What time is left for: the tests that need a GPU, the other cases of the benchmark, training
   steps, the tests made for memcheck.

For a machine with a GPU and whatever torch >= 2.10, Triton >= 3.4 and Python >= 3.10 it has; no
virtual environment, no network, nothing installed: the package is built from a copy of the sources
into build/gpu/site, which alone is put on PYTHONPATH (the repository root must not be, `kernels/`
would shadow another library). No setting of the GPU is touched.

Each part of a stage is a process of its own with a time limit; what it found is written at once,
and a part or a stage that fails, or does not end, does not stop the others. Exit code: 0 if all
went well, 1 if a part failed, hung, or found no time in the first two stages, 2 without a GPU.
bench/results/README.md says what is written where.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shutil
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from gpu import build, measurements, sanitizer, shared_tests
from gpu.sources import ROOT
from gpu.stages import BUDGET, LIMITS, RESULTS, STAGES, Stages

PARTS = {
    "build": build.build_package,
    "checks": measurements.run_checks,
    "small_step": sanitizer.run_small_step,
    "short": measurements.run_short,
    "tests": shared_tests.run_tests,
    "step": measurements.run_step,
    "training": measurements.run_training,
    "sanitizer": sanitizer.run_marked_tests,
    "profile": measurements.run_profile,
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the stages; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", type=int, choices=STAGES, help="one stage; default: all")
    parser.add_argument("--parts", help=f"single parts, comma-separated, of {', '.join(PARTS)}")
    parser.add_argument(
        "--out", type=pathlib.Path, default=os.environ.get("OUT"),
        help="folder that gets the results too; default: $OUT",
    )  # fmt: skip
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--commit", help="commit of the sources, where no repository tells it")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything")
    parser.add_argument(
        "--limit", type=float, help="seconds that any part may take; default: each has its own"
    )
    parser.add_argument(
        "--rehearse", action="store_true",
        help="go through it on a CPU with tiny sizes, to test this script; needs --out",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.stage is not None and options.parts is not None:
        parser.error("--stage and --parts: name one or the other")
    wanted = [name for name in (options.parts or "").split(",") if name]
    if unknown := set(wanted) - LIMITS.keys():
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(LIMITS)}")
    if options.rehearse and options.out is None:
        parser.error("--rehearse needs --out: what it writes is no result")
    outputs = [] if options.rehearse else [RESULTS]
    outputs += [options.out.resolve()] if options.out else []
    # Nothing is written for a machine without a GPU.
    stages = Stages(
        options.build.resolve(), [], budget=options.budget, rehearsal=options.rehearse,
        commit=options.commit, most=options.limit,
    )  # fmt: skip
    if options.parts is not None:
        stages.part = [name for name in PARTS if name in wanted]
        groups = [(None, [*stages.part])]
    else:
        numbers = list(STAGES) if options.stage is None else [options.stage]
        groups = [(number, [*STAGES[number].parts]) for number in numbers]
        stages.part = [] if options.stage is None else [f"stage{options.stage}"]
    # The others need to know where they are.
    stages.begin(groups[0][0])
    stages.run("environment", build.find_environment, groups[0][1])
    stages.outputs = outputs
    found = stages.environment
    if not found or not (found.get("available") or options.rehearse):
        reason = stages.results["stages"]["environment"].get("reason") or (
            "there is no GPU here that torch can use "
            f"(torch {found['torch']}, CUDA {found['cuda']}). The package is tested without one by "
            "`make test`."
        )
        print(f"make gpu: {reason}", file=sys.stderr)
        return 2
    # A stage by itself takes what an earlier call has built.
    if options.stage not in (None, 1) and not build.is_built(stages):
        groups[0][1].insert(0, "build")
    for place, (number, names) in enumerate(groups):
        if place > 0:
            stages.begin(number)
        for later, name in enumerate(names, 1):
            stages.run(name, PARTS[name], names[later:])
        stages.finish()
    if options.out:
        shutil.copy2(stages.build / "gpu.log", outputs[-1] / "gpu.log")
    for name in ("short", "step"):
        for target in stages.results.get(name, {}).get("targets", []):
            met = {True: "met", False: "MISSED", None: "-"}[target["met"]]
            print(f"{met:>6}  {target['what']}: {target['measured']} ({target['target']})")
    return stages.exit_code()


if __name__ == "__main__":
    sys.exit(main())
