# SPDX-License-Identifier: BSD-3-Clause
"""Compiles the CPU library with sanitizers and sends random calls through it (docs/sanitizers.md).

``make sanitize CALLS=1000000`` runs this at every instruction set; tests/test_sanitized.py a short
form. The package that uses the library is made of links to dgg/, so that nothing in dgg/ has to
know of it.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import os
import pathlib
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time

import torch

ROOT = pathlib.Path(__file__).parent.parent
CALLS = ROOT / "tests" / "sanitized_calls.py"
SOURCES = [
    ROOT / "csrc" / f"{name}.cpp" for name in ("ops", "cpu", "cpu_lists", "cpu_products", "watch")
]
HEADERS = sorted((ROOT / "csrc").glob("*.h"))
COMPILER = shutil.which("g++")
INSTRUCTION_SETS = ["baseline", "avx2", "avx512"]
# Division by zero is not among these: 1 / 0 is inf in IEEE 754, and a gradient scale of 0 or a
# bias correction of 0 has to give what it gives in torch. Conversions to integers are.
SANITIZERS = "address,undefined,float-cast-overflow"
FLAGS = [
    # -O1: the checks see each load and store as it stands in the source, and it compiles in a third
    # of the time. Everything that decides about arithmetic is as in setup.py.
    "-std=c++17", "-O1", "-g1", "-fPIC", "-fno-omit-frame-pointer", f"-fsanitize={SANITIZERS}",
    "-fno-sanitize-recover=all", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off",
    "-fopenmp-simd", "-fvisibility=hidden", "-Wno-unknown-pragmas",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]  # fmt: skip
# Undefined on purpose, to see that it is found in what was compiled with these flags.
CONTROL = """
extern "C" __attribute__((visibility("default"))) int dgg_overflow(int x) { return x + 1; }
"""
# Processes are ended after so many calls, so that the memory that ASan keeps back stays small.
CHUNK = 100_000


class Finding(Exception):
    """A sanitizer, or the generator of the calls, has found something."""


@functools.cache
def runtime(name: str) -> str | None:
    """Returns the path of a library of the compiler's, or None."""
    if COMPILER is None:
        return None
    done = subprocess.run(
        [COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    )
    place = pathlib.Path(done.stdout.strip())
    return str(place) if place.is_absolute() and place.exists() else None


def missing() -> str | None:
    """Returns why the sanitizers cannot be used here, or None."""
    if not sys.platform.startswith("linux"):
        return f"sanitizers are preloaded as on Linux, this is {sys.platform}"
    if COMPILER is None:
        return "g++, which brings the sanitizers, is not installed"
    absent = [x for x in ("libasan.so", "libubsan.so", "libstdc++.so.6") if runtime(x) is None]
    return f"g++ has no {' and no '.join(absent)} here" if absent else None


def build() -> pathlib.Path:
    """Returns a folder to put on PYTHONPATH: dgg with the library watched by sanitizers.

    The library is kept in build/ as long as its sources, the compiler and torch do not change.
    """
    torch_folder = pathlib.Path(torch.__file__).parent
    version = subprocess.run([COMPILER, "-v"], capture_output=True, text=True).stderr
    key = repr((FLAGS, CONTROL, version, torch.__version__)).encode()
    key += b"".join(path.read_bytes() for path in [*SOURCES, *HEADERS])
    folder = ROOT / "build" / f"sanitized-{hashlib.sha256(key).hexdigest()[:16]}"
    library = folder / "dgg" / "_C.abi3.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as place:
            control = pathlib.Path(place) / "control.cpp"
            control.write_text(CONTROL)
            objects = []
            for source in [*SOURCES, control]:
                objects.append(f"{place}/{source.stem}.o")
                _compile(
                    [*FLAGS, "-I", str(torch_folder / "include"), "-c", str(source), "-o",
                     objects[-1]]
                )  # fmt: skip
            unfinished = f"{place}/library.so"
            _compile(
                ["-shared", f"-fsanitize={SANITIZERS}", *objects, f"-L{torch_folder / 'lib'}",
                 "-ltorch_cpu", "-o", unfinished]
            )  # fmt: skip
            os.replace(unfinished, library)
    _link_package(folder / "dgg")
    return folder


def released() -> pathlib.Path:
    """Returns a folder to put on PYTHONPATH: dgg with the library that it is installed with."""
    import dgg

    folder = ROOT / "build" / "unsanitized"
    (folder / "dgg").mkdir(parents=True, exist_ok=True)
    library = next(pathlib.Path(dgg.__file__).parent.glob("_C.*so"))
    _link(library.resolve(), folder / "dgg" / library.name)
    _link_package(folder / "dgg")
    return folder


def _compile(arguments: list[str]) -> None:
    done = subprocess.run([COMPILER, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{COMPILER} {' '.join(arguments)}:\n{done.stderr[:4000]}")


def _link(target: pathlib.Path, place: pathlib.Path) -> None:
    if place.is_symlink() and place.readlink() == target:
        return
    unfinished = place.with_name(f"{place.name}.{os.getpid()}")
    unfinished.symlink_to(target)
    os.replace(unfinished, place)


def _link_package(folder: pathlib.Path) -> None:
    packages = [path.parent for path in (ROOT / "dgg").glob("*/__init__.py")]
    for source in [*(ROOT / "dgg").glob("*.py"), *packages]:
        _link(source, folder / source.name)
    _link(ROOT / "kernels", folder / "kernels")


def environment(folder: pathlib.Path, isa: str, *, preload: bool = True) -> dict[str, str]:
    """Returns the variables of a process that uses the package in ``folder``."""
    values = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "PYTHONDONTWRITEBYTECODE": "1",
        "DGG_ISA": "" if isa == "avx512" else isa,
        "OMP_WAIT_POLICY": "passive",  # threads that spin take the core from others
        # Python keeps what it has until it ends, which is no leak. Of freed memory 64 MB are held
        # back, a quarter of the default: tests run side by side. Nothing here needs 2 GB at once.
        "ASAN_OPTIONS": "detect_leaks=0:exitcode=99:allocator_may_return_null=1:"
        "quarantine_size_mb=64:max_allocation_size_mb=2048",
        "UBSAN_OPTIONS": "print_stacktrace=1:exitcode=99",
    }
    if preload:
        # Python itself has no C++ library, whose exceptions ASan looks for when it begins.
        values["LD_PRELOAD"] = f"{runtime('libasan.so')} {runtime('libstdc++.so.6')}"
    return values


def instruction_sets() -> list[str]:
    """Returns those that this processor has, as the library names them."""
    best = torch.ops.dgg.isa()
    return INSTRUCTION_SETS[: INSTRUCTION_SETS.index(best) + 1]


def run(
    folder: pathlib.Path, isa: str, calls: int, seed: int, *, pages: bool = False
) -> dict[str, int]:
    """Makes random calls in a process of their own.

    Args:
        folder: What `build` or `released` has returned.
        isa: Instruction set.
        calls: How many at least.
        seed: Of the calls.
        pages: Put tensors before pages that cannot be touched, and preload no sanitizer.

    Returns:
        Counts: scenarios, calls, refused, steps, findings.

    Raises:
        Finding: With the report, and how to repeat it.
        RuntimeError: The process was killed.
    """
    with tempfile.NamedTemporaryFile() as progress:
        command = [sys.executable, "-P", str(CALLS), "--calls", str(calls), "--seed", str(seed),
                   "--progress", progress.name, *(["--pages"] if pages else [])]  # fmt: skip
        done = subprocess.run(
            command, env=environment(folder, isa, preload=not pages), capture_output=True, text=True
        )
        if done.returncode == -signal.SIGKILL:  # nothing in the library can do that
            raise RuntimeError(f"{isa}: the process was killed from outside; out of memory?")
        if done.returncode:
            number = struct.unpack("q", (progress.read() + bytes(8))[:8])[0]
            again = f"--calls 1 --seed {seed} --first {number}{' --pages' if pages else ''}"
            raise Finding(
                f"{isa}: exit code {done.returncode} in scenario {number} of seed {seed} (again: "
                f"python -P tests/sanitized.py --isa {isa} {again})\n{done.stderr[-8000:]}"
            )
    counts = dict(re.findall(r"(\w+): (\w+)", done.stdout))
    if counts.pop("isa") != isa:
        raise RuntimeError(f"{isa} was asked for: {done.stdout}")
    return {name: int(count) for name, count in counts.items()}


def provoke(folder: pathlib.Path, kind: str, isa: str = "avx512") -> subprocess.CompletedProcess:
    """Runs what must be found: ``"memory"``, ``"undefined"`` or ``"pages"``."""
    return subprocess.run(
        [sys.executable, "-P", str(CALLS), "--provoke", kind],
        env=environment(folder, isa, preload=kind != "pages"), capture_output=True, text=True,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=1_000_000, help="of all instruction sets")
    parser.add_argument("--seed", type=int, default=0, help="the same calls again")
    parser.add_argument("--isa", choices=INSTRUCTION_SETS, help="one instruction set only")
    parser.add_argument("--first", type=int, help="repeat the scenario with this number")
    parser.add_argument("--pages", action="store_true",
                        help="the released library, tensors before forbidden pages")  # fmt: skip
    given = parser.parse_args()
    if not given.pages and missing() is not None:
        raise SystemExit(missing())
    importlib.import_module("dgg")  # which knows what the processor has
    folder = released() if given.pages else build()
    if given.first is not None:
        command = [sys.executable, "-P", str(CALLS), "--calls", str(given.calls), "--seed",
                   str(given.seed), "--first", str(given.first)]  # fmt: skip
        values = environment(folder, given.isa or "avx512", preload=not given.pages)
        command += ["--pages"] if given.pages else []
        raise SystemExit(subprocess.run(command, env=values).returncode)
    kind = "forbidden pages" if given.pages else SANITIZERS
    sets = [given.isa] if given.isa else instruction_sets()
    total: dict[str, int] = {}
    try:
        for place, isa in enumerate(sets):
            left, chunk = -(-given.calls // len(sets)), 0
            while left > 0:
                begin = time.monotonic()
                # A seed for every chunk, and none twice, as long as there are fewer than these.
                seed = given.seed + 1_000_000 * place + chunk
                counts = run(folder, isa, min(left, CHUNK), seed, pages=given.pages)
                for name, count in counts.items():
                    total[name] = total.get(name, 0) + count
                told = ", ".join(f"{name}: {count}" for name, count in counts.items())
                print(f"{isa}, seed {seed}, {kind}: {told}, {time.monotonic() - begin:.0f} s",
                      flush=True)  # fmt: skip
                left -= counts["calls"] + counts["refused"]
                chunk += 1
    except Finding as finding:
        print(f"findings: 1\n{finding}")
        raise SystemExit(1) from finding
    print("all: " + ", ".join(f"{name}: {count}" for name, count in total.items()))


if __name__ == "__main__":
    main()
