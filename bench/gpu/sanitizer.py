# SPDX-License-Identifier: BSD-3-Clause
"""The parts of run.py under compute-sanitizer: a small step, and the tests made for memcheck."""

from __future__ import annotations

import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

from gpu import shared_tests, witness
from gpu.stages import GPU, Stages, block, tail

# The two tools of compute-sanitizer for a small step, and the line that each ends with.
TOOLS = {"memcheck": r"ERROR SUMMARY: (\d+) error", "racecheck": r"RACECHECK SUMMARY: (\d+) hazard"}
# Without torch's cache every tensor is an allocation of its own, with an end to run over.
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
NOT_HERE = {"status": "not run", "reason": "compute-sanitizer is not installed here"}


def run_small_step(stages: Stages) -> dict:
    """Runs a small step of every kernel under memcheck and racecheck, side by side."""
    if (sanitizer := installed()) is None:
        return NOT_HERE
    script = [sys.executable, GPU / "checks.py", "--small-step"]
    script += ["--device", "cpu"] if stages.rehearsal else []
    counted, bad, refused = {}, [], []
    commands = [[*_sanitized(tool, sanitizer), *script] for tool in TOOLS]
    with ThreadPoolExecutor(len(TOOLS)) as pool:
        ended = list(pool.map(lambda command: stages.command(command, **UNCACHED), commands))
    for tool, (code, output) in zip(TOOLS, ended, strict=True):
        if reason := _refusal(output):
            refused.append(f"{tool}: {reason}")
            continue
        numbers = [int(number) for number in re.findall(TOOLS[tool], output)]
        checked = [b for b in ("cpp", "triton") if f"{b}: checked" in output]
        counted[tool] = {"errors": sum(numbers), "checked": checked}
        # On a GPU both are to run.
        wanted = 1 if stages.rehearsal else 2
        if code is None:
            bad.append(f"{tool}: stopped at its limit")
        elif code != 0 or not numbers or any(numbers) or len(checked) < wanted:
            stages.pages.append(block(tool, _said(output)))
            bad.append(f"{tool}: {sum(numbers)} errors, exit code {code}: {tail(output, 3)}")
    if bad or refused:
        status = "failed" if bad else "not run"
        return {"tools": counted, "status": status, "reason": "; ".join(bad + refused)}
    seen = [f"{tool}: 0 errors ({', '.join(f['checked'])})" for tool, f in counted.items()]
    return {"tools": counted, "summary": ", ".join(seen)}


def run_marked_tests(stages: Stages) -> dict:
    """Runs the tests made for it under compute-sanitizer's memcheck."""
    if (sanitizer := installed()) is None:
        return NOT_HERE
    if not stages.environment.get("pytest"):
        return {"status": "not run", "reason": "pytest is not installed here"}
    # What lost the device is looked at, too: here it is said which access it was.
    lost = stages.results["stages"].get("tests", {}).get("lost", [])[:3]
    path = stages.work / "sanitizer.jsonl"
    path.unlink(missing_ok=True)
    code, output = stages.command(
        [*_sanitized("memcheck", sanitizer), *shared_tests.pytest_command(stages)],
        DGG_WITNESS=str(path), DGG_ONLY="\n".join(["overrun", *lost]), **UNCACHED,
    )  # fmt: skip
    if reason := _refusal(output):
        return {"status": "not run", "reason": f"compute-sanitizer: {reason}"}
    found = shared_tests.summarise(witness.records(path))
    summaries = [int(number) for number in re.findall(TOOLS["memcheck"], output)]
    counted = {"errors": sum(summaries), "passed": found["passed"], "skipped": found["skipped"]}
    if code is None:
        reason = f"stopped at its limit; {found['passed']} tests had passed"
        return {**counted, "status": "failed", "reason": reason}
    if code != 0 or not summaries or any(summaries):
        stages.pages.append(block("Memory check", _said(output)))
        words = f"{sum(summaries)} errors, exit code {code}, {found['failed']} tests failed"
        return {**counted, "status": "failed", "reason": f"{words}: {tail(output)}"}
    return {**counted, "summary": f"memcheck: 0 errors, {found['passed']} tests"}


def installed() -> str | None:
    """Returns where compute-sanitizer is."""
    return tool_of_cuda("compute-sanitizer")


def tool_of_cuda(name: str) -> str | None:
    """Returns where a program is, on the path or where CUDA puts its own."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


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
