# SPDX-License-Identifier: BSD-3-Clause
"""Triton kernels, installed as ``dgg.kernels``.

One launch serves all tensors of one dtype combination: it reads their addresses from a table and
takes a program per chunk. The math stands in update.py, once; layout.py says what stands where in
the table; chunks.py says how a chunk is found and walked; norms.py, products.py, optimizers.py
and guide.py hold the kernels, and launcher.py launches them.

The folder is a package of its own, and this file stays, because an editable install maps
``dgg.kernels`` to it. Importing it imports neither Triton nor a kernel: names are looked up when
they are first used, so that dgg can be imported where there is no Triton.
"""

import importlib
import importlib.util
import os
import sys

import torch

# The first version of Triton whose language the kernels are written in.
OLDEST = (3, 4)

_HOMES = {
    "norms_launch": "norms",
    "coefficients_launch": "norms",
    "products_launch": "products",
    "guard_coefficients_launch": "products",
    "adam_launch_": "optimizers",
    "sgd_launch_": "optimizers",
    "guide_launch_": "guide",
    "draw_flags_launch": "guide",
}

__all__ = [*_HOMES, "unavailable"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def unavailable(device: torch.device) -> str | None:
    """Returns None if these kernels can run on ``device``, else why not and what would help."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton, on Linux)"
    loaded = sys.modules.get(f"{__name__}.update")
    if loaded is None:
        interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    else:  # decided when the kernels were declared; the environment may have changed since
        interpreted = loaded.INTERPRETED.value
    if device.type == "cpu" and not interpreted:
        return (
            "on the CPU Triton runs in its interpreter only, which is for tests; start Python with "
            "TRITON_INTERPRET=1 in the environment for that"
        )
    if device.type != "cpu" and interpreted:
        return (
            f"TRITON_INTERPRET=1 is set, and the interpreter cannot read {device.type!r} memory; "
            "start Python without it"
        )
    try:
        import triton
    except Exception as error:
        return f"Triton is installed but cannot be imported ({error}); reinstall it for this Python"
    version = tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:2])
    if version < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return f"Triton {triton.__version__} is too old; install {oldest} or later"
    if device.type == "cpu":
        return None
    try:
        backend = triton.runtime.driver.active.get_active_torch_device().type
    except Exception as error:
        return f"Triton finds no device that it can compile for ({error})"
    if backend != device.type:
        return f"Triton {triton.__version__} compiles for {backend!r} here, not {device.type!r}"
    return None
