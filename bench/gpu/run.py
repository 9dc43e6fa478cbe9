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
went well, 1 if a part failed, hung, or found no time in the first two stages, 2 without a GPU. A
stage prints its table when it ends and leaves bench/results/<device>-<date>-stage<n>.json and .md;
all of them together are in <device>-<date>.json; those of single parts say which.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import report
from gpu import witness

GPU = pathlib.Path(__file__).resolve().parent
ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
SCHEMA = 1
SOURCES = ("dgg", "kernels", "csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE",
           "MANIFEST.in")  # fmt: skip

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
    """A stage of the command.

    Attributes:
        name: For its table.
        seconds: What it may take; None: until the deadline of all.
        parts: Its parts, in order.
    """

    name: str
    seconds: float | None
    parts: tuple[str, ...]


STAGES = {
    1: Stage("does it work", 240, ("build", "checks", "small_step")),
    2: Stage("what does it cost", 360, ("short",)),
    3: Stage("the rest", None, ("tests", "step", "training", "sanitizer")),
}
# 14 minutes for everything: a device is lent for 15.
BUDGET = 840
# The two tools of compute-sanitizer for a small step, and the line that each ends with.
TOOLS = {"memcheck": r"ERROR SUMMARY: (\d+) error", "racecheck": r"RACECHECK SUMMARY: (\d+) hazard"}
# Without torch's cache every tensor is an allocation of its own, with an end to run over.
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
# The benchmark begins no case so close to its limit.
LAST_CASE = 45
# A test that takes longer hangs: the slowest compiles a few kernels while other tests do, too.
PATIENCE = 75
# Processes that share the tests, most of whose time is compilation, and what each needs.
MOST_PARTS, PART_BYTES = 12, 6 * 2**30
# How often a part of the tests, or the benchmark, goes on after the device was lost.
RESTARTS = 5

