# SPDX-License-Identifier: BSD-3-Clause
"""The parts of run.py that come first: what is here, and dgg built for it."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import sys
import time

import provenance
from gpu import sanitizer
from gpu.sources import ROOT, SOURCES, built_digest
from gpu.stages import Failed, Stages, tail
from report import replace

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
import json, torch, dgg
from dgg import backends
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
missing = {name: backends.unavailable(name, device) for name in ("cpp", "triton")}
print("FOUND " + json.dumps({"dgg": dgg.__file__, "config": dgg.show_config(), "missing": missing}))
"""


def find_environment(stages: Stages) -> dict:
    """What is here: torch, Triton, Python, the GPU and how it is set."""
    found, output = _answer(stages, _ENVIRONMENT, stages.limit)
    if found is None:
        raise Failed(f"torch cannot be imported by {sys.executable}: {tail(output)}")
    stages.environment = found

    def ask(command: list[str]) -> str | None:
        program = sanitizer.tool_of_cuda(command[0])
        return stages.command([program, *command[1:]], limit=20)[1] if program else None

    return {
        "found": found,
        "nvidia_smi": provenance.nvidia_smi(ask),
        "nvcc": (ask(["nvcc", "--version"]) or "").strip().splitlines()[-1:],
        "sanitizer": sanitizer.installed(),
        "summary": f"{found.get('name')}, torch {found['torch']}, Triton {found['triton']}, "
        f"Python {found['python']}",
    }


def _answer(stages: Stages, code: str, limit: float) -> tuple[dict | None, str]:
    """Returns what a program says behind FOUND, or None, and all that it printed."""
    _, output = stages.command([sys.executable, "-c", code], limit=limit)
    lines = [line for line in output.splitlines() if line.startswith("FOUND ")]
    return json.loads(lines[-1].removeprefix("FOUND ")) if lines else None, output


def build_package(stages: Stages) -> dict:
    """Builds dgg with its CUDA library into build/gpu/site, from a copy of the sources."""
    source = stages.build / "source"
    source.mkdir(parents=True, exist_ok=True)
    # The copy keeps its build folder, so that a second run compiles only what has changed.
    for name in SOURCES:
        target, origin = source / name, ROOT / name
        if origin.is_dir():
            shutil.rmtree(target, ignore_errors=True)
            ignored = shutil.ignore_patterns("__pycache__", "*.so", "_build_error*")
            shutil.copytree(origin, target, ignore=ignored)
        else:
            shutil.copy2(origin, target)
    cuda = {"DGG_CPP": "1", "DGG_CUDA": "1", "MAX_JOBS": str(os.cpu_count() or 1)}
    if capability := stages.environment.get("capability"):
        cuda["TORCH_CUDA_ARCH_LIST"] = capability
    attempts = {"with CUDA": cuda, "without CUDA": {"DGG_CUDA": "0"}}
    if stages.rehearsal:
        del attempts["with CUDA"]
    notes = []
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-v",
           "--no-build-isolation", "--no-deps", "--no-index", "--target", stages.site]  # fmt: skip
    for words, variables in attempts.items():
        shutil.rmtree(stages.site, ignore_errors=True)
        begin = time.monotonic()
        code, output = stages.command([*pip, source], **variables)
        stages.limit -= time.monotonic() - begin
        if code == 0:
            return import_built(stages, words, notes)
        notes.append(f"{words}: {'stopped at its limit' if code is None else tail(output)}")
    # Triton needs no compiler: what is Python alone can still be measured.
    for name, target in (("dgg", "dgg"), ("kernels", "dgg/kernels")):
        shutil.copytree(source / name, stages.site / target, dirs_exist_ok=True)
    return import_built(stages, "Python alone", notes)


def import_built(stages: Stages, words: str, notes: list[str]) -> dict:
    """Imports what was built as ``words`` say; returns that and what went wrong before."""
    found, output = _answer(stages, _CONFIG, 120)
    if found is None:
        raise Failed(f"dgg built {words} cannot be imported: {tail(output)}")
    if stages.site not in pathlib.Path(found["dgg"]).parents:
        raise Failed(f"another dgg is imported than the one that was built: {found['dgg']}")
    libraries = {p.name: p.stat().st_size for p in stages.site.glob("dgg/*.so")}
    stages.say(found["config"])
    result = {"how": words, "notes": notes, "libraries": libraries, **found}
    if words == "with CUDA" or stages.rehearsal:
        replace(stages.build / "built.json", json.dumps(_recipe(stages)))
    for name, reason in found["missing"].items() if not stages.rehearsal else ():
        if reason is not None and not (name == "cpp" and words != "with CUDA"):
            notes.append(f"{name} cannot run: {reason}")
    if notes:
        # Something can be measured, but not everything.
        reason = f"built {words}; {' | '.join(notes)}"
        return {**result, "status": "failed", "reason": reason}
    return {**result, "summary": f"{words}: {', '.join(libraries)}"}


def _recipe(stages: Stages) -> list[object]:
    """Returns what a build depends on."""
    wanted = ("torch", "capability", "python")
    return [built_digest(), *(stages.environment.get(name) for name in wanted)]


def is_built(stages: Stages) -> bool:
    """Returns whether an earlier call has built what is to be run."""
    made = stages.build / "built.json"
    if not made.exists() or not (stages.site / "dgg" / "__init__.py").exists():
        return False
    return json.loads(made.read_text(encoding="utf-8")) == _recipe(stages)
