# SPDX-License-Identifier: BSD-3-Clause
"""Everything that needs a GPU, in one command: build, tests, memory check, benchmarks, report.

    python3 bench/gpu.py                        # what `make gpu` runs; under 8 minutes
    python3 bench/gpu.py --stages build,step    # single stages
    python3 bench/gpu.py --out results          # results there too (default: $OUT if set)

For a machine with a GPU and whatever torch >= 2.10, Triton >= 3.4 and Python >= 3.10 it has; no
virtual environment, no network, nothing installed: the package is built from a copy of the sources
into build/gpu/site, which alone is put on PYTHONPATH (the repository root must not be, `kernels/`
would shadow another library). No setting of the GPU is touched.

Each stage is a process of its own with a time limit; its result is written at once, and one that
fails does not stop the others. Exit code: 0 if all went well, 1 if a stage failed, 2 without a GPU.
The results are bench/results/<device>-<date>.json and .md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Callable, Sequence

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCHEMA = 1
SOURCES = ("dgg", "kernels", "csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE",
           "MANIFEST.in")  # fmt: skip

# Seconds: what a stage may take at most, and what earlier ones must leave for it.
LIMITS = {
    "environment": (60, 0),
    "build": (200, 0),
    "tests": (120, 0),
    "step": (230, 60),
    "training": (80, 45),
    "sanitizer": (60, 20),
}
BUDGET = 460
# The benchmark begins no case so close to its limit.
LAST_CASE = 30

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
import json, dgg, dgg.kernels
print("FOUND " + json.dumps({"dgg": dgg.__file__, "config": dgg.show_config()}))
"""


class Failed(RuntimeError):
    """A stage did not do what it should; the message says what."""


