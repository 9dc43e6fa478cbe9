# SPDX-License-Identifier: BSD-3-Clause
"""Where the numbers are from: machine, versions, commit, and what a GPU is set to.

Imports no torch before it is asked about one: gpu/run.py must start where torch does not.
"""

from __future__ import annotations

import datetime
import os
import pathlib
import platform
import re
import subprocess
from collections.abc import Callable


def provenance(device) -> dict[str, object]:
    """Returns what a reader needs to judge or repeat the numbers."""
    import torch

    import dgg

    huge = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
    active = re.search(r"\[(\w+)\]", huge.read_text()) if huge.exists() else None
    configuration = dgg.show_config().splitlines()
    gpu = None
    if device.device.type == "cuda":
        gpu = {**gpu_report(), "cache": device.cache_bytes}
    return {
        "gpu": gpu,
        **origin(),
        "device": device.name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "last_level_cache": device.cache_bytes,
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "huge_pages": active[1] if active else None,
        "load_average": os.getloadavg(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dgg": dgg.__version__,
        "backends": [line.strip() for line in configuration[1:]],
        "compiler": (output(["g++", "--version"]) or "none").splitlines()[0],
    }


def origin() -> dict[str, object]:
    """Returns commit, processor and date, for every file of a run."""
    return {
        "commit": commit(),
        "uncommitted_changes": uncommitted_changes(),
        "cpu": cpu_model(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


# What nvidia-smi is asked for; asking changes nothing.
_GPU_FIELDS = (
    "name", "driver_version", "memory.total", "memory.used", "clocks.sm", "clocks.mem",
    "clocks.max.sm", "clocks.max.mem", "power.draw", "power.limit", "temperature.gpu",
    "utilization.gpu", "ecc.mode.current", "mig.mode.current", "compute_cap",
)  # fmt: skip


def nvidia_smi(ask: Callable[[list[str]], str | None], place: int = 0) -> dict[str, str | None]:
    """Returns what nvidia-smi says about a GPU; no setting is touched.

    ``ask`` returns what a command prints, or None.
    """
    query = ["nvidia-smi", f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader"]
    answer = ask([*query, "-i", str(place)]) or ""
    values = [value.strip() for value in answer.split(",")]
    known = len(values) == len(_GPU_FIELDS)
    return dict(zip(_GPU_FIELDS, values, strict=True)) if known else dict.fromkeys(_GPU_FIELDS)


def gpu_report() -> dict[str, str | None]:
    """Returns what nvidia-smi and torch say about the GPU."""
    import torch

    found = nvidia_smi(output, torch.cuda.current_device())
    found["name"] = found["name"] or torch.cuda.get_device_name()
    found["cuda"] = torch.version.cuda
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    return found


def commit() -> str | None:
    """Returns the commit that is checked out; None: not known here."""
    return _git("rev-parse", "HEAD")


def uncommitted_changes() -> bool | None:
    """Returns whether tracked files differ from the commit; None: not known here."""
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return None if changed is None else bool(changed)


def _git(*arguments: str) -> str | None:
    return output(["git", "-C", str(pathlib.Path(__file__).parent), *arguments])


def cpu_model() -> str:
    """Returns the processor's name."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    found = cpuinfo.exists() and re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
    return found[1].strip() if found else platform.processor() or platform.machine()


def output(command: list[str]) -> str | None:
    """Returns what a short command prints; None: it is not here, or failed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def provenance_lines(found: dict) -> str:
    """Returns where and when the numbers were taken."""
    gpu = found.get("gpu") or {}
    card = (
        f"{gpu['name']}, {gpu['memory.total']}, driver {gpu['driver_version']}, CUDA "
        f"{gpu['cuda']}, Triton {gpu['triton']}, SM {gpu['clocks.sm']} of {gpu['clocks.max.sm']}, "
        f"memory {gpu['clocks.mem']} of {gpu['clocks.max.mem']}, power {gpu['power.draw']} of "
        f"{gpu['power.limit']}, {gpu['temperature.gpu']} °C\n"
        if gpu
        else ""
    )
    backends = "; ".join(" ".join(line.split()) for line in found["backends"] if "usable" in line)
    load = ", ".join(f"{x:.2f}" for x in found["load_average"])
    changed = " with uncommitted changes" if found["uncommitted_changes"] else ""
    commit = (found["commit"] or "unknown")[:12] + changed
    return (
        f"{card}{found['cpu']}, {found['cores']} cores, {found['threads']} threads, "
        f"{found['memory'] / 2**30:.0f} GiB, last-level cache "
        f"{found['last_level_cache'] / 2**20:.1f} MiB, huge pages: {found['huge_pages']}\n"
        f"torch {found['torch']}, dgg {found['dgg']}, {found['compiler']}, "
        f"Python {found['python']}\n{backends}\n"
        f"commit {commit}, {found['date']}, load average {load}"
    )
