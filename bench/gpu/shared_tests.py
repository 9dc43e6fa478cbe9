# SPDX-License-Identifier: BSD-3-Clause
"""The part of run.py that runs the tests: shared out to processes, begun again when one is lost."""

from __future__ import annotations

import collections
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from gpu import witness
from gpu.stages import ROOT, Failed, Stages, block, kill, tail

# A test that takes longer hangs: the slowest compiles a few kernels while other tests do, too.
PATIENCE = 75
# Processes that share the tests, most of whose time is compilation, and what each needs.
MOST_PARTS, PART_BYTES = 12, 6 * 2**30
# How often a part of the tests, or the benchmark, goes on after the device was lost.
RESTARTS = 5


def pytest_command(stages: Stages, *more: str) -> list[object]:
    """Returns the command that runs tests which need a GPU."""
    # Settings of its own: those of the project want a newer pytest and its plugins.
    settings = stages.work / "pytest.ini"
    marks = "".join(f"    {mark}\n" for mark in ("gpu", "dist", "slow", "compat"))
    settings.write_text(f"[pytest]\nmarkers =\n{marks}", encoding="utf-8")
    shutil.copy2(witness.__file__, stages.work)
    files = [
        path for path in sorted((ROOT / "tests").glob("test_*.py"))
        if "mark.gpu" in path.read_text(encoding="utf-8")
    ]  # fmt: skip
    return [
        sys.executable, "-m", "pytest", "-c", settings, "--rootdir", stages.work,
        "-p", "no:cacheprovider", "-p", "witness", "-v", "-ra", "-m", "gpu",
        "--continue-on-collection-errors", *more, *files,
    ]  # fmt: skip


def run_tests(stages: Stages) -> dict:
    """Runs the tests that are marked `gpu`, shared out to several processes."""
    if not stages.environment.get("pytest"):
        raise Failed("pytest is not installed here: the GPU tests were not run")
    folder = stages.work / "tests"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    command = pytest_command(stages, *(["--collect-only"] if stages.rehearsal else []))
    parts = processes(stages)
    share = [
        Part(folder, (number, parts), lambda output, more: stages.start(command, more, output))
        for number in range(parts)
    ]
    end = time.monotonic() + stages.limit
    with ThreadPoolExecutor(parts) as pool:
        list(pool.map(lambda part: part.run(end), share))
    for part in share:
        stages.log.write(part.output())
    found = summarise(record for part in share for record in witness.records(part.path))
    tails = [tail(part.output(), 12) for part in share if part.failed or part.stopped]
    page = [", ".join(f"{found[name]} {name}" for name in ("passed", "failed", "skipped"))]
    page += [f"FAILED {failure['name']}: {failure['message']}" for failure in found["failures"]]
    page += [f"{n} skipped: {reason}" for reason, n in found["skip_reasons"].items()]
    stages.say("\n".join([*page, *tails]))
    stages.pages.append(block("Tests", page))
    reasons = [part.failed for part in share if part.failed]
    if any(part.stopped for part in share):
        reasons.append("stopped at its limit; not all tests were run")
    if found["failed"]:
        names = ", ".join(failure["name"] for failure in found["failures"][:10])
        reasons.append(f"{found['passed']} passed, {found['failed']} failed: {names}")
    if reasons:
        return {**found, "status": "failed", "reason": "; ".join(dict.fromkeys(reasons))}
    if not stages.rehearsal and not found["passed"]:
        raise Failed("no test was run: none is marked gpu, or all were skipped")
    return {**found, "summary": f"{found['passed']} passed, {found['skipped']} skipped"}


def processes(stages: Stages) -> int:
    """Returns how many processes share the tests."""
    if stages.rehearsal:
        return 1
    fitting = int(stages.environment.get("memory") or 0) // PART_BYTES
    return max(1, min(MOST_PARTS, 3 * (os.cpu_count() or 1) // 4, fitting))


class Part:
    """A share of the tests, run by one process after the other until none is left.

    ``number``: which part, and of how many; ``launch``: (file for the output, environment) → a
    process that runs the tests.
    """

    def __init__(
        self, folder: pathlib.Path, number: tuple[int, int], launch: Callable[..., subprocess.Popen]
    ) -> None:
        part, parts = number
        # What the witness writes, and what the processes print.
        self.path, self._printed = folder / f"{part}.jsonl", folder / f"{part}.log"
        self.failed: str | None = None  # why the part was given up
        self.stopped = False  # it ran until the end of its time
        # Tensors on the CPU are small here, and the processes many.
        self._more = {"DGG_WITNESS": str(self.path), "DGG_PART": f"{part}/{parts}",
                      "OMP_NUM_THREADS": "2"}  # fmt: skip
        self._launch = launch

    def run(self, end: float) -> None:
        """Starts processes for the tests that are left; ends one that still runs at ``end``."""
        for _ in range(1 + RESTARTS):
            with self._printed.open("a", encoding="utf-8") as output:
                process = self._launch(output, self._more)
            quiet = self._watch(process, end)
            code, how = process.poll(), f"no end after {quiet:.0f} s"
            if code is None:
                kill(process)
                self.stopped = time.monotonic() >= end
            else:
                how = f"its process ended with exit code {code}"
            if self.stopped or code in (0, 1, 5):
                return
            open_test = witness.unfinished(witness.records(self.path))
            if open_test is not None:
                failed = {"outcome": "failed", "message": how, "seconds": 0, "lost": how}
                witness.note(self.path, test=open_test, **failed)
            elif code != witness.LOST:
                self.failed = f"pytest: {how}"
                return
        self.failed = f"the device was lost {1 + RESTARTS} times"

    def _watch(self, process: subprocess.Popen, end: float) -> float:
        """Waits for the end of a process, or of patience; returns the seconds it was quiet."""
        begun, quiet = time.time(), 0.0
        while process.poll() is None and time.monotonic() < end:
            written = self.path.stat().st_mtime if self.path.exists() else 0.0
            quiet = time.time() - max(written, begun)
            # Python and pytest take their time, too, before the first test and behind the last.
            if quiet > PATIENCE and (
                quiet > 3 * PATIENCE or witness.unfinished(witness.records(self.path))
            ):
                break
            time.sleep(0.2)
        return quiet

    def output(self) -> str:
        """Returns what the processes printed."""
        return self._printed.read_text(encoding="utf-8", errors="replace")


def summarise(found: Iterable[dict]) -> dict:
    """Returns what witnesses say: counts, failures, reasons of skips, the slowest tests."""
    ends = {record["test"]: record for record in found if "test" in record}
    by = {name: [] for name in ("passed", "failed", "skipped")}
    for record in ends.values():
        by[record["outcome"]].append(record)
    slowest = sorted(ends.values(), key=lambda record: -record["seconds"])[:10]
    return {
        **{name: len(records) for name, records in by.items()},
        "failures": [{"name": r["test"], "message": r["message"]} for r in by["failed"]],
        "skip_reasons": dict(collections.Counter(record["message"] for record in by["skipped"])),
        "lost": [record["test"] for record in ends.values() if record.get("lost")],
        "slowest": [{"name": r["test"], "seconds": r["seconds"]} for r in slowest],
    }