class Stages:
    """Runs the stages and keeps what they find.

    Args:
        build: Folder for everything that is built.
        outputs: Folders the results are written to.
        budget: Seconds for everything.
        rehearsal: Go through the stages on the CPU with tiny sizes; nothing found is a result.
    """

    def __init__(
        self,
        build: pathlib.Path,
        outputs: Sequence[pathlib.Path],
        *,
        budget: float = BUDGET,
        rehearsal: bool = False,
    ) -> None:
        self.build, self.outputs, self.rehearsal = build, list(outputs), rehearsal
        self.site, self.work = build / "site", build / "work"
        self.end = time.monotonic() + budget
        self.limit = 0.0
        self.environment: dict = {}
        self.results: dict = {
            "schema": SCHEMA,
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "rehearsal": rehearsal,
            "commit": _commit(),
            "stages": {},
        }
        self.pages: list[str] = []
        self.work.mkdir(parents=True, exist_ok=True)
        self._log = (build / "gpu.log").open("w", encoding="utf-8")

    # -- running --------------------------------------------------------------------------------

    def run(self, name: str, function: Callable[[], dict], later: Sequence[str]) -> None:
        """Runs one stage within its share of what is left, and writes the results."""
        left = self.end - time.monotonic() - sum(LIMITS[stage][1] for stage in later)
        self.limit = min(LIMITS[name][0], left)
        begin = time.monotonic()
        self.say(f"\n## {name} (at most {max(0, self.limit):.0f} s)")
        if self.limit < 5:
            found = {"status": "not run", "reason": "no time was left for it"}
        else:
            try:
                found = {"status": "ok", **function()}
            except Failed as error:
                found = {"status": "failed", "reason": str(error)}
            except Exception as error:  # nothing that one stage meets may cost the others
                found = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
        found["seconds"] = round(time.monotonic() - begin, 1)
        self.results["stages"][name] = found
        self.say(f"{name}: {found['status']} {found.get('reason', '')} ({found['seconds']} s)")
        self.write()

    def command(
        self, command: Sequence[object], *, limit: float | None = None, show: bool = False, **more
    ) -> tuple[int | None, str]:
        """Runs a command; returns its exit code (None: it was stopped at its limit) and output."""
        limit = self.limit if limit is None else limit
        environment = {**os.environ, **self._variables(), **more}
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=self.work, env=environment, text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        timer = _After(limit, process)
        lines = []
        with timer:
            for line in process.stdout:
                lines.append(line)
                self._log.write(line)
                if show:
                    print(line, end="", flush=True)
            code = process.wait()
        self._log.flush()
        return (None if timer.fired else code), "".join(lines)

    def _variables(self) -> dict[str, str]:
        paths = [str(self.site), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
            "TRITON_CACHE_DIR": str(self.build / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.build / "inductor"),
        }

    def say(self, line: str) -> None:
        """Prints a line and keeps it in the log."""
        print(line, flush=True)
        self._log.write(line + "\n")
        self._log.flush()

    def write(self) -> None:
        """Writes what is known so far."""
        stem = slug(self.environment.get("name") or "unknown") + "-" + self.results["date"][:10]
        for folder in self.outputs:
            with contextlib.suppress(OSError):  # a read-only checkout
                folder.mkdir(parents=True, exist_ok=True)
                text = json.dumps(self.results, indent=1, ensure_ascii=False) + "\n"
                _replace(folder / f"{stem}.json", text)
                _replace(folder / f"{stem}.md", self.page())

    def page(self) -> str:
        """Returns the results as markdown."""
        lines = [f"# {self.environment.get('name')}, {self.results['date']}\n"]
        if self.rehearsal:
            lines.append("**A rehearsal on a CPU: no number here means anything.**\n")
        return "\n".join([*lines, self.summary(), *self.pages]) + "\n"

    def summary(self) -> str:
        """Returns the table of stages."""
        rows = ["| stage | status | s | |", "|---|---|---:|---|"]
        for name, found in self.results["stages"].items():
            words = found.get("summary") or found.get("reason") or ""
            first = words.splitlines()[0] if words else ""
            rows.append(f"| {name} | {found['status']} | {found['seconds']} | {first} |")
        return "\n".join(rows) + "\n"

    # -- the stages -----------------------------------------------------------------------------

    def find_environment(self) -> dict:
        """What is here: torch, Triton, Python, the GPU and how it is set."""
        code, output = self.command([sys.executable, "-c", _ENVIRONMENT], limit=60)
        if (found := _found(output)) is None:
            raise Failed(f"torch cannot be imported by {sys.executable}: {_tail(output)}")
        self.environment = found
        smi = shutil.which("nvidia-smi")
        report = self.command([smi, "-q"], limit=20)[1] if smi else "no nvidia-smi"
        wanted = ("Driver Version", "CUDA Version", "Product Name", "Performance State", "Power",
                  "Graphics", "SM  ", "Memory  ", "Gpu  ", "ECC Mode", "Current  ", "MIG Mode",
                  "Persistence")  # fmt: skip
        kept = [line.strip() for line in report.splitlines() if line.strip().startswith(wanted)]
        nvcc = shutil.which("nvcc") or _first(["/usr/local/cuda/bin/nvcc"])
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
        _, output = self.command([sys.executable, "-c", _CONFIG], limit=120)
        found = _found(output)
        if found is None:
            raise Failed(f"dgg built {words} cannot be imported: {_tail(output)}")
        if self.site not in pathlib.Path(found["dgg"]).parents:
            raise Failed(f"another dgg is imported than the one that was built: {found['dgg']}")
        libraries = {p.name: p.stat().st_size for p in self.site.glob("dgg/*.so")}
        self.say(found["config"])
        result = {"how": words, "notes": notes, "libraries": libraries, **found}
        if notes:
            # Something can be measured, but not everything.
            reason = f"built {words} only; {' | '.join(notes)}"
            return {**result, "status": "failed", "reason": reason}
        return {**result, "summary": f"{words}: {', '.join(libraries)}"}

    def _pytest(
        self, report: pathlib.Path, more: Sequence[str], prefix=(), limit=None, **variables
    ):
        # Settings of its own: those of the project want a newer pytest and its plugins.
        settings = self.work / "pytest.ini"
        marks = ("gpu: needs a GPU", "dist: several processes", "slow: left out by default",
                 "compat: a cell of the compatibility table")  # fmt: skip
        listed = "".join(f"    {mark}\n" for mark in marks)
        settings.write_text(f"[pytest]\nmarkers =\n{listed}", encoding="utf-8")
        files = [
            path for path in sorted((ROOT / "tests").glob("test_*.py"))
            if "mark.gpu" in path.read_text(encoding="utf-8")
        ]  # fmt: skip
        report.unlink(missing_ok=True)
        command = [
            *prefix, sys.executable, "-m", "pytest", "-c", settings, "--rootdir", self.work,
            "-p", "no:cacheprovider", "-v", "-ra", "--continue-on-collection-errors",
            f"--junitxml={report}", *more, *files,
        ]  # fmt: skip
        return self.command(command, limit=limit, **variables)

    def run_tests(self) -> dict:
        """Runs the tests that are marked `gpu`."""
        if not self.environment.get("pytest"):
            raise Failed("pytest is not installed here: the GPU tests were not run")
        report = self.work / "tests.xml"
        code, output = self._pytest(
            report, ["-m", "gpu", *(["--collect-only"] if self.rehearsal else [])]
        )
        # Who is stopped writes no report; the output still says how far it came.
        found = junit(report) if report.exists() else verbose_counts(output)
        self.say(_tail(output, 25))
        self.pages.append("### Tests\n\n```\n" + _tail(output, 25) + "\n```\n")
        if code == 5:
            raise Failed("no test is marked gpu")
        if code != 0:
            what = "stopped at its limit" if code is None else f"pytest's exit code is {code}"
            names = ", ".join(failure["name"] for failure in found["failures"][:10])
            what += f"; {found['passed']} passed, {found['failed']} failed: "
            return {**found, "status": "failed", "reason": what + (names or _tail(output, 3))}
        return {**found, "summary": f"{found.get('passed')} passed, {found.get('skipped')} skipped"}

    def run_step(self) -> dict:
        """Runs bench/step.py; its results stand under "step"."""
        folder = self.build / "step"
        shutil.rmtree(folder, ignore_errors=True)
        command = [
            sys.executable, ROOT / "bench" / "step.py", "--markdown", "--out", folder,
            "--deadline", max(5.0, self.limit - LAST_CASE),
        ]  # fmt: skip
        command += ["--preset", "smoke", "--only", "tiny"] if self.rehearsal else []
        command += [] if self.rehearsal else ["--device", "cuda"]
        code, output = self.command(command, show=True)
        found = self._take("step", folder, code, output)
        cases, skipped = len(found["cases"]), len(found["skipped"])
        missed = [t["what"] for t in found["targets"] if t["met"] is False]
        judged = [t for t in found["targets"] if t["met"] is not None]
        return {
            "missed": missed,
            "summary": f"{cases} cases, {skipped} skipped; "
            f"{len(judged) - len(missed)} of {len(judged)} targets met",
        }

    def run_training(self) -> dict:
        """Runs bench/training_step.py; its results stand under "training"."""
        folder = self.build / "training"
        shutil.rmtree(folder, ignore_errors=True)
        command = [
            sys.executable, ROOT / "bench" / "training_step.py", "--out", folder,
            "--deadline", max(5.0, self.limit - 15),
        ]  # fmt: skip
        command += ["--preset", "smoke"] if self.rehearsal else ["--device", "cuda"]
        code, output = self.command(command, show=True)
        found = self._take("training", folder, code, output)
        return {"summary": f"{len(found['cases'])} models"}

    def _take(self, name: str, folder: pathlib.Path, code: int | None, output: str) -> dict:
        files = sorted(folder.glob("*.json"))
        if files:
            self.results[name] = json.loads(files[0].read_text(encoding="utf-8"))
        pages = sorted(folder.glob("*.md"))
        if pages:
            self.pages.append(pages[0].read_text(encoding="utf-8"))
        if code != 0:
            what = "stopped at its limit" if code is None else f"exit code {code}"
            raise Failed(f"{what}: {_tail(output)}")
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
        prefix = [sanitizer, "--tool", "memcheck", "--error-exitcode", "99", "--target-processes",
                  "all"]  # fmt: skip
        # Without torch's cache every tensor is an allocation of its own, with an end to run over.
        code, output = self._pytest(
            self.work / "sanitizer.xml", ["-m", "gpu", "-k", "overrun"], prefix,
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )  # fmt: skip
        refused = re.search(r"Device not supported|Unable to find|LibraryNotLoaded", output)
        if refused:
            return {"status": "not run", "reason": f"compute-sanitizer: {refused[0]}"}
        if code is None:
            raise Failed("stopped at its limit")
        errors = re.search(r"ERROR SUMMARY: (\d+) error", output)
        if code != 0 or errors is None or errors[1] != "0":
            raise Failed(f"exit code {code}: {_tail(output)}")
        return {"errors": 0, "summary": "memcheck: 0 errors"}


