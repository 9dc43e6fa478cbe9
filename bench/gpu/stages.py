# SPDX-License-Identifier: BSD-3-Clause
"""The stages of run.py: runs their parts within the time there is and writes what they find."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import report
from gpu import witness
from gpu.sources import ROOT, sources_digest
from provenance import commit as checked_out

GPU = pathlib.Path(__file__).resolve().parent
RESULTS = ROOT / "bench" / "results"
SCHEMA = 1
# Seconds: what a part may take at most, and what earlier ones of its stage must leave for it.
LIMITS = {
    "environment": (120, 0),  # torch's first import off a cold disk
    "build": (200, 0),
    "checks": (90, 50),
    "small_step": (90, 40),
    "short": (350, 120),
    "tests": (120, 0),
    "step": (230, 60),
    "training": (80, 45),
    "sanitizer": (150, 20),
    "profile": (90, 20),
}


class Stage(NamedTuple):
    """A stage of the command."""

    name: str
    seconds: float | None  # what it may take; None: until the deadline of all
    parts: tuple[str, ...]  # in their order


STAGES = {
    1: Stage("does it work", 240, ("build", "checks", "small_step")),
    2: Stage("what does it cost", 360, ("short",)),
    3: Stage("the rest", None, ("tests", "step", "training", "sanitizer")),
}
# 14 minutes for everything: a device is lent for 15.
BUDGET = 840


class Failed(RuntimeError):
    """A part did not do what it should; the message says what."""


class Stages:
    """Runs the parts of the stages and keeps what they find.

    Args:
        build: Folder for everything that is built.
        outputs: Folders the results are written to.
        budget: Seconds for everything.
        rehearsal: Go through the stages on the CPU with tiny sizes; nothing found is a result.
        commit: Commit of the sources, where no repository tells it.
        most: Seconds that any part may take, in place of LIMITS.
    """

    def __init__(
        self, build: pathlib.Path, outputs: Sequence[pathlib.Path], *, budget: float = BUDGET,
        rehearsal: bool = False, commit: str | None = None, most: float | None = None,
    ) -> None:  # fmt: skip
        self.build, self.outputs, self.rehearsal = build, list(outputs), rehearsal
        # A rehearsal runs beside other tests, on few cores.
        self._slower = 2 if rehearsal else 1
        self.site, self.work = build / "site", build / "work"
        self.deadline = self.end = time.monotonic() + budget
        self.limit, self.most = 0.0, most
        self.environment: dict = {}
        # Names of the parts, where they are single ones: no run replaces another's results.
        self.part: list[str] = []
        self.number: int | None = None
        self._mine: list[str] = []  # parts and results of this stage
        self._first_page = 0
        self.results: dict = {
            "schema": SCHEMA,
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "rehearsal": rehearsal,
            "commit": commit or checked_out(),
            "sources": sources_digest(),
            "stages": {},
        }
        self.pages: list[str] = []
        self.work.mkdir(parents=True, exist_ok=True)
        self.log = (build / "gpu.log").open("w", encoding="utf-8")

    def begin(self, number: int | None) -> None:
        """Begins a stage; None: single parts, which have all the time."""
        self.number, self._mine, self._first_page = number, [], len(self.pages)
        self.end = self.deadline
        if number is None:
            return
        stage, begin = STAGES[number], time.monotonic()
        if stage.seconds is not None:
            self.end = min(self.deadline, begin + stage.seconds * self._slower)
        left = max(0.0, self.end - begin)
        self.say(f"\n# Stage {number}: {stage.name} (at most {left:.0f} s)")

    def finish(self) -> None:
        """Prints the stage's table and writes its results."""
        if self.number is not None:
            self.say(f"\nstage {self.number}, {STAGES[self.number].name}: {self._state()}")
        self.say("\n" + self.summary(self._mine))
        self.write()

    def exit_code(self) -> int:
        """Returns 1 if a part failed, or found no time that was set aside for it."""
        return int(any(map(self._failed, self.results["stages"])))

    def _state(self) -> str:
        return "failed" if any(map(self._failed, self._mine)) else "ok"

    def _failed(self, name: str) -> bool:
        found = self.results["stages"][name]
        set_aside = {part for stage in STAGES.values() if stage.seconds for part in stage.parts}
        return found["status"] == "failed" or "late" in found and name in set_aside

    def run(self, name: str, part: Callable[[Stages], dict], later: Sequence[str]) -> None:
        """Runs one part within its share of what is left, and writes the results."""
        begin = time.monotonic()
        left = self.end - begin - sum(LIMITS[stage][1] for stage in later)
        self.limit = min(self.most or LIMITS[name][0] * self._slower, left)
        self.say(f"\n## {name} (at most {max(0, self.limit):.0f} s)")
        if self.limit < 5:
            found = {"status": "not run", "reason": "no time was left for it", "late": True}
        else:
            try:
                found = {"status": "ok", **part(self)}
            except Failed as error:
                found = {"status": "failed", "reason": str(error)}
            except Exception as error:  # nothing that one part meets may cost the others
                found = {"status": "failed", "reason": report.first_line(error)}
        found["seconds"] = round(time.monotonic() - begin, 1)
        self.results["stages"][name] = found
        self._mine.append(name)
        self.say(f"{name}: {found['status']} {found.get('reason', '')} ({found['seconds']} s)")
        self.write()

    def command(
        self, command: Sequence[object], *, limit: float | None = None, show: bool = False, **more
    ) -> tuple[int | None, str]:
        """Runs a command; returns its exit code (None: it was stopped at its limit) and output."""
        process = self.start(command, more, subprocess.PIPE)
        lines: list[str] = []

        def read() -> None:
            for line in process.stdout:
                lines.append(line)
                self.log.write(line)
                if show:
                    print(line, end="", flush=True)

        # Apart: a process that hangs in the driver may keep its output open after its end.
        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        code = wait(process, self.limit if limit is None else limit)
        reader.join(10)
        self.log.flush()
        return code, "".join(lines)

    def start(self, command: Sequence[object], more: dict[str, str], stdout) -> subprocess.Popen:
        """Starts a command for which what was built is installed; ``more``: its environment."""
        paths = [str(self.site), *filter(None, [os.environ.get("PYTHONPATH")])]
        variables = {
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
            "TRITON_CACHE_DIR": str(self.build / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.build / "inductor"),
            # A few kernels are compiled sooner than a pool of processes is started.
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            # What else is installed for pytest must not have a say.
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        }
        return subprocess.Popen(
            list(map(str, command)), cwd=self.work, env={**os.environ, **variables, **more},
            text=True, errors="replace", stdin=subprocess.DEVNULL, stdout=stdout,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def say(self, line: str) -> None:
        """Prints a line and keeps it in the log."""
        print(line, flush=True)
        self.log.write(line + "\n")
        self.log.flush()

    def write(self) -> None:
        """Writes what is known so far."""
        begun = [slug(self.environment.get("name") or "unknown"), self.results["date"][:10]]
        files = {"-".join([*begun, *self.part]): (self.results, self.page())}
        if self.number is not None:
            stem = "-".join([*begun, f"stage{self.number}"])
            files[stem] = (self._of_stage(), self.page(self._mine, self.pages[self._first_page :]))
        for folder in self.outputs:
            with contextlib.suppress(OSError):  # a read-only checkout
                folder.mkdir(parents=True, exist_ok=True)
                for stem, (results, page) in files.items():
                    report.write_json(folder / f"{stem}.json", results)
                    report.replace(folder / f"{stem}.md", page)

    def _of_stage(self) -> dict:
        """Returns the results of this stage: where, when, with what, and what its parts found."""
        common = ("schema", "date", "rehearsal", "commit", "sources")
        versions = ("python", "torch", "cuda", "triton")
        return {
            **{name: self.results[name] for name in common},
            "device": self.environment.get("name"),
            "versions": {name: self.environment.get(name) for name in versions},
            "stage": self.number,
            "status": self._state(),
            "stages": {name: self.results["stages"][name] for name in self._mine},
            **{name: self.results[name] for name in self._mine if name in self.results},
        }

    def page(self, names: Iterable[str] | None = None, pages: Sequence[str] | None = None) -> str:
        """Returns the results, or those of some parts, as markdown."""
        lines = [f"# {self.environment.get('name')}, {self.results['date']}\n"]
        if self.rehearsal:
            lines.append("**A rehearsal on a CPU: no number here means anything.**\n")
        pages = self.pages if pages is None else pages
        return "\n".join([*lines, self.summary(names), *pages]) + "\n"

    def summary(self, names: Iterable[str] | None = None) -> str:
        """Returns the table of the parts."""
        parts = self.results["stages"]
        rows = []
        for name in parts if names is None else names:
            found = parts[name]
            words = found.get("summary") or found.get("reason") or " "
            rows.append((name, found["status"], found["seconds"], words.splitlines()[0].strip()))
        return f"| part | status | s | |\n|---|---|---:|---|\n{table_rows(*rows)}\n"


def wait(process: subprocess.Popen, seconds: float) -> int | None:
    """Returns the exit code, or None if the process had to be ended."""
    try:
        return process.wait(max(0.1, seconds))
    except subprocess.TimeoutExpired:
        kill(process)
        return None


def kill(process: subprocess.Popen) -> None:
    """Ends a process and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    # One that hangs in the driver does not end.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)


def slug(name: str) -> str:
    """Returns a device's name as part of a file name: ``NVIDIA H100 80GB`` → ``h100-80gb``."""
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return words.removeprefix("nvidia-").removeprefix("geforce-") or "unknown"


def tail(output: str, lines: int = 8) -> str:
    """Returns the last lines."""
    return "\n".join(output.strip().splitlines()[-lines:])


def ended(code: int | None) -> str:
    """Returns how a process ended, in words."""
    words = {None: "stopped at its limit", witness.LOST: "the device was lost"}
    return words.get(code, f"exit code {code}")


def block(title: str, lines: Iterable[str]) -> str:
    """Returns lines as they are, in markdown."""
    return "\n".join([f"### {title}\n", "```", *lines, "```\n"])


def table_rows(*rows: Iterable[object]) -> str:
    """Returns rows of a markdown table."""
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)