_ENVIRONMENT = """
import importlib.metadata, json, platform
import torch
found = {"python": platform.python_version(), "torch": torch.__version__,
         "cuda": torch.version.cuda, "hip": torch.version.hip, "available": False}
try:
    import triton
    found["triton"] = triton.__version__
except Exception as error:
    found["triton"] = f"not importable: {error}"
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    found.update(available=True, name=p.name, capability=f"{p.major}.{p.minor}",
                 memory=p.total_memory, devices=torch.cuda.device_count(),
                 multiprocessors=p.multi_processor_count, cache=getattr(p, "L2_cache_size", None))
for name in ("pytest", "setuptools", "pip"):
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found[name] = None
print("FOUND " + json.dumps(found))
"""
_CONFIG = """
import json, sys, torch, dgg, dgg.kernels
sys.path.append(sys.argv[1])
import peers
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
missing = {name: peers.unavailable(name, device) for name in ("cpp", "triton")}
print("FOUND " + json.dumps({"dgg": dgg.__file__, "config": dgg.show_config(), "missing": missing}))
"""


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
        most: Seconds that any stage may take, in place of LIMITS.
    """

    def __init__(
        self,
        build: pathlib.Path,
        outputs: Sequence[pathlib.Path],
        *,
        budget: float = BUDGET,
        rehearsal: bool = False,
        commit: str | None = None,
        most: float | None = None,
    ) -> None:
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
            "commit": commit or report.commit(),
            "sources": sources_digest(),
            "stages": {},
        }
        self.pages: list[str] = []
        self.work.mkdir(parents=True, exist_ok=True)
        self._log = (build / "gpu.log").open("w", encoding="utf-8")

    # -- running --------------------------------------------------------------------------------

    def begin(self, number: int | None) -> None:
        """Begins a stage; None: single parts, which have all the time."""
        self.number, self._mine, self._first_page = number, [], len(self.pages)
        seconds = None if number is None else STAGES[number].seconds
        if seconds is not None:
            seconds *= self._slower
        begin = time.monotonic()
        self.end = self.deadline if seconds is None else min(self.deadline, begin + seconds)
        if number is not None:
            left = max(0.0, self.end - begin)
            self.say(f"\n# Stage {number}: {STAGES[number].name} (at most {left:.0f} s)")

    def finish(self) -> None:
        """Prints the stage's table and writes its results."""
        if self.number is not None:
            found = self._state()
            self.say(f"\nstage {self.number}, {STAGES[self.number].name}: {found}")
        self.say("\n" + self.summary(self._mine))
        self.write()

    def exit_code(self) -> int:
        """Returns 1 if a part failed, or found no time that was set aside for it."""
        return int(any(map(self._failed, self.results["stages"])))

    def _state(self) -> str:
        """Returns "ok" or "failed"."""
        return "failed" if any(map(self._failed, self._mine)) else "ok"

    def _failed(self, name: str) -> bool:
        found = self.results["stages"][name]
        set_aside = [stage.parts for stage in STAGES.values() if stage.seconds is not None]
        late = found.get("late", False) and any(name in parts for parts in set_aside)
        return found["status"] == "failed" or late

    def run(self, name: str, function: Callable[[], dict], later: Sequence[str]) -> None:
        """Runs one part within its share of what is left, and writes the results."""
        left = self.end - time.monotonic() - sum(LIMITS[stage][1] for stage in later)
        most = self.most or LIMITS[name][0] * self._slower
        self.limit = min(most, left)
        begin = time.monotonic()
        self.say(f"\n## {name} (at most {max(0, self.limit):.0f} s)")
        if self.limit < 5:
            found = {"status": "not run", "reason": "no time was left for it", "late": True}
        else:
            try:
                found = {"status": "ok", **function()}
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
        limit = self.limit if limit is None else limit
        process = self._start(command, more, stdout=subprocess.PIPE)
        lines: list[str] = []

        def read() -> None:
            for line in process.stdout:
                lines.append(line)
                self._log.write(line)
                if show:
                    print(line, end="", flush=True)

        # Apart: a process that hangs in the driver may keep its output open after its end.
        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        code = _wait(process, limit)
        reader.join(10)
        self._log.flush()
        return code, "".join(lines)

    def _start(self, command: Sequence[object], more: dict, stdout) -> subprocess.Popen:
        return subprocess.Popen(
            [str(part) for part in command],
            cwd=self.work, env={**os.environ, **self._variables(), **more}, text=True,
            errors="replace", stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip

    def _variables(self) -> dict[str, str]:
        paths = [str(self.site), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
            "TRITON_CACHE_DIR": str(self.build / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.build / "inductor"),
            # A few kernels are compiled sooner than a pool of processes is started.
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            # What else is installed for pytest must not have a say.
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        }

    def say(self, line: str) -> None:
        """Prints a line and keeps it in the log."""
        print(line, flush=True)
        self._log.write(line + "\n")
        self._log.flush()

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
        versions = {name: self.environment.get(name) for name in ("python", "torch", "cuda",
                                                                  "triton")}  # fmt: skip
        common = ("schema", "date", "rehearsal", "commit", "sources")
        return {
            **{name: self.results[name] for name in common},
            "device": self.environment.get("name"),
            "versions": versions,
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
        return f"| part | status | s | |\n|---|---|---:|---|\n{_rows(*rows)}\n"

    # -- the parts ------------------------------------------------------------------------------

    def find_environment(self) -> dict:
        """What is here: torch, Triton, Python, the GPU and how it is set."""
        code, output = self.command([sys.executable, "-c", _ENVIRONMENT])
        if (found := _found(output)) is None:
            raise Failed(f"torch cannot be imported by {sys.executable}: {_tail(output)}")
        self.environment = found
        smi = shutil.which("nvidia-smi")
        report = self.command([smi, "-q"], limit=20)[1] if smi else "no nvidia-smi"
        wanted = ("Driver Version", "CUDA Version", "Product Name", "Performance State", "Power",
                  "Graphics", "SM  ", "Memory  ", "Gpu  ", "ECC Mode", "Current  ", "MIG Mode",
                  "Persistence")  # fmt: skip
        kept = [line.strip() for line in report.splitlines() if line.strip().startswith(wanted)]
        nvcc = _tool("nvcc")
        version = self.command([nvcc, "--version"], limit=20)[1] if nvcc else ""
        return {
            "found": found,
            "nvidia_smi": kept[:60],
            "nvcc": nvcc and version.strip().splitlines()[-1:],
            "sanitizer": _sanitizer(),
            "summary": f"{found.get('name')}, torch {found['torch']}, Triton {found['triton']}, "
            f"Python {found['python']}",
        }

    def build_package(self) -> dict:
        """Builds dgg with its CUDA library into build/gpu/site, from a copy of the sources."""
        source = self.build / "source"
        # The copy keeps its build folder, so that a second run compiles only what has changed.
        for name in SOURCES:
            target, origin = source / name, ROOT / name
            if origin.is_dir():
                shutil.rmtree(target, ignore_errors=True)
                ignored = shutil.ignore_patterns("__pycache__", "*.so", "_build_error*")
                shutil.copytree(origin, target, ignore=ignored)
            else:
                source.mkdir(parents=True, exist_ok=True)
                shutil.copy2(origin, target)
        capability = self.environment.get("capability")
        cuda = {"DGG_CPP": "1", "DGG_CUDA": "1", "MAX_JOBS": str(os.cpu_count() or 1)}
        if capability:
            cuda["TORCH_CUDA_ARCH_LIST"] = capability
        attempts = {"with CUDA": cuda, "without CUDA": {"DGG_CUDA": "0"}}
        if self.rehearsal:
            del attempts["with CUDA"]
        notes = []
        for words, variables in attempts.items():
            shutil.rmtree(self.site, ignore_errors=True)
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-v"]
            options = ["--no-build-isolation", "--no-deps", "--no-index", "--target", self.site]
            begin = time.monotonic()
            code, output = self.command([*pip, *options, source], limit=self.limit, **variables)
            self.limit -= time.monotonic() - begin
            if code == 0:
                return self._built(words, notes)
            notes.append(f"{words}: {'stopped at its limit' if code is None else _tail(output)}")
        # Triton needs no compiler: what is Python alone can still be measured.
        for name, target in (("dgg", "dgg"), ("kernels", "dgg/kernels")):
            shutil.copytree(source / name, self.site / target, dirs_exist_ok=True)
        return self._built("Python alone", notes)

    def _built(self, words: str, notes: list[str]) -> dict:
        _, output = self.command([sys.executable, "-c", _CONFIG, GPU.parent], limit=120)
        found = _found(output)
        if found is None:
            raise Failed(f"dgg built {words} cannot be imported: {_tail(output)}")
        if self.site not in pathlib.Path(found["dgg"]).parents:
            raise Failed(f"another dgg is imported than the one that was built: {found['dgg']}")
        libraries = {p.name: p.stat().st_size for p in self.site.glob("dgg/*.so")}
        self.say(found["config"])
        result = {"how": words, "notes": notes, "libraries": libraries, **found}
        if words == "with CUDA" or self.rehearsal:
            report.replace(self.build / "built.json", json.dumps(self._recipe()))
        for name, reason in found["missing"].items() if not self.rehearsal else ():
            if reason is not None and not (name == "cpp" and words != "with CUDA"):
                notes.append(f"{name} cannot run: {reason}")
        if notes:
            # Something can be measured, but not everything.
            reason = f"built {words}; {' | '.join(notes)}"
            return {**result, "status": "failed", "reason": reason}
        return {**result, "summary": f"{words}: {', '.join(libraries)}"}

    def _recipe(self) -> list[object]:
        """Returns what a build depends on."""
        wanted = ("torch", "capability", "python")
        return [built_digest(), *(self.environment.get(name) for name in wanted)]

    def is_built(self) -> bool:
        """Returns whether an earlier call has built what is to be run."""
        made = self.build / "built.json"
        if not made.exists() or not (self.site / "dgg" / "__init__.py").exists():
            return False
        return json.loads(made.read_text(encoding="utf-8")) == self._recipe()

    def _script(
        self, name: str, script: pathlib.Path, *arguments: object,
        rehearsed: Sequence[str], otherwise: Sequence[str] = (),
    ) -> tuple[pathlib.Path, int | None, str]:  # fmt: skip
        """Runs a script of bench/; returns its folder, its exit code and what it printed."""
        folder = self.build / name
        shutil.rmtree(folder, ignore_errors=True)
        how = rehearsed if self.rehearsal else otherwise
        command = [sys.executable, script, "--out", folder, *how, *arguments]
        return folder, *self.command(command, show=True)

    def run_checks(self) -> dict:
        """Runs bench/gpu/checks.py; its results stand under "checks"."""
        cpu = ["--device", "cpu"]
        folder, code, output = self._script("checks", GPU / "checks.py", rehearsed=cpu)
        path = folder / "checks.json"
        if not path.exists():
            raise Failed(f"it made no check: {_tail(output)}")
        found = json.loads(path.read_text(encoding="utf-8"))["checks"]
        self.results["checks"] = found
        by = {s: [n for n, c in found.items() if c["status"] == s] for s in ("failed", "not run")}
        rows = _rows(*((n, c["status"], c["seen"], c["seconds"]) for n, c in found.items()))
        head = "### Checks\n\n| check | status | seen | s |\n|---|---|---|---:|"
        self.pages.append(f"{head}\n{rows}\n")
        if code != 0 or by["failed"]:
            what = [_ended(code)] + [f"{name}: {found[name]['seen']}" for name in by["failed"]]
            raise Failed("; ".join(what))
        done = len(found) - len(by["not run"])
        return {"summary": f"{done} checks, {len(by['not run'])} not possible here"}

    def run_small_step(self) -> dict:
        """Runs a small step of every kernel under memcheck and racecheck, side by side."""
        sanitizer = _sanitizer()
        if sanitizer is None:
            return {"status": "not run", "reason": "compute-sanitizer is not installed here"}
        script = [sys.executable, GPU / "checks.py", "--small-step"]
        script += ["--device", "cpu"] if self.rehearsal else []
        end, running, counted, bad, refused = time.monotonic() + self.limit, {}, {}, [], []
        for tool in TOOLS:
            printed = self.work / f"{tool}.log"
            with printed.open("w", encoding="utf-8") as output:
                command = [*_sanitized(tool, sanitizer), *script]
                running[tool] = self._start(command, UNCACHED, output), printed
        for tool, (process, printed) in running.items():
            code = _wait(process, end - time.monotonic())
            output = printed.read_text(encoding="utf-8", errors="replace")
            self._log.write(output)
            if reason := _refusal(output):
                refused.append(f"{tool}: {reason}")
                continue
            numbers = [int(number) for number in re.findall(TOOLS[tool], output)]
            checked = [b for b in ("cpp", "triton") if f"{b}: checked" in output]
            counted[tool] = {"errors": sum(numbers), "checked": checked}
            # On a GPU both are to run.
            wanted = 1 if self.rehearsal else 2
            if code is None:
                bad.append(f"{tool}: stopped at its limit")
            elif code != 0 or not numbers or any(numbers) or len(checked) < wanted:
                self.pages.append(_block(tool, _said(output)))
                bad.append(f"{tool}: {sum(numbers)} errors, exit code {code}: {_tail(output, 3)}")
        if bad:
            return {"tools": counted, "status": "failed", "reason": "; ".join(bad + refused)}
        if refused:
            return {"tools": counted, "status": "not run", "reason": "; ".join(refused)}
        seen = ", ".join(f"{tool}: 0 errors ({', '.join(f['checked'])})"
                         for tool, f in counted.items())  # fmt: skip
        return {"tools": counted, "summary": seen}

    def _pytest(self, more: Sequence[object]) -> list[object]:
        """Returns the command that runs tests which need a GPU."""
        # Settings of its own: those of the project want a newer pytest and its plugins.
        settings = self.work / "pytest.ini"
        marks = ("gpu: needs a GPU", "dist: several processes", "slow: left out by default",
                 "compat: a cell of the compatibility table")  # fmt: skip
        listed = "".join(f"    {mark}\n" for mark in marks)
        settings.write_text(f"[pytest]\nmarkers =\n{listed}", encoding="utf-8")
        shutil.copy2(witness.__file__, self.work)
        files = [
            path for path in sorted((ROOT / "tests").glob("test_*.py"))
            if "mark.gpu" in path.read_text(encoding="utf-8")
        ]  # fmt: skip
        return [
            sys.executable, "-m", "pytest", "-c", settings, "--rootdir", self.work,
            "-p", "no:cacheprovider", "-p", "witness", "-v", "-ra",
            "--continue-on-collection-errors", *more, *files,
        ]  # fmt: skip

    def run_tests(self) -> dict:
        """Runs the tests that are marked `gpu`, shared out to several processes."""
        if not self.environment.get("pytest"):
            raise Failed("pytest is not installed here: the GPU tests were not run")
        folder = self.work / "tests"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        command = self._pytest(["-m", "gpu", *(["--collect-only"] if self.rehearsal else [])])
        parts = self._parts()
        share = [
            Part(folder, (number, parts), lambda output, more: self._start(command, more, output))
            for number in range(parts)
        ]
        end = time.monotonic() + self.limit
        for part in share:
            part.start()
        while any([part.running() for part in share]) and time.monotonic() < end:
            time.sleep(0.2)
        stopped = [part for part in share if part.stop()]
        for part in share:
            self._log.write(part.output())
        found = summarise(record for part in share for record in witness.records(part.path))
        tails = [_tail(part.output(), 12) for part in share if part.failed or part in stopped]
        words = [f"{found[name]} {name}" for name in ("passed", "failed", "skipped")]
        page = [", ".join(words)]
        page += [f"FAILED {failure['name']}: {failure['message']}" for failure in found["failures"]]
        page += [f"{n} skipped: {reason}" for reason, n in found["skip_reasons"].items()]
        self.say("\n".join([*page, *tails]))
        self.pages.append(_block("Tests", page))
        reasons = [part.failed for part in share if part.failed]
        if stopped:
            reasons.append("stopped at its limit; not all tests were run")
        if found["failed"]:
            names = ", ".join(failure["name"] for failure in found["failures"][:10])
            reasons.append(f"{found['passed']} passed, {found['failed']} failed: {names}")
        if reasons:
            return {**found, "status": "failed", "reason": "; ".join(dict.fromkeys(reasons))}
        if not self.rehearsal and not found["passed"]:
            raise Failed("no test was run: none is marked gpu, or all were skipped")
        return {**found, "summary": f"{found['passed']} passed, {found['skipped']} skipped"}

    def _parts(self) -> int:
        """Returns how many processes share the tests."""
        if self.rehearsal:
            return 1
        fitting = int(self.environment.get("memory") or 0) // PART_BYTES
        return max(1, min(MOST_PARTS, 3 * (os.cpu_count() or 1) // 4, fitting))

    def run_short(self) -> dict:
        """Runs the cases of bench/step.py that come first; its results stand under "short"."""
        return self._benchmark("short", "gpu-short")

    def run_step(self) -> dict:
        """Runs bench/step.py; its results stand under "step"."""
        # What the second stage of this call has measured is not measured again.
        done = self.results["stages"].get("short", {}).get("status") == "ok"
        return self._benchmark("step", "gpu-rest" if done else "gpu")

    def _benchmark(self, name: str, preset: str) -> dict:
        folder = self.build / name
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, ROOT / "bench" / "step.py", "--markdown", "--out", folder]
        command += ["--preset", "smoke", "--only", "tiny"] if self.rehearsal else []
        command += [] if self.rehearsal else ["--device", "cuda", "--preset", preset]
        end, lost, more = time.monotonic() + self.limit, [], []
        for _ in range(1 + RESTARTS):
            left = end - time.monotonic()
            limits = ["--deadline", max(5.0, left - LAST_CASE)]
            code, output = self.command([*command, *limits, *more], limit=max(5.0, left), show=True)
            files = sorted(folder.glob("*.json"))
            if code != witness.LOST or not files:
                break
            # An implementation that breaks the device is left out, the others go on.
            lost = json.loads(files[0].read_text(encoding="utf-8"))["lost"]
            more = ["--resume", files[0]]
        found = self._take(name, folder, code, output)
        cases, skipped = len(found["cases"]), len(found["skipped"])
        missed = [t["what"] for t in found["targets"] if t["met"] is False]
        judged = [t for t in found["targets"] if t["met"] is not None]
        summary = (
            f"{cases} cases, {skipped} skipped; "
            f"{len(judged) - len(missed)} of {len(judged)} targets met"
        )
        if lost:
            names = ", ".join(f"{x['name']} ({x['setting']}) in {x['case']}" for x in lost)
            reason = f"the device was lost by {names}; {summary}"
            return {"status": "failed", "reason": reason, "missed": missed}
        return {"missed": missed, "summary": summary}

    def run_training(self) -> dict:
        """Runs bench/training_step.py; its results stand under "training"."""
        lost = [x for name in ("short", "step") for x in self.results.get(name, {}).get("lost", [])]
        without = [word for x in lost for word in ("--without", x["name"])]
        folder, code, output = self._script(
            "training", ROOT / "bench" / "training_step.py", "--deadline",
            max(5.0, self.limit - 15), *without, rehearsed=["--preset", "smoke"],
            otherwise=["--device", "cuda"],
        )  # fmt: skip
        found = self._take("training", folder, code, output)
        return {"summary": f"{len(found['cases'])} models"}

    def run_profile(self) -> dict:
        """Profiles LoRA steps with bench/gpu/nsys_step.py; trace or report go to the results."""
        tiny = ["--shape", "tiny", "--device", "cpu"]
        nsys = GPU / "nsys_step.py"
        folder, code, output = self._script("profile", nsys, "--launch", rehearsed=tiny)
        made = sorted(path for path in folder.glob("step*") if path.is_file())
        for target in self.outputs:
            if target == RESULTS:
                continue
            target.mkdir(parents=True, exist_ok=True)
            for path in made:
                # Larger ones are left where they are.
                if path.stat().st_size < 16 * 2**20:
                    shutil.copy2(path, target / path.name)
        self.pages.append(f"### Profile\n\n{output}\n")
        if code != 0:
            raise Failed(f"{_ended(code)}: {_tail(output)}")
        return {"summary": ", ".join(path.name for path in made)}

    def _take(self, name: str, folder: pathlib.Path, code: int | None, output: str) -> dict:
        files = sorted(folder.glob("*.json"))
        if files:
            self.results[name] = json.loads(files[0].read_text(encoding="utf-8"))
        pages = sorted(folder.glob("*.md"))
        if pages:
            self.pages.append(pages[0].read_text(encoding="utf-8"))
        if code != 0:
            raise Failed(f"{_ended(code)}: {_tail(output)}")
        if not files:
            raise Failed(f"it wrote no results: {_tail(output)}")
        return self.results[name]

    def run_sanitizer(self) -> dict:
        """Runs the tests made for it under compute-sanitizer's memcheck."""
        sanitizer = _sanitizer()
        if sanitizer is None:
            return {"status": "not run", "reason": "compute-sanitizer is not installed here"}
        if not self.environment.get("pytest"):
            return {"status": "not run", "reason": "pytest is not installed here"}
        # What lost the device is looked at, too: here it is said which access it was.
        lost = self.results["stages"].get("tests", {}).get("lost", [])[:3]
        path = self.work / "sanitizer.jsonl"
        path.unlink(missing_ok=True)
        code, output = self.command(
            [*_sanitized("memcheck", sanitizer), *self._pytest(["-m", "gpu"])],
            DGG_WITNESS=str(path), DGG_ONLY="\n".join(["overrun", *lost]), **UNCACHED,
        )  # fmt: skip
        if reason := _refusal(output):
            return {"status": "not run", "reason": f"compute-sanitizer: {reason}"}
        found = summarise(witness.records(path))
        summaries = [int(number) for number in re.findall(r"ERROR SUMMARY: (\d+) error", output)]
        counted = {"errors": sum(summaries), "passed": found["passed"], "skipped": found["skipped"]}
        if code is None:
            reason = f"stopped at its limit; {found['passed']} tests had passed"
            return {**counted, "status": "failed", "reason": reason}
        if code != 0 or not summaries or any(summaries):
            self.pages.append(_block("Memory check", _said(output)))
            words = f"{sum(summaries)} errors, exit code {code}, {found['failed']} tests failed"
            return {**counted, "status": "failed", "reason": f"{words}: {_tail(output)}"}
        return {**counted, "summary": f"memcheck: 0 errors, {found['passed']} tests"}


class Part:
    """A share of the tests, run by one process after the other until none is left.

    Args:
        folder: Where its files go.
        number: Which part, and of how many.
        launch: (file for the output, environment) → a process that runs the tests.

    Attributes:
        path: What the witness writes.
        failed: Why the part was given up, or None.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        number: tuple[int, int],
        launch: Callable[..., subprocess.Popen],
    ) -> None:
        self.path = folder / f"{number[0]}.jsonl"
        self.failed: str | None = None
        self._printed = folder / f"{number[0]}.log"
        # Tensors on the CPU are small here, and the processes many.
        self._more = {"DGG_WITNESS": str(self.path), "DGG_PART": f"{number[0]}/{number[1]}",
                      "OMP_NUM_THREADS": "2"}  # fmt: skip
        self._launch, self._starts = launch, 0
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        """Starts a process for the tests that are left."""
        self._starts += 1
        with self._printed.open("a", encoding="utf-8") as output:
            self._process = self._launch(output, self._more)
        self._begun = time.time()

    def running(self) -> bool:
        """Looks after the process; returns whether there is more to wait for."""
        if self._process is None:
            return False
        code = self._process.poll()
        written = self.path.stat().st_mtime if self.path.exists() else 0.0
        quiet = time.time() - max(written, self._begun)
        if code is None and quiet < PATIENCE:
            return True
        open_test = witness.unfinished(witness.records(self.path))
        # Python and pytest take their time, too, before the first test and behind the last.
        if code is None and open_test is None and quiet < 3 * PATIENCE:
            return True
        if code is None:
            _kill(self._process)
            how = f"no end after {quiet:.0f} s"
        elif code in (0, 1, 5):
            self._process = None
            return False
        else:
            how = f"its process ended with exit code {code}"
        self._process = None
        if open_test is not None:
            failed = {"outcome": "failed", "message": how, "seconds": 0, "lost": how}
            witness.note(self.path, test=open_test, **failed)
        elif code != witness.LOST:
            self.failed = f"pytest: {how}"
            return False
        if self._starts > RESTARTS:
            self.failed = f"the device was lost {self._starts} times"
            return False
        self.start()
        return True

    def stop(self) -> bool:
        """Ends what still runs; returns whether it did."""
        if self._process is None or self._process.poll() is not None:
            return False
        _kill(self._process)
        return True

    def output(self) -> str:
        """Returns what the processes printed."""
        exists = self._printed.exists()
        return self._printed.read_text(encoding="utf-8", errors="replace") if exists else ""


def summarise(found: Iterable[dict]) -> dict:
    """Returns what witnesses say: counts, failures, reasons of skips, the slowest tests."""
    ends = {record["test"]: record for record in found if "test" in record}
    by = {name: [] for name in ("passed", "failed", "skipped")}
    for record in ends.values():
        by[record["outcome"]].append(record)
    reasons: dict[str, int] = {}
    for record in by["skipped"]:
        reasons[record["message"]] = reasons.get(record["message"], 0) + 1
    slowest = sorted(ends.values(), key=lambda record: -record["seconds"])[:10]
    return {
        **{name: len(records) for name, records in by.items()},
        "failures": [{"name": r["test"], "message": r["message"]} for r in by["failed"]],
        "skip_reasons": reasons,
        "lost": [record["test"] for record in ends.values() if record.get("lost")],
        "slowest": [{"name": r["test"], "seconds": r["seconds"]} for r in slowest],
    }


def _wait(process: subprocess.Popen, seconds: float) -> int | None:
    """Returns the exit code, or None if the process had to be ended."""
    try:
        return process.wait(max(0.1, seconds))
    except subprocess.TimeoutExpired:
        _kill(process)
        return None


def _kill(process: subprocess.Popen) -> None:
    """Ends a process and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    # One that hangs in the driver does not end.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)


def sources_digest() -> str:
    """Returns a digest of what is built and run, for machines without the repository."""
    return _digest(*SOURCES, "bench", "tests")


def built_digest() -> str:
    """Returns a digest of what is compiled or installed."""
    return _digest(*SOURCES)


def _digest(*names: str) -> str:
    digest = hashlib.sha256()
    for name in names:
        place = ROOT / name
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh", ".toml"):
                digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0")
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def slug(name: str) -> str:
    """Returns a device's name as part of a file name: ``NVIDIA H100 80GB`` → ``h100-80gb``."""
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return words.removeprefix("nvidia-").removeprefix("geforce-") or "unknown"


def _found(output: str) -> dict | None:
    lines = [line for line in output.splitlines() if line.startswith("FOUND ")]
    return json.loads(lines[-1].removeprefix("FOUND ")) if lines else None


def _tail(output: str, lines: int = 8) -> str:
    return "\n".join(output.strip().splitlines()[-lines:])


def _tool(name: str) -> str | None:
    """Returns where a program is, on the path or where CUDA puts its own."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def _sanitizer() -> str | None:
    return _tool("compute-sanitizer")


def _sanitized(tool: str, sanitizer: str) -> list[str]:
    """Returns the beginning of a command that runs under one of compute-sanitizer's tools."""
    command = [sanitizer, "--tool", tool, "--error-exitcode", "99", "--target-processes", "all"]
    # Not API errors: torch asks the driver for functions that need not be there.
    return command + (["--report-api-errors", "no"] if tool == "memcheck" else [])


def _refusal(output: str) -> str | None:
    """Returns why compute-sanitizer cannot run here, or None."""
    found = re.search(r"Device not supported|Unable to find|LibraryNotLoaded", output)
    return found and found[0]


def _said(output: str) -> list[str]:
    """Returns the first lines that are compute-sanitizer's own."""
    return [line for line in output.splitlines() if line.startswith("=========")][:60]


def _ended(code: int | None) -> str:
    """Returns how a process ended, in words."""
    words = {None: "stopped at its limit", witness.LOST: "the device was lost"}
    return words.get(code, f"exit code {code}")


def _block(title: str, lines: Iterable[str]) -> str:
    """Returns lines as they are, in markdown."""
    return "\n".join([f"### {title}\n", "```", *lines, "```\n"])


def _rows(*rows: Iterable[object]) -> str:
    """Returns rows of a markdown table."""
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def main(arguments: list[str] | None = None) -> int:
    """Runs the stages; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", type=int, choices=STAGES, help="one stage; default: all")
    parser.add_argument("--parts", help=f"single parts, comma-separated, of {', '.join(LIMITS)}")
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
    outputs += [pathlib.Path(options.out).resolve()] if options.out else []
    stages = Stages(
        options.build.resolve(), outputs, budget=options.budget, rehearsal=options.rehearse,
        commit=options.commit, most=options.limit,
    )  # fmt: skip
    functions = {
        "build": stages.build_package, "checks": stages.run_checks,
        "small_step": stages.run_small_step, "short": stages.run_short, "tests": stages.run_tests,
        "step": stages.run_step, "training": stages.run_training,
        "sanitizer": stages.run_sanitizer, "profile": stages.run_profile,
    }  # fmt: skip
    if options.parts is not None:
        stages.part = [name for name in functions if name in wanted]
        groups = [(None, [*stages.part])]
    else:
        numbers = list(STAGES) if options.stage is None else [options.stage]
        groups = [(number, [*STAGES[number].parts]) for number in numbers]
        stages.part = [] if options.stage is None else [f"stage{options.stage}"]
    # The others need to know where they are. Nothing is written for a machine without a GPU.
    outputs, stages.outputs = stages.outputs, []
    stages.begin(groups[0][0])
    stages.run("environment", stages.find_environment, groups[0][1])
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
    if options.stage not in (None, 1) and not stages.is_built():
        groups[0][1].insert(0, "build")
    for place, (number, names) in enumerate(groups):
        if place > 0:
            stages.begin(number)
        for later, name in enumerate(names, 1):
            stages.run(name, functions[name], names[later:])
        stages.finish()
    if options.out:
        shutil.copy2(stages.build / "gpu.log", pathlib.Path(options.out).resolve() / "gpu.log")
    for name in ("short", "step"):
        for target in stages.results.get(name, {}).get("targets", []):
            met = {True: "met", False: "MISSED", None: "-"}[target["met"]]
            print(f"{met:>6}  {target['what']}: {target['measured']} ({target['target']})")
    return stages.exit_code()


if __name__ == "__main__":
    sys.exit(main())
