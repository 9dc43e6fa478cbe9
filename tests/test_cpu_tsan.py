# SPDX-License-Identifier: BSD-3-Clause
"""The CPU passes and watches under ThreadSanitizer, on threads of their own (cpu_races.cpp)."""

from __future__ import annotations

import pathlib

import pytest
import torch

import thread_sanitizer
from thread_sanitizer import RACE, ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        thread_sanitizer.missing() is not None, reason=str(thread_sanitizer.missing())
    ),
]

TORCH = pathlib.Path(torch.__file__).parent
PROGRAMS = {"cpu": "passes: 40", "watch": "watches: 801, wrong: 0"}
# What must be found: program, and what is changed in its source.
FAULTS = {
    "a chunk is taken by two threads": (
        "cpu",
        "for (int64_t i; (i = share.next.fetch_add(1, std::memory_order_relaxed)) < count;) {",
        "for (int64_t i = 0; i < count; ++i) {",
    ),
    "two optimizers share their lists": (
        "cpu",
        "static thread_local std::vector<T> list;",
        "static std::vector<T> list;",
    ),
    "all threads sum into one place": ("cpu", "partials[k] =", "partials[0] ="),
    "watches are looked up without the lock": (
        "watch",
        "const std::lock_guard<std::mutex> lock(mutex);",
        "",
    ),
}


def build(folder: pathlib.Path, name: str, change: tuple[str, str] | None = None) -> pathlib.Path:
    changed = 0
    for source in [ROOT / "csrc" / f"{name}.cpp", *(ROOT / "csrc").glob("*.h")]:
        text = source.read_text()
        if change is not None and change[0] in text:
            text = text.replace(*change)
            changed += 1
        (folder / source.name).write_text(text)
    assert changed == (change is not None)
    options = ["-I", str(folder), "-isystem", str(TORCH / "include"),
               "-DTORCH_TARGET_VERSION=0x020a000000000000"]  # fmt: skip
    libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{TORCH / 'lib'}"]
    units = {ROOT / "tests" / f"{name}_races.cpp": options}
    thread_sanitizer.build(folder / "races", units, *libraries)
    return folder / "races"


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_races(tmp_path, name):
    done = thread_sanitizer.run(build(tmp_path, name))
    assert done.returncode == 0, done.stderr[:6000]
    assert done.stdout.strip() == PROGRAMS[name]


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(tmp_path, fault):
    name, *change = FAULTS[fault]
    done = thread_sanitizer.run(build(tmp_path, name, tuple(change)), halt_on_error=1)
    assert done.returncode != 0 and RACE in done.stderr, done.stdout + done.stderr[:4000]