def junit(report: pathlib.Path) -> dict:
    """Returns passed, failed, skipped and the failures of a JUnit report."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures, reasons = [], {}
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        bad = [child for child in case if child.tag in ("failure", "error")]
        skipped = case.find("skipped")
        if bad:
            counts["failed"] += 1
            message = (bad[0].get("message") or "").strip().splitlines() or [""]
            failures.append({"name": name, "message": message[0][:300]})
        elif skipped is not None:
            counts["skipped"] += 1
            reason = skipped.get("message") or ""
            reasons[reason] = reasons.get(reason, 0) + 1
        else:
            counts["passed"] += 1
    return {**counts, "failures": failures, "skip_reasons": reasons}


def verbose_counts(output: str) -> dict:
    """Returns the same of the output of a `pytest -v` that was stopped."""
    results = re.findall(r"^(\S+::\S.*?) (PASSED|FAILED|ERROR|SKIPPED)", output, re.MULTILINE)
    bad = [name for name, state in results if state in ("FAILED", "ERROR")]
    return {
        "passed": sum(state == "PASSED" for _, state in results),
        "failed": len(bad),
        "skipped": sum(state == "SKIPPED" for _, state in results),
        "failures": [{"name": name, "message": "see the log"} for name in bad],
        "skip_reasons": {},
    }


class _After:
    """Ends a process and its children after a time."""

    def __init__(self, seconds: float, process: subprocess.Popen) -> None:
        import threading

        self.fired, self._process = False, process
        self._timer = threading.Timer(max(0.1, seconds), self._fire)

    def _fire(self) -> None:
        self.fired = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_) -> None:
        self._timer.cancel()


def slug(name: str) -> str:
    """Returns a device's name as part of a file name: ``NVIDIA H100 80GB`` → ``h100-80gb``."""
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return words.removeprefix("nvidia-").removeprefix("geforce-") or "unknown"


