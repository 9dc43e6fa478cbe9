# SPDX-License-Identifier: BSD-3-Clause
"""What run.py builds and runs, and digests of it for machines without the repository."""

from __future__ import annotations

import hashlib
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCES = ("dgg", "kernels", "csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE",
           "MANIFEST.in")  # fmt: skip


def sources_digest() -> str:
    """Returns a digest of what is built and run."""
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
