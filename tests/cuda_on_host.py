# SPDX-License-Identifier: BSD-3-Clause
"""Compiles the CUDA kernels and operators for the CPU and loads them, for tests.

The kernels become functions for ctypes; the operators (`dgg::adam_launch_` and the others) are
registered for the CPU, so that whatever calls them on a GPU can be run without one.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import hashlib
import pathlib
import shutil
import subprocess

import torch

import dgg  # noqa: F401  declares the operators

ROOT = pathlib.Path(__file__).parent.parent
SHIM = ROOT / "tests" / "cuda_on_host.h"
# The longest to compile first.
UNITS = [
    *(
        ROOT / "csrc" / f"{name}.cu"
        for name in ("cuda_adam", "cuda_sgd", "cuda_guide", "cuda_norms", "cuda_products")
    ),
    ROOT / "csrc" / "cuda.cu",
    ROOT / "tests" / "cuda_on_host.cpp",
]
HEADERS = sorted([*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc").glob("*.cuh")])
COMPILER = shutil.which("g++")


def missing() -> str | None:
    """Returns why the kernels cannot be run on this CPU, or None."""
    return None if COMPILER else "g++, which runs the CUDA kernels on the CPU, is not installed"


@functools.cache
def load() -> ctypes.CDLL:
    """Returns the library; it is kept in build/ as long as its sources and torch do not change."""
    torch_folder = pathlib.Path(torch.__file__).parent
    options = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden",
               "-I", str(torch_folder / "include"),
               "-DTORCH_TARGET_VERSION=0x020a000000000000", "-Wall", "-Werror",
               "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-Wno-clobbered",
               "-Wno-class-memaccess"]  # fmt: skip
    processor = pathlib.Path("/proc/cpuinfo")
    if processor.exists() and "fma" in processor.read_text().split():
        options.append("-mfma")  # else std::fma is a slow function with the same result
    sources = b"".join(path.read_bytes() for path in [*UNITS, *HEADERS, SHIM])
    key = repr((options, torch.__version__)).encode() + sources
    folder = ROOT / "build" / f"cuda-on-host-{hashlib.sha256(key).hexdigest()[:16]}"
    library = folder / "kernels.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)

        def compiled(unit: pathlib.Path) -> str:
            target = str(folder / f"{unit.stem}.o")
            files = ["-include", str(SHIM), "-x", "c++", "-c", str(unit), "-o", target]
            done = subprocess.run([COMPILER, *options, *files], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{unit.name}: {done.stderr[:4000]}")
            return target

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compiled, UNITS))
        unfinished = folder / "unfinished.so"
        subprocess.run(
            [COMPILER, "-shared", "-o", str(unfinished), *objects,
             f"-L{torch_folder / 'lib'}", "-ltorch_cpu"], check=True,
        )  # fmt: skip
        unfinished.replace(library)
    handle = ctypes.CDLL(str(library))
    handle.count_vector_accesses.restype = ctypes.c_int64
    return handle