def _found(output: str) -> dict | None:
    lines = [line for line in output.splitlines() if line.startswith("FOUND ")]
    return json.loads(lines[-1].removeprefix("FOUND ")) if lines else None


def _tail(output: str, lines: int = 8) -> str:
    return "\n".join(output.strip().splitlines()[-lines:])


def _first(paths: Sequence[str]) -> str | None:
    return next((path for path in paths if pathlib.Path(path).exists()), None)


def _sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or _first(["/usr/local/cuda/bin/compute-sanitizer"])


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _replace(path: pathlib.Path, text: str) -> None:
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def main(arguments: list[str] | None = None) -> int:
    """Runs the stages; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--stages", default=",".join(LIMITS), help=f"comma-separated, of {', '.join(LIMITS)}"
    )
    parser.add_argument(
        "--out", type=pathlib.Path, default=os.environ.get("OUT"),
        help="folder that gets the results too; default: $OUT",
    )  # fmt: skip
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything")
    parser.add_argument(
        "--rehearse", action="store_true",
        help="go through the stages on a CPU with tiny sizes, to test this script; needs --out",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    wanted = [name for name in options.stages.split(",") if name]
    if unknown := set(wanted) - LIMITS.keys():
        parser.error(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(LIMITS)}")
    if options.rehearse and options.out is None:
        parser.error("--rehearse needs --out: what it writes is no result")
    outputs = [] if options.rehearse else [ROOT / "bench" / "results"]
    outputs += [pathlib.Path(options.out).resolve()] if options.out else []
    stages = Stages(
        options.build.resolve(), outputs, budget=options.budget, rehearsal=options.rehearse
    )
    functions = {
        "environment": stages.find_environment, "build": stages.build_package,
        "tests": stages.run_tests, "step": stages.run_step, "training": stages.run_training,
        "sanitizer": stages.run_sanitizer,
    }  # fmt: skip
    # The others need to know where they are.
    names = [name for name in LIMITS if name in wanted or name == "environment"]
    for place, name in enumerate(names):
        if name != "environment" and not options.rehearse and not stages.environment["available"]:
            print(
                "make gpu: there is no GPU here that torch can use "
                f"(torch {stages.environment['torch']}, CUDA {stages.environment['cuda']}). The "
                "package is tested without one by `make test`.",
                file=sys.stderr,
            )
            return 2
        if place == 0 and not options.rehearse:
            # Nothing is written for a machine that has nothing to say.
            stages.outputs, kept = [], stages.outputs
            stages.run(name, functions[name], names[1:])
            stages.outputs = kept
            if not stages.environment:
                print(f"make gpu: {stages.results['stages'][name]['reason']}", file=sys.stderr)
                return 2
            continue
        stages.run(name, functions[name], names[place + 1 :])
    if stages.environment.get("available") or options.rehearse:
        stages.write()
    if options.out:
        shutil.copy2(stages.build / "gpu.log", pathlib.Path(options.out).resolve() / "gpu.log")
    print("\n" + stages.summary())
    for target in stages.results.get("step", {}).get("targets", []):
        met = {True: "met", False: "MISSED", None: "-"}[target["met"]]
        print(f"{met:>6}  {target['what']}: {target['measured']} ({target['target']})")
    states = {found["status"] for found in stages.results["stages"].values()}
    return 1 if "failed" in states else 0


if __name__ == "__main__":
    sys.exit(main())
