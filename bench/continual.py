# SPDX-License-Identifier: BSD-3-Clause
"""Continual multimodal instruction tuning, small: does guidance reduce forgetting?

    python bench/continual.py --preset tiny --out runs/tiny  # docs/forgetting.md has more seeds
    python bench/continual.py --preset tiny --out runs/tiny --resume   # go on after an interruption
    python bench/continual.py --preset full --out runs/full  # more seeds, the paper's ablations
    python bench/continual.py --tune --out runs/tune         # how hyper-parameters were chosen
    python bench/continual.py --pretrain                     # make minivqa/base.safetensors again

Writes results.json, table.md, continual.png, matrices/*.csv and checkpoints to the folder.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
import queue
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from provenance import commit, cpu_model, uncommitted_changes
from report import replace

# Two processes of one thread each beat one process of two threads at this size, and one thread adds
# up in one order only. The variables must be set before torch is loaded, in the workers too.
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_variable] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class Job(NamedTuple):
    """One method, one seed."""

    method: Any
    settings: Any
    seed: int
    name: str


class Preset(NamedTuple):
    """What a preset runs."""

    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    settings: dict[str, Any]
    changes: dict[str, Any] = {}  # to all methods


# The sizes of an experiment. Learning rates, alpha and penalty of every method, all of them in
# METHODS, were chosen on seeds 100 and 101 and their validation items; no reported seed was looked
# at. Many small steps: a sub-task is then learnt about as well as it can be, and what is missing in
# the end was forgotten.
_TINY = {
    "steps": 260,
    "train_items": 600,
    "test_items": 200,
    "replay_per_task": 6,  # 1 % of a sub-task, the share of the 500 examples of the paper on VQAv2
    "replay_share": 0.25,
}
# Too short to learn anything, long enough that every method leaves the others' path.
_SMOKE = {**_TINY, "steps": 4, "train_items": 48, "test_items": 24, "batch": 16, "warmup": 2}
_ALL = ("joint", "guidance_replay", "l2sp", "replay", "guidance", "sequential")
PRESETS = {
    "smoke": Preset(_ALL, (0,), _SMOKE, {"lr": 1e-2}),
    "tiny": Preset(_ALL, (0, 1, 2), _TINY),
    "full": Preset((*_ALL, "no_scaling", "no_bernoulli"), (0, 1, 2, 3, 4), _TINY),
}
TUNING_SEEDS = (100, 101)


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.pretrain:
        return _pretrain()
    if options.out is None:
        parser.error("--out is needed")
    preset = PRESETS[options.preset]
    out: Path = options.out
    # What runs is what is loaded now, whatever is committed meanwhile.
    began, origin = time.perf_counter(), _provenance()
    jobs = _tuning_jobs(options) if options.tune else _jobs(preset, options)
    _prepare(out, jobs, options.resume)
    todo = [job for job in jobs if not _result_path(out, job).exists()]
    if len(todo) < len(jobs):
        print(f"{len(jobs) - len(todo)} of {len(jobs)} runs are finished already")
    if todo:
        workers = max(1, min(options.workers, len(todo)))
        if not _work(todo, out, options.resume, workers, quiet=options.quiet):
            return 1
    results = [json.loads(_result_path(out, job).read_text(encoding="utf-8")) for job in jobs]
    _report(results, jobs, out, options, time.perf_counter() - began, origin)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), default="tiny")
    parser.add_argument("--out", type=Path, help="the folder for results and checkpoints")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last finished sub-task"
    )
    parser.add_argument("--methods", nargs="+", metavar="M", help="instead of the preset's")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="S", help="instead of the preset's")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument(
        "--tune", action="store_true", help="run the tuning grid on validation seeds"
    )
    parser.add_argument(
        "--pretrain", action="store_true", help="make the base model again and exit"
    )
    return parser


def _jobs(preset: Preset, options) -> list[Job]:
    from minivqa.methods import METHODS, Settings, variant

    names = tuple(options.methods or preset.methods)
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise SystemExit(f"no method {', '.join(unknown)}; there are {', '.join(METHODS)}")
    settings = Settings(**preset.settings)
    seeds = tuple(dict.fromkeys(options.seeds or preset.seeds))
    # Seed by seed, so that a worker can keep the images of a seed for all its methods.
    return [
        Job(variant(name, **preset.changes), settings, seed, f"{name}-{seed}")
        for seed in seeds
        for name in names
    ]


# The points at which methods were compared on validation items: learning rates, and the knob of
# each. bench/results/continual-tune-2026-11-21.json has them and everything tried before.
_GRID = (
    *(("replay", {"lr": lr}) for lr in (1e-3, 1.5e-3, 2e-3, 3e-3)),
    *(("guidance_replay", {"lr": 1.5e-3, "alpha": alpha}) for alpha in (0.05, 0.1)),
    *(("guidance_replay", {"lr": 3e-3, "alpha": alpha}) for alpha in (0.05, 0.1, 0.2)),
    ("l2sp", {"lr": 1.5e-3, "penalty": 0.1}),
    *(("l2sp", {"lr": 3e-3, "penalty": penalty}) for penalty in (0.1, 0.3, 1.0)),
    ("guidance", {"lr": 3e-3, "alpha": 0.1}),
)


def _tuning_jobs(options) -> list[Job]:
    """The grid on the validation items of seeds that are never reported."""
    from minivqa.methods import Settings, variant

    settings = Settings(**_TINY, split="validation")
    wanted = tuple(options.methods or ())
    return [
        Job(variant(name, **changes), settings, seed, f"{_point(name, changes)}-{seed}")
        for seed in options.seeds or TUNING_SEEDS
        for name, changes in _GRID
        if not wanted or name in wanted
    ]


def _point(name: str, changes: dict[str, float]) -> str:
    return "-".join([name, *(f"{key}{value:g}" for key, value in changes.items())])


def _result_path(out: Path, job: Job) -> Path:
    return out / "runs" / f"{job.name}.json"


def _checkpoint_path(out: Path, job: Job) -> Path:
    return out / "checkpoints" / f"{job.name}.pt"


def _prepare(out: Path, jobs: list[Job], resume: bool) -> None:
    """Make the folder; without --resume remove what earlier runs of the same names left there."""
    from minivqa.methods import fingerprint

    for folder in ("runs", "checkpoints", "matrices"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for part in (out / "checkpoints").glob("*.part"):
        part.unlink()  # half a checkpoint of a killed run
    for job in jobs:
        result = _result_path(out, job)
        if not resume:
            result.unlink(missing_ok=True)
            _checkpoint_path(out, job).unlink(missing_ok=True)
        elif result.exists():
            found = json.loads(result.read_text(encoding="utf-8")).get("fingerprint")
            if found != fingerprint(job.method, job.settings, job.seed):
                raise SystemExit(f"{result} is of another experiment; use another --out")


def _work(jobs: list[Job], out: Path, resume: bool, workers: int, *, quiet: bool) -> bool:
    """Run the jobs in processes of their own, with a progress bar each; False if one failed."""
    from tqdm import tqdm

    context = multiprocessing.get_context("spawn")
    waiting, news = context.Queue(), context.Queue()
    for job in jobs:
        waiting.put(job)
    for _ in range(workers):
        waiting.put(None)
    processes = []
    for k in range(workers):
        more = (k, os.getpid(), waiting, news, out, resume)
        processes.append(context.Process(target=_worker, args=more, daemon=True))
        processes[-1].start()
    total = tqdm(total=len(jobs), desc="runs", position=0, disable=quiet, dynamic_ncols=True)
    bars = [
        tqdm(position=k + 1, disable=quiet, leave=False, dynamic_ncols=True) for k in range(workers)
    ]
    failed = finished = 0
    try:
        while finished < workers:
            try:
                kind, worker, *rest = news.get(timeout=5)
            except queue.Empty:
                dead = [p for p in processes if not p.is_alive() and p.exitcode]
                if dead:
                    print(f"a worker ended with code {dead[0].exitcode}", file=sys.stderr)
                    return False
                continue
            if kind == "start":
                bars[worker].reset(total=rest[1])
                bars[worker].set_description(rest[0])
            elif kind == "step":
                bars[worker].update(rest[0] - bars[worker].n)
            elif kind == "result":
                total.update()
                print(rest[0], flush=True) if quiet else total.write(rest[0])
            elif kind == "error":
                failed += 1
                print(rest[0], file=sys.stderr)
            else:
                finished += 1
    finally:
        for bar in (*bars, total):
            bar.close()
        for process in processes:
            if failed or finished < workers:
                process.terminate()
            process.join(timeout=10)
    return not failed


def _worker(index: int, parent: int, waiting, news, out: Path, resume: bool) -> None:
    """Take jobs until there are none; end quietly when the parent is gone."""
    import torch

    from minivqa import methods

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)

    def orphaned() -> bool:
        # A killed parent cannot tell its workers; left alone they would go on writing
        # checkpoints while a resumed run does the same.
        return os.getppid() != parent

    while not orphaned():
        try:
            job = waiting.get(timeout=2)
        except queue.Empty:
            continue
        if job is None:
            break
        stages = len(methods.scenes.SEQUENCE)
        news.put(("start", index, job.name, job.settings.steps * stages))

        def progress(stage: int, step: int, steps=job.settings.steps) -> None:
            if step % 10 == 0 or step == steps:
                news.put(("step", index, stage * steps + step))

        try:
            result = methods.run(
                job.method, job.settings, job.seed, _checkpoint_path(out, job), resume=resume,
                progress=progress, stop=orphaned,
            )  # fmt: skip
        except methods.Interrupted:
            break
        except Exception:
            news.put(("error", index, f"{job.name}:\n{traceback.format_exc()}"))
            continue
        result["run"] = job.name
        result["fingerprint"] = methods.fingerprint(job.method, job.settings, job.seed)
        replace(_result_path(out, job), json.dumps(result, indent=1) + "\n")
        _checkpoint_path(out, job).unlink(missing_ok=True)
        text = f"{job.name:28s} FAA {result['faa']:5.1f}   {result['seconds']:4.0f} s"
        news.put(("result", index, text))
    news.put(("end", index))


def _report(results, jobs: list[Job], out: Path, options, seconds: float, origin) -> None:
    from minivqa import report

    for result in results:
        del result["fingerprint"]
    config = {
        "preset": "tune" if options.tune else options.preset,
        "methods": list(dict.fromkeys(job.method.name for job in jobs)),
        "seeds": list(dict.fromkeys(job.seed for job in jobs)),
        "settings": asdict(jobs[0].settings),
        "workers": options.workers,
        "resumed": options.resume,
        "wall_seconds": round(seconds, 1),
        **origin,
    }
    data = {"config": config, "results": results}
    replace(out / "results.json", json.dumps(data, indent=1) + "\n")
    if options.tune:
        print(_tuning_table(results))
        return
    from dgg.metrics import AccuracyMatrix

    for result in results:
        matrix = AccuracyMatrix.from_rows(result["matrix"], result["tasks"])
        matrix.to_csv(out / "matrices" / f"{result['run']}.csv")
    text = report.table(results)
    replace(out / "table.md", text + "\n")
    report.picture(results, out / "continual.png")
    print(f"\n{text}\n\n{len(results)} runs, {seconds:.0f} s; "
          f"{out / 'results.json'}, {out / 'continual.png'}")  # fmt: skip


def _tuning_table(results) -> str:
    """Mean FAA of every point of the grid."""
    points: dict[str, list[float]] = {}
    for result in results:
        points.setdefault(result["run"].rsplit("-", 1)[0], []).append(result["faa"])
    return "\n".join(f"{name:28s} {sum(v) / len(v):5.1f}" for name, v in points.items())


def _provenance() -> dict[str, Any]:
    """Versions, date, commit and processor."""
    versions = {}
    for package in ("dgg", "torch", "transformers", "peft", "safetensors"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "dirty": bool(uncommitted_changes()),
        "versions": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
    }


def _pretrain() -> int:
    import torch

    from minivqa import model

    torch.set_num_threads(1)
    began = time.perf_counter()
    scores = model.pretrain()
    print({name: round(value, 1) for name, value in scores.items()})
    print(f"{model.BASE_PATH}: {time.perf_counter() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
