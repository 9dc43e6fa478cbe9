# SPDX-License-Identifier: BSD-3-Clause
"""The choice of a backend for a device, and of the class of its rows."""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dgg import sharding
from dgg._signatures import listed
from dgg.backends import libraries
from dgg.backends.eager import ReferenceRows
from dgg.backends.launched import LaunchedRows
from dgg.backends.rows import Rows
from dgg.backends.table import TableRows

BACKENDS = ("reference", "cpp", "triton")


def unavailable(backend: str, device: torch.device) -> str | None:
    """Returns None if ``backend`` can run on ``device``, else why not and how to get it."""
    if backend == "reference":
        return None
    if backend == "cpp":
        if device.type == "cpu":
            return libraries.cpp_error and f"its library is missing: {libraries.cpp_error}"
        if device.type != "cuda":
            return (
                f"it has kernels for the CPU and for CUDA, not for {device.type!r} devices; use "
                "backend='triton', 'reference' or None there"
            )
        if libraries.cuda_error is not None:
            return f"its CUDA library is missing: {libraries.cuda_error}"
        return libraries.trouble_on(device)
    if backend == "triton":
        return importlib.import_module("dgg.kernels").unavailable(device)
    raise ValueError(f"unknown backend {backend!r}; choose one of {BACKENDS} or None")


def choose(backend: str | None, device: torch.device) -> str:
    """Returns the backend for ``device``: the named one, or the fastest that can run.

    Raises:
        RuntimeError: The named backend cannot run; the message says how to get it.
        ValueError: No such backend.
    """
    if backend is not None:
        reason = unavailable(backend, device)
        if reason is not None:
            raise RuntimeError(f"backend={backend!r} cannot run: {reason}")
        return backend
    # Triton's interpreter runs on the CPU, too, but it is slow: it has to be named.
    candidates = ("cpp",) if device.type == "cpu" else ("cpp", "triton")
    return next((name for name in candidates if unavailable(name, device) is None), "reference")


def choose_for(backend: str | None, param: Tensor) -> str:
    """Returns the backend for ``param``: the one of `choose`, if it can reach the values.

    A tensor that keeps its values in other tensors (float8 weights of a library) can be stepped by
    torch operations only.

    Raises:
        TypeError: The named backend cannot reach the values.
    """
    if not sharding.keeps_values_elsewhere(param):
        return choose(backend, param.device)
    if backend not in (None, "reference"):
        kind = type(sharding.local(param)).__name__
        raise TypeError(
            f"backend={backend!r} cannot step a {kind}, which keeps its values in other tensors; "
            "use backend=None or 'reference'"
        )
    return "reference"


def launches(backend: str, device: torch.device) -> bool:
    """Returns whether the backend's work on ``device`` is launched and runs asynchronously."""
    return backend == "triton" or (backend == "cpp" and device.type != "cpu")


def unexpected_reference(device: torch.device) -> str | None:
    """Returns why the reference is the fastest on a device that has kernels, if it is; said once.

    It is None where somebody installed dgg without its library on purpose.
    """
    if device.type not in ("cpu", "cuda") or device.type in libraries.told:
        return None
    if libraries.declined or choose(None, device) != "reference":
        return None
    libraries.told.add(device.type)
    missing = ("cpp",) if device.type == "cpu" else ("cpp", "triton")
    reasons = [f"backend {name!r} cannot run, {unavailable(name, device)}" for name in missing]
    return "; ".join(reasons)


@listed
def show_config() -> str:
    """Returns, as text to print, which backends are usable here and why the others are not."""
    lines = [
        f"torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        f"dgg from {libraries.FOLDER}",
    ]
    devices = [torch.device("cpu")]
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and torch.accelerator.is_available():
        devices.append(accelerator)
    for backend in BACKENDS:
        for device in devices:
            reason = unavailable(backend, device)
            state = "usable" if reason is None else f"not usable: {reason}"
            if backend == "cpp" and reason is None and device.type == "cpu":
                state += f" ({torch.ops.dgg.isa()})"
            lines.append(f"  {backend:<10} {device.type:<5} {state}")
            if backend == "cpp" and device.type == "cpu":
                lines += [f"    {line}" for line in libraries.details]
    chosen = ", ".join(f"{choose(None, device)} on {device.type}" for device in devices)
    lines.append(
        f"default: {chosen}; on other devices: the first of cpp (CUDA) and triton that runs there, "
        "else reference"
    )
    for name in ("DGG_CPP", "DGG_CUDA"):
        if os.environ.get(name):
            lines.append(f"{name}={os.environ[name]} was set in this environment")
    return "\n".join(lines)


def make_rows(
    backend: str, params: Sequence[Tensor], *args: Any, capturable: bool = False, **columns: Any
) -> Rows:
    """Returns the rows of parameters of one device; arguments as in `Rows` and `LaunchedRows`."""
    if backend == "reference":
        return ReferenceRows(backend, params, *args, **columns)
    if launches(backend, sharding.local(params[0]).device):
        return LaunchedRows(backend, params, *args, capturable=capturable, **columns)
    return TableRows(backend, params, *args, **columns)
