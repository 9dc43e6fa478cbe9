# SPDX-License-Identifier: BSD-3-Clause
"""The parts of run.py that run a script of bench/: checks, benchmarks, training steps, profile."""

from __future__ import annotations

import json
import pathlib
import shutil
import sys
import time
from collections.abc import Sequence

from gpu import witness
from gpu.shared_tests import RESTARTS
from gpu.sources import ROOT
from gpu.stages import GPU, RESULTS, Failed, Stages, ended, table_rows, tail

# The benchmark begins no case so close to its limit.
LAST_CASE = 45


def _script(
    stages: Stages, name: str, script: pathlib.Path, *arguments: object,
    rehearsed: Sequence[str], otherwise: Sequence[str] = (),
) -> tuple[pathlib.Path, int | None, str]:  # fmt: skip
    """Runs a script of bench/; returns its folder, its exit code and what it printed."""
    folder = stages.build / name
    shutil.rmtree(folder, ignore_errors=True)
    how = rehearsed if stages.rehearsal else otherwise
    command = [sys.executable, script, "--out", folder, *how, *arguments]
    return folder, *stages.command(command, show=True)


def run_checks(stages: Stages) -> dict:
    """Runs bench/gpu/checks.py; its results stand under "checks"."""
    cpu = ["--device", "cpu"]
    folder, code, output = _script(stages, "checks", GPU / "checks.py", rehearsed=cpu)
    path = folder / "checks.json"
    if not path.exists():
        raise Failed(f"it made no check: {tail(output)}")
    found = json.loads(path.read_text(encoding="utf-8"))["checks"]
    stages.results["checks"] = found
    by = {s: [n for n, c in found.items() if c["status"] == s] for s in ("failed", "not run")}
    lines = table_rows(*((n, c["status"], c["seen"], c["seconds"]) for n, c in found.items()))
    head = "### Checks\n\n| check | status | seen | s |\n|---|---|---|---:|"
    stages.pages.append(f"{head}\n{lines}\n")
    if code != 0 or by["failed"]:
        what = [ended(code)] + [f"{name}: {found[name]['seen']}" for name in by["failed"]]
        raise Failed("; ".join(what))
    done = len(found) - len(by["not run"])
    return {"summary": f"{done} checks, {len(by['not run'])} not possible here"}


def run_short(stages: Stages) -> dict:
    """Runs the cases of bench/step.py that come first; its results stand under "short"."""
    return _benchmark(stages, "short", "gpu-short")


def run_step(stages: Stages) -> dict:
    """Runs bench/step.py; its results stand under "step"."""
    # What the second stage of this call has measured is not measured again.
    done = stages.results["stages"].get("short", {}).get("status") == "ok"
    return _benchmark(stages, "step", "gpu-rest" if done else "gpu")


def _benchmark(stages: Stages, name: str, preset: str) -> dict:
    folder = stages.build / name
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, ROOT / "bench" / "step.py", "--markdown", "--out", folder]
    command += ["--preset", "smoke", "--only", "tiny"] if stages.rehearsal else []
    command += [] if stages.rehearsal else ["--device", "cuda", "--preset", preset]
    end, lost, more = time.monotonic() + stages.limit, [], []
    for _ in range(1 + RESTARTS):
        left = end - time.monotonic()
        limits = ["--deadline", max(5.0, left - LAST_CASE)]
        code, output = stages.command([*command, *limits, *more], limit=max(5.0, left), show=True)
        files = sorted(folder.glob("*.json"))
        if code != witness.LOST or not files:
            break
        # An implementation that breaks the device is left out, the others go on.
        lost = json.loads(files[0].read_text(encoding="utf-8"))["lost"]
        more = ["--resume", files[0]]
    found = _take(stages, name, folder, code, output)
    cases, skipped = len(found["cases"]), len(found["skipped"])
    missed = [t["what"] for t in found["targets"] if t["met"] is False]
    judged = sum(t["met"] is not None for t in found["targets"])
    met = f"{judged - len(missed)} of {judged} targets met"
    summary = f"{cases} cases, {skipped} skipped; {met}"
    if lost:
        names = ", ".join(f"{x['name']} ({x['setting']}) in {x['case']}" for x in lost)
        reason = f"the device was lost by {names}; {summary}"
        return {"status": "failed", "reason": reason, "missed": missed}
    return {"missed": missed, "summary": summary}


def run_training(stages: Stages) -> dict:
    """Runs bench/training_step.py; its results stand under "training"."""
    lost = [x for name in ("short", "step") for x in stages.results.get(name, {}).get("lost", [])]
    without = [word for x in lost for word in ("--without", x["name"])]
    folder, code, output = _script(
        stages, "training", ROOT / "bench" / "training_step.py", "--deadline",
        max(5.0, stages.limit - 15), *without, rehearsed=["--preset", "smoke"],
        otherwise=["--device", "cuda"],
    )  # fmt: skip
    found = _take(stages, "training", folder, code, output)
    return {"summary": f"{len(found['cases'])} models"}


def run_profile(stages: Stages) -> dict:
    """Profiles LoRA steps with bench/gpu/nsys_step.py; trace or report go to the results."""
    tiny = ["--shape", "tiny", "--device", "cpu"]
    nsys = GPU / "nsys_step.py"
    folder, code, output = _script(stages, "profile", nsys, "--launch", rehearsed=tiny)
    made = sorted(path for path in folder.glob("step*") if path.is_file())
    for target in stages.outputs:
        if target == RESULTS:
            continue
        target.mkdir(parents=True, exist_ok=True)
        for path in made:
            if path.stat().st_size < 16 * 2**20:  # larger ones are left where they are
                shutil.copy2(path, target / path.name)
    stages.pages.append(f"### Profile\n\n{output}\n")
    if code != 0:
        raise Failed(f"{ended(code)}: {tail(output)}")
    return {"summary": ", ".join(path.name for path in made)}


def _take(stages: Stages, name: str, folder: pathlib.Path, code: int | None, output: str) -> dict:
    """Returns the results that a script left, which go into those of all, its page likewise."""
    files = sorted(folder.glob("*.json"))
    if files:
        stages.results[name] = json.loads(files[0].read_text(encoding="utf-8"))
    for page in sorted(folder.glob("*.md")):
        stages.pages.append(page.read_text(encoding="utf-8"))
    if code != 0:
        raise Failed(f"{ended(code)}: {tail(output)}")
    if not files:
        raise Failed(f"it wrote no results: {tail(output)}")
    return stages.results[name]
