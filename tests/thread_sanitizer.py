# SPDX-License-Identifier: BSD-3-Clause
"""Compiles and runs programs under ThreadSanitizer, for tests."""

from __future__ import annotations

import functools
import os
import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence

ROOT = pathlib.Path(__file__).parent.parent
COMPILER = shutil.which("g++")
FLAGS = ["-std=c++17", "-O1", "-g1", "-fsanitize=thread", "-ffp-contract=off", "-fopenmp-simd",
         "-Wall", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-function",
         "-Wno-maybe-uninitialized", "-Wno-class-memaccess"]  # fmt: skip
RACE = "WARNING: ThreadSanitizer: data race"


@functools.cache
def prefix() -> tuple[str, ...] | None:
    """Returns what to write before a program so that ThreadSanitizer can run it, None if nothing.

    Its memory has fixed places, which a kernel that spreads addresses widely gives to others.
    """
    if COMPILER is None:
        return None
    with tempfile.TemporaryDirectory() as place:
        source, program = pathlib.Path(place) / "empty.cpp", f"{place}/empty"
        source.write_text("int main() {}\n")
        made = subprocess.run(
            [COMPILER, "-fsanitize=thread", str(source), "-o", program], capture_output=True
        )
        for candidate in ((), ("setarch", "-R")):
            if made.returncode or (candidate and shutil.which(candidate[0]) is None):
                continue
            if subprocess.run([*candidate, program], capture_output=True).returncode == 0:
                return candidate
    return None


def missing() -> str | None:
    """Returns why ThreadSanitizer cannot be used here, or None."""
    if COMPILER is None:
        return "g++, which brings ThreadSanitizer, is not installed"
    return None if prefix() is not None else "g++'s ThreadSanitizer cannot run a program here"


def build(program: pathlib.Path, units: Mapping[pathlib.Path, Sequence[str]], *libraries: str):
    """Compiles a program.

    Args:
        program: Where it goes; object files go beside it.
        units: Sources, and the options of each.
        libraries: Options for linking.
    """
    objects = []
    for source, options in units.items():
        objects.append(str(program.parent / f"{program.name}-{source.stem}.o"))
        _compile([*FLAGS, *options, "-c", str(source), "-o", objects[-1]])
    _compile(["-fsanitize=thread", *objects, *libraries, "-lpthread", "-o", str(program)])


def _compile(arguments: list[str]) -> None:
    done = subprocess.run([COMPILER, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}:\n{done.stderr[:4000]}")


def run(program: pathlib.Path, *arguments: str, **options) -> subprocess.CompletedProcess:
    """Runs a program; ``options`` are ThreadSanitizer's."""
    told = {"exitcode": 66, **options}
    return subprocess.run(
        [*prefix(), str(program), *arguments], capture_output=True, text=True, timeout=1000,
        env={**os.environ, "TSAN_OPTIONS": ":".join(f"{k}={v}" for k, v in told.items())},
    )  # fmt: skip
